"""The disk beneath a store: what is wrong with it, told once, and how much room it has.

Whoever meets a failure reports it here, and gets the StorageFailed to raise.  The first failure of a cause
is an event, `disk.failed`; those that follow are not.  The cause stands until

- of a full disk: there is room for what did not fit;
- of one that is read-only: it no longer is, and something was written;
- of all else: something of the same kind works that is as large as what failed;
- or nothing has failed for it for a while;

and then `disk.recovered` is told.  So neither a hundred pulls on a full disk nor small blobs among large
ones that do not fit make more than one event.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from storage.errors import StorageFailed
from storage.oci import Digest

log = structlog.get_logger()

SPARE = 1 << 20  # bytes that blobs leave free, for records
FORGOTTEN = 600.0  # seconds without a failure after which anything that works is good enough

_FULL = os.strerror(errno.ENOSPC)
_READ_ONLY = os.strerror(errno.EROFS)
_PASSING = {_FULL, _READ_ONLY, os.strerror(errno.EIO), os.strerror(errno.EDQUOT)}


def primary(error: Exception) -> int:
    """SQLite's primary result code; 0 where the error has none."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def _cause(error: BaseException | None) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def may_pass(error: StorageFailed) -> bool:
    """Whether it is of a kind that ends without anybody's changing the configuration."""
    return isinstance(error.__cause__, sqlite3.Error) or _cause(error.__cause__) in _PASSING


@contextmanager
def translated(what: Path | Digest) -> Iterator[None]:
    """Around what tells nothing of the disk: an OSError is the caller's alone.  Raises StorageFailed."""
    try:
        yield
    except OSError as error:
        raise StorageFailed(f"{what}: {error.strerror or error}") from error


def sync(directory: Path) -> None:
    """Have the disk keep the names in it."""
    file = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@dataclass(slots=True)
class _Trouble:
    path: str
    size: int
    failed_at: float


class DiskHealth:
    """One for all that lies below `root`.  `clock` tells seconds.  Any thread may use it."""

    def __init__(self, root: Path, clock: Callable[[], float] = time.time) -> None:
        self._root = root
        self._clock = clock
        self._troubles: dict[tuple[str, str], _Trouble] = {}
        self._lock = threading.Lock()

    @contextmanager
    def guard(self, kind: str, path: Path, size: int = 0) -> Iterator[None]:
        """Report an OSError: see failed().  Raises StorageFailed."""
        try:
            yield
        except OSError as error:
            raise self.failed(kind, path, error, size) from error

    def failed(self, kind: str, path: Path, error: Exception, size: int = 0) -> StorageFailed:
        """Take note of it; `size` bytes is how large what failed was to be.

        What it returns is to be raised from `error`.
        """
        cause = self._cause(error)
        # Blobs and records share the disk, but not the fate of a file.
        key = ("disk" if cause in (_FULL, _READ_ONLY) else kind), cause
        with self._lock:
            known = self._troubles.get(key)
            size = max(size, known.size if known else 0)
            self._troubles[key] = _Trouble(known.path if known else str(path), size, self._clock())
        if known is None:
            log.error("disk.failed", path=str(path), cause=cause, action="pulls go on uncached")
        return StorageFailed(f"{path}: {cause}")

    def _cause(self, error: Exception) -> str:
        """The same, whoever meets it."""
        if primary(error) == sqlite3.SQLITE_FULL:
            return _FULL
        if primary(error) in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN) and self._read_only():
            return _READ_ONLY
        return _cause(error)

    def _read_only(self) -> bool:
        try:
            return bool(os.statvfs(self._root).f_flag & os.ST_RDONLY)
        except OSError:
            return False

    def worked(self, kind: str, size: int = 0) -> None:
        """Something of `size` bytes was written."""
        if not self._troubles:
            return
        with self._lock:
            over = [key for key in self._troubles if self._is_over(key, kind, size)]
            troubles = [(cause, self._troubles.pop((of, cause))) for of, cause in over]
        for cause, trouble in troubles:
            log.info("disk.recovered", path=trouble.path, cause=cause)

    def _is_over(self, key: tuple[str, str], kind: str, size: int) -> bool:
        trouble = self._troubles[key]
        if key == ("disk", _FULL):
            over = self.room() >= trouble.size
        elif key == ("disk", _READ_ONLY):
            over = not self._read_only()
        elif key[0] == kind:
            over = size >= trouble.size
        else:
            return False
        return over or not 0 <= self._clock() - trouble.failed_at < FORGOTTEN

    def room(self) -> int:
        """Bytes that blobs may take."""
        try:
            status = os.statvfs(self._root)
        except OSError:
            return sys.maxsize  # whoever writes will see
        if status.f_files and not status.f_favail:
            return -1
        return status.f_bavail * status.f_frsize - SPARE

    def troubles(self) -> list[str]:
        """A sentence for each cause that stands."""
        with self._lock:
            return [f"{trouble.path}: {cause}" for (_, cause), trouble in self._troubles.items()]


MakeRoom = Callable[[int], Coroutine[Any, Any, None]]


async def nobody(coming: int) -> None:
    """Where nobody keeps house."""
