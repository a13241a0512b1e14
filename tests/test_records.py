"""Records: what was put is there, in order, for all who look; what somebody else put is not trusted."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diskcache
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.errors import StorageFailed
from storage.records import Records

MANY = 1_200  # more than two batches of a scan


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "records"


@pytest.fixture
def records(directory: Path) -> Iterator[Records]:
    found = Records(directory)
    yield found
    found.close()


def test_put_get_replace_delete(records: Records) -> None:
    assert records.get("tag a b") is None
    records.put("tag a b", b"one")
    records.put("tag a b", b"\0\xfftwo\n")
    assert records.get("tag a b") == b"\0\xfftwo\n"
    assert records.delete("tag a b") is True
    assert records.delete("tag a b") is False
    assert records.get("tag a b") is None


@pytest.mark.parametrize("size", [0, 1, 40_000, 5 << 20])
def test_values_of_any_size_stand_in_the_database(records: Records, directory: Path, size: int) -> None:
    """A file beside it could be lost without SQLite's notice."""
    records.put("manifest a b", b"x" * size)
    assert records.get("manifest a b") == b"x" * size
    assert {path.name.partition("-")[0] for path in directory.rglob("*")} == {"cache.db"}


# Scans


def test_a_scan_is_in_order_and_within_its_prefix(records: Records) -> None:
    keys = [
        "tag a/b x",
        "tag a b",
        "tag a-b x",
        "tag a B",
        "tag a _",
        "tag a a.b",
        "tag a a",
        "tagg a a",
        "tag",
    ]
    for key in keys:
        records.put(key, key.encode())
    expected = ["tag a B", "tag a _", "tag a a", "tag a a.b", "tag a b"]
    assert list(records.scan("tag a ")) == [(key, key.encode()) for key in expected]
    assert [key for key, _ in records.scan("tag ")] == [*expected, "tag a-b x", "tag a/b x"]
    assert list(records.scan("link ")) == []


def test_a_scan_begins_after_what_need_not_be_there(records: Records) -> None:
    for tag in ("a", "b", "c"):
        records.put(f"tag r {tag}", b"")
    after = {last: [key[6:] for key, _ in records.scan("tag r ", last)] for last in ("", "a", "aa", "c", "z")}
    assert after == {"": ["a", "b", "c"], "a": ["b", "c"], "aa": ["b", "c"], "c": [], "z": []}


def test_a_scan_over_many_batches_misses_none_and_repeats_none(records: Records) -> None:
    keys = [f"tag r {number:05}" for number in range(MANY)]
    # In no order, and beside neighbours.
    for key in [*keys[::-2], *keys[::2], "tag q z", "tag s 0"]:
        records.put(key, key.encode())
    assert [key for key, _ in records.scan("tag r ")] == keys


def test_a_scan_goes_on_past_what_is_put_and_deleted_meanwhile(records: Records) -> None:
    keys = [f"tag r {number:05}" for number in range(MANY)]
    for key in keys:
        records.put(key, b"")
    scan = records.scan("tag r ")
    seen = [next(scan)[0]]
    for key in (keys[0], keys[700]):  # behind it; ahead, in a batch not yet read
        records.delete(key)
    records.put("tag r 99999", b"")
    seen += [key for key, _ in scan]
    assert seen == [key for key in keys if key != keys[700]] + ["tag r 99999"]


def test_first_skips_from_group_to_group(records: Records) -> None:
    for name in ("a", "a-b", "a/b", "b"):
        for tag in ("1", "2", "3"):
            records.put(f"tag {name} {tag}", b"")
    assert records.first("tag ") == "tag a 1"
    assert records.first("tag ", "a!") == "tag a-b 1"
    assert records.first("tag ", "a/b!") == "tag b 1"
    assert records.first("tag ", "b!") is None


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    max_examples=30,
    deadline=None,
)
@given(st.sets(st.text("Aa0./_- ", max_size=6), max_size=12), st.text("Aa0./_- ", max_size=4))
def test_a_scan_is_what_sorting_the_keys_would_give(records: Records, keys: set[str], after: str) -> None:
    for key, _ in list(records.scan("")):
        records.delete(key)
    for key in keys | {"l" + key for key in keys}:
        records.put("k" + key, key.encode())
    found = [key for key, _ in records.scan("k", after)]
    assert found == sorted("k" + key for key in keys | {"l" + key for key in keys} if key > after)
    assert records.first("k", after) == (found[0] if found else None)


