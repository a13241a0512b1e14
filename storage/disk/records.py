"""Records in an SQLite database on disk: see storage/records.py.

A read takes about 10 µs and may run on the event loop; a write is a transaction: call it in a thread.

Each record has a check sum; a damaged record counts as absent.  The first process that finds the database
damaged moves it to `<directory>.damaged-<time>` and replaces it by one with all records that can still be
read.  The records on damaged pages are lost; all are if the first page of the database is damaged.  While the
database is rebuilt, intact records can be read, and nothing can be written.
"""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import structlog

from storage.disk import indexes
from storage.disk.database import FAILURES, FILE, Database, Identity, identity, origin
from storage.disk.health import DiskHealth, is_of_the_disk
from storage.disk.locks import ProcessLock
from storage.disk.modes import make_directory
from storage.disk.read_only import ReadOnlyDatabase, Retired
from storage.disk.salvage import CHECKSUM_BYTES, checked, checksum, readable_records
from storage.errors import StorageFailed
from storage.keys import TAG, is_total
from storage.records import BATCH, LAST, Batch, Records, batches

log = structlog.get_logger()
T = TypeVar("T")

KIND = "records"  # the kind of these files in DiskHealth
KEPT = 2  # damaged databases that are not removed
AGAIN = 10.0  # seconds between two rebuilds, so that a failing disk does not keep the process busy with them
AT_START = 0.5  # seconds that opening waits for a rebuild
POLL = 0.02  # seconds between two attempts to get a lock
_GET = "SELECT value FROM Cache WHERE key = ? AND raw = 1"
_COUNT = "SELECT COUNT(*) FROM Cache WHERE key > ? AND key < ? AND raw = 1"
_HOLDS = "SELECT 1 FROM Cache WHERE key = ? AND raw = 1"


class _WorkFailed(Exception):
    """The work of a transaction raised an error of its own."""


class SQLiteBatch(Batch):
    """The records as a transaction sees and changes them."""

    def __init__(self, cache: Database) -> None:
        self._cache = cache

    def get(self, key: str) -> bytes | None:
        # Half of the time of diskcache's get(), which also checks for expiry, tags and files.
        row = self._cache._con.execute(_GET, (key,)).fetchone()
        return checked(key, row[0]) if row else None

    def put(self, key: str, value: bytes) -> None:
        self._cache.set(key, checksum(key, value) + value)

    def delete(self, key: str) -> bool:
        return bool(self._cache.delete(key))

    def count(self, prefix: str) -> int:
        row = self._cache._con.execute(_COUNT, (prefix, prefix + LAST)).fetchone()
        return int(row[0])

    def tags_at(self, repository: str, target: str) -> list[str]:
        # Making the index takes a second for a million records, once.
        self._cache._con.execute(indexes.TAGS)
        prefix = TAG.prefix(repository)
        rows = self._cache._con.execute(indexes.POINTING, (prefix, prefix + LAST, target.encode()))
        return [key for key, stored in rows if checked(key, stored) is not None]


