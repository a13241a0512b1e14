"""What pytest and its plugins do around each test, done for less: with 12,000 tests, 0.1 ms is a second.

tests/conftest.py has the hooks by name.
"""

from __future__ import annotations

import math
import os
import signal
import threading
from collections import Counter
from time import monotonic
from types import FrameType
from typing import Any

import pytest
from pytest_rerunfailures import StatusDB
from pytest_timeout import timeout_timer


class Watchdog:
    """A thread that ends whichever test takes too long; pytest-timeout would start one for each test."""

    def __init__(self) -> None:
        self._test: tuple[float, pytest.Item, Any] | None = None  # that runs, after when it is to end
        self._wakes = math.inf
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def watch(self, item: pytest.Item, settings: Any) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
            self._thread.start()
        end = monotonic() + settings.timeout
        with self._changed:
            self._test = end, item, settings
            if end < self._wakes:
                self._changed.notify()

    def leave(self) -> None:
        self._test = None

    def _run(self) -> None:
        with self._changed:
            while True:
                test = self._test
                self._wakes = test[0] if test else math.inf
                left = self._wakes - monotonic()
                if test and left <= 0:
                    timeout_timer(*test[1:])  # it ends the process, unless that is being debugged
                    self._test = None
                else:
                    self._changed.wait(left if test else None)


WATCHDOG = Watchdog()
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(256 << 20)}  # bytes


@pytest.hookimpl(optionalhook=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> bool | None:
    if settings.method != "thread":
        return None
    WATCHDOG.watch(item, settings)
    return True


@pytest.hookimpl(optionalhook=True)
def pytest_timeout_cancel_timer(item: pytest.Item) -> None:
    WATCHDOG.leave()


class Failures(StatusDB):
    """How often each test has failed in this process.

    pytest-rerunfailures would ask the controller before each test, for one that ended its process before.
    """

    def __init__(self) -> None:
        super().__init__()
        self._failures: Counter[tuple[str, str]] = Counter()

    def _set(self, i: str, k: str, v: int) -> None:
        self._failures[i, k] = v

    def _get(self, i: str, k: str) -> int:
        return self._failures[i, k]


def keep_failures(config: pytest.Config) -> None:
    """Let a process of pytest-xdist count failures itself, and its controller say how often each may fail."""
    asked = getattr(config, "failures_db", None)
    if asked is None:
        return
    if hasattr(config, "workerinput"):
        asked.sock.close()
        vars(config)["failures_db"] = Failures()
    else:
        asked.get_test_reruns = lambda test: config.getoption("reruns") or 0


def keep_memory(config: pytest.Config) -> None:
    """Let the processes of pytest-xdist keep memory that they have freed; the servers that they start do not.

    The bodies of most tests have some MiB.  glibc would ask the kernel for each of them anew, which clears
    every page of it: twice as many as without.
    """
    if hasattr(config, "workerinput"):
        for name in MALLOC:
            os.environ.pop(name, None)  # it was read when this process started
    elif config.getoption("tx", None):
        os.environ.update(MALLOC)


def interrupt(number: int, frame: FrameType | None) -> None:
    """What Python does at SIGINT.  If it is this function, asyncio sets no other while it runs a task.

    That takes 0.1 ms, for the test and for each of its fixtures.
    """
    raise KeyboardInterrupt


# A shell starts what runs in the background with SIGINT ignored, and processes inherit that.
signal.signal(signal.SIGINT, interrupt)
