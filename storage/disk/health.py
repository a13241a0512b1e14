"""The state of the disk below a store: its failures, each logged once, and its free space.

Code that meets a failure reports it here, and gets the StorageFailed to raise.  The first failure with a
cause, in any process of a server, logs the event `disk.failed`; later ones log nothing.  The cause is over
when, in any process,

- the disk was full: there is room for the largest write that failed;
- the disk was read-only: it no longer is, and a write succeeds;
- anything else: a write of the same kind succeeds that is as large as the largest that failed;
- in any case: a write succeeds and nothing has failed with this cause for a while;

and then `disk.recovered` is logged.
So there is one event for a hundred pulls on a full disk, and for small blobs that fit among large ones that
do not.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import structlog

from storage.disk.troubles import DISK, Trouble, Troubles
from storage.errors import StorageFailed
from storage.oci import Digest

log = structlog.get_logger()

SPARE = 1 << 20  # bytes that blobs leave free for records
_INDEX_BYTES = 1 << 15  # of SQLite's index, at least
FORGOTTEN = 600.0  # seconds without a failure after which any successful write ends a cause
_FULL = os.strerror(errno.ENOSPC)
_READ_ONLY = os.strerror(errno.EROFS)
_PASSING = {_FULL, _READ_ONLY, os.strerror(errno.EIO), os.strerror(errno.EDQUOT)}

_OF_THE_DISK = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_INTERRUPT,
}


def is_of_the_disk(error: Exception) -> bool:
    """Whether the disk or a lock has caused an error of SQLite; otherwise the database is damaged."""
    short = getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_IOERR_SHORT_READ  # a truncated log
    return isinstance(error, OSError) or (_primary(error) in _OF_THE_DISK and not short)


def _primary(error: Exception) -> int:
    """The primary SQLite result code of an error; 0 if it has none."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def _cause(error: BaseException | None) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def may_pass(error: StorageFailed) -> bool:
    """Whether the failure may end without a change of the configuration."""
    return isinstance(error.__cause__, sqlite3.Error) or _cause(error.__cause__) in _PASSING


@contextmanager
def translated(what: Path | Digest) -> Iterator[None]:
    """Turn an OSError into StorageFailed without reporting it: it says nothing about the disk."""
    try:
        yield
    except OSError as error:
        cause = _cause(error)
        raise StorageFailed(f"{what}: {cause}", cause=error.strerror or "") from error


def sync(directory: Path) -> None:
    """Make the names in a directory durable."""
    file = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def write_all(file: int, content: bytes | memoryview, position: int) -> None:
    """Write all of it at `position`."""
    rest = memoryview(content)
    while rest:
        written = os.pwrite(file, rest, position)
        rest, position = rest[written:], position + written


class DiskHealth:
    """The state of the disk that holds `root`.  Thread-safe.

    `clock` returns seconds.  Several disks, in several processes, may share `troubles`.
    """

    def __init__(
        self, root: Path, clock: Callable[[], float] = time.time, troubles: Troubles | None = None
    ) -> None:
        self._root = root
        self._clock = clock
        self._troubles = Troubles() if troubles is None else troubles

    @contextmanager
    def guard(self, kind: str, path: Path, size: int = 0) -> Iterator[None]:
        """Report an OSError, as failed() does, and raise StorageFailed instead."""
        try:
            yield
        except OSError as error:
            raise self.failed(kind, path, error, size) from error

    def failed(self, kind: str, path: Path, error: Exception, size: int = 0) -> StorageFailed:
        """Report a failure; returns the error to raise from `error`.

        `size` is the size in bytes of the write that failed.
        """
        cause = self._cause(error)
        # A full or read-only disk affects blobs and records alike; any other failure affects one kind.
        kind = DISK if cause in (_FULL, _READ_ONLY) else kind
        trouble = Trouble(kind, self._device(), str(self._root), str(path), cause, size, self._clock())
        if self._troubles.add(trouble):
            log.error("disk.failed", path=str(path), cause=cause, action="pulls go on uncached")
        # An error without a number may have a path in its text.
        public_cause = cause if not isinstance(error, OSError) or error.strerror else ""
        return StorageFailed(f"{path}: {cause}", cause=public_cause)

    def _cause(self, error: Exception) -> str:
        """The cause in words that are the same for files and for SQLite."""
        if _primary(error) == sqlite3.SQLITE_FULL:
            return _FULL
        # SQLite has no room for its index.
        if _primary(error) in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN) and self._is_full():
            return _FULL
        if _primary(error) in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN) and self.is_read_only():
            return _READ_ONLY
        return _cause(error)

    def is_read_only(self) -> bool:
        """Whether the file system is mounted read-only."""
        try:
            return bool(os.statvfs(self._root).f_flag & os.ST_RDONLY)
        except OSError:
            return False

    def _is_full(self) -> bool:
        return self.room() + SPARE < _INDEX_BYTES

    def worked(self, kind: str, size: int = 0) -> None:
        """Report a successful write of `size` bytes."""
        if not self._troubles:
            return
        for trouble in self._troubles.remove(lambda each: self._is_over(each, kind, size)):
            log.info("disk.recovered", path=trouble.path, cause=trouble.cause)

    def _is_over(self, trouble: Trouble, kind: str, size: int) -> bool:
        if not self._has(trouble):
            return False
        if trouble.kind == DISK:
            disk = DiskHealth(Path(trouble.root), self._clock, self._troubles)
            over = disk.room() >= trouble.size if trouble.cause == _FULL else not disk.is_read_only()
        elif trouble.kind == kind:
            over = size >= trouble.size
        else:
            return False
        return over or not 0 <= self._clock() - trouble.failed_at < FORGOTTEN

    def _has(self, trouble: Trouble) -> bool:
        """Whether a trouble is one of this disk."""
        if trouble.kind == DISK:
            return trouble.device == self._device()
        return trouble.root == str(self._root)

    def _device(self) -> int:
        try:
            return self._root.stat().st_dev
        except OSError:
            return 0

    def room(self) -> int:
        """Bytes that are free for blobs."""
        try:
            status = os.statvfs(self._root)
        except OSError:
            return sys.maxsize  # a write will show the failure
        if status.f_files and not status.f_favail:
            return -1
        return status.f_bavail * status.f_frsize - SPARE

    def troubles(self) -> list[str]:
        """A sentence for each cause that is not over."""
        return [f"{each.path}: {each.cause}" for each in self._troubles if self._has(each)]


MakeRoom = Callable[[int], Coroutine[Any, Any, None]]


async def make_no_room(coming: int) -> None:
    """Make no room: there is no housekeeping."""
