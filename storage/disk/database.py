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


class _End:
    """The end of a thread, or of a database: it closes a connection.

    A connection refers to itself, by its cache of statements.  So without this its files stay open until the
    garbage collector finds it.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __del__(self) -> None:
        self._connection.close()


class Database(diskcache.Cache):  # type: ignore[misc]
    """A diskcache that stores only bytes and evicts nothing.  Raises FAILURES."""

    _opening = True

    def __init__(self, directory: Path, durable: bool) -> None:
        make_directory(directory)
        with suppress(FileExistsError):  # SQLite gives its other files the mode of this one
            os.close(create_file(directory / FILE, os.O_EXCL))
        self._path = str(directory / FILE)
        pragmas = {
            # A page that is missing in a mapped file raises a signal that kills, not an error.
            "mmap_size": 0,
            "cache_size": -CACHE_KIB,  # negative for KiB; diskcache's default is 32 MiB
            # FULL waits for the disk at each commit; NORMAL may lose the last commits in a power failure.
            "synchronous": 2 if durable else 1,
        }
        self._pragmas = [f"PRAGMA {name} = {value}" for name, value in pragmas.items()]
        try:
            super().__init__(
                str(directory),
                timeout=LOCKED,
                disk=_BytesOnly,
                disk_min_file_size=_INLINE,
                # Culling may remove the value just stored, and an LRU read is a write: hence neither.
                eviction_policy="none",
                cull_limit=0,
                sqlite_soft_heap_limit=CACHES_KIB << 10,  # bytes, of all that SQLite allocates
                **{f"sqlite_{name}": value for name, value in pragmas.items()},
            )
        except BaseException:
            self._opening = False
            self.close()
            raise

    # diskcache writes its settings and its schema at each opening, in some fifty transactions.  It sets its
    # disk after the pragmas, which no transaction may change, and before all the others: so they become one,
    # which close() ends.

    @property
    def _disk(self) -> _BytesOnly:
        return self._bytes_only

    @_disk.setter
    def _disk(self, disk: _BytesOnly) -> None:
        self._bytes_only = disk
        self._sql_retry("BEGIN IMMEDIATE")

    def reset(self, key: str, value: Any = diskcache.core.ENOVAL, update: bool = True) -> Any:
        """As diskcache's, which while it opens a database writes each setting twice."""
        if self._opening and update and value is not diskcache.core.ENOVAL:
            setattr(self, key, value)
            return value
        return super().reset(key, value, update)

    @property
    def _con(self) -> sqlite3.Connection:
        """This thread's connection.  diskcache's own costs five times as much, and outlives its thread."""
        local, process = self._local, os.getpid()
        if getattr(local, "pid", None) != process:
            super().close()  # it was opened before the process was forked
            local.pid = process
        connection: sqlite3.Connection | None = getattr(local, "con", None)
        if connection is None:
            connection = local.con = sqlite3.connect(
                self._path, timeout=LOCKED, isolation_level=None, check_same_thread=False
            )
            local.end = _End(connection)
            for pragma in self._pragmas:
                connection.execute(pragma)
        return connection

    def close(self) -> None:
        """Close this thread's connection."""
        if self._opening:  # diskcache's last step, before it opens another connection, which waits for locks
            self._sql("COMMIT")
            self._sql(f"PRAGMA busy_timeout = {LOCKED * 1000:.0f}")
            self._opening = False
        else:
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
