"""SQLiteRecords: what was put is there, in order, for all who look; what somebody else put is not trusted."""

from __future__ import annotations

import _sqlite3
import ctypes
import os
import resource
import sqlite3
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import diskcache
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import LogCapture

from storage.disk import records as records_module
from storage.disk.records import AGAIN, SQLiteRecords
from storage.disk.remembered import Remembered
from storage.errors import StorageFailed
from storage.records import Batch
from tests.conftest import Clock

MANY = 1_200  # more than two batches of a scan


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "records"


@pytest.fixture
def records(directory: Path) -> Iterator[SQLiteRecords]:
    found = SQLiteRecords(directory)
    yield found
    found.close()


@pytest.mark.parametrize("size", [0, 1, 40_000, 5 << 20])
def test_values_of_any_size_stand_in_the_database(records: SQLiteRecords, directory: Path, size: int) -> None:
    """A file beside it could be lost without SQLite's notice."""
    records.put("manifest a b", b"x" * size)
    assert records.get("manifest a b") == b"x" * size
    assert {path.name.partition("-")[0] for path in directory.rglob("*")} == {"cache.db"}


# Scans


def test_keys_are_told_of_what_cannot_be_read_as_well(
    records: SQLiteRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records_module, "BATCH", 2)
    for number in range(5):
        records.put(f"tag a {number}", b"value")
    records.put("tag ab 1", b"value")
    records.transaction(lambda batch: batch._cache.set("tag a 3", b"no check sum"))
    assert [key for key, _ in records.scan("tag a ")] == [f"tag a {number}" for number in (0, 1, 2, 4)]
    assert list(records.keys("tag a ")) == [f"tag a {number}" for number in range(5)]


# Several who look


def test_whether_it_waits_for_the_disk_is_up_to_whom_it_is_for(directory: Path) -> None:
    """In every thread, and again once it is there: SQLite's PRAGMA synchronous, 1 is NORMAL and 2 FULL."""
    for durable in (False, True, True, False):
        with closing(SQLiteRecords(directory, durable=durable)) as found, ThreadPoolExecutor(1) as pool:
            found.put("a", b"b")
            ask = found._do
            levels = {ask(_level), pool.submit(lambda ask=ask: ask(_level)).result()}
            assert levels == {2 if durable else 1}


def _level(cache: Any) -> int:
    return int(cache._sql("PRAGMA synchronous").fetchone()[0])


# What is not as it should be


class Bomb:
    """What runs code when it is unpickled."""

    exploded = False

    def __reduce__(self) -> Any:
        return setattr, (Bomb, "exploded", True)


def test_a_pickle_is_refused_unopened(records: SQLiteRecords, directory: Path) -> None:
    with diskcache.Cache(str(directory)) as stranger:
        stranger.set("tag r a", Bomb())
    assert not Bomb.exploded
    assert records.get("tag r a") is None
    assert list(records.scan("tag ")) == []
    assert not Bomb.exploded


def test_nothing_is_culled_whatever_the_size(directory: Path) -> None:
    with diskcache.Cache(str(directory), size_limit=1, cull_limit=10):
        pass  # the database remembers these settings
    records = SQLiteRecords(directory)
    for number in range(30):
        records.put(f"tag r {number:02}", b"x" * 1000)
    assert len(list(records.scan("tag r "))) == 30
    records.close()


def test_the_directory_is_its_owners_alone(records: SQLiteRecords, directory: Path) -> None:
    assert directory.stat().st_mode & 0o777 == 0o700


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageFailed, match=str(tmp_path / "file" / "records")):
        SQLiteRecords(tmp_path / "file" / "records")


# Damage


def settle() -> None:
    """Wait until what is being rebuilt is."""
    for thread in threading.enumerate():
        if thread.name == "records":
            thread.join()


def damaged(directory: Path) -> list[Path]:
    return sorted(directory.parent.glob("records.damaged-*"))


def expected(count: int) -> dict[str, bytes]:
    return {f"tag r {number:04}": b"%d" % number * (number % 50) for number in range(count)}


