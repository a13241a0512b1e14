"""Which bytes each transfer of a blob brings, and in which order, where clients read long ranges of it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.cache import parts
from proxy.cache.parts import Part, Parts
from storage.disk.extents import Extents

SIZE = 1000


class Watch:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LEAST": 10, "LONG": 20, "PIECE": 100, "ASSUMED": 5, "MEASURED": 0.25}.items():
        monkeypatch.setattr(parts, name, value)


@pytest.fixture
def watch() -> Watch:
    return Watch()


@pytest.fixture
def all_parts(watch: Watch) -> Parts:
    return Parts(Extents(), watch)


def granted(all_parts: Parts, start: int, stop: int) -> Part:
    """The first part of a range that a client reads."""
    part = all_parts.add(start, stop, in_pieces=True)
    assert all_parts.clip(part)
    part.requested = True
    assert all_parts.grant(part, SIZE)
    return part


def finish(
    all_parts: Parts, watch: Watch, part: Part, pace: float = 10, anywhere: bool = True
) -> Part | None:
    """All of it comes, in so many bytes per second; the part that its transfer brings next."""
    watch.now += (part.stop - part.position) / pace
    part.advance(part.stop - part.position, watch.now)
    following = all_parts.following(part, SIZE, anywhere)
    all_parts.remove(part)
    return following


def span(part: Part | None) -> tuple[int, int] | None:
    return None if part is None else (part.position, part.stop)


def test_a_short_range_is_one_part(all_parts: Parts) -> None:
    part = all_parts.add(500, 520, in_pieces=True)
    assert (all_parts.clip(part), span(part), part.left) == (True, (500, 520), 0)
    part = all_parts.add(600, 700)
    assert (all_parts.clip(part), span(part), part.left) == (True, (600, 700), 0)


def test_a_long_range_comes_piece_by_piece(all_parts: Parts, watch: Watch) -> None:
    part = granted(all_parts, 500, 900)
    assert span(part) == (500, 520)
    sizes = []
    following: Part | None = part
    while (following := finish(all_parts, watch, following, anywhere=False)) is not None:
        sizes.append(following.stop - following.position)
        assert span(following) == (following.start, following.stop)
        part = following
    assert (part.stop, sum(sizes)) == (900, 380)
    assert max(sizes) == 100
    assert list(all_parts) == []
    assert list(all_parts.taken) == [(500, 900)]


def test_pieces_are_smaller_the_less_is_missing(all_parts: Parts) -> None:
    assert all_parts.piece(SIZE) == 100
    all_parts.taken.add(0, 840)
    all_parts.take(840, 860)
    assert all_parts.piece(SIZE) == 80
    all_parts.take(860, 880)
    assert all_parts.piece(SIZE) == 40
    all_parts.take(880, 1000)
    assert all_parts.piece(SIZE) == 26
    assert all_parts.piece(0) == 10


def test_no_small_piece_is_left(all_parts: Parts, watch: Watch) -> None:
    all_parts.taken.add(0, 400)
    part = finish(all_parts, watch, granted(all_parts, 500, 629), anywhere=False)
    assert span(part) == (520, 629)


def test_what_is_asked_for_without_end_ends_where_a_long_range_begins_elsewhere(all_parts: Parts) -> None:
    first = all_parts.take(0, SIZE)
    first.advance(50, 0.0)
    short = all_parts.add(700, 710, in_pieces=True)
    all_parts.clip(short)
    assert all_parts.grant(short, SIZE)
    assert span(first) == (50, 700)
    granted(all_parts, 300, 600)
    assert span(first) == (50, 50 + 100)
    assert all_parts.gap(SIZE) == (150, 300)


def test_a_slow_transfer_stays_with_its_client(all_parts: Parts, watch: Watch) -> None:
    part = granted(all_parts, 500, 900)
    following = finish(all_parts, watch, part, pace=19)
    assert following is not None
    assert (span(following), following.home) == ((520, 620), -1)


def test_a_quick_one_also_brings_what_comes_first(all_parts: Parts, watch: Watch) -> None:
    part = finish(all_parts, watch, granted(all_parts, 500, 900), pace=40)
    assert part is not None
    assert (span(part), part.home) == ((0, 30), 520)
    part = finish(all_parts, watch, part, pace=40)
    assert part is not None
    assert (span(part), part.home) == ((520, 550), -1)
    part = finish(all_parts, watch, part, pace=40)
    assert part is not None
    assert (span(part), part.home) == ((30, 60), 550)
    part = finish(all_parts, watch, part, pace=40, anywhere=False)
    assert span(part) == (550, 580)
    part = finish(all_parts, watch, part or granted(all_parts, 0, 1), pace=40, anywhere=False)
    assert span(part) == (580, 610)


def test_a_client_waits_a_second_for_a_transfer_that_is_elsewhere(all_parts: Parts, watch: Watch) -> None:
    part = finish(all_parts, watch, granted(all_parts, 500, 900), pace=40)
    assert part is not None
    assert (span(part), part.home) == ((0, 30), 520)
    assert all_parts.late(520, 900) == 520  # soon
    assert all_parts.late(525, 900) == 525
    assert all_parts.late(561, 900) == 900  # a second and more
    assert all_parts.late(900, 950) == 950
    watch.now += 0.3
    part.advance(1, watch.now)
    assert all_parts.late(520, 900) == 900  # it has become slow
    assert all_parts.late(5, 100) == 100


def test_who_has_nothing_more_to_bring_to_its_client_brings_what_comes_first(
    all_parts: Parts, watch: Watch
) -> None:
    part = granted(all_parts, 500, 600)
    all_parts.taken.add(520, 600)  # others have brought them
    assert finish(all_parts, watch, part, anywhere=False) is None
    part = granted(all_parts, 600, 700)
    all_parts.taken.add(620, 700)
    following = finish(all_parts, watch, part)
    assert following is not None
    assert (span(following), following.left) == ((0, 20), 80)
    following = finish(all_parts, watch, following)
    assert following is not None
    assert (span(following), following.left) == ((20, 40), 60)
    for _ in range(2):
        following = finish(all_parts, watch, following or part)
    assert span(following) == (60, 80)
    assert finish(all_parts, watch, following or part) is None  # as many bytes as its client asked for


def test_one_that_nobody_waits_for(all_parts: Parts, watch: Watch) -> None:
    all_parts.taken.add(0, 100)
    part = all_parts.first(SIZE)
    assert span(part) == (100, 120)
    part = finish(all_parts, watch, part or granted(all_parts, 0, 1))
    assert span(part) == (120, 140)
    assert finish(all_parts, watch, part or granted(all_parts, 0, 1), anywhere=False) is None
    all_parts.taken.add(0, SIZE)
    assert all_parts.first(SIZE) is None


@pytest.mark.clients
@settings(max_examples=200)
@given(
    ranges=st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE)), max_size=8),
    steps=st.lists(
        st.tuples(st.integers(0, 20), st.sampled_from([3, 15, 50, math.inf]), st.booleans()), max_size=200
    ),
)
def test_each_byte_is_brought_once(
    ranges: list[tuple[int, int]], steps: list[tuple[int, float, bool]]
) -> None:
    watch = Watch()
    all_parts, came = Parts(Extents(), watch), Extents()
    all_parts.take(0, SIZE)
    waiting = [(start, min(SIZE, start + length)) for start, length in ranges]

    def bring(part: Part, number: int) -> None:
        assert came.gaps(part.position, part.position + number) == [(part.position, part.position + number)]
        came.add(part.position, part.position + number)
        part.advance(number, watch.now)

    def end(part: Part, anywhere: bool) -> None:
        if part.left and part.position == part.stop:
            all_parts.following(part, SIZE, anywhere)
        all_parts.remove(part)

    for number, pace, anywhere in steps:
        if waiting and number % 3 == 0:
            start, stop = waiting.pop()
            part = all_parts.add(start, stop, in_pieces=True)
            part.requested = all_parts.clip(part)
            if not (part.requested and all_parts.grant(part, SIZE)):
                all_parts.remove(part)
        elif present := list(all_parts):
            part = present[number % len(present)]
            watch.now += 1 / pace
            bring(part, min(part.stop - part.position, number * 5 + 1))
            if part.position == part.stop or number == 1:  # 1: it breaks off
                end(part, anywhere)
    while (present := list(all_parts)) or all_parts.gap(SIZE)[0] < SIZE:
        for part in present or [all_parts.take(*all_parts.gap(SIZE))]:
            if part.position < part.stop:
                bring(part, part.stop - part.position)
            end(part, True)
    assert list(came) == [(0, SIZE)]
