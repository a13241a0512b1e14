"""What every database of records owes, whichever it is: the one suite that all implementations pass."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.disk.records import SQLiteRecords
from storage.errors import StorageFailed
from storage.keys import BLOB, LINK, TAG
from storage.postgres.records import PostgresRecords
from storage.records import BATCH, Batch, Records
from tests.postgres import PostgresServer

MANY = 2 * BATCH + 200  # more than two batches of a scan
Open = Callable[[], Records]


@pytest.fixture
def sqlite(tmp_path: Path) -> Open:
    return lambda: SQLiteRecords(tmp_path / "records")


@pytest.fixture
def postgres(postgres_server: PostgresServer) -> Open:
    url = postgres_server.database()
    return lambda: PostgresRecords(url)


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.clients)])
def another(request: pytest.FixtureRequest) -> Iterator[Open]:
    """Opens the same records again, as another process would."""
    make: Open = request.getfixturevalue(request.param)
    opened: list[Records] = []

    def open_again() -> Records:
        opened.append(make())
        return opened[-1]

    yield open_again
    for each in opened:
        each.close()


@pytest.fixture
def records(another: Open) -> Records:
    return another()


def fill(records: Records, *keys: str) -> None:
    def work(batch: Batch) -> None:
        for key in keys:
            batch.put(key, key.encode())

    records.transaction(work)


# One record


def test_put_get_replace_delete(records: Records) -> None:
    assert records.get("tag a b") is None
    records.put("tag a b", b"one")
    records.put("tag a b", b"\0\xfftwo\n")
    assert records.get("tag a b") == b"\0\xfftwo\n"
    assert records.holds("tag a b")
    assert records.delete("tag a b") is True
    assert records.delete("tag a b") is False
    assert records.get("tag a b") is None
    assert not records.holds("tag a b")


@pytest.mark.parametrize("size", [0, 1, 40_000, 5 << 20])
def test_values_of_any_size(records: Records, size: int) -> None:
    value = bytes(range(256)) * (size // 256) + b"\\" * (size % 256)
    records.put("manifest a b", value)
    assert records.get("manifest a b") == value
    assert list(records.scan("manifest ")) == [("manifest a b", value)]


@pytest.mark.parametrize("key", ["tag a " + "x" * 1994, "pin a b?c*%_\\'\"", "pin é 😀\x01\x7f"])
def test_keys_of_any_kind(records: Records, key: str) -> None:
    records.put(key, b"1")
    assert records.get(key) == b"1"
    assert [*records.scan(key[:4])] == [(key, b"1")]
    assert records.get(key[:-1]) is records.get(key + "x") is None
    assert records.delete(key)


# Scans


def test_a_scan_is_in_order_and_within_its_prefix(records: Records) -> None:
    expected = ["tag a B", "tag a _", "tag a a", "tag a a.b", "tag a b"]
    fill(records, "tag a/b x", "tag a-b x", "tagg a a", "tag", *expected[::-1])
    assert list(records.scan("tag a ")) == [(key, key.encode()) for key in expected]
    assert list(records.keys("tag a ")) == expected
    assert list(records.keys("tag ")) == [*expected, "tag a-b x", "tag a/b x"]
    assert list(records.scan("link ")) == list(records.keys("link ")) == []


def test_the_order_is_that_of_bytes_whatever_the_language(records: Records) -> None:
    order = ["k -", "k .", "k 10", "k 9", "k A", "k Z", "k _", "k a", "k z", "k é", "k ￿", "k 😀"]
    fill(records, *sorted(order, key=len), *order[::-1])
    assert list(records.keys("k ")) == order
    assert [key for key, _ in records.scan("k ", "a")] == order[8:]


def test_a_scan_begins_after_what_need_not_be_there(records: Records) -> None:
    fill(records, "tag r a", "tag r b", "tag r c")
    after = {last: [key[6:] for key, _ in records.scan("tag r ", last)] for last in ("", "a", "aa", "c", "z")}
    assert after == {"": ["a", "b", "c"], "a": ["b", "c"], "aa": ["b", "c"], "c": [], "z": []}


def test_a_scan_over_many_batches_misses_none_and_repeats_none(records: Records) -> None:
    keys = [f"tag r {number:05}" for number in range(MANY)]
    fill(records, *keys[::-2], *keys[::2], "tag q z", "tag s 0")  # in no order, and beside neighbours
    assert [key for key, _ in records.scan("tag r ")] == keys
    assert list(records.keys("tag r ")) == keys


def test_a_scan_goes_on_past_what_is_put_and_deleted_meanwhile(records: Records) -> None:
    keys = [f"tag r {number:05}" for number in range(MANY)]
    fill(records, *keys)
    scan = records.scan("tag r ")
    seen = [next(scan)[0]]
    for key in (keys[0], keys[BATCH + 200]):  # behind it; ahead, in a batch not yet read
        records.delete(key)
    records.put("tag r 99999", b"")
    seen += [key for key, _ in scan]
    assert seen == [key for key in keys if key != keys[BATCH + 200]] + ["tag r 99999"]


def test_first_skips_from_group_to_group(records: Records) -> None:
    fill(records, *(f"tag {name} {tag}" for name in ("a", "a-b", "a/b", "b") for tag in "123"))
    assert records.first("tag ") == "tag a 1"
    assert records.first("tag ", "a!") == "tag a-b 1"
    assert records.first("tag ", "a/b!") == "tag b 1"
    assert records.first("tag ", "b!") is None


def test_groups_skip_from_one_field_to_the_next(records: Records) -> None:
    fill(records, "link a 1", "link a 2", "link a-b 1", "link a/b 1", "link b 1", "links c 1", "link é 1 2")
    assert list(records.groups("link ")) == ["a", "a-b", "a/b", "b", "é"]
    assert list(records.groups("link ", "a")) == ["a-b", "a/b", "b", "é"]
    assert list(records.groups("link ", "a-")) == ["a-b", "a/b", "b", "é"]
    assert list(records.groups("link b ")) == ["1"]
    assert list(records.groups("tag ")) == []


def test_there_may_be_many_groups(records: Records) -> None:
    names = [f"r{number:05}" for number in range(MANY)]
    fill(records, *(f"link {name} {each}" for name in names for each in "12"))
    assert list(records.groups("link ")) == names


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    max_examples=30,
    deadline=None,
)
@given(st.sets(st.text("Aa0./_- ", max_size=6), max_size=12), st.text("Aa0./_- ", max_size=4))
def test_a_scan_is_what_sorting_the_keys_would_give(records: Records, keys: set[str], after: str) -> None:
    for key in list(records.keys("")):
        records.delete(key)
    fill(records, *("k" + key for key in keys | {"l" + key for key in keys}))
    found = [key for key, _ in records.scan("k", after)]
    assert found == sorted("k" + key for key in keys | {"l" + key for key in keys} if key > after)
    assert records.first("k", after) == (found[0] if found else None)


# Counts and tags


def test_a_count_is_of_a_prefix(records: Records) -> None:
    fill(records, "event a 1", "event a 2", "event ab 3", "event b 4")
    assert records.transaction(lambda batch: batch.count("event a ")) == 2
    assert records.transaction(lambda batch: batch.count("event ")) == 4
    assert records.transaction(lambda batch: batch.count("pin ")) == 0


def test_tags_are_found_by_what_they_point_to(records: Records) -> None:
    def found(repository: str, target: str) -> list[str]:
        return records.transaction(lambda batch: batch.tags_at(repository, target))

    for repository, tag, target in (
        ("a", "v2", "sha256:1"),
        ("a", "v1", "sha256:1"),
        ("a", "v3", "sha256:11"),
        ("ab", "v1", "sha256:1"),
        ("a/b", "v1", "sha256:1"),
    ):
        records.put(TAG.key(repository, tag), f"{target} 17.5".encode())
    records.put("manifest a sha256:1", b"sha256:1 17.5")
    records.put("tag a odd", b"sha256:1")  # it has no second field, hence no first
    records.put("tag a empty", b"")
    assert found("a", "sha256:1") == ["tag a v1", "tag a v2"]
    records.put("tag a v1", b"sha256:2 18.5")
    assert (found("a", "sha256:1"), found("a", "sha256:2")) == (["tag a v2"], ["tag a v1"])
    records.delete("tag a v2")
    assert found("a", "sha256:1") == []

    def work(batch: Batch) -> list[str]:
        batch.put("tag a v4", b"sha256:1 19.5")
        batch.delete("tag a v1")
        return batch.tags_at("a", "sha256:1") + batch.tags_at("a", "sha256:2")

    assert records.transaction(work) == ["tag a v4"]


# Transactions


@pytest.mark.parametrize("shared", [False, True])
def test_a_transaction_sees_its_changes_whoever_asks(records: Records, another: Open, shared: bool) -> None:
    other = another()
    records.put("a", b"1")

    def work(batch: Batch) -> list[bytes | None]:
        batch.put("b", b"2")
        assert batch.delete("a")
        assert not batch.delete("a")
        assert list(records.scan("")) == [("b", b"2")]
        assert records.first("") == "b"
        return [batch.get("a"), batch.get("b"), records.get("a"), records.get("b"), other.get("a")]

    assert records.transaction(work, shared) == [None, b"2", None, b"2", b"1"]
    assert list(other.scan("")) == [("b", b"2")]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyError, StorageFailed])
def test_a_transaction_is_whole_or_nothing(records: Records, error: type[Exception], shared: bool) -> None:
    def work(batch: Batch) -> None:
        batch.put("a", b"1")
        raise error("a slip of the work is none of the database")

    with pytest.raises(error):
        records.transaction(work, shared)
    assert records.get("a") is None
    records.put("b", b"2")
    assert records.get("b") == b"2"


def test_transactions_of_several_lose_nothing(records: Records, another: Open) -> None:
    other = another()

    def add(batch: Batch) -> None:
        batch.put("n", str(int(batch.get("n") or b"0") + 1).encode())

    with ThreadPoolExecutor(4) as pool:
        for shared in (False, True, True) * 5:
            for each in (records, other):
                pool.submit(each.transaction, add, shared)
    assert records.get("n") == b"30"


def test_shared_transactions_are_as_if_one_came_after_the_other(records: Records, another: Open) -> None:
    """Each reads what the other writes: if none saw the other, both would believe to be the first."""
    other = another()
    for number in range(20):
        together = threading.Barrier(2)

        def claim(
            by: Records, mine: str, theirs: str, number: int = number, together: threading.Barrier = together
        ) -> None:
            def work(batch: Batch) -> None:
                if batch.get(f"claim {number} {theirs}") is None:
                    batch.put(f"claim {number} {mine}", b"")

            together.wait()
            by.transaction(work, True)

        with ThreadPoolExecutor(2) as pool:
            for each in (pool.submit(claim, records, "a", "b"), pool.submit(claim, other, "b", "a")):
                each.result()
        assert len(list(records.keys(f"claim {number} "))) == 1


@pytest.mark.parametrize("way", ["put", "delete", "shared", "not shared"])
def test_nothing_is_written_while_a_transaction_runs_alone(records: Records, another: Open, way: str) -> None:
    other, begun, asked = another(), threading.Event(), threading.Event()
    records.put("a", b"1")

    def change(batch: Batch) -> None:
        batch.put("a", b"2")

    def meddle() -> None:
        begun.wait()
        asked.set()
        if way == "put":
            other.put("a", b"2")
        elif way == "delete":
            other.delete("a")
        else:
            other.transaction(change, way == "shared")

    def work(batch: Batch) -> list[bytes | None]:
        begun.set()
        asked.wait()
        return [batch.get("a") for _ in range(50)]

    with ThreadPoolExecutor(1) as pool:
        meddling = pool.submit(meddle)
        assert records.transaction(work) == [b"1"] * 50
        meddling.result()
    assert records.get("a") == (None if way == "delete" else b"2")


def test_a_shared_transaction_sees_what_it_waited_for(records: Records, another: Open) -> None:
    """Its work begins after the other's end: so it reads what that has written."""
    other, begun, asked = another(), threading.Event(), threading.Event()

    def slow(batch: Batch) -> None:
        batch.put("a", b"1")
        begun.set()
        asked.wait()

    def wait() -> bytes | None:
        begun.wait()
        asked.set()
        seen = []

        def work(batch: Batch) -> None:
            seen.append(batch.get("a"))

        other.transaction(work, True)
        assert len(seen) == 1
        return seen[0]

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait)
        records.transaction(slow)
        assert waiting.result() == b"1"


