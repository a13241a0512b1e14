"""Programs of others: found, run, started, waited for by what they print, and ended by their pid."""

from __future__ import annotations

import itertools
import os
import secrets
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import pytest

PATIENCE = 60.0  # seconds until a program that should answer is taken for hung
GRACE = 20.0  # seconds from the request to end to the kill
# For programs in Go: most end before their memory is worth collecting, which is a tenth of what they do.
GO = {"GOGC": "off", "GOMEMLIMIT": "256MiB"}

_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_PORTS = itertools.count(secrets.randbelow(1000))  # from somewhere, for the tests may run twice at once


def require(*programs: str, root: bool = True) -> None:
    """Skip the test where a program is not installed; fail it if ENTREPOT_REQUIRE_CLIENTS=1 asks for all."""
    lacking = [f"{name} is not installed" for name in programs if not shutil.which(name)]
    if root and os.geteuid() != 0:
        lacking.append("needs root")
    if lacking and os.environ.get("ENTREPOT_REQUIRE_CLIENTS") == "1":
        pytest.fail("; ".join(lacking))
    if lacking:
        pytest.skip("; ".join(lacking))


def environment(home: Path, **more: str) -> dict[str, str]:
    """For clients: nobody's logins, and no way past the cache.

    Every client falls back from a mirror to the real registry; through a proxy that is not there it
    cannot, so that a failure of ours shows and no test leaves this machine.
    """
    nowhere = "http://127.0.0.1:9"
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "HTTP_PROXY": nowhere,
        "HTTPS_PROXY": nowhere,
        "NO_PROXY": f"127.0.0.1,{own_address()}",
        **GO,
        **more,
    }


def run(command: Sequence[str | Path], environment: Mapping[str, str]) -> str:
    """Run to the end and return standard output.  A failure fails the test with what was printed."""
    words = [str(word) for word in command]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    if done.returncode:
        pytest.fail(f"{' '.join(words)}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on, for programs that cannot choose one themselves.

    Until they listen nobody else may get it: so it is one that the system gives to nobody, and each process
    of the tests has a range of its own.
    """
    while True:
        port = 10_000 + _WORKER % 20 * 1000 + next(_PORTS) % 1000  # below ip_local_port_range
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def own_address() -> str:
    """One of this machine's that is not 127.0.0.1."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            asking.connect(("192.0.2.1", 9))  # of RFC 5737; nothing is sent
        except OSError:
            return "127.0.0.1"
        address: str = asking.getsockname()[0]
        return address


class Process:
    """A running program, all of whose output (both streams) is kept as `lines`."""

    def __init__(
        self, command: Sequence[str | Path], environment: Mapping[str, str] | None = None, ready: str = ""
    ):
        """Start `command` and return once it has printed a line that holds `ready`."""
        words = [str(word) for word in command]
        self.lines: list[str] = []
        self._ended = False
        self._news = threading.Condition()
        self._process = subprocess.Popen(
            words,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert self._process.stdout
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._reader.start()
        try:
            self.wait_for(ready)
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_for(self, text: str) -> str:
        """The first line that holds `text`, waiting until it is printed."""
        seen = 0
        deadline = time.monotonic() + PATIENCE
        with self._news:
            while True:
                for line in self.lines[seen:]:
                    if text in line:
                        return line
                seen = len(self.lines)
                left = deadline - time.monotonic()
                if self._ended or left <= 0:
                    state = "ended" if self._ended else "is silent"
                    said = "\n".join(self.lines)
                    pytest.fail(f"{self._process.args!r} {state} without {text!r}:\n{said}")
                self._news.wait(left)

    def stop(self) -> None:
        """Ask it to end, make it end, and wait until it has.  Again is harmless."""
        self._process.terminate()
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(GRACE)

    def kill(self) -> None:
        """End it at once, as a lack of memory does, and wait until it has ended."""
        self._process.kill()
        self._process.wait()
        self._reader.join(GRACE)

    def _read(self, pipe: IO[str]) -> None:
        with pipe:
            for line in pipe:
                with self._news:
                    self.lines.append(line.rstrip("\n"))
                    self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()