def filled(directory: Path, count: int) -> dict[str, bytes]:
    """SQLiteRecords of a database that is closed, and all in one file."""
    records = SQLiteRecords(directory)
    for key, value in expected(count).items():
        records.put(key, value)
    records.close()
    with closing(sqlite3.connect(directory / "cache.db")) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return expected(count)


def use(records: SQLiteRecords, key: str) -> None:
    """Every way to read and write; it may fail, but in one way only."""
    for way in (
        lambda: records.get(key),
        lambda: records.put("tag r other", b"x"),
        lambda: records.delete("tag r none"),
        lambda: records.first("tag "),
        lambda: list(records.scan("tag ")),
    ):
        with suppress(StorageFailed):
            way()


@pytest.mark.errors("records.damaged")
@pytest.mark.parametrize("content", [b"not a database" * 1000, b"SQLite format 3\0", b"\0" * 8192])
def test_a_file_that_is_no_database_makes_way(directory: Path, content: bytes, events: LogCapture) -> None:
    directory.mkdir()
    (directory / "cache.db").write_bytes(content)
    records = SQLiteRecords(directory)
    settle()
    records.put("tag r a", b"1")
    assert records.get("tag r a") == b"1"
    (aside,) = damaged(directory)
    assert (aside / "cache.db").read_bytes() == content
    (told,) = [each for each in events.entries if each["event"] == "records.damaged"]
    assert (told["path"], told["salvaged"]) == (str(aside), 0)
    assert {path.name for path in directory.parent.iterdir()} == {"records", "records.lock", aside.name}
    records.close()


@pytest.mark.clients
@pytest.mark.errors("records.damaged", "disk.failed")
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    max_examples=40,
    deadline=None,
    derandomize=True,
)
@given(
    places=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=3000)), max_size=6
    ),
    cut=st.none() | st.floats(0, 1),
    running=st.booleans(),
)
def test_whatever_is_damaged_no_record_is_wrong_and_it_works_again(
    sound: tuple[bytes, dict[str, bytes]],
    tmp_path_factory: pytest.TempPathFactory,
    places: list[tuple[float, bytes]],
    cut: float | None,
    running: bool,
) -> None:
    content, values = sound
    directory = tmp_path_factory.mktemp("damaged") / "records"
    directory.mkdir()
    file = directory / "cache.db"
    file.write_bytes(content)
    records = SQLiteRecords(directory) if running else None
    if records is not None:
        assert records.get("tag r 0001") == b"1"
    with file.open("r+b") as opened:
        for at, noise in places:
            opened.seek(int(at * len(content)))
            opened.write(noise)
        if cut is not None:
            opened.truncate(int(cut * len(content)))
    records = records or SQLiteRecords(directory)
    for _ in range(2):
        for key in [*values][::7]:
            use(records, key)
        settle()
    found = dict(records.scan("tag r "))
    found.pop("tag r other", None)
    assert found.items() <= values.items()
    assert all(records.get(key) in (None, value) for key, value in values.items())
    for key in ("tag r 0003", "tag r new"):
        with suppress(StorageFailed):  # so far nothing may have met the damage
            records.put(key, b"again")
    settle()
    records.put("tag r new", b"again")
    assert records.get("tag r new") == b"again"
    records.close()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, bytes]]:
    """A database file, and what it holds."""
    directory = tmp_path_factory.mktemp("sound") / "records"
    values = filled(directory, 400)
    return (directory / "cache.db").read_bytes(), values


def test_the_page_cache_of_each_thread_is_bounded(directory: Path) -> None:
    with closing(SQLiteRecords(directory)) as records:
        pragma = "PRAGMA cache_size"
        assert records._do(lambda cache: list(cache._sql(pragma))) == [(-2048,)]
        for durable in (True, False):  # what is stored in the database does not decide
            with closing(SQLiteRecords(directory, durable=durable)) as other:
                assert other._do(lambda cache: list(cache._sql(pragma))) == [(-2048,)]
    former = sqlite3.connect(directory / "cache.db")
    with closing(former), former:
        former.execute("UPDATE Settings SET value = 8192 WHERE key = 'sqlite_cache_size'")
    with closing(SQLiteRecords(directory)) as records:
        assert records._do(lambda cache: list(cache._sql(pragma))) == [(-2048,)]


