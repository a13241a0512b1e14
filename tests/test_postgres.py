"""Records in PostgreSQL, when the database is lost, busy, older or newer than it should be."""

from __future__ import annotations

import hashlib
import logging
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from typing import Any

import psycopg
import pytest
from structlog.testing import LogCapture

from storage.disk.troubles import Troubles
from storage.errors import StorageFailed, StorageUnavailable
from storage.keys import TAG
from storage.postgres import connections, schema
from storage.postgres.records import PostgresBatch, PostgresRecords
from storage.records import Batch
from tests.conftest import Clock
from tests.postgres import PASSWORD, PostgresServer

pytestmark = pytest.mark.clients


@pytest.fixture
def url(postgres_server: PostgresServer) -> str:
    return postgres_server.database()


@pytest.fixture
def records(url: str) -> Iterator[PostgresRecords]:
    with closing(PostgresRecords(url)) as found:
        yield found


def ask(url: str, statement: str) -> list[tuple[Any, ...]]:
    """What the database itself answers, asked beside the records."""
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


def end_connections(url: str) -> None:
    """End all other connections to the database, as its administrator can."""
    others = "FROM pg_stat_activity WHERE application_name = 'entrepot'"
    ask(url, f"SELECT pg_terminate_backend(pid, 5000) {others}")


# Poolers

POOLERS = {"transaction": "1", "session": "pg_catalog.pg_backend_pid() + 1000000"}


@pytest.mark.errors("records.failed")
@pytest.mark.parametrize("pools", POOLERS)
def test_a_pooler_of_transactions_is_refused(postgres_server: PostgresServer, url: str, pools: str) -> None:
    """Behind a pooler, the number of a session is not the one that it was told when it connected."""
    name = url.rpartition("search_path%3D")[2]
    ask(url, f"CREATE FUNCTION pg_backend_pid() RETURNS int LANGUAGE sql AS 'SELECT {POOLERS[pools]}'")
    pooled = postgres_server.url({"options": f"-csearch_path={name},pg_catalog"})
    with closing(PostgresRecords(pooled)) as records:
        if pools == "session":
            records.put("tag a b", b"1")
            assert records.get("tag a b") == b"1"
        else:
            with pytest.raises(StorageUnavailable, match="pool_mode = session"):
                records.put("tag a b", b"1")


# The schema


def test_the_tables_are_made_once_by_whoever_comes_first(url: str) -> None:
    together = threading.Barrier(4)

    def make(number: int) -> None:
        together.wait()
        with closing(PostgresRecords(url)) as records:
            records.put(f"tag a {number}", b"")

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(make, range(4)))
    assert ask(url, "SELECT version FROM entrepot_schema") == [(schema.VERSION,)]
    assert ask(url, "SELECT count(*) FROM entrepot_records") == [(4,)]


def test_tables_of_an_earlier_version_are_brought_to_this_one(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(PostgresRecords(url)) as records:
        records.put("tag a b", b"1")
    with monkeypatch.context() as later:
        later.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, "CREATE TABLE another (); SELECT 1"))
        later.setattr(schema, "VERSION", schema.VERSION + 1)
        with closing(PostgresRecords(url)) as records:
            assert records.get("tag a b") == b"1"
        with closing(PostgresRecords(url)) as records:  # not a second time
            assert records.get("tag a b") == b"1"
    assert ask(url, "SELECT count(*) FROM another") == [(0,)]
    assert ask(url, "SELECT version FROM entrepot_schema") == [(schema.VERSION + 1,)]


def test_a_migration_may_take_its_time(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    PostgresRecords(url).close()
    session = connections._SESSION.replace("statement_timeout = '15s'", "statement_timeout = '1s'")
    monkeypatch.setattr(connections, "ANSWER", 1.0)
    monkeypatch.setattr(connections, "_SESSION", session)
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, "SELECT pg_sleep(1.5)"))
    monkeypatch.setattr(schema, "VERSION", schema.VERSION + 1)
    with closing(PostgresRecords(url)) as records:
        assert records.health.troubles() == []
        assert ask(url, "SELECT version FROM entrepot_schema") == [(schema.VERSION,)]


@pytest.mark.errors("records.failed")
def test_a_migration_that_fails_changes_nothing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(PostgresRecords(url)) as records:
        records.put("tag a b", b"1")
    with monkeypatch.context() as later:
        later.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, "CREATE TABLE another ()", "SELECT 1 / 0"))
        later.setattr(schema, "VERSION", schema.VERSION + 2)
        with pytest.raises(StorageFailed, match="division by zero"):
            PostgresRecords(url)
    assert ask(url, "SELECT to_regclass('another')") == [(None,)]
    with closing(PostgresRecords(url)) as records:
        assert records.get("tag a b") == b"1"


