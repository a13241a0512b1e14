"""Connections of one process to a PostgreSQL server, each used by one thread at a time.

Not psycopg_pool: its callers learn nothing of a connection that is refused, and wait to the end of their
time-out; its attempts to connect again are ever longer apart; and what it hands out after a restart of the
server are connections to the former one.
"""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Self, TypeAlias, TypeVar

import psycopg
from psycopg.abc import PQGen, PQGenConn
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import TransactionStatus
from psycopg.rows import TupleRow

from storage.errors import StorageFailed

PATIENCE = 5.0  # seconds that a thread waits for one of the connections
ANSWER = 20.0  # seconds that it waits for the end of a statement
ENDING = 1.0  # seconds that statements may still take when all is closed
# What the URL does not say.  A server that is gone without a word is noticed by the lack of its answers.
_SETTINGS = {
    "application_name": "entrepot",
    "client_encoding": "utf8",  # in that of the database, text would be bytes where it is SQL_ASCII
    "connect_timeout": "5",  # seconds, for each host of the URL
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "15000",  # milliseconds
    "target_session_attrs": "read-write",  # of several hosts the one that is not a standby
}
# The server ends what a client that is gone has left: otherwise its locks hold for two hours.  Commits are
# durable, whatever the default of the database is.
_SESSION = """
SET lock_timeout = '10s'; SET statement_timeout = '15s'; SET idle_in_transaction_session_timeout = '60s';
SET tcp_keepalives_idle = 10; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3;
SET default_transaction_isolation = 'read committed';
SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'
"""
_LOOKS = 10  # at the sessions behind a pooler, while others use it too
_PART = "SELECT set_config('search_path', quote_ident(current_schema() || %s), false)"

T = TypeVar("T")
Ready = TypeVar("Ready")
Wanted = TypeVar("Wanted")
DatabaseConnection: TypeAlias = psycopg.Connection[TupleRow]


class Busy(Exception):
    """All connections were in use for too long."""


class Closed(psycopg.InterfaceError):
    """The connections were closed."""


def _kind(ended: threading.Event, patient: bool) -> type[DatabaseConnection]:
    """Connections whose waits end by Closed soon after `ended` is set.

    Those that are not `patient` are closed if the server does not answer for too long, though its machine is
    there.
    """

    class Bounded(psycopg.Connection[TupleRow]):
        @classmethod
        def _connect_gen(cls, *arguments: Any, **named: Any) -> PQGenConn[Self]:
            return (yield from _until(ended, super()._connect_gen(*arguments, **named)))

        def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
            timeout = ANSWER if timeout is None and not patient else timeout
            try:
                return super().wait(_until(ended, gen), interval, timeout)
            except psycopg.OperationalError as error:
                if timeout is None or error.sqlstate or self.closed:
                    raise  # from the server, or the connection is lost
                self.close()
                raise psycopg.OperationalError(f"the server did not answer for {timeout:.0f} s") from None

    return Bounded


def _until(ended: threading.Event, steps: Generator[Wanted, Ready, T]) -> Generator[Wanted, Ready, T]:
    """The same steps, of which psycopg takes ten a second, until `ended` is set.  Then it raises Closed."""
    try:
        wanted = next(steps)
        while not ended.is_set():
            wanted = steps.send((yield wanted))
    except StopIteration as end:
        result: T = end.value
        return result
    raise Closed("the connections were closed")