# Links and blobs


def test_the_links_to_a_blob_are_found_in_order(records: Records) -> None:
    keys = [LINK.key(f"a/{name}", f"sha256:{number}") for name in ("y", "x", "x-1") for number in range(3)]
    fill(records, *keys, "links a/x sha256:1", TAG.key("a/x", "sha256:1"))
    assert records.linking("sha256:1") == [LINK.key(f"a/{name}", "sha256:1") for name in ("x", "x-1", "y")]
    assert records.linking("sha256:") == records.linking("sha256:11") == []
    records.delete(LINK.key("a/x", "sha256:1"))
    assert records.linking("sha256:1") == [LINK.key(f"a/{name}", "sha256:1") for name in ("x-1", "y")]


def test_a_transaction_finds_the_links_that_it_makes(records: Records) -> None:
    key = LINK.key("a/x", "sha256:1")

    def work(batch: Batch) -> list[str]:
        batch.put(key, b"1 1.0")
        return records.linking("sha256:1")

    assert records.transaction(work) == [key]
    assert records.linking("sha256:1") == [key]

    def undone(batch: Batch) -> None:
        batch.delete(key)
        assert records.linking("sha256:1") == []
        raise StorageFailed("no")

    with pytest.raises(StorageFailed):
        records.transaction(undone)
    assert records.linking("sha256:1") == [key]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.integers(0, 9), st.integers(0, 5), max_size=10), st.integers(1, 4), st.integers(0, 6)
)
def test_blobs_are_in_the_order_of_their_values(
    records: Records, found: dict[int, int], limit: int, start: int
) -> None:
    def work(batch: Batch) -> None:
        for number in range(10):
            batch.delete(BLOB.key(f"sha256:{number}"))
        for number, value in found.items():
            batch.put(BLOB.key(f"sha256:{number}"), b"%d x" % value)
        batch.put(TAG.key("a", "b"), b"0")

    records.transaction(work)
    expected = sorted((b"%d x" % value, BLOB.key(f"sha256:{number}")) for number, value in found.items())
    after, seen = (BLOB.key("sha256:5"), b"%d x" % start), []
    while rows := records.oldest(after, limit):
        assert len(rows) <= limit
        seen += rows
        after = rows[-1]
    beyond = b"%d x" % start, BLOB.key("sha256:5")
    assert seen == [(key, value) for value, key in expected if (value, key) > beyond]


