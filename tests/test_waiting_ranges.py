"""Who waits while an origin refuses further transfers."""

from __future__ import annotations

from proxy.cache.readers import LOOK, BlobSource
from proxy.cache.waiting_ranges import WaitingRanges
from storage.registry import Registry
from tests.conftest import Clock

SOURCE = BlobSource("up", Registry(), "a/b")


def all_late(start: int, stop: int) -> int:
    return stop


def test_who_came_first_is_next(clock: Clock) -> None:
    waiting = WaitingRanges(clock)
    for start in (500, 100, 300):
        waiting.add(SOURCE, start, start + 50)
    waiting.add(SOURCE, 500, 550)  # it says so again, and keeps its place
    assert waiting.next(all_late) == (SOURCE, 500, 550)
    assert waiting.next(lambda start, stop: start + 10) == (SOURCE, 100, 110)
    assert waiting.next(lambda start, stop: start) is None  # it comes soon
    assert waiting.next(all_late) is None


def test_who_does_not_say_so_again_has_left(clock: Clock) -> None:
    waiting = WaitingRanges(clock)
    waiting.add(SOURCE, 100, 150)
    clock.advance(LOOK)
    waiting.add(SOURCE, 300, 350)
    clock.advance(LOOK)
    assert waiting.next(all_late) == (SOURCE, 300, 350)


def test_a_refusal_shows_that_no_place_is_free(clock: Clock) -> None:
    waiting = WaitingRanges(clock)
    waiting.places = 2
    waiting.refused(SOURCE, 100, 150)
    assert waiting.places == 0
    assert waiting.next(all_late) == (SOURCE, 100, 150)
