"""Queues on disk: order, whoever puts; what is pending; what is left of webhooks that are gone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from proxy.server.fork import Parent
from proxy.webhooks.event import Event, EventAction
from proxy.webhooks.queue import DeliveryState, Queue
from storage.disk.records import SQLiteRecords
from tests.conftest import Clock
from tests.forks import forking

MANY = 1000


def happening(number: int, action: EventAction = "push") -> Event:
    return Event(id=str(number), at=number, action=action, kind="manifest", repository="local/a")


def ids(queue: Queue, webhook: str, after: str = "", limit: int = 100) -> list[str]:
    return [each.event.id for each in queue.read(webhook, after, limit) if each.event]


@pytest.fixture
def records(tmp_path: Path, clock: Clock) -> Iterator[SQLiteRecords]:
    records = SQLiteRecords(tmp_path / "records", clock)
    yield records
    records.close()


@pytest.fixture
def queue(records: SQLiteRecords, clock: Clock) -> Queue:
    return Queue(records, clock)


def test_each_webhook_has_its_own_in_order(queue: Queue) -> None:
    queue.put([(happening(1), ["a", "b"]), (happening(2), ["b"])], MANY)
    assert queue.put([(happening(3), ["b", "a"])], MANY) == {"a": 1, "b": 1}
    assert ids(queue, "a") == ["1", "3"]
    assert ids(queue, "b") == ["1", "2", "3"]
    assert ids(queue, "c") == []
    first = queue.read("b", "", 1)[0]
    assert ids(queue, "b", first.key, 1) == ["2"]


def test_a_name_is_not_another_one_s_beginning(queue: Queue) -> None:
    queue.put([(happening(1), ["ci"]), (happening(2), ["ci-2"])], MANY)
    assert ids(queue, "ci") == ["1"]


@pytest.mark.parametrize("seconds", [-86400.0, 0.0, 86400.0])
def test_a_clock_that_is_set_changes_no_order(queue: Queue, clock: Clock, seconds: float) -> None:
    queue.put([(happening(1), ["a"])], MANY)
    clock.advance(seconds)
    queue.put([(happening(2), ["a"])], MANY)
    assert ids(queue, "a") == ["1", "2"]


def test_the_order_survives_the_loss_of_the_number(
    queue: Queue, records: SQLiteRecords, clock: Clock
) -> None:
    queue.put([(happening(1), ["a"]), (happening(2), ["a"])], MANY)
    records.delete("number")
    clock.advance(1)
    queue.put([(happening(3), ["a"])], MANY)
    assert ids(queue, "a") == ["1", "2", "3"]


async def test_processes_do_not_get_into_each_other_s_way(tmp_path: Path) -> None:
    directory = tmp_path / "records"

    async def put(first: int, parent: Parent) -> int:
        parent.report("ready")
        records = SQLiteRecords(directory)
        queue = Queue(records)
        for number in range(first, first + 20):
            queue.put([(happening(number), ["a"])], MANY)
        records.close()
        return 0

    async with forking() as forks:
        processes = [await forks.start(partial(put, first)) for first in (0, 20)]
        assert [await each.wait() for each in processes] == [0, 0]
    queue = Queue(SQLiteRecords(directory))
    found = [int(each) for each in ids(queue, "a")]
    queue.close()
    assert sorted(found) == list(range(40))
    assert [each for each in found if each < 20] == list(range(20))
    assert [each for each in found if each >= 20] == list(range(20, 40))


def test_what_is_removed_is_pending_no_more(queue: Queue) -> None:
    queue.put([(happening(number), ["a", "b"]) for number in range(3)], MANY)
    keys = [each.key for each in queue.read("a", "", 2)]
    state = DeliveryState(delivered_at=7.0)
    queue.remove("a", [*keys, "event a nothing"], state)
    assert (queue.pending("a"), queue.pending("b")) == (1, 3)
    assert ids(queue, "a") == ["2"]
    assert queue.oldest("a") == 2.0
    assert queue.state("a") == state
    assert queue.state("b") == DeliveryState()
    queue.remove("a", [each.key for each in queue.read("a", "", 2)])
    assert queue.oldest("a") is None
    assert queue.state("a") == state


def test_above_the_limit_pulls_are_refused_and_nothing_else(queue: Queue) -> None:
    given = [(happening(1), ["a"]), (happening(2, "pull"), ["a", "b"]), (happening(3), ["a"])]
    assert queue.put(given, 1) == {"a": 2, "b": 1}
    assert ids(queue, "a") == ["1", "3"]
    assert ids(queue, "b") == ["2"]


def test_settling_counts_anew_and_drops_what_nobody_is_told_of(queue: Queue, records: SQLiteRecords) -> None:
    queue.put([(happening(number), ["a", "gone"]) for number in range(3)], MANY)
    records.put("pending a", b"damaged")
    assert queue.pending("a") == 0
    queue.remove("gone", [], DeliveryState(error="away"))
    assert queue.settle(["a", "new"]) == {"gone": 3}
    assert (queue.pending("a"), queue.pending("gone"), queue.pending("new")) == (3, 0, 0)
    assert ids(queue, "gone") == []
    assert queue.state("gone") == DeliveryState()
    assert queue.settle(["a", "new"]) == {}


def test_what_cannot_be_read_is_told_as_such(queue: Queue, records: SQLiteRecords) -> None:
    queue.put([(happening(1), ["a"])], MANY)
    key = queue.read("a", "", 1)[0].key
    records.put(key, b"of another version")
    records.put("webhook a", b"\xff")
    assert [each.event for each in queue.read("a", "", 1)] == [None]
    assert queue.oldest("a") is None
    assert queue.state("a") == DeliveryState()
