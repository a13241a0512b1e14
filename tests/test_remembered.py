"""What a server remembers of the records in a database, and what it does with it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path

import pytest

from storage import remembered
from storage.disk.records import SQLiteRecords
from storage.errors import StorageUnavailable
from storage.keys import CONFIRMED, LINK, PULLED, REMEMBERED, TAG
from storage.records import Batch
from storage.remembered import LOOKED, RENEWED, USED, NotRemembered, RecordMemory, RememberedRecords
from tests.conftest import Clock

KEEP = 3600.0
KEY, OTHER = TAG.key("local/a", "latest"), LINK.key("local/a", "sha256:1")


class Database(SQLiteRecords):
    """What stands for a database; while it is `away`, it cannot be read."""

    away = False

    def get(self, key: str) -> bytes | None:
        if self.away:
            raise StorageUnavailable("away")
        return super().get(key)

    def marks(self, keys: Iterable[str]) -> Mapping[str, bytes]:
        found = {key: self.get(key) for key in keys}
        return {key: hashlib.sha256(value).digest() for key, value in found.items() if value is not None}


@pytest.fixture
def here(tmp_path: Path, clock: Clock) -> Iterator[SQLiteRecords]:
    with closing(SQLiteRecords(tmp_path / "here", clock)) as records:
        yield records


@pytest.fixture
def there(tmp_path: Path, clock: Clock) -> Iterator[Database]:
    with closing(Database(tmp_path / "there", clock)) as records:
        yield records


@pytest.fixture
def records(here: SQLiteRecords, there: Database, clock: Clock) -> RememberedRecords:
    return RememberedRecords(there, RecordMemory(here, KEEP, clock))


def read(records: RememberedRecords, key: str = KEY) -> bytes | None:
    value = records.noting(records.get, key)
    records.memory.write()
    return value


def recalled(records: RememberedRecords, key: str = KEY) -> bytes | None:
    """None if nothing is remembered."""
    try:
        return records.recalling(records.get, key)
    except NotRemembered:
        return None


def another(here: SQLiteRecords, there: Database, clock: Clock) -> RememberedRecords:
    """Those of another process."""
    return RememberedRecords(there, RecordMemory(here, KEEP, clock))


def test_what_was_read_for_a_pull_is_remembered_by_all_processes(
    records: RememberedRecords, here: SQLiteRecords, there: Database, clock: Clock
) -> None:
    there.put(KEY, b"one")
    assert records.get(KEY) == b"one"  # for something else
    assert not records.memory.waits
    assert read(records) == b"one"
    there.away = True
    assert recalled(records) == recalled(another(here, there, clock)) == b"one"
    assert recalled(records, OTHER) is None
    with pytest.raises(StorageUnavailable):
        records.get(KEY)


def test_it_is_known_before_it_is_written_down(records: RememberedRecords, there: Database) -> None:
    there.put(KEY, b"one")
    records.noting(records.get, KEY)
    assert recalled(records) == b"one"


def test_only_what_pulls_need_is_remembered(records: RememberedRecords, here: SQLiteRecords) -> None:
    records.put(KEY, b"one")
    records.put(PULLED.key("local/a", "latest"), b"1")
    assert list(here.keys("")) == [REMEMBERED.key(KEY)]


def test_what_is_written_here_is_remembered(
    records: RememberedRecords, here: SQLiteRecords, there: Database, clock: Clock
) -> None:
    def push(batch: Batch) -> None:
        assert batch.get(KEY) is None
        batch.put(KEY, b"one")
        batch.put(OTHER, b"link")

    records.transaction(push)
    other = another(here, there, clock)
    assert (recalled(other), recalled(other, OTHER)) == (b"one", b"link")
    assert records.delete(OTHER)
    assert not records.delete(OTHER)
    assert (recalled(other), recalled(other, OTHER)) == (b"one", None)
    clock.advance(1)
    records.put(OTHER, b"again")
    assert recalled(other, OTHER) == b"again"


def test_a_transaction_that_fails_is_not_remembered(records: RememberedRecords) -> None:
    def push(batch: Batch) -> None:
        batch.put(KEY, b"one")
        raise LookupError

    with pytest.raises(LookupError):
        records.transaction(push)
    assert recalled(records) is None


def test_what_was_deleted_is_forgotten(records: RememberedRecords, there: Database, clock: Clock) -> None:
    there.put(KEY, b"one")
    read(records)
    there.delete(KEY)
    clock.advance(1)
    assert read(records) is None
    assert recalled(records) is None


def test_a_slow_read_does_not_replace_what_is_newer(
    records: RememberedRecords, here: SQLiteRecords, there: Database, clock: Clock
) -> None:
    """1. one process reads the tag  2. another one moves it  3. the first one writes down what it has read"""
    there.put(KEY, b"old")
    records.noting(records.get, KEY)
    clock.advance(1)
    other = another(here, there, clock)
    other.put(KEY, b"new")
    records.memory.write()
    assert recalled(other) == b"new"


def test_a_slow_read_does_not_bring_back_what_was_deleted(
    records: RememberedRecords, here: SQLiteRecords, there: Database, clock: Clock
) -> None:
    """1. one process reads a tag, the first to do so  2. another one deletes it  3. the first one writes"""
    there.put(KEY, b"old")
    records.noting(records.get, KEY)
    clock.advance(1)
    other = another(here, there, clock)
    assert other.delete(KEY)
    assert recalled(records) is None
    records.memory.write()
    assert (recalled(records), recalled(other)) == (None, None)
    clock.advance(LOOKED + 1)
    other.confirm()
    assert list(here.keys(REMEMBERED.prefix())) == []


def test_what_is_written_is_noted_though_it_was_so_before(
    records: RememberedRecords, here: SQLiteRecords, there: Database, clock: Clock
) -> None:
    """1. a process finds no tag  2. another one makes it  3. the first one deletes it, and makes it again"""
    other = another(here, there, clock)
    for value in (None, b"one"):
        assert read(records) == value
        clock.advance(1)
        if value is None:
            other.put(KEY, b"one")
            records.delete(KEY)
        else:
            other.delete(KEY)
            records.put(KEY, value)
        assert recalled(other) == value
        clock.advance(1)
        records.put(KEY, b"one")


@pytest.mark.parametrize("value", [b"new", None])
def test_a_slow_read_of_the_same_process(
    records: RememberedRecords, there: Database, clock: Clock, value: bytes | None
) -> None:
    there.put(KEY, b"old")
    begun = clock()
    clock.advance(1)
    if value is None:
        records.delete(KEY)
    else:
        records.put(KEY, value)
    records.memory.note(KEY, b"old", begun)
    assert recalled(records) == value
    records.memory.write()
    assert recalled(records) == value


def test_what_waits_to_be_written_was_not_confirmed(
    records: RememberedRecords, here: SQLiteRecords, there: Database, clock: Clock
) -> None:
    """1. a process reads a tag, and cannot write yet  2. the tag moves  3. another one confirms the others"""
    there.put(KEY, b"old")
    records.noting(records.get, KEY)
    clock.advance(KEEP)
    there.put(KEY, b"new")
    other = another(here, there, clock)
    other.confirm()
    assert recalled(records) == b"old"
    clock.advance(1)
    assert recalled(records) is None
    read(other)
    assert recalled(records) == b"new"


@pytest.mark.parametrize("value", [b"two", None])
@pytest.mark.parametrize("ours", [True, False], ids=["by this server", "by another one"])
def test_a_clock_that_is_set_back(
    records: RememberedRecords, there: Database, clock: Clock, value: bytes | None, ours: bool
) -> None:
    there.put(KEY, b"one")
    there.put(OTHER, b"link")
    read(records)
    read(records, OTHER)
    clock.advance(-KEEP)
    changed = records if ours else there
    if value is None:
        changed.delete(KEY)
    else:
        changed.put(KEY, value)
    if not ours:
        assert recalled(records) is None  # it may be of any age
        records.confirm()
    assert recalled(records) == value
    records.confirm()
    clock.advance(KEEP)
    assert (recalled(records), recalled(records, OTHER)) == (value, b"link")
    clock.advance(1)
    assert (recalled(records), recalled(records, OTHER)) == (None, None)


def test_it_counts_as_long_as_it_is_confirmed(
    records: RememberedRecords, there: Database, clock: Clock
) -> None:
    there.put(KEY, b"one")
    there.put(OTHER, b"link")
    read(records)
    read(records, OTHER)
    clock.advance(KEEP)
    assert recalled(records) == b"one"
    clock.advance(1)
    assert recalled(records) is None
    there.put(KEY, b"two")  # by another server
    there.delete(OTHER)
    records.confirm()
    clock.advance(KEEP)
    assert (recalled(records), recalled(records, OTHER)) == (b"two", None)
    clock.advance(1)
    assert recalled(records) is None


def test_a_confirmation_that_fails_confirms_nothing(
    records: RememberedRecords, there: Database, here: SQLiteRecords, clock: Clock
) -> None:
    there.put(KEY, b"one")
    read(records)
    there.away = True
    with pytest.raises(StorageUnavailable):
        records.confirm()
    assert here.get(CONFIRMED.key()) is None


def test_reads_of_the_same_write_nothing(
    records: RememberedRecords, there: Database, here: SQLiteRecords, clock: Clock
) -> None:
    there.put(KEY, b"one")
    read(records)
    written = here.get(REMEMBERED.key(KEY))
    records.noting(records.get, KEY)
    assert not records.memory.waits
    clock.advance(LOOKED)
    read(records)
    assert here.get(REMEMBERED.key(KEY)) == written
    clock.advance(RENEWED)
    read(records)
    assert here.get(REMEMBERED.key(KEY)) != written


def test_what_is_not_used_is_forgotten(
    records: RememberedRecords, there: Database, here: SQLiteRecords, clock: Clock
) -> None:
    there.put(KEY, b"one")
    there.put(OTHER, b"link")
    read(records)
    clock.advance(RENEWED)
    read(records, OTHER)
    records.delete(KEY)
    records.confirm()
    assert len(list(here.keys(REMEMBERED.prefix()))) == 2  # a slow read must not bring it back
    clock.advance(USED)
    records.confirm()
    assert list(here.keys(REMEMBERED.prefix())) == [REMEMBERED.key(OTHER)]
    clock.advance(1)
    records.confirm()
    assert list(here.keys(REMEMBERED.prefix())) == []


@pytest.mark.parametrize(("limit", "value"), [("MOST", 2), ("SPACE", 8)])
def test_no_more_is_remembered_than_the_limits(
    records: RememberedRecords,
    there: Database,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    limit: str,
    value: int,
) -> None:
    monkeypatch.setattr(remembered, limit, value)
    keys = [TAG.key("local/a", f"v{number}") for number in range(4)]
    for key in keys:
        there.put(key, b"1234")
        read(records, key)
        clock.advance(1)
    records.confirm()
    assert [recalled(records, key) for key in keys] == [None, None, b"1234", b"1234"]
    assert read(records, keys[0]) == b"1234"
    assert recalled(records, keys[0]) == b"1234"


def test_a_damaged_memory_is_none(records: RememberedRecords, here: SQLiteRecords, there: Database) -> None:
    here.put(REMEMBERED.key(KEY), b"yesterday\none")
    here.put(CONFIRMED.key(), b"?")
    assert recalled(records) is None
    there.put(KEY, b"two")
    records.confirm()
    assert list(here.keys(REMEMBERED.prefix())) == []
