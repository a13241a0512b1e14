"""A database of records that could not be opened for writing: it can only be read."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

from storage.disk.modes import create_file


class Retired(sqlite3.Error):
    """Another database is to be used instead of this one."""


class ReadOnlyDatabase:
    """The part of diskcache.Cache that reads, without writing anything.  Raises sqlite3.Error.

    What would write raises `reason`, the error because of which the database could not be opened for writing.

    All threads share one connection.  As long as any connection of the process is read-only, SQLite opens no
    other one that can write.  So after close() the next read opens it again, but after retire() none does.
    """

    def __init__(self, file: Path, reason: Exception) -> None:
        self._file = file
        self._reason = reason
        self._log, self._index = (file.with_name(f"{file.name}-{end}") for end in ("wal", "shm"))
        self._lock = threading.Lock()
        self.retired = False
        self._connection: sqlite3.Connection | None = None
        self._valid: Callable[[], bool] = lambda: True  # whether what was read from the connection is right
        self.execute("SELECT 1 FROM Cache LIMIT 1")

    @property
    def _con(self) -> ReadOnlyDatabase:
        return self  # Batch calls its execute()

    def execute(self, statement: str, values: tuple[Any, ...] = ()) -> _Rows:
        with self._lock:
            while True:
                if self.retired:
                    raise Retired
                try:
                    rows = _Rows(self._open().execute(statement, values).fetchall())
                except sqlite3.Error:
                    if self._valid():
                        raise
                else:
                    if self._valid():
                        return rows
                self._close()

    _sql = execute

    def version(self) -> object:
        return None  # it cannot be told

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            found = self._state()
            # SQLite needs an index in shared memory for a database with a log.  If it may only read the
            # index, it makes one of its own in memory, unless another process has one.  Without a log,
            # nothing is missing in the database; it is read without locks, and again if another process has
            # changed it meanwhile.
            if found[0]:
                with suppress(OSError):  # the index exists, or the disk is read-only
                    os.close(create_file(self._index, os.O_EXCL))
                options, self._valid = "readonly_shm=1", lambda: True
            else:
                options, self._valid = "immutable=1", lambda: self._state() == found
            uri = f"file:{quote(str(self._file.absolute()))}?mode=ro&{options}"
            self._connection = sqlite3.connect(uri, uri=True, check_same_thread=False, isolation_level=None)
        return self._connection

    def _state(self) -> tuple[bool, int, int, int]:
        """Whether the database has a log, and what differs after each change of the database itself."""
        logged = False
        with suppress(OSError):
            logged = self._log.stat().st_size > 0
        try:
            status = self._file.stat()
        except OSError:
            return logged, 0, 0, 0
        return logged, status.st_ino, status.st_size, status.st_mtime_ns

    def _refused(self, *arguments: Any) -> NoReturn:
        raise self._reason.with_traceback(None)

    set = delete = transact = _refused

    def close(self) -> None:
        with self._lock:
            self._close()

    def retire(self) -> None:
        """Close it for good: from now on, reads raise Retired."""
        with self._lock:
            self.retired = True
            self._close()

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class _Rows(list[Any]):
    """The rows of a statement, as far as they are used like a cursor."""

    def fetchone(self) -> Any:
        return self[0] if self else None