class SQLiteRecords(Records):
    """Records in a database that all processes of a machine may share.

    `directory` is created if necessary.  If the database is `durable`, a record is on the disk when put()
    returns.

    Opening raises only if the directory cannot be created: if the disk fails, or the database is damaged, the
    other methods fail until that is over.
    """

    remote = False

    def __init__(
        self,
        directory: Path,
        clock: Callable[[], float] = time.time,
        disk: DiskHealth | None = None,
        durable: bool = False,
    ) -> None:
        self._directory = directory
        self._durable = durable
        self._file = directory / FILE
        self._path = str(self._file)  # os.stat() of a Path takes twice as long
        self._lock = directory.with_name(f"{directory.name}.lock")
        self._clock = clock
        self._disk = disk or DiskHealth(directory.parent, clock)
        self._opening = threading.Lock()
        self._turn = threading.Lock()
        self._local = threading.local()
        self._opened: tuple[Database, Identity] | None = None
        self._indexes: set[tuple[Identity, str]] = set()  # of which database, and which
        self._rebuilding: threading.Thread | None = None
        self._rebuilt_at = -math.inf
        self._closing = threading.Event()
        try:
            make_directory(directory)
        except OSError as error:
            cause = error.strerror or ""
            raise StorageFailed(f"records in {directory}: {cause or error}", cause=cause) from error
        with suppress(StorageFailed):
            self._do(lambda cache: None)
        if self._rebuilding is not None:
            self._rebuilding.join(AT_START)

    def get(self, key: str) -> bytes | None:
        return self._do(lambda cache: SQLiteBatch(cache).get(key))

    def put(self, key: str, value: bytes) -> None:
        with self._writing(len(value)):
            self._do(lambda cache: SQLiteBatch(cache).put(key, value), len(value), write=True)

    def delete(self, key: str) -> bool:
        with self._writing(0):
            return self._do(lambda cache: SQLiteBatch(cache).delete(key), write=True)

    def transaction(self, work: Callable[[Batch], T], shared: bool = False) -> T:
        # SQLite has one writer at a time, shared or not.
        def run(cache: Database) -> T:
            with cache.transact():
                try:
                    return work(SQLiteBatch(cache))
                except (ValueError, TypeError, LookupError, AttributeError) as error:
                    raise _WorkFailed from error  # it does not mean that the database failed

        with self._writing(0):
            try:
                return self._do(run, write=True)
            except _WorkFailed as error:
                assert error.__cause__ is not None
                raise error.__cause__ from None

    def scan(self, prefix: str, after: str = "") -> Iterator[tuple[str, bytes]]:
        last = prefix + after
        while rows := self._rows("SELECT key, value", last, prefix + LAST, BATCH):
            for key, stored in rows:
                if (value := checked(key, stored)) is not None:
                    yield key, value
            last = rows[-1][0]

    def keys(self, prefix: str) -> Iterator[str]:
        last = prefix
        while rows := self._rows("SELECT key, NULL", last, prefix + LAST, BATCH):
            yield from (key for key, _ in rows)
            last = rows[-1][0]

    def holds(self, key: str) -> bool:
        return bool(self._do(lambda cache: list(cache._sql(_HOLDS, (key,)))))

    def first(self, prefix: str, after: str = "") -> str | None:
        rows = self._rows("SELECT key, NULL", prefix + after, prefix + LAST, 1)
        return rows[0][0] if rows else None

    def groups(self, prefix: str, after: str = "") -> Iterator[str]:
        # '!' follows the space that ends a field: the next key has another value there.
        while (key := self.first(prefix, f"{after}!" if after else "")) is not None:
            after = key[len(prefix) :].partition(" ")[0]
            yield after

    def linking(self, digest: str) -> list[str]:
        self._index(indexes.LINKS)
        return self._do(lambda cache: [key for (key,) in cache._sql(indexes.LINKING, (digest,))])

    def oldest(self, after: tuple[str, bytes], limit: int) -> list[tuple[str, bytes]]:
        self._index(indexes.BLOBS)
        key, value = after
        rows = self._do(lambda cache: list(cache._sql(indexes.OLDEST, (value, value, key, limit))))
        return [(key, bytes(stored)[CHECKSUM_BYTES:]) for key, stored in rows]

    def _index(self, statement: str) -> None:
        """Make an index, if this database does not have it: without one, a search reads everything."""
        opened = self._opened
        if (made := (opened and opened[1], statement)) in self._indexes:
            return

        def create(cache: Database) -> None:
            with cache.transact():  # which a database that can only be read refuses
                cache._sql(statement)

        with suppress(StorageFailed):
            if self._do(lambda cache: getattr(cache._con, "in_transaction", False)):
                self._do(lambda cache: list(cache._sql(statement)))
                return  # it may be undone
            with self._writing(0):
                self._do(create, write=True)
                self._indexes.add(made)

    def _rows(self, select: str, above: str, below: str, limit: int) -> list[tuple[str, Any]]:
        # diskcache lists only all keys; but its index on (key, raw) can be used for ranges.
        statement = f"{select} FROM Cache WHERE key > ? AND key < ? AND raw = 1 ORDER BY key LIMIT ?"
        return self._do(lambda cache: list(cache._sql(statement, (above, below, limit))))

    def version(self) -> object:
        opened = self._opened
        try:
            status = os.stat(self._path)  # noqa: PTH116
            if opened is None or (status.st_dev, status.st_ino) != opened[1]:
                return None
            return opened[0].version()
        except FAILURES:
            return None

    def turn(self, name: str) -> AbstractContextManager[bool]:
        return nullcontext(True)  # of several servers on one directory, one alone does such work

    def troubles(self) -> list[str]:
        return []  # they are the disk's

    def close(self) -> None:
        """Close the database; a rebuild is abandoned, and the next process to open the database does it."""
        self._closing.set()
        if self._rebuilding is not None:
            self._rebuilding.join()
        with self._turn:
            if self._opened is not None:
                self._opened[0].close()

    # Opening

    def _do(self, work: Callable[[Database], T], size: int = 0, again: bool = True, write: bool = False) -> T:
        found = identity(self._file)
        cache: Database | None = None
        try:
            cache, found = self._current(found, write)
            former: Any = getattr(self._local, "cache", cache)
            self._local.cache = cache
            if former is not cache:
                former.close()  # this thread's connection to the database that was replaced
            return work(cache)
        except Retired:
            return self._do(work, size, again, write)
        except FAILURES as error:
            if cache is not None:
                with suppress(sqlite3.Error):
                    cache.close()  # of this thread: it may be in a transaction, or the disk was read-only
            if again and cache is not None and identity(self._file) != found:
                return self._do(work, size, again=False, write=write)  # it was replaced in the meantime
            raise self._failed(origin(error), found, size) from origin(error)

    def _current(self, found: Identity, write: bool) -> tuple[Database, Identity]:
        """The database that has the name.

        It is opened anew if it was rebuilt or removed; or to `write`, if it can only be read so far.
        """
        if (opened := self._valid(found, write)) is None:
            with self._opening, self._shared():
                found = identity(self._file)
                if (opened := self._valid(found, write)) is None:
                    make_directory(self._directory)
                    opened = self._opened = self._connected(), identity(self._file)
        return opened

    def _valid(self, found: Identity, write: bool) -> tuple[Database, Identity] | None:
        """The open database, if it is the one that has the name, and not read-only if it is to `write`."""
        opened = self._opened
        if opened is None or found is None or found != opened[1]:
            return None
        if isinstance(opened[0], ReadOnlyDatabase) and (write or opened[0].retired):
            opened[0].retire()  # before another connection is opened, which is to write
            return None
        return opened

    def _connected(self) -> Database:
        try:
            return Database(self._directory, self._durable)
        except FAILURES as error:
            cause = origin(error)
            if not is_of_the_disk(cause) or identity(self._file) is None:
                raise
            self._disk.failed(KIND, self._directory, cause)
            try:
                return cast(Database, ReadOnlyDatabase(self._file, cause))
            except sqlite3.Error:
                raise error from None

    def _failed(self, error: Exception, found: Identity, size: int) -> StorageFailed:
        if is_of_the_disk(error):
            return self._disk.failed(KIND, self._directory, error, size)
        self._rebuild(found)
        return StorageFailed(f"records in {self._directory} are damaged: {error}", cause="damaged records")

    @contextmanager
    def _writing(self, size: int) -> Iterator[None]:
        # One write at a time, as SQLite requires anyway; so close() can wait for a write in a thread.
        with self._turn, self._disk.guard(KIND, self._lock), self._shared():
            if self._closing.is_set():
                raise StorageFailed(f"records in {self._directory} are closed", cause="it is closed")
            yield
        self._disk.worked(KIND, size)

    @contextmanager
    def _shared(self) -> Iterator[None]:
        """Keep others from replacing the database.  Raises StorageFailed if a process does so already."""
        with closing(ProcessLock(self._lock)) as lock:
            if not lock.take(fcntl.LOCK_SH):
                raise StorageFailed(
                    f"records in {self._directory} are being rebuilt", cause="records are being rebuilt"
                )
            yield

    # Rebuilding

    def _rebuild(self, damaged: Identity) -> None:
        with self._opening:
            running = self._rebuilding is not None and self._rebuilding.is_alive()
            early = 0 <= self._clock() - self._rebuilt_at < AGAIN
            if running or early or self._closing.is_set():
                return
            self._rebuilt_at = self._clock()
            # In a thread, since the caller may be the event loop: a million records take seconds.
            self._rebuilding = threading.Thread(target=self._replace, args=(damaged,), name="records")
            self._rebuilding.start()

    def _replace(self, damaged: Identity) -> None:
        fresh = self._directory.with_name(f"{self._directory.name}.new")
        aside = self._directory.with_name(f"{self._directory.name}.damaged-{int(self._clock() * 1000)}")
        try:
            with closing(ProcessLock(self._lock)) as lock:
                while not lock.take(fcntl.LOCK_EX):
                    if self._closing.wait(POLL):
                        return
                if identity(self._file) != damaged:
                    return  # another process was first
                shutil.rmtree(fresh, ignore_errors=True)
                salvaged = self._salvage(fresh)
                if not self._closing.is_set():
                    self._directory.rename(aside)
                    fresh.rename(self._directory)
                    log.error("records.damaged", path=str(aside), salvaged=salvaged, action="rebuilt")
                shutil.rmtree(fresh, ignore_errors=True)
                kept = sorted(aside.parent.glob(f"{self._directory.name}.damaged-*"))
                for each in kept[:-KEPT]:
                    shutil.rmtree(each, ignore_errors=True)
        except FAILURES as error:
            shutil.rmtree(fresh, ignore_errors=True)
            self._disk.failed(KIND, fresh, origin(error))

    def _salvage(self, fresh: Path) -> int:
        """Create a database of all intact records; returns how many there are.

        Without totals: what is left is counted anew.
        """
        records = (
            record
            for record in readable_records(self._file)
            if not self._closing.is_set() and not is_total(record[0])
        )
        with closing(Database(fresh, self._durable)) as cache:
            for batch in batches(records):
                with cache.transact():
                    for key, stored in batch:
                        cache.set(key, stored)
            return len(cache)