class Connections:
    """At most `most` connections, made when they are needed.  Methods block, and raise psycopg.Error.

    With a `part`, they use the schema beside that of `url` whose name has this ending.  Making it raises
    StorageFailed if `url` is invalid.

    After an attempt to connect has failed, one thread at a time tries again, and the others fail at once: so
    a server that does not answer holds one thread.
    """

    def __init__(self, url: str, most: int, part: str = "") -> None:
        try:
            parameters = {**_SETTINGS, **conninfo_to_dict(url)}
        except psycopg.ProgrammingError:  # which shows the URL, and a password in it
            raise StorageFailed(
                "it is no valid URL of PostgreSQL: write %20 for a space, %25 for %, %40 for @ in a password"
            ) from None
        self._parameters = make_conninfo("", **parameters)
        self.name = _name(parameters)
        self._most = most
        self._part = f"_{part}" if part else ""
        self._slots = threading.Semaphore(most)
        self._lock = threading.Lock()
        self._idle: list[DatabaseConnection] = []
        self._failure: str | None = None  # of the last attempt to connect
        self._checked = False  # whether sessions are our own
        self._trying = threading.Lock()  # held by the thread that tries again
        self._closed = False
        self._ended = threading.Event()
        self._kinds = {patient: _kind(self._ended, patient) for patient in (False, True)}

    @contextmanager
    def take(self) -> Iterator[DatabaseConnection]:
        """A connection that is not in a transaction.  Raises Busy and Closed."""
        if not self._slots.acquire(timeout=PATIENCE):
            raise Busy(f"all {self._most} connections of this process are in use")
        try:
            if self._closed:
                raise Closed("the connections were closed")
            connection = self._idle_one() or self.connect()
            try:
                yield connection
            finally:
                self._put_back(connection)
        finally:
            self._slots.release()

    def _idle_one(self) -> DatabaseConnection | None:
        while True:
            with self._lock:
                if not self._idle:
                    return None
                connection = self._idle.pop()
            if not _has_news(connection):
                return connection
            connection.close()

    def _put_back(self, connection: DatabaseConnection) -> None:
        if not connection.closed and connection.info.transaction_status == TransactionStatus.IDLE:
            with self._lock:
                if not self._closed:
                    self._idle.append(connection)
                    return
        connection.close()

    def connect(self, patient: bool = False) -> DatabaseConnection:
        """A connection for the caller alone, who closes it; `patient` if a statement may take minutes."""
        if self._failure is None:
            return self._connect(patient)
        if not self._trying.acquire(blocking=False):
            raise psycopg.OperationalError(self._failure)
        try:
            return self._connect(patient)
        finally:
            self._trying.release()

    def _connect(self, patient: bool) -> DatabaseConnection:
        try:
            connection = self._kinds[patient].connect(self._parameters, autocommit=True)
            try:
                connection.execute(_SESSION)
                if not self._checked:
                    self._check_sessions(connection)
                if self._part:
                    connection.execute(_PART, (self._part,))
            except BaseException:
                connection.close()
                raise
        except psycopg.Error as error:
            self._failure = str(error)
            raise
        self._failure = None
        return connection

    def _check_sessions(self, connection: DatabaseConnection) -> None:
        """Raise psycopg.OperationalError if a pooler gives the session to others between transactions.

        What is prepared, set and locked in a session would be theirs: a statement might be one of others.
        """
        backend, shared = _backend(connection), False
        if backend != connection.info.backend_pid:  # a pooler answers with a number of its own
            with (
                suppress(psycopg.Error),
                self._kinds[False].connect(self._parameters, autocommit=True) as other,
            ):
                for _ in range(_LOOKS):  # a pooler gives to each the session that was used last
                    shared = shared or _backend(other) == backend or _backend(connection) != backend
            if shared:
                raise psycopg.OperationalError(
                    "a pooler gives its sessions to others between transactions: it needs pool_mode = session"
                )
        self._checked = True

    def close(self) -> None:
        """Refuse further use; after ENDING seconds, end what is in use then."""
        if not self._closed:
            self._closed, until = True, time.monotonic() + ENDING
            for _ in range(self._most):
                self._slots.acquire(timeout=max(0.0, until - time.monotonic()))
            self._ended.set()
            self._slots.release(self._most)  # to those who wait: they learn that all are closed
            for each in self._idle:
                each.close()
            self._idle.clear()


def _backend(connection: DatabaseConnection) -> int:
    """The process of the server that has executed this."""
    (number,) = connection.execute("SELECT pg_backend_pid()", prepare=False).fetchone() or (0,)
    return int(number)


def _has_news(connection: DatabaseConnection) -> bool:
    """Whether the server has sent something, which to an idle connection is the end of it."""
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def _name(parameters: Mapping[str, Any]) -> str:
    """What a database is called in messages, which never hold a password."""
    hosts = str(parameters.get("host") or "localhost").split(",")
    ports = str(parameters.get("port") or "5432").split(",")
    if len(ports) == 1:
        ports *= len(hosts)
    places = ",".join(f"{host}:{port}" for host, port in zip(hosts, ports, strict=False))
    return f"{places}/{parameters.get('dbname') or ''}"
