"""The requests of a process so far, and the slowest of the last ones."""

from __future__ import annotations

from proxy.telemetry.exchange import Exchange
from proxy.telemetry.recent_requests import NUMBER, SPAN, RecentRequests, RequestTotals
from tests.conftest import Clock


def add(recent: RecentRequests, *seconds: float) -> None:
    for each in seconds:
        exchange = Exchange(f"id-{each}", "docker.io", "library/alpine", "3", "manifest", "hit")
        recent.add("GET", exchange, 200, each, 2 * each)


def test_the_slowest_come_first(clock: Clock) -> None:
    recent = RecentRequests(clock)
    add(recent, 1.0, 3.0, 2.0)
    found = recent.slowest()
    assert [each.first for each in found] == [3.0, 2.0, 1.0]
    first = found[0]
    assert (first.at, first.seconds, first.id, first.method, first.status) == (
        clock(), 6.0, "id-3.0", "GET", 200,
    )  # fmt: skip
    assert (first.name, first.reference, first.trace) == ("docker.io/library/alpine", "3", "")


def test_a_request_of_no_namespace_has_no_name(clock: Clock) -> None:
    recent = RecentRequests(clock)
    recent.add("GET", Exchange("1", kind="base"), 200, 0.1, 0.1)
    assert [(each.name, each.kind) for each in recent.slowest()] == [("", "base")]


def test_only_so_many_are_remembered(clock: Clock) -> None:
    recent = RecentRequests(clock)
    add(recent, *(number / 10 for number in range(3 * NUMBER)))
    add(recent, 0.05)
    expected = [number / 10 for number in range(3 * NUMBER - 1, 2 * NUMBER - 1, -1)]
    assert [each.first for each in recent.slowest()] == expected


def test_those_that_are_too_old_make_place(clock: Clock) -> None:
    recent = RecentRequests(clock)
    add(recent, *(float(number) for number in range(1, NUMBER + 1)))
    clock.advance(SPAN + 1)
    assert recent.slowest() == []
    add(recent, 0.5, 0.25)  # faster than all of the former
    assert [each.first for each in recent.slowest()] == [0.5, 0.25]


def test_old_ones_make_place_while_nobody_looks(clock: Clock) -> None:
    recent = RecentRequests(clock)
    add(recent, *(float(number) for number in range(1, NUMBER + 1)))
    clock.advance(SPAN + 1)
    add(recent, 100.0)  # finds that the others are old
    add(recent, 0.5)
    assert [each.first for each in recent.slowest()] == [100.0, 0.5]


def test_totals() -> None:
    totals = RequestTotals()
    for result in ("hit", "revalidated", "stale", "miss", "error", "negative", ""):
        totals.add(result, 2, 10)
    assert totals == RequestTotals(requests=14, served=6, misses=2, errors=2, sent=70)
