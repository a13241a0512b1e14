"""Snapshots of a database of records: one file that holds what was recorded at one moment.

A snapshot is taken while others read and write (SQLite's online backup).  All functions block.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from storage.disk.database import FILE
from storage.disk.locks import ProcessLock
from storage.disk.modes import create_file
from storage.disk.salvage import LOCKED, checked
from storage.errors import StorageFailed
from storage.records import LAST

_GET = "SELECT value FROM Cache WHERE key = ? AND raw = 1"
_ROWS = "SELECT key, value FROM Cache WHERE key > ? AND key < ? AND raw = 1 ORDER BY key"


def take(directory: Path, target: Path) -> None:
    """Write a snapshot of the database in `directory` to the new file `target`.

    Raises StorageFailed if the database is damaged or is being rebuilt, OSError if the disk fails.
    """
    lock = directory.with_name(f"{directory.name}.lock")
    os.close(create_file(target, os.O_EXCL))
    try:
        with closing(ProcessLock(lock)) as held:
            if not held.take(fcntl.LOCK_SH):
                raise StorageFailed(f"records in {directory} are being rebuilt: try again later")
            with closing(_connect(directory / FILE)) as source, closing(_connect(target)) as copy:
                source.backup(copy)
                copy.execute("PRAGMA journal_mode = DELETE")  # so that it is one file
                (found,) = copy.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.Error as error:
        raise StorageFailed(f"records in {directory}: {error}") from error
    if found != "ok":
        raise StorageFailed(f"records in {directory} are damaged: {found}")
    with target.open("rb") as file:
        os.fsync(file.fileno())


def records(snapshot: Path, prefix: str) -> Iterator[tuple[str, bytes]]:
    """The intact records of a snapshot whose keys begin with `prefix`, in order.  Raises StorageFailed."""
    try:
        with closing(_connect(snapshot)) as database:
            for key, stored in database.execute(_ROWS, (prefix, prefix + LAST)):
                if (value := checked(key, stored)) is not None:
                    yield key, value
    except sqlite3.Error as error:
        raise StorageFailed(f"{snapshot}: {error}") from error


def get(snapshot: Path, key: str) -> bytes | None:
    """An intact record of a snapshot.  Raises StorageFailed."""
    try:
        with closing(_connect(snapshot)) as database:
            row = database.execute(_GET, (key,)).fetchone()
    except sqlite3.Error as error:
        raise StorageFailed(f"{snapshot}: {error}") from error
    return checked(key, row[0]) if row else None


def _connect(file: Path) -> sqlite3.Connection:
    if not file.is_file():
        raise StorageFailed(f"{file} does not exist")
    return sqlite3.connect(file, timeout=LOCKED, isolation_level=None)