@pytest.mark.clients
def test_the_page_caches_of_all_threads_together_are_bounded(tmp_path: Path) -> None:
    library = ctypes.CDLL(getattr(_sqlite3, "__file__", None))  # or part of Python itself
    library.sqlite3_memory_used.restype = ctypes.c_longlong
    threads, read, end = 12, threading.Semaphore(0), threading.Event()
    with closing(SQLiteRecords(tmp_path / "1")) as one, closing(SQLiteRecords(tmp_path / "2")) as two:
        for records in (one, two):
            records.transaction(
                lambda batch: [batch.put(f"link a {n:04d}", bytes(3000)) for n in range(1000)]
            )

        def work() -> None:
            for records in (one, two):
                assert sum(1 for _ in records.scan("link ")) == 1000
            read.release()
            end.wait()
            for records in (one, two):
                records._do(lambda cache: cache.close())  # this thread's connection

        before = library.sqlite3_memory_used()
        started = [threading.Thread(target=work) for _ in range(threads)]
        for each in started:
            each.start()
        for _ in started:
            assert read.acquire(timeout=60)
        held = library.sqlite3_memory_used() - before
        end.set()
        for each in started:
            each.join()
        # Without the limit they hold 2 MiB each, in two databases: 48 MiB.
        assert held < 24 << 20
        assert one._do(lambda cache: list(cache._sql("PRAGMA soft_heap_limit"))) == [(16 << 20,)]