# Several who look


def test_two_on_one_directory_see_each_other(directory: Path) -> None:
    one, other = Records(directory), Records(directory)
    one.put("tag r a", b"1")
    assert other.get("tag r a") == b"1"
    other.put("tag r a", b"2")
    other.put("tag r b", b"3")
    assert list(one.scan("tag r ")) == [("tag r a", b"2"), ("tag r b", b"3")]
    one.delete("tag r a")
    one.close()
    assert other.first("tag ") == "tag r b"
    other.close()


def test_records_outlive_whoever_put_them(directory: Path) -> None:
    first = Records(directory)
    first.put("tag r a", b"1")
    first.close()
    second = Records(directory)
    assert second.get("tag r a") == b"1"
    second.close()


def test_threads_put_at_the_same_time(records: Records) -> None:
    barrier = threading.Barrier(6)

    def put(thread: int) -> None:
        barrier.wait()
        for number in range(20):
            records.put(f"tag r {thread}-{number:02}", b"%d" % thread)
            records.put("tag r one", b"%d" % thread)
        assert records.get(f"tag r {thread}-19") == b"%d" % thread

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(put, range(6)))
    found = dict(records.scan("tag r "))
    assert found.pop("tag r one") in {b"%d" % thread for thread in range(6)}
    assert found == {f"tag r {t}-{n:02}": b"%d" % t for t in range(6) for n in range(20)}


def test_closing_twice_is_harmless(directory: Path) -> None:
    records = Records(directory)
    records.close()
    records.close()


# What is not as it should be


class Bomb:
    """What runs code when it is unpickled."""

    exploded = False

    def __reduce__(self) -> Any:
        return setattr, (Bomb, "exploded", True)


def test_a_pickle_is_refused_unopened(records: Records, directory: Path) -> None:
    with diskcache.Cache(str(directory)) as stranger:
        stranger.set("tag r a", Bomb())
    assert not Bomb.exploded
    with pytest.raises(StorageFailed, match="pickled"):
        records.get("tag r a")
    for _ in records.scan("tag "):
        pass
    assert not Bomb.exploded


def test_nothing_is_culled_whatever_the_size(directory: Path) -> None:
    with diskcache.Cache(str(directory), size_limit=1, cull_limit=10):
        pass  # the database remembers these settings
    records = Records(directory)
    for number in range(30):
        records.put(f"tag r {number:02}", b"x" * 1000)
    assert len(list(records.scan("tag r "))) == 30
    records.close()


def test_the_directory_is_its_owners_alone(records: Records, directory: Path) -> None:
    assert directory.stat().st_mode & 0o777 == 0o700


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageFailed, match=str(tmp_path / "file" / "records")):
        Records(tmp_path / "file" / "records")


def test_a_file_that_is_no_database_is_named(directory: Path) -> None:
    directory.mkdir()
    (directory / "cache.db").write_bytes(b"not a database" * 100)
    with pytest.raises(StorageFailed, match=str(directory)):
        Records(directory)


def test_a_database_that_loses_its_table_fails_as_storage(records: Records, directory: Path) -> None:
    with sqlite3.connect(directory / "cache.db") as connection:
        connection.execute("DROP TABLE Cache")
    connection.close()
    for use in (
        lambda: records.get("tag r a"),
        lambda: records.put("tag r a", b""),
        lambda: records.delete("tag r a"),
        lambda: records.first("tag "),
        lambda: list(records.scan("tag ")),
    ):
        with pytest.raises(StorageFailed, match=str(directory)):
            use()
