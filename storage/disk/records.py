"""Small named records on disk: tags, manifests, links, listings.  Bytes in, bytes out.

A key is its kind and fields, joined by spaces, which neither names nor tags nor digests hold; a space
sorts before every character that they do hold, so a scan over a prefix is in the order of the fields.
A read takes about 10 µs and may be done on the event loop; a write is a transaction: call it in a thread.

Each record carries a check sum; one that is not what was put counts as absent.  A database that is damaged
is moved aside, to `<directory>.damaged-<time>`, by whichever process first finds it so, and one with all
that could still be read takes its place.  What is lost are the records on damaged pages; where the
database's first page is damaged, all.  Meanwhile what is readable is read, and nothing can be put.
"""

from __future__ import annotations

import fcntl
import math
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import diskcache
import structlog

from storage.disk.health import DiskHealth, primary
from storage.disk.locks import ProcessLock
from storage.disk.salvage import LOCKED, checked, checksum, readable_records
from storage.errors import StorageFailed

log = structlog.get_logger()
T = TypeVar("T")

KIND = "records"  # what the disk calls what fails here
KEPT = 2  # damaged databases
AGAIN = 10.0  # seconds between rebuildings, lest a disk that damages all have us do nothing else
AT_START = 0.5  # seconds that opening waits for a rebuilding
POLL = 0.02  # seconds between looks at a lock

_INLINE = 1 << 30  # bytes; larger values would go to files of their own, whose loss SQLite does not notice
_GET = "SELECT value FROM Cache WHERE key = ? AND raw = 1"
_COUNT = "SELECT COUNT(*) FROM Cache WHERE key > ? AND key < ? AND raw = 1"
_HOLDS = "SELECT 1 FROM Cache WHERE key = ? AND raw = 1"
_BATCH = 500
# Result codes that tell of the disk or of a lock; every other one tells that the database is damaged.
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

# diskcache reads its settings from the database, and believes them: the last ones come of that.
_FAILURES = (OSError, sqlite3.Error, diskcache.Timeout, ValueError, TypeError, LookupError, AttributeError)

Identity = tuple[int, int] | None  # of a file; None: there is none


class _BytesOnly(diskcache.Disk):  # type: ignore[misc]
    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Any:
        # Never unpickle: whoever can write the file could run code (CVE-2025-69872).
        if mode == diskcache.core.MODE_PICKLE:
            raise StorageFailed("a pickled record was refused: somebody else wrote to the records")
        return value  # never what a file holds: we name none

    def remove(self, file_path: str) -> None:
        """We have no files; a damaged record may name any."""


class _Database(diskcache.Cache):  # type: ignore[misc]
    """Raises _FAILURES."""

    def __init__(self, directory: Path, durable: bool) -> None:
        try:
            super().__init__(
                str(directory),
                timeout=LOCKED,
                disk=_BytesOnly,
                disk_min_file_size=_INLINE,
                # Culling may throw away the value just stored, and an LRU read is a write: hence neither.
                eviction_policy="none",
                cull_limit=0,
                # A page that vanishes from a mapped file is no error to handle but a signal that kills.
                sqlite_mmap_size=0,
                # FULL waits for the disk at every commit; NORMAL may lose the last ones with the power.
                sqlite_synchronous=2 if durable else 1,
            )
        except BaseException:
            self.close()
            raise


class _Own(Exception):
    """What the work of a transaction has failed with."""


class Batch:
    """The records within a transaction."""

    def __init__(self, cache: _Database) -> None:
        self._cache = cache

    def get(self, key: str) -> bytes | None:
        # Half of the time that diskcache's own get() takes, which looks for expiry, tags and files as well.
        row = self._cache._con.execute(_GET, (key,)).fetchone()
        return checked(key, row[0]) if row else None

    def put(self, key: str, value: bytes) -> None:
        self._cache.set(key, checksum(key, value) + value)

    def delete(self, key: str) -> bool:
        """Whether it was there."""
        return bool(self._cache.delete(key))

    def count(self, prefix: str) -> int:
        """How many keys start with `prefix`; it takes 50 ms for a million of them."""
        row = self._cache._con.execute(_COUNT, (prefix, prefix + "\U0010ffff")).fetchone()
        return int(row[0])