@pytest.mark.clients
@pytest.mark.errors("records.damaged")
def test_all_but_the_damaged_pages_is_salvaged(directory: Path) -> None:
    values = filled(directory, 3000)
    file = directory / "cache.db"
    content = file.read_bytes()
    for key in ("tag r 0500", "tag r 1700", "tag r 2999"):
        # Its row, not its entry of the index.
        check = zlib.crc32(values[key], zlib.crc32(key.encode())).to_bytes(4, "big")
        at = content.index(check)
        with file.open("r+b") as opened:
            opened.seek(at // 4096 * 4096)
            opened.write(b"\xa5" * 4096)
    records = SQLiteRecords(directory)
    for key in values:
        with suppress(StorageFailed):
            records.get(key)
    settle()
    found = dict(records.scan("tag r "))
    assert found.items() < values.items()
    assert len(values) - 300 < len(found) < len(values)
    for key in ("tag r 0000", "tag r 1000", "tag r 2000", "tag r 2700"):
        assert found[key] == values[key]
    records.close()


@pytest.mark.errors("records.damaged")
def test_one_of_several_moves_it_and_the_others_notice(directory: Path) -> None:
    filled(directory, 100)
    sharers = [SQLiteRecords(directory) for _ in range(4)]
    for each in sharers:
        assert each.get("tag r 0001") == b"1"
    os.truncate(directory / "cache.db", 5000)
    barrier = threading.Barrier(len(sharers))

    def meet(records: SQLiteRecords) -> None:
        barrier.wait()
        for number in range(100):
            use(records, f"tag r {number:04}")

    with ThreadPoolExecutor(len(sharers)) as threads:
        list(threads.map(meet, sharers))
    settle()
    assert len(damaged(directory)) == 1
    sharers[0].put("tag r shared", b"1")
    assert [each.get("tag r shared") for each in sharers] == [b"1"] * 4
    sharers[3].put("tag r shared", b"2")
    assert [each.get("tag r shared") for each in sharers] == [b"2"] * 4
    for each in sharers:
        each.close()


def test_a_record_that_cannot_be_read_is_held_all_the_same(directory: Path) -> None:
    with closing(SQLiteRecords(directory)) as records:
        records.transaction(lambda batch: batch._cache.set("tag a v1", b"not what was put"))
        assert records.get("tag a v1") is None
        assert records.holds("tag a v1")
        assert not records.holds("tag a v")


@pytest.mark.errors("records.damaged")
def test_two_damaged_databases_are_kept(directory: Path, clock: Clock) -> None:
    for _ in range(4):
        SQLiteRecords(directory, clock).close()
        (directory / "cache.db").write_bytes(b"not a database" * 1000)
        records = SQLiteRecords(directory, clock)
        settle()
        clock.advance(AGAIN)
        records.close()
    times = [int(path.name.rpartition("-")[2]) for path in damaged(directory)]
    assert times == [int((clock.now - AGAIN * back) * 1000) for back in (2, 1)]


@pytest.mark.errors("records.damaged")
def test_no_connection_to_what_was_moved_stays_open(directory: Path) -> None:
    filled(directory, 10)
    records = SQLiteRecords(directory)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(records.put, "tag r a", b"").result()
        os.truncate(directory / "cache.db", 0)
        os.truncate(directory / "cache.db-wal", 0)
        use(records, "tag r a")
        settle()
        records.get("tag r a")
        thread.submit(records.put, "tag r a", b"").result()
        held = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        assert [each for each in held if each.startswith(f"{directory}.damaged")] == []
        thread.submit(records.close).result()
    records.close()


@pytest.mark.errors("records.damaged")
def test_a_database_that_loses_its_table_fails_as_storage_and_is_rebuilt(
    records: SQLiteRecords, directory: Path
) -> None:
    records.put("tag r a", b"1")
    with closing(sqlite3.connect(directory / "cache.db")) as connection:
        connection.execute("DROP TABLE Cache")
        connection.commit()
    with pytest.raises(StorageFailed, match=str(directory)):
        records.get("tag r a")
    settle()
    assert records.get("tag r a") is None
    records.put("tag r a", b"2")
    assert records.get("tag r a") == b"2"


def test_a_record_that_is_not_what_was_put_counts_as_absent(records: SQLiteRecords, directory: Path) -> None:
    for key in ("tag r a", "tag r b"):
        records.put(key, b"value of " + key.encode())
    with closing(sqlite3.connect(directory / "cache.db")) as connection:
        connection.execute("UPDATE Cache SET value = CAST(value || 'x' AS BLOB) WHERE key = 'tag r a'")
        connection.execute("UPDATE Cache SET key = 'tag r c' WHERE key = 'tag r b'")
        connection.commit()
    assert [records.get(f"tag r {name}") for name in "abc"] == [None, None, None]
    assert list(records.scan("tag r ")) == []
    records.put("tag r a", b"again")
    assert records.get("tag r a") == b"again"


def test_no_file_is_read_or_removed_that_a_record_names(records: SQLiteRecords, directory: Path) -> None:
    records.put("tag r a", b"1")
    (directory / "precious").write_bytes(b"precious")
    with closing(sqlite3.connect(directory / "cache.db")) as connection:
        connection.execute("UPDATE Cache SET mode = 2, filename = 'precious'")
        connection.commit()
    records.get("tag r a")
    records.put("tag r a", b"2")
    records.delete("tag r a")
    assert (directory / "precious").read_bytes() == b"precious"


# The disk


@pytest.mark.errors("disk.failed")
def test_a_database_that_is_locked_is_waited_for(
    directory: Path, monkeypatch: pytest.MonkeyPatch, events: LogCapture
) -> None:
    monkeypatch.setattr("storage.disk.database.LOCKED", 0.01)
    hasty = SQLiteRecords(directory)
    monkeypatch.undo()
    patient = SQLiteRecords(directory)
    with ThreadPoolExecutor(1) as thread, closing(sqlite3.connect(directory / "cache.db")) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageFailed, match="locked"):
            hasty.put("tag r a", b"hasty")
        assert hasty.get("tag r a") is None  # reading needs no lock
        waiting = thread.submit(patient.put, "tag r a", b"patient")
        other.execute("COMMIT")
        waiting.result()
        thread.submit(patient.close).result()
    hasty.put("tag r b", b"hasty")
    assert hasty.get("tag r a") == b"patient"
    assert [each["event"] for each in events.entries] == ["disk.failed", "disk.recovered"]
    hasty.close()
    patient.close()