@pytest.mark.errors("records.failed")
def test_tables_of_a_later_version_are_refused(url: str) -> None:
    PostgresRecords(url).close()
    ask(url, "UPDATE entrepot_schema SET version = 7")
    with pytest.raises(schema.SchemaTooNew, match=r"schema 7, and this version knows schema 2: use .* later"):
        PostgresRecords(url)
    assert ask(url, "SELECT version FROM entrepot_schema") == [(7,)]


def test_records_are_compared_by_their_marks(records: PostgresRecords) -> None:
    records.put("tag a b", b"1")
    records.put("tag a \u00e9", b"\x00" * 100_000)
    marks = records.marks(["tag a b", "tag a \u00e9", "tag a c"])
    assert marks == {
        key: hashlib.sha256(value).digest()
        for key, value in {"tag a b": b"1", "tag a \u00e9": b"\x00" * 100_000}.items()
    }
    assert records.marks([]) == {}


def test_tags_are_found_by_the_index(records: PostgresRecords, url: str) -> None:
    def work(batch: Batch) -> None:
        for number in range(5000):
            batch.put(TAG.key("a", f"v{number}"), b"sha256:%d 17.5" % (number // 2))
            batch.put(f"manifest a sha256:{number}", b"x")

    records.transaction(work)
    ask(url, "ANALYZE entrepot_records")
    plans = []

    def explain(batch: Batch) -> list[str]:
        assert isinstance(batch, PostgresBatch)
        execute = batch._connection.execute

        def explained(statement: Any, values: Any, **options: Any) -> Any:
            plans.extend(execute(b"EXPLAIN " + statement, values).fetchall())
            return execute(statement, values, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(batch._connection, "execute", explained)
            return batch.tags_at("a", "sha256:77")

    assert records.transaction(explain) == ["tag a v154", "tag a v155"]
    assert any("entrepot_tags" in line for (line,) in plans)


# What is acknowledged


@pytest.mark.errors("records.failed")
def test_a_transaction_with_a_failed_statement_is_not_taken_for_committed(records: PostgresRecords) -> None:
    """PostgreSQL answers its COMMIT by ROLLBACK, and reports no error."""

    def work(batch: Batch) -> str:
        assert isinstance(batch, PostgresBatch)
        batch.put("a", b"1")
        with suppress(psycopg.Error):
            batch._connection.execute("SELECT 1 / 0")
        return "stored"

    with pytest.raises(StorageUnavailable, match="rolled back"):
        records.transaction(work)
    assert records.get("a") is None


def test_commits_are_durable_whatever_the_default_is(postgres_server: PostgresServer) -> None:
    url = postgres_server.database()
    with closing(PostgresRecords(f"{url}%20-csynchronous_commit%3Doff")) as records:
        assert _setting(records, "synchronous_commit") == "on"
    with closing(PostgresRecords(f"{url}%20-csynchronous_commit%3Dremote_apply")) as records:
        assert _setting(records, "synchronous_commit") == "remote_apply"


def test_a_database_of_any_encoding_will_do(postgres_server: PostgresServer, url: str) -> None:
    """SQL_ASCII is that of a cluster that was made where no locale is set."""
    ask(url, "CREATE DATABASE ascii ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0")
    found: list[str] = []
    PostgresRecords(postgres_server.url().replace("/postgres?", "/ascii?"), check=found.append).close()
    assert re.fullmatch("[0-9a-f-]{36}", found[0])


@pytest.mark.parametrize(
    "name",
    ["idle_in_transaction_session_timeout", "lock_timeout", "statement_timeout", "tcp_keepalives_idle"],
)
def test_the_server_ends_what_a_lost_client_left(records: PostgresRecords, name: str) -> None:
    assert _setting(records, name) not in ("0", "7200")


def _setting(records: PostgresRecords, name: str) -> str:
    def work(batch: Batch) -> str:
        assert isinstance(batch, PostgresBatch)
        row = batch._connection.execute(b"SHOW " + name.encode()).fetchone()
        assert row is not None
        return str(row[0])

    return records.transaction(work)


# Conflicts


def test_a_deadlock_is_resolved(records: PostgresRecords) -> None:
    """Each waits for the other's row, the first time."""
    records.put("a", b"0")
    records.put("b", b"0")
    both = threading.Barrier(2)

    def change(first: str, second: str, value: bytes) -> int:
        tries = 0

        def work(batch: Batch) -> None:
            nonlocal tries
            tries += 1
            batch.put(first, value)
            if tries == 1:
                both.wait()
            batch.put(second, value)

        records.transaction(work, shared=True)
        return tries

    with ThreadPoolExecutor(2) as threads:
        one, other = threads.submit(change, "a", "b", b"1"), threads.submit(change, "b", "a", b"2")
        assert one.result() + other.result() > 2
    assert records.get("a") == records.get("b") != b"0"


def test_a_transaction_that_conflicts_again_and_again_runs_alone(records: PostgresRecords, url: str) -> None:
    tries = 0

    def work(batch: Batch) -> None:
        nonlocal tries
        tries += 1
        batch.get("a")
        batch.put("b", b"%d" % tries)
        if tries <= 4:  # another one has read b, and writes a
            with psycopg.connect(url) as other:
                other.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
                other.execute("SELECT * FROM entrepot_records")
                other.execute("DELETE FROM entrepot_records WHERE key = 'a'")
                other.execute("INSERT INTO entrepot_records VALUES ('a', '1')")

    records.transaction(work, shared=True)
    assert tries == 5
    assert (records.get("a"), records.get("b")) == (b"1", b"5")


# When the database is lost


def test_a_restart_between_two_requests_is_not_noticed(records: PostgresRecords, url: str) -> None:
    records.put("a", b"1")
    end_connections(url)
    records.put("a", b"2")
    end_connections(url)
    assert records.get("a") == b"2"


@pytest.mark.errors("records.failed")
@pytest.mark.parametrize("shared", [False, True])
def test_a_connection_that_is_lost_in_a_transaction_is_no_success(
    records: PostgresRecords, url: str, shared: bool, events: LogCapture
) -> None:
    def work(batch: Batch) -> None:
        batch.put("a", b"1")
        end_connections(url)

    with pytest.raises(StorageUnavailable) as caught:
        records.transaction(work, shared)
    assert (caught.value.status, caught.value.code) == (503, "UNAVAILABLE")
    assert caught.value.retry_after
    assert caught.value.public == "the storage of this registry failed: its database cannot be used now"
    assert records.get("a") is None
    assert records.health.troubles() == []
    assert [each["event"] for each in events.entries] == ["records.failed", "records.recovered"]


@pytest.mark.errors("records.failed")
def test_a_database_that_is_killed_and_comes_back(
    postgres_server: PostgresServer, events: LogCapture, clock: Clock
) -> None:
    url, troubles = postgres_server.database(), Troubles()
    uses: list[Callable[[PostgresRecords], object]] = [
        lambda records: records.get("a"),
        lambda records: records.put("a", b"2"),
        lambda records: records.delete("a"),
        lambda records: list(records.scan("")),
        lambda records: records.first(""),
        lambda records: list(records.groups("")),
        lambda records: records.transaction(lambda batch: batch.count("")),
        lambda records: records.turn("collect").__enter__(),
    ]
    with closing(PostgresRecords(url, clock, troubles)) as records, ThreadPoolExecutor(8) as threads:
        records.put("a", b"1")
        with postgres_server.lost():
            waiting = [threads.submit(use, records) for use in uses * 3]
            for each in waiting:
                with pytest.raises(StorageUnavailable):
                    each.result()
            late = PostgresRecords(url, clock, troubles)  # a process may be started meanwhile
            assert records.health.troubles() == late.health.troubles() != []
            assert all(PASSWORD not in text for text in records.health.troubles())
        assert records.get("a") == late.get("a") == b"1"
        late.put("a", b"3")
        assert records.get("a") == b"3"
        late.close()
    assert troubles._table is not None
    assert records.health.troubles() == []
    found = [each["event"] for each in events.entries]
    assert found.count("records.failed") == found.count("records.recovered") == len(set(_causes(events)))


def _causes(events: LogCapture) -> list[str]:
    return [each["cause"] for each in events.entries if each["event"] == "records.failed"]


@pytest.mark.errors("records.failed")
def test_a_database_that_says_nothing_is_given_up(
    records: PostgresRecords, postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    records.put("a", b"1")
    with postgres_server.silent(), monkeypatch.context() as hasty:
        hasty.setattr(connections, "ANSWER", 0.1)
        with pytest.raises(StorageUnavailable, match="did not answer"):
            records.get("a")
    assert records.get("a") == b"1"


def test_what_waits_for_a_silent_database_ends_when_it_is_closed(
    records: PostgresRecords, postgres_server: PostgresServer, events: LogCapture
) -> None:
    begun, silenced = threading.Semaphore(0), threading.Event()

    def work(batch: Batch) -> None:
        begun.release()
        silenced.wait()
        batch.get("a")

    def look() -> None:
        with records.turn("collect"):
            pass

    with ThreadPoolExecutor(8) as threads:
        waiting = [threads.submit(records.transaction, work, True) for _ in range(2)]
        for _ in waiting:
            begun.acquire()
        with postgres_server.silent():
            silenced.set()
            waiting += [threads.submit(records.get, "a") for _ in range(5)]  # more than there are connections
            waiting.append(threads.submit(look))
            records.close()
            for each in waiting:
                with pytest.raises(StorageFailed, match="are closed"):
                    each.result()
    assert events.entries == []


@pytest.mark.errors("records.failed")
def test_a_server_that_has_become_a_standby_is_left(records: PostgresRecords) -> None:
    records.put("a", b"1")
    with records._connection() as connection:
        connection.execute("SET default_transaction_read_only = on")
    with pytest.raises(StorageUnavailable, match="read-only"):
        records.put("a", b"2")
    records.put("a", b"3")
    assert records.get("a") == b"3"


@pytest.mark.errors("records.failed")
def test_only_a_server_that_can_be_written_to_is_used(url: str) -> None:
    records = PostgresRecords(f"{url}%20-cdefault_transaction_read_only%3Don")
    with pytest.raises(StorageUnavailable, match="read-only"):
        records.get("a")
    records.close()


def test_of_several_servers_the_one_that_answers_is_used(url: str) -> None:
    other = url.replace("@127.0.0.1:", "@127.0.0.1:1,127.0.0.1:")
    with closing(PostgresRecords(other)) as records:
        records.put("a", b"1")
    with closing(PostgresRecords(url)) as records:
        assert records.get("a") == b"1"
    assert other.partition("@")[2].partition("?")[0] == records.name.replace("127", "127.0.0.1:1,127", 1)


def test_a_database_that_has_become_another_one_is_not_used(
    postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = list[str]()

    def check(identity: str) -> None:
        if known and identity not in known:
            raise StorageFailed("it is another database")
        known.append(identity)

    url, other = postgres_server.database(), postgres_server.database()
    with closing(PostgresRecords(other)) as elsewhere, closing(PostgresRecords(url, check=check)) as records:
        records.put("a", b"1")
        end_connections(url)
        with monkeypatch.context() as moved:
            moved.setattr(records._connections, "_parameters", elsewhere._connections._parameters)
            for _ in range(2):
                with pytest.raises(StorageFailed, match="another database"):
                    records.get("a")
        assert records.get("a") == b"1"
        assert elsewhere.get("a") is None
        assert len(known) == 1


# When it is busy


def test_all_connections_in_use_are_an_error_that_passes(
    url: str, monkeypatch: pytest.MonkeyPatch, events: LogCapture
) -> None:
    monkeypatch.setattr(connections, "PATIENCE", 0.0)
    with closing(PostgresRecords(url, connections=1)) as records:

        def work(batch: Batch) -> None:
            with ThreadPoolExecutor(1) as threads:
                with pytest.raises(StorageUnavailable, match="all 1 connections of this process") as caught:
                    threads.submit(records.get, "a").result()
                assert caught.value.retry_after

        records.transaction(work)
        assert records.get("a") is None
        assert records.health.troubles() == []
    assert [each["event"] for each in events.entries] == ["records.busy"]


def test_a_lock_that_others_keep_is_an_error_that_passes(records: PostgresRecords, url: str) -> None:
    with records._connection() as connection:
        connection.execute("SET lock_timeout = '1ms'")
    with psycopg.connect(url) as other:
        other.execute("LOCK TABLE entrepot_writers IN EXCLUSIVE MODE")
        with pytest.raises(StorageUnavailable, match="lock timeout"):
            records.put("a", b"1")
        assert records.get("a") is None  # reading needs no lock
    records.put("a", b"2")
    assert records.get("a") == b"2"


def test_it_waits_for_no_vacuum(records: PostgresRecords, url: str) -> None:
    """A lock on the records would: autovacuum takes one, and is cancelled by who waits for it."""

    def work(batch: Batch) -> None:
        batch.put("a", b"1")
        ask(url, "VACUUM entrepot_records")

    records.transaction(work)
    assert records.get("a") == b"1"


def test_no_password_is_shown(records: PostgresRecords, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    records.put("a", b"1")
    assert PASSWORD not in records.name + caplog.text
    assert records.name.startswith("127.0.0.1:")
    assert records.name.endswith("/postgres")
