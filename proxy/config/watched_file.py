"""A file that somebody may replace at any time: what it means is made anew when it has changed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")


class WatchedFile(Generic[T]):
    """What `parse` makes of the file at `path`.  `parse` may raise ValueError."""

    def __init__(self, path: Path, parse: Callable[[bytes], T]) -> None:
        self.path = path
        self._parse = parse
        self._known: tuple[tuple[int, ...], T] | None = None

    def current(self) -> T:
        """Looks at the file each time.  Raises OSError, and what `parse` does."""
        if self._known is None or self._known[0] != _signature(self.path.stat()):
            with self.path.open("rb") as file:
                # Before reading: a write from here on changes it, and so is noticed the next time.
                signature = _signature(os.fstat(file.fileno()))
                self._known = signature, self._parse(file.read())
        return self._known[1]


def _signature(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_mtime_ns, stat.st_size, stat.st_dev, stat.st_ino
