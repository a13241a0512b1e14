"""The SQLite database of records: what is stored in it and how, and the memory that it may take."""

from __future__ import annotations

import os
import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import Any

import diskcache

from storage.disk.modes import create_file, make_directory
from storage.disk.salvage import LOCKED
from storage.errors import StorageFailed

FILE = diskcache.core.DBNAME  # its name in the directory of the database
# diskcache reads its settings from the database without checking them, which causes the last ones.
FAILURES = (OSError, sqlite3.Error, diskcache.Timeout, ValueError, TypeError, LookupError, AttributeError)
# SQLite's page caches: of each connection, and of all in the process together.  Each thread has a connection
# to each database, which may be a hundred: with 2 MiB each they would hold 200 MiB.  Beyond the sum, SQLite
# reuses the pages that it has.  The kernel caches the files besides, once for all processes: a page that
# SQLite does not hold costs microseconds.
CACHE_KIB, CACHES_KIB = 2048, 16 << 10
Identity = tuple[int, int] | None  # device and inode of a file; None if it does not exist
_INLINE = 1 << 30  # bytes; diskcache puts larger values into files, whose loss SQLite does not notice


class _BytesOnly(diskcache.Disk):  # type: ignore[misc]
    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Any:
        # Never unpickle: anyone who can write the file could run code (CVE-2025-69872).
        if mode == diskcache.core.MODE_PICKLE:
            raise StorageFailed("a pickled record was refused: another program wrote to the records")
        return value  # never the content of a file: no record names one

    def remove(self, file_path: str) -> None:
        """Does nothing: there are no such files, and a damaged record may name any file."""


class Database(diskcache.Cache):  # type: ignore[misc]
    """A diskcache that stores only bytes and evicts nothing.  Raises FAILURES."""

    _opening = True

    def __init__(self, directory: Path, durable: bool) -> None:
        make_directory(directory)
        with suppress(FileExistsError):  # SQLite gives its other files the mode of this one
            os.close(create_file(directory / FILE, os.O_EXCL))
        try:
            super().__init__(
                str(directory),
                timeout=LOCKED,
                disk=self._disk_class(),
                disk_min_file_size=_INLINE,
                # Culling may remove the value just stored, and an LRU read is a write: hence neither.
                eviction_policy="none",
                cull_limit=0,
                # A page that is missing in a mapped file raises a signal that kills, not an error.
                sqlite_mmap_size=0,
                sqlite_cache_size=-CACHE_KIB,  # negative for KiB; diskcache's default is 32 MiB
                sqlite_soft_heap_limit=CACHES_KIB << 10,  # bytes, of all that SQLite allocates
                # FULL waits for the disk at each commit; NORMAL may lose the last commits in a power failure.
                sqlite_synchronous=2 if durable else 1,
            )
        except BaseException:
            self.close()
            raise
        self._opening = False

    def _disk_class(self) -> type[_BytesOnly]:
        # diskcache writes its settings and its schema at each opening, in some fifty transactions.  It makes
        # its disk after it has set the pragmas, which no transaction may change, and before all the others:
        # so they become one, which close() ends.  A new database takes a third of the time.
        begin = self._begin

        class Disk(_BytesOnly):
            def __init__(self, *arguments: Any, **options: Any) -> None:
                super().__init__(*arguments, **options)
                begin()

        return Disk

    def _begin(self) -> None:
        self._sql_retry("BEGIN IMMEDIATE")

    def close(self) -> None:
        """Close this thread's connection."""
        connection = getattr(self._local, "con", None)
        if self._opening and connection is not None and connection.in_transaction:
            connection.commit()
        super().close()

    def version(self) -> object:
        """What differs once any record has changed, compared with its value before in the same thread."""
        connection = self._con
        if getattr(self._local, "versioned", None) is not connection:
            self._local.versioned, self._local.version = connection, connection.cursor()
        # The number counts what other connections change, of this process too; not what this one does.
        (number,) = self._local.version.execute("PRAGMA data_version").fetchone()
        return connection, number, connection.total_changes


def origin(error: Exception) -> Exception:
    """The first error: diskcache raises Timeout for all of them, and fails when it rolls back once more."""
    while isinstance(error.__context__, sqlite3.Error):
        error = error.__context__
    return error


def identity(file: Path) -> Identity:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
