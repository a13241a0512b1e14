"""Removing files that no process continues to write.

The time without a change is measured by a clock that does not jump, from when a file was first seen in its
present state: otherwise an upload that waits for the next request of its client would be lost when the wall
clock is set a day forward.  The wall clock only says how old a file was at the first look.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from storage.disk.locks import leads_to, try_lock


def uptime() -> float:
    """Seconds since the machine started, those included for which it was suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Sight(NamedTuple):
    """When a file was last written, in ns since the epoch, and since when, in ticks, it is not written."""

    written: int
    idle_since: float


class Reaper:
    """Removes files that were not written for some time, and that no process has locked.

    `clock` returns seconds since the epoch, `ticks` seconds of a clock that nobody sets.
    """

    def __init__(self, clock: Callable[[], float] = time.time, ticks: Callable[[], float] = uptime) -> None:
        self._clock = clock
        self._ticks = ticks
        self._seen: dict[Path, Sight] = {}
        self._looked: float | None = None  # when, in ticks

    def reap(self, paths: Iterable[Path], age: float) -> int:
        """Remove those of `paths`, which are all files, that nobody wrote for `age` seconds; how many.

        A lock counts as a write.  Blocks.  Raises OSError.
        """
        now, seen, reaped = self._ticks(), dict[Path, Sight](), 0
        for path in paths:
            with suppress(FileNotFoundError):
                sight = self._sight(path, now)
                if now - sight.idle_since > age:
                    if _unlink_unlocked(path):
                        reaped += 1
                        continue
                    sight = sight._replace(idle_since=now)
                seen[path] = sight
        self._seen, self._looked = seen, now
        return reaped

    def _sight(self, path: Path, now: float) -> Sight:
        written = path.stat().st_mtime_ns
        known = self._seen.get(path)
        if known is not None and known.written == written:
            return known
        idle = self._clock() - written / 1e9
        if self._looked is not None:
            idle = min(idle, now - self._looked)  # it was written since
        return Sight(written, now - max(0.0, idle))


def _unlink_unlocked(path: Path) -> bool:
    """Remove a file unless a process has locked it; whether it was removed.  Raises OSError."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError:  # a symbolic link, or a file of another user: none that we write
        path.unlink()
        return True
    try:
        # 1. we open  2. its writer takes it up again, and renames it  3. we get the lock, of a stored blob
        if not try_lock(file) or not leads_to(path, file):
            return False
        path.unlink()
        return True
    finally:
        os.close(file)
