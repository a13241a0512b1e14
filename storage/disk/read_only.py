"""A database of records on a disk that was read-only already when it was opened: it can only be read."""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote


class ReadOnlyDatabase:
    """The part of diskcache.Cache that reads.  Raises sqlite3.Error, and OSError for what would write.

    All threads share one connection.  After close() the next read opens it again: as long as any connection
    of the process is read-only, SQLite opens no other one that can write.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self.execute("SELECT 1 FROM Cache LIMIT 1")

    @property
    def _con(self) -> ReadOnlyDatabase:
        return self  # Batch calls its execute()

    def execute(self, statement: str, values: tuple[Any, ...] = ()) -> _Rows:
        with self._lock:
            if self._connection is None:
                self._connection = self._open()
            return _Rows(self._connection.execute(statement, values).fetchall())

    _sql = execute

    def _open(self) -> sqlite3.Connection:
        log = self._file.with_name(f"{self._file.name}-wal")
        logged = False
        with suppress(FileNotFoundError):
            logged = log.stat().st_size > 0
        # SQLite needs a shared memory file for a database with a log, unless it never changes.  After a
        # crash that file exists.  Without a log, nothing is missing in the database.
        options = "mode=ro" if logged else "mode=ro&immutable=1"
        uri = f"file:{quote(str(self._file.absolute()))}?{options}"
        return sqlite3.connect(uri, uri=True, check_same_thread=False, isolation_level=None)

    def _refused(self, *arguments: Any) -> NoReturn:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    set = delete = transact = _refused

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None


class _Rows(list[Any]):
    """The rows of a statement, as far as they are used like a cursor."""

    def fetchone(self) -> Any:
        return self[0] if self else None