class Records:
    """Every method raises StorageFailed.  Several processes may share `directory`, which is made if need be.

    Where it is `durable`, what was put is on the disk when put() returns.

    Opening raises only where it cannot be made: where the disk fails, or the database is damaged, all that
    follows fails until they do not.
    """

    def __init__(
        self,
        directory: Path,
        clock: Callable[[], float] = time.time,
        disk: DiskHealth | None = None,
        durable: bool = False,
    ) -> None:
        self._directory = directory
        self._durable = durable
        self._file = directory / diskcache.core.DBNAME
        self._lock = directory.with_name(f"{directory.name}.lock")
        self._clock = clock
        self._disk = disk or DiskHealth(directory.parent, clock)
        self._opening = threading.Lock()
        self._turn = threading.Lock()
        self._local = threading.local()
        self._opened: tuple[_Database, Identity] | None = None
        self._rebuilding: threading.Thread | None = None
        self._rebuilt_at = -math.inf
        self._closing = threading.Event()
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StorageFailed(f"records in {directory}: {error.strerror or error}") from error
        with suppress(StorageFailed):
            self._do(lambda cache: None)
        if self._rebuilding is not None:
            self._rebuilding.join(AT_START)

    def get(self, key: str) -> bytes | None:
        return self._do(lambda cache: Batch(cache).get(key))

    def put(self, key: str, value: bytes) -> None:
        with self._writing(len(value)):
            self._do(lambda cache: Batch(cache).put(key, value), len(value))

    def delete(self, key: str) -> bool:
        """Whether it was there."""
        with self._writing(0):
            return self._do(lambda cache: Batch(cache).delete(key))

    def transaction(self, work: Callable[[Batch], T]) -> T:
        """What `work` returns; all that it does happens, or nothing, and no process writes meanwhile.

        It may be run twice, so it is to touch nothing but its batch.
        """

        def run(cache: _Database) -> T:
            with cache.transact():
                try:
                    return work(Batch(cache))
                except (ValueError, TypeError, LookupError, AttributeError) as error:
                    raise _Own from error  # it says nothing of the database

        with self._writing(0):
            try:
                return self._do(run)
            except _Own as error:
                assert error.__cause__ is not None
                raise error.__cause__ from None

    def scan(self, prefix: str, after: str = "") -> Iterator[tuple[str, bytes]]:
        """Keys that start with `prefix` and come after `prefix + after`, in order, with their values."""
        last = prefix + after
        while rows := self._rows("SELECT key, value", last, prefix + "\U0010ffff", _BATCH):
            for key, stored in rows:
                if (value := checked(key, stored)) is not None:
                    yield key, value
            last = rows[-1][0]

    def keys(self, prefix: str) -> Iterator[str]:
        """The keys of scan(), and of those records too that cannot be read any more; without their values."""
        last = prefix
        while rows := self._rows("SELECT key, NULL", last, prefix + "\U0010ffff", _BATCH):
            yield from (key for key, _ in rows)
            last = rows[-1][0]

    def holds(self, key: str) -> bool:
        """Whether there is such a record, even if it can no longer be read."""
        return bool(self._do(lambda cache: list(cache._sql(_HOLDS, (key,)))))

    def first(self, prefix: str, after: str = "") -> str | None:
        """The first key of scan()."""
        rows = self._rows("SELECT key, NULL", prefix + after, prefix + "\U0010ffff", 1)
        return rows[0][0] if rows else None

    def groups(self, prefix: str, after: str = "") -> Iterator[str]:
        """The distinct fields that follow `prefix` in keys, in order; those greater than `after`.

        Each takes one look at the index, however many keys have the same field.
        """
        # '!' follows the space that ends a field: the next key has another value there.
        while (key := self.first(prefix, f"{after}!" if after else "")) is not None:
            after = key[len(prefix) :].partition(" ")[0]
            yield after

    def _rows(self, select: str, above: str, below: str, limit: int) -> list[tuple[str, Any]]:
        # diskcache lists keys only from end to end; its index on (key, raw) serves ranges as well.
        statement = f"{select} FROM Cache WHERE key > ? AND key < ? AND raw = 1 ORDER BY key LIMIT ?"
        return self._do(lambda cache: list(cache._sql(statement, (above, below, limit))))

    def close(self) -> None:
        """A rebuilding is given up; the next to open does it."""
        self._closing.set()
        if self._rebuilding is not None:
            self._rebuilding.join()
        with self._turn:
            if self._opened is not None:
                self._opened[0].close()

    # Opening

    def _do(self, work: Callable[[_Database], T], size: int = 0, again: bool = True) -> T:
        found = _identity(self._file)
        cache: _Database | None = None
        try:
            cache, found = self._current(found)
            former: Any = getattr(self._local, "cache", cache)
            self._local.cache = cache
            if former is not cache:
                former.close()  # this thread's connection to what has gone
            return work(cache)
        except _FAILURES as error:
            if cache is not None:
                with suppress(sqlite3.Error):
                    cache.close()  # this thread's: it may be in a transaction, or the disk was read-only
            if again and cache is not None and _identity(self._file) != found:
                return self._do(work, size, again=False)  # it was taken away under us
            raise self._failed(_origin(error), found, size) from _origin(error)

    def _current(self, found: Identity) -> tuple[_Database, Identity]:
        """The database that has the name; another one where it was rebuilt, or removed."""
        opened = self._opened
        if opened is None or found is None or found != opened[1]:
            with self._opening, self._shared():
                found, opened = _identity(self._file), self._opened
                if opened is None or found is None or found != opened[1]:
                    self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                    cache = _Database(self._directory, self._durable)
                    opened = self._opened = cache, _identity(self._file)
        return opened

    def _failed(self, error: Exception, found: Identity, size: int) -> StorageFailed:
        short = getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_IOERR_SHORT_READ  # a truncated log
        if isinstance(error, OSError) or (primary(error) in _OF_THE_DISK and not short):
            return self._disk.failed(KIND, self._directory, error, size)
        self._rebuild(found)
        return StorageFailed(f"records in {self._directory} are damaged: {error}")

    @contextmanager
    def _writing(self, size: int) -> Iterator[None]:
        # One at a time, as SQLite has it anyhow; so close() can wait for a thread that nobody waits for.
        with self._turn, self._disk.guard(KIND, self._lock), self._shared():
            if self._closing.is_set():
                raise StorageFailed(f"records in {self._directory} are closed")
            yield
        self._disk.worked(KIND, size)

    @contextmanager
    def _shared(self) -> Iterator[None]:
        """So that nobody moves the database away meanwhile.  Raises StorageFailed where one is at it."""
        with closing(ProcessLock(self._lock)) as lock:
            if not lock.take(fcntl.LOCK_SH):
                raise StorageFailed(f"records in {self._directory} are being rebuilt")
            yield

    # Rebuilding

    def _rebuild(self, damaged: Identity) -> None:
        with self._opening:
            running = self._rebuilding is not None and self._rebuilding.is_alive()
            early = 0 <= self._clock() - self._rebuilt_at < AGAIN
            if running or early or self._closing.is_set():
                return
            self._rebuilt_at = self._clock()
            # Not on the caller's time, which may be the event loop's: it takes seconds for a million.
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
                if _identity(self._file) != damaged:
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
        except _FAILURES as error:
            shutil.rmtree(fresh, ignore_errors=True)
            self._disk.failed(KIND, fresh, _origin(error))

    def _salvage(self, fresh: Path) -> int:
        """Make a database of all that can be read; how many records it has."""
        records = (record for record in readable_records(self._file) if not self._closing.is_set())
        with closing(_Database(fresh, self._durable)) as cache:
            while batch := list(islice(records, _BATCH)):
                with cache.transact():
                    for key, stored in batch:
                        cache.set(key, stored)
            return len(cache)


def _origin(error: Exception) -> Exception:
    """What went wrong first: diskcache says Timeout for all, and rolls back what is rolled back already."""
    while isinstance(error.__context__, sqlite3.Error):
        error = error.__context__
    return error


def _identity(file: Path) -> Identity:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
