"""Records in a PostgreSQL database: see storage/records.py.

Every writer locks the table `entrepot_writers` before its transaction reads anything: shared with others, or
alone.  Of shared transactions, PostgreSQL itself sees to it that the result is as if one had run after the
other, and ends one that would break that; it is run again, and at last alone, so that it gets to its end.

An error that PostgreSQL raises within a transaction leaves it as psycopg.Error: the work cannot take it for
one that it may ignore.  Whoever called transaction() gets StorageFailed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from typing import TypeVar
from weakref import WeakSet

import psycopg
import structlog
from psycopg import errors

from storage.disk.troubles import Troubles
from storage.errors import StorageFailed, StorageUnavailable
from storage.keys import TAG
from storage.postgres.connections import Busy, Closed, Connections, DatabaseConnection
from storage.postgres.health import DatabaseHealth
from storage.postgres.schema import BLOBS, DIGEST, LINKS, TAGS, TARGET, identity_of, migrate
from storage.records import BATCH, LAST, Batch, SharedRecords

log = structlog.get_logger()
T = TypeVar("T")

CONNECTIONS = 4  # of a process, by default
RETRY_AFTER = 5.0  # seconds, told to clients
TOGETHER, TRIES = 4, 8  # attempts of a transaction beside others, and in all
# LOCK takes no snapshot: so the transaction reads what was written while it waited for the lock.  A SELECT of
# an advisory lock would take it before.
_SHARED = "BEGIN ISOLATION LEVEL SERIALIZABLE; LOCK TABLE entrepot_writers IN ROW EXCLUSIVE MODE"
_ALONE = "BEGIN ISOLATION LEVEL REPEATABLE READ; LOCK TABLE entrepot_writers IN EXCLUSIVE MODE"
_RANGE = "FROM entrepot_records WHERE key > %b AND key < %b"
_PUT = "INSERT INTO entrepot_records VALUES (%b, %b) ON CONFLICT (key) DO UPDATE SET value = excluded.value"
_POINTING = f"SELECT key {_RANGE} AND {TARGET} = %b AND {TAGS} ORDER BY key".encode()
_LINKING = f"SELECT key FROM entrepot_records WHERE {DIGEST} = %b AND {LINKS} ORDER BY key".encode()
_MARKS = b"SELECT key, sha256(value) FROM entrepot_records WHERE key = ANY(%b)"
_OLDEST = (
    f"SELECT key, value FROM entrepot_records WHERE (value, key) > (%b, %b) AND {BLOBS}"
    " ORDER BY value, key LIMIT %s"
).encode()
# Each step looks up the first key after all those with the same field: '!' follows the space that ends one.
_GROUPS = """
WITH RECURSIVE found (key, number) AS (
    (SELECT key, 1 FROM entrepot_records WHERE key > %(above)b AND key < %(below)b ORDER BY key LIMIT 1)
    UNION ALL
    SELECT (
        SELECT following.key FROM entrepot_records AS following
        WHERE following.key > substring(found.key FROM 1 FOR ends.at) || '\\x21'::bytea
            AND following.key < %(below)b
        ORDER BY following.key LIMIT 1
    ), number + 1
    FROM found, LATERAL (
        SELECT %(start)s::integer + position(
            '\\x20'::bytea IN substring(found.key FROM %(start)s::integer + 1) || '\\x20'::bytea
        ) - 1
    ) AS ends (at)
    WHERE found.key IS NOT NULL AND number < %(limit)s
)
SELECT key FROM found WHERE key IS NOT NULL
"""
# Of a transaction that another one would have to precede and to follow, or waits for in a circle.
_CONFLICTS = (errors.SerializationFailure, errors.DeadlockDetected)
_BUSY = (Busy, errors.LockNotAvailable, errors.QueryCanceled, *_CONFLICTS)
_PASSING = (psycopg.OperationalError, psycopg.InterfaceError, errors.ReadOnlySqlTransaction)


class PostgresBatch(Batch):
    """The records by one connection: in a transaction, or as they are."""

    def __init__(self, connection: DatabaseConnection) -> None:
        self._connection = connection

    def get(self, key: str) -> bytes | None:
        statement = "SELECT value FROM entrepot_records WHERE key = %b"
        row = self._connection.execute(statement, (key.encode(),), binary=True).fetchone()
        return row[0] if row else None

    def put(self, key: str, value: bytes) -> None:
        self._connection.execute(_PUT, (key.encode(), value))

    def delete(self, key: str) -> bool:
        found = self._connection.execute("DELETE FROM entrepot_records WHERE key = %b", (key.encode(),))
        return found.rowcount > 0

    def count(self, prefix: str) -> int:
        values = prefix.encode(), (prefix + LAST).encode()
        row = self._connection.execute(f"SELECT count(*) {_RANGE}".encode(), values, binary=True).fetchone()
        return row[0] if row else 0

    def tags_at(self, repository: str, target: str) -> list[str]:
        prefix = TAG.prefix(repository)
        values = prefix.encode(), (prefix + LAST).encode(), target.encode()
        rows = self._connection.execute(_POINTING, values, binary=True)
        return [row[0].decode() for row in rows]

    def linking(self, digest: str) -> list[str]:
        rows = self._connection.execute(_LINKING, (digest.encode(),), binary=True)
        return [row[0].decode() for row in rows]

    def oldest(self, key: str, value: bytes, limit: int) -> list[tuple[str, bytes]]:
        rows = self._connection.execute(_OLDEST, (value, key.encode(), limit), binary=True)
        return [(key.decode(), value) for key, value in rows]

    def rows(self, select: str, above: str, below: str, limit: int) -> list[tuple[str, bytes]]:
        """The first rows of a range, in the order of their keys."""
        statement = f"SELECT key, {select} {_RANGE} ORDER BY key LIMIT %s".encode()
        rows = self._connection.execute(statement, (above.encode(), below.encode(), limit), binary=True)
        return [(key.decode(), value) for key, value in rows]

    def marks(self, keys: Iterable[str]) -> Mapping[str, bytes]:
        rows = self._connection.execute(_MARKS, ([key.encode() for key in keys],), binary=True)
        return {key.decode(): mark for key, mark in rows}

    def groups(self, prefix: str, above: str) -> list[str]:
        """The first key of each of the next groups."""
        values = {"above": above.encode(), "below": (prefix + LAST).encode(), "limit": BATCH}
        rows = self._connection.execute(_GROUPS, {**values, "start": len(prefix.encode())}, binary=True)
        return [row[0].decode() for row in rows]


class PostgresRecords(SharedRecords):
    """Records that several servers share.

    `url` is a connection string of PostgreSQL.  A process has at most `connections`.  `check` is called with
    the identity of the records before they are used, also if a later connection leads to others, and raises
    StorageFailed if they are the wrong ones.
    Each `part` has tables of its own: see Connections.

    Making it raises SchemaTooNew, and what `check` raises; if the database cannot be reached, the other
    methods fail until it can.
    """

    remote = True

    def __init__(
        self,
        url: str,
        clock: Callable[[], float] = time.time,
        troubles: Troubles | None = None,
        connections: int = CONNECTIONS,
        check: Callable[[str], None] = lambda identity: None,
        part: str = "",
    ) -> None:
        self._connections = Connections(url, connections, part)
        self.name = self._connections.name
        self.health = DatabaseHealth(self.name, clock, troubles)
        self._local = threading.local()
        self._check = check
        self._identity = ""  # of the records that are meant
        self._verified = WeakSet[DatabaseConnection]()
        with suppress(StorageUnavailable):
            self._read(lambda batch: None)

    def get(self, key: str) -> bytes | None:
        return self._read(lambda batch: batch.get(key))

    def put(self, key: str, value: bytes) -> None:
        self.transaction(lambda batch: batch.put(key, value), shared=True)

    def delete(self, key: str) -> bool:
        return self.transaction(lambda batch: batch.delete(key), shared=True)

    def transaction(self, work: Callable[[Batch], T], shared: bool = False) -> T:
        with self._translated():
            for number in range(1, TRIES):
                with suppress(*_CONFLICTS):
                    return self._once(work, _SHARED if shared and number <= TOGETHER else _ALONE)
            return self._once(work, _ALONE)

    def _once(self, work: Callable[[Batch], T], begin: str) -> T:
        with self._connection() as connection:
            connection.execute(begin.encode())
            self._local.batch = batch = PostgresBatch(connection)
            try:
                result = work(batch)
                # A transaction in which a statement failed is rolled back by COMMIT, without an error.
                if connection.execute("COMMIT").statusmessage != "COMMIT":
                    raise psycopg.OperationalError("the transaction was rolled back")
                return result
            except BaseException:
                with suppress(psycopg.Error):
                    connection.execute("ROLLBACK")
                raise
            finally:
                self._local.batch = None

    def scan(self, prefix: str, after: str = "") -> Iterator[tuple[str, bytes]]:
        yield from self._each("value", prefix, after)

    def keys(self, prefix: str) -> Iterator[str]:
        yield from (key for key, _ in self._each("NULL", prefix, ""))

    def _each(self, select: str, prefix: str, after: str) -> Iterator[tuple[str, bytes]]:
        last = prefix + after
        while rows := self._rows(select, last, prefix + LAST, BATCH):
            yield from rows
            last = rows[-1][0]

    def _rows(self, select: str, above: str, below: str, limit: int) -> list[tuple[str, bytes]]:
        return self._read(lambda batch: batch.rows(select, above, below, limit))

    def holds(self, key: str) -> bool:
        return self.get(key) is not None

    def first(self, prefix: str, after: str = "") -> str | None:
        rows = self._rows("NULL", prefix + after, prefix + LAST, 1)
        return rows[0][0] if rows else None

    def groups(self, prefix: str, after: str = "") -> Iterator[str]:
        def found() -> list[str]:
            return self._read(lambda batch: batch.groups(prefix, prefix + (f"{after}!" if after else "")))

        while keys := found():
            for key in keys:
                after = key[len(prefix) :].partition(" ")[0]
                yield after

    def linking(self, digest: str) -> list[str]:
        return self._read(lambda batch: batch.linking(digest))

    def oldest(self, after: tuple[str, bytes], limit: int) -> list[tuple[str, bytes]]:
        return self._read(lambda batch: batch.oldest(*after, limit))

    def marks(self, keys: Iterable[str]) -> Mapping[str, bytes]:
        return self._read(lambda batch: batch.marks(keys))

    def version(self) -> object:
        return None  # only the server knows

    @contextmanager
    def turn(self, name: str) -> Iterator[bool]:
        statement = "SELECT pg_try_advisory_lock(hashtextextended(current_schema() || %s, 0))"
        with self._translated():
            connection = self._connections.connect()  # of its own: it may be held for hours
            try:
                row = connection.execute(statement, (f" entrepot {name}",)).fetchone()
            except BaseException:
                connection.close()
                raise
        try:
            yield row == (True,)
        finally:
            with suppress(psycopg.Error):  # by closing alone, it would end a moment later
                connection.execute("SELECT pg_advisory_unlock_all()")
            connection.close()

    def troubles(self) -> list[str]:
        return self.health.troubles()

    def close(self) -> None:
        self._connections.close()

    # Connections

    def _read(self, work: Callable[[PostgresBatch], T]) -> T:
        """The result of `work`, in the transaction of this thread if there is one."""
        batch: PostgresBatch | None = getattr(self._local, "batch", None)
        if batch is not None:
            return work(batch)
        with self._translated(), self._connection() as connection:
            return work(PostgresBatch(connection))

    @contextmanager
    def _connection(self) -> Iterator[DatabaseConnection]:
        with self._connections.take() as connection:
            if connection not in self._verified:
                self._verify(connection)
            try:
                yield connection
            except errors.ReadOnlySqlTransaction:
                connection.close()  # its server has become a standby: another one is to be found
                raise

    def _verify(self, connection: DatabaseConnection) -> None:
        """Close a new connection, and raise what `check` raises, if it leads to other records.

        The first one may lead to tables that are still to be made.  Later ones may lead to another server.
        """
        try:
            if self._identity:
                found = identity_of(connection)
            else:
                with closing(self._connections.connect(patient=True)) as patient:
                    found = migrate(patient, self.name)
            if found != self._identity:
                self._check(found)
        except BaseException:
            connection.close()
            raise
        self._identity = found
        self._verified.add(connection)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn errors of the database into StorageFailed, and report them."""
        try:
            yield
        except Closed as error:
            raise StorageFailed(f"records in {self.name} are closed", cause="it is closed") from error
        except _BUSY as error:
            log.warning("records.busy", database=self.name, cause=_reason(error))
            raise self._unavailable(error, "its database is busy") from error
        except _PASSING as error:
            self.health.failed(_reason(error))
            raise self._unavailable(error, "its database cannot be used now") from error
        except psycopg.Error as error:
            self.health.failed(_reason(error))
            raise StorageFailed(f"records in {self.name}: {_reason(error)}", cause="its database") from error
        else:
            self.health.worked()

    def _unavailable(self, error: Exception, cause: str) -> StorageUnavailable:
        message = f"records in {self.name}: {_reason(error)}"
        return StorageUnavailable(message, cause=cause, retry_after=RETRY_AFTER)


def _reason(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).partition("\n")[0]
