"""The history on disk: it adds up over processes, is bounded, and begins anew where it is damaged."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.disk.records import SQLiteRecords
from storage.errors import StorageFailed
from storage.maintenance import usage as module
from storage.maintenance.usage import DAY, HOUR, KEEP_DAYS, KEEP_HOURS, MOVES_KEPT, Counters, Move, Usage, Use
from storage.oci import Digest, Tag
from tests.conftest import Clock

ALPINE, HUB = "docker.io/library/alpine", "docker.io"
LATEST = Tag("latest")
OLD, NEW = Digest.of(b"old"), Digest.of(b"new")


@pytest.fixture
def records(tmp_path: Path) -> Iterator[SQLiteRecords]:
    found = SQLiteRecords(tmp_path / "records")
    yield found
    found.close()


@pytest.fixture
def clock() -> Clock:
    return Clock(1_699_999_200.0)  # 2023-11-14 22:00 UTC: an hour begins


@pytest.fixture
def usage(records: SQLiteRecords, clock: Clock) -> Usage:
    return Usage(records, clock)


def count(usage: Usage, at: float, namespace: str = HUB, requests: int = 1) -> None:
    usage.record({}, [], {(int(at) // HOUR * HOUR, namespace): Counters(requests=requests)})


def requests(usage: Usage, since: float, until: float | None = None) -> dict[str, int]:
    return {namespace: each.requests for namespace, each in usage.stats(since, until).items()}


# Uses


def test_uses_add_up(usage: Usage) -> None:
    assert usage.use(ALPINE, "3") is None
    usage.record({(ALPINE, "3"): Use(2, 20.5, 10.0), (ALPINE, OLD): Use(1, 20.0, 20.0)}, [], {})
    usage.record({(ALPINE, "3"): Use(3, 15.0, 5.0)}, [], {})
    assert usage.use(ALPINE, "3") == Use(5, 20.5, 5.0)
    assert usage.use(ALPINE, OLD) == Use(1, 20.0, 20.0)
    assert usage.use("docker.io/library/alpin", "3") is None


def test_two_processes_add_up(tmp_path: Path, clock: Clock) -> None:
    def record() -> None:
        records = SQLiteRecords(tmp_path / "records")
        usage = Usage(records, clock)
        for _ in range(20):
            usage.record(
                {(ALPINE, "3"): Use(1, 1.0, 1.0)}, [], {(int(clock()), HUB): Counters(requests=1, hits=1)}
            )
        records.close()

    threads = [threading.Thread(target=record) for _ in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    records = SQLiteRecords(tmp_path / "records")
    usage = Usage(records, clock)
    assert usage.use(ALPINE, "3") == Use(40, 1.0, 1.0)
    assert usage.stats(clock()) == {HUB: Counters(requests=40, hits=40)}
    records.close()


# Moves


def test_moves_are_in_order_whoever_records_them_first(usage: Usage) -> None:
    back, forth = Move(2.0, NEW, OLD), Move(1.0, OLD, NEW)
    usage.record({}, [(ALPINE, LATEST, back)], {})
    usage.record({}, [(ALPINE, LATEST, forth), (ALPINE, Tag("edge"), back)], {})
    assert usage.moves(ALPINE, LATEST) == [forth, back]
    assert usage.moves(ALPINE, "edge") == [back]


def test_the_last_moves_are_kept(usage: Usage) -> None:
    made = [Move(float(at), OLD, NEW) for at in range(MOVES_KEPT + 10)]
    usage.record({}, [(ALPINE, LATEST, each) for each in made], {})
    assert usage.moves(ALPINE, LATEST) == made[-MOVES_KEPT:]


# Counters


def test_hours_are_summed_where_they_are_known(usage: Usage, clock: Clock) -> None:
    count(usage, clock(), requests=1)
    clock.advance(HOUR)
    count(usage, clock(), requests=2)
    count(usage, clock(), "ghcr.io", requests=4)
    clock.advance(HOUR / 2)
    assert requests(usage, clock() - 1) == {HUB: 2, "ghcr.io": 4}
    assert requests(usage, clock() - HOUR) == {HUB: 3, "ghcr.io": 4}
    assert requests(usage, 0.0) == {HUB: 3, "ghcr.io": 4}
    assert requests(usage, clock() - HOUR, clock() - HOUR) == {HUB: 1}
    assert requests(usage, clock() + HOUR) == {}


def test_days_are_summed_where_hours_are_gone(usage: Usage, clock: Clock, records: SQLiteRecords) -> None:
    begun = clock()
    for requested in (1, 2, 4, 8, 16):
        count(usage, clock(), requests=requested)
        clock.advance(DAY)
    clock.advance(-DAY)
    hours = [key for key, _ in records.scan("stats hour ")]
    assert hours == [f"stats hour 202311{day}22 {HUB}" for day in (15, 16, 17, 18)]
    assert requests(usage, clock() - 3 * DAY) == {HUB: 2 + 4 + 8 + 16}
    assert requests(usage, clock() - 4 * DAY) == requests(usage, -1e20) == {HUB: 31}
    assert requests(usage, begun, begun + DAY) == {HUB: 1 + 2}


def test_the_last_72_hours_are_whole(usage: Usage, clock: Clock) -> None:
    count(usage, clock())
    asked = clock()  # the caller's clock is read a little earlier than ours
    clock.advance(3 * DAY + 1)
    count(usage, clock(), requests=2)
    assert requests(usage, asked) == {HUB: 3}
    assert requests(usage, asked + HOUR) == {HUB: 2}


def test_old_days_go(usage: Usage, clock: Clock, records: SQLiteRecords) -> None:
    count(usage, clock())
    clock.advance(KEEP_DAYS)
    count(usage, clock(), requests=2)
    assert requests(usage, 0.0) == {HUB: 3}
    clock.advance(DAY)
    count(usage, clock(), requests=4)
    assert requests(usage, 0.0) == {HUB: 6}
    assert len(list(records.scan("stats day "))) == 2
    assert len(list(records.scan("stats hour "))) == 2


def test_old_periods_go_once_an_hour(usage: Usage, clock: Clock, records: SQLiteRecords) -> None:
    count(usage, clock())
    long_ago = clock() - KEEP_HOURS - HOUR
    count(usage, long_ago)
    assert len(list(records.scan("stats hour "))) == 2
    clock.advance(HOUR)
    usage.record({}, [], {})
    assert len(list(records.scan("stats hour "))) == 1


def test_what_is_derived() -> None:
    found = Counters(
        requests=20,
        hits=6,
        misses=2,
        revalidated=1,
        stale=1,
        negative=5,
        errors=5,
        hit_bytes=75,
        sent_bytes=100,
        received_bytes=30,
        upstream_requests=4,
    )
    assert (found.hit_ratio, found.byte_hit_ratio) == (0.8, 0.75)
    assert (found.bytes_saved, found.requests_saved) == (70, 16)
    nothing = Counters()
    assert (nothing.hit_ratio, nothing.byte_hit_ratio, nothing.bytes_saved) == (0.0, 0.0, 0)
    # A warmed cache has fetched more than it served.
    warmed = Counters(requests=1, received_bytes=10, upstream_requests=3)
    assert (warmed.bytes_saved, warmed.requests_saved) == (0, 0)


# Damage


@pytest.mark.parametrize("damaged", [b"", b"{", b"\xff", b"7", b"[1]", b'["a", 1, 2]', b'{"requests": "a"}'])
def test_a_damaged_record_is_as_none(
    usage: Usage, records: SQLiteRecords, clock: Clock, damaged: bytes
) -> None:
    keys = (f"use {ALPINE} latest", f"moves {ALPINE} latest", f"stats hour 2023111422 {HUB}")
    for key in keys:
        records.put(key, damaged)
    assert usage.use(ALPINE, LATEST) is None
    assert usage.moves(ALPINE, LATEST) == []
    assert usage.stats(clock()) == {HUB: Counters()}
    move = Move(1.0, OLD, NEW)
    usage.record({(ALPINE, LATEST): Use(1, 1.0, 1.0)}, [(ALPINE, LATEST, move)], {})
    count(usage, clock())
    assert usage.use(ALPINE, LATEST) == Use(1, 1.0, 1.0)
    assert usage.moves(ALPINE, LATEST) == [move]
    assert requests(usage, clock()) == {HUB: 1}


def test_all_is_recorded_or_nothing(usage: Usage, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise StorageFailed("in the middle")

    monkeypatch.setattr(module, "_add_counters", fail)
    with pytest.raises(StorageFailed):
        usage.record({(ALPINE, "3"): Use(1, 1.0, 1.0)}, [], {(int(clock()), HUB): Counters()})
    assert usage.use(ALPINE, "3") is None
