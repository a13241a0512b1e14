"""A file that may be replaced at any time, and is parsed again when it has changed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")


class WatchedFile(Generic[T]):
    """The parsed content of a file, kept until the file changes.  `parse` may raise ValueError."""

    def __init__(self, path: Path, parse: Callable[[bytes], T]) -> None:
        self.path = path
        self._parse = parse
        self._known: tuple[tuple[int, ...], T] | None = None

    def current(self) -> T:
        """The content now; every call checks the file.  Raises OSError, and the errors of `parse`."""
        if self._known is None or self._known[0] != _signature(self.path.stat()):
            with self.path.open("rb") as file:
                # Taken before reading: a write from here on changes it, so the next call notices.
                signature = _signature(os.fstat(file.fileno()))
                self._known = signature, self._parse(file.read())
        return self._known[1]


def _signature(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_mtime_ns, stat.st_size, stat.st_dev, stat.st_ino