@pytest.mark.parametrize("made", [False, True])
def test_a_lock_while_it_is_opened_is_waited_for(
    directory: Path, made: bool, monkeypatch: pytest.MonkeyPatch, events: LogCapture
) -> None:
    """As when several processes make it, on a disk that takes its time."""
    directory.mkdir()
    if made:
        with closing(SQLiteRecords(directory)) as records:
            records.put("tag a 1", b"value")
    asking = threading.Event()

    class Connection(sqlite3.Connection):
        def execute(self, *statement: Any) -> sqlite3.Cursor:
            asking.set()
            return super().execute(*statement)

    connect = sqlite3.connect
    with (
        closing(connect(directory / "cache.db", isolation_level=None)) as other,
        ThreadPoolExecutor() as pool,
    ):
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        monkeypatch.setattr(sqlite3, "connect", partial(connect, factory=Connection))
        opening = pool.submit(SQLiteRecords, directory)
        asking.wait()
        other.close()
        with closing(opening.result()) as records:
            assert records.get("tag a 1") == (b"value" if made else None)
            records.put("tag a 2", b"value")
    assert events.entries == []


@pytest.mark.errors("disk.failed")
def test_a_database_that_may_not_grow_is_read_all_the_same(
    records: SQLiteRecords, events: LogCapture
) -> None:
    records.put("tag r a", b"1")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        for _ in range(3):
            with pytest.raises(StorageFailed, match="disk I/O error"):
                records.put("tag r b", b"x" * 300_000)
            records.put("tag r a", b"2")
            assert records.get("tag r a") == b"2"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    records.put("tag r b", b"x" * 300_000)
    assert [each["event"] for each in events.entries] == ["disk.failed", "disk.recovered"]


# Versions


def test_a_version_holds_until_a_record_changes(records: SQLiteRecords, directory: Path) -> None:
    records.put("tag a b", b"1")
    before = records.version()
    assert before is not None
    assert records.get("tag a b") == b"1"
    assert list(records.scan("tag "))
    assert records.version() == before


@pytest.mark.parametrize("change", ["put", "delete", "transaction", "many"])
@pytest.mark.parametrize("by", ["itself", "a thread", "another"])
def test_a_version_ends_with_any_change(
    records: SQLiteRecords, directory: Path, change: str, by: str
) -> None:
    records.put("tag a b", b"1")

    def work(batch: Batch) -> None:
        batch.put("tag a c", b"2")

    def write(to: SQLiteRecords) -> None:
        match change:
            case "put":
                to.put("tag a b", b"1")  # the same again may mean another time
            case "delete":
                to.delete("tag a b")
            case "transaction":
                to.transaction(work)
            case "many":
                for number in range(3000):  # the log is taken over into the database meanwhile
                    to.put(f"tag a {number % 7}", b"x" * 2000)

    for _ in range(2):
        before = records.version()
        if by == "itself":
            write(records)
        elif by == "a thread":
            with ThreadPoolExecutor(1) as threads:
                threads.submit(write, records).result()
        else:
            with closing(SQLiteRecords(directory)) as another:
                write(another)
        after = records.version()
        assert after is not None
        assert after != before
        records.put("tag a b", b"1")


def test_a_version_is_of_the_database_that_has_the_name(records: SQLiteRecords, directory: Path) -> None:
    records.put("tag a b", b"1")
    before = records.version()
    assert before is not None
    directory.rename(directory.with_name("records-aside"))
    assert records.version() is None
    assert records.get("tag a b") is None
    after = records.version()
    assert after is not None
    assert after != before


def test_what_is_remembered_is_read_once(records: SQLiteRecords, directory: Path) -> None:
    records.put("tag a b", b"1")
    reads = []

    def read() -> bytes | None:
        reads.append(1)
        return records.get("tag a b")

    remembered = Remembered(records, read)
    assert [remembered() for _ in range(3)] == [b"1"] * 3
    assert len(reads) == 1
    with closing(SQLiteRecords(directory)) as another:
        another.put("tag a b", b"2")
        assert [remembered() for _ in range(3)] == [b"2"] * 3
        another.put("tag a c", b"3")
    assert [remembered() for _ in range(3)] == [b"2"] * 3
    assert len(reads) == 3
    directory.rename(directory.with_name("records-aside"))
    assert remembered() is None


def test_what_fails_to_be_read_is_read_again(records: SQLiteRecords) -> None:
    answers: list[Exception | int] = [1, ValueError(), 2]

    def read() -> int:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    remembered = Remembered(records, read)
    assert remembered() == 1
    records.put("tag a b", b"1")
    with pytest.raises(ValueError):
        remembered()
    assert remembered() == 2