# Several who look


def test_two_see_each_other_at_once(records: Records, another: Open) -> None:
    other = another()
    records.put("tag r a", b"1")
    assert other.get("tag r a") == b"1"
    other.put("tag r a", b"2")
    other.put("tag r b", b"3")
    assert list(records.scan("tag r ")) == [("tag r a", b"2"), ("tag r b", b"3")]
    records.delete("tag r a")
    records.close()
    assert other.first("tag ") == "tag r b"


def test_records_outlive_whoever_put_them(records: Records, another: Open) -> None:
    records.put("tag r a", b"1")
    records.close()
    assert another().get("tag r a") == b"1"


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


def test_what_is_closed_takes_nothing(records: Records) -> None:
    records.put("a", b"1")
    records.close()
    records.close()
    with pytest.raises(StorageFailed, match="closed"):
        records.put("a", b"2")
    with pytest.raises(StorageFailed, match="closed"):
        records.transaction(lambda batch: batch.put("a", b"2"))


def test_one_at_a_time_has_a_turn(records: Records, another: Open) -> None:
    other = another()
    with records.turn("collect") as first:
        assert first
        with other.turn("collect") as second, other.turn("scrub") as elsewhere:
            assert second == (not records.remote)  # a database on one machine leaves that to others
            assert elsewhere
        other.put("a", b"1")
        assert records.get("a") == b"1"
    with other.turn("collect") as third:
        assert third


def test_a_version_is_another_after_a_change_if_it_is_told(records: Records, another: Open) -> None:
    other = another()
    records.put("a", b"1")
    before = records.version()
    assert (before is None) == records.remote
    for change in (other, records):
        change.put("a", b"2")
        after = records.version()
        assert after is None or after != before
        before = after
