"""Upstreams that refuse ranges of a blob, and send all of it: whoever tries again gets it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from proxy.cache import parts, rest
from proxy.cache.fetcher import HEARING
from proxy.cache.policy import Threshold
from proxy.cache.refusals import LASTING, RECENT, REST, RangeRefusals
from storage.errors import OriginFailed, RegistryError, TooManyRequests
from storage.oci import OCTETS, Descriptor, Digest, Span
from storage.registry import Blob, Registry
from storage.shared import SharedTable
from tests.conftest import Clock
from tests.test_fetcher import BODY, SIZE, Dealt, Rig, asked, leave_holes, to_ranges
from tests.test_fills import heard
from tests.upstream import Fault, Reset, Status, Upstream

NEVER = Threshold(share=1.0, clients=99)
LATER = {"Retry-After": "7"}


@pytest.fixture
async def rig(
    tmp_path: Path, upstream: Upstream, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Rig]:
    """Time passes while something waits for it; but looks for notes of other processes take their time."""
    sleep = asyncio.sleep

    async def pass_time(seconds: float) -> None:
        if seconds > HEARING:
            clock.advance(seconds)
            seconds = 0
        await sleep(seconds)

    monkeypatch.setattr(asyncio, "sleep", pass_time)
    monkeypatch.setattr(rest, "LINGER", 0.0)
    rig = Rig(tmp_path, upstream, clock, clock)
    rig.source = replace(rig.source, client="0123456789abcdef")
    yield rig
    await rig.close()
    for path in rig.partial.iterdir():
        path.unlink()


async def attempts(
    rig: Rig, clock: Clock, digest: Digest, start: int, stop: int, lazy: Threshold | None
) -> list[str]:
    """What a client meets that comes again whenever it may, until it has the bytes."""
    met: list[str] = []
    while len(met) <= LASTING:
        try:
            assert await rig.read(digest, start, stop, lazy) == BODY[start:stop]
            return met
        except RegistryError as error:
            met.append(type(error).__name__)
            clock.advance(max(RECENT, error.retry_after or 0.0))
    raise AssertionError(f"it met {met}")


REFUSALS = {
    "429": (Status(429), "TooManyRequests"),
    "429 with a time": (Status(429, LATER), "TooManyRequests"),
    "503": (Status(503, LATER), "OriginFailed"),
    "403": (Status(403), "OriginDenied"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("before", ["fresh", "resumed", "cut"])
@pytest.mark.parametrize("lazy", [None, NEVER], ids=["default", "lazy"])
@pytest.mark.parametrize(("start", "stop"), [(0, SIZE), (300_000, 300_100)], ids=["all", "part"])
async def test_a_pull_that_can_succeed_does(
    rig: Rig,
    upstream: Upstream,
    clock: Clock,
    refusal: str,
    before: str,
    lazy: Threshold | None,
    start: int,
    stop: int,
) -> None:
    fault, error = REFUSALS[refusal]
    digest = Digest(upstream.blob("a/b", BODY))
    if before == "resumed":
        await leave_holes(rig, digest, upstream, (0, 1000), (50_000, 90_000))
    elif before == "cut":  # clients have headers, and go on
        upstream.next("GET", digest, Reset(after=40))
    upstream.next("GET", to_ranges, fault, times=1000)
    met = await attempts(rig, clock, digest, start, stop, lazy)
    assert set(met) <= ({error, "OriginFailed"} if before == "cut" else {error})
    if lazy is None:
        # Who knows the size of the blob is kept waiting.
        assert len(met) == (LASTING if before == "resumed" and refusal.startswith("429") else 0)
    assert asked(upstream).count((0, 0)) == (2 if (lazy, before) == (None, "cut") else 1)
    with suppress(rest.Idle):
        await rig.fills.ended(digest)
    assert rig.store.files.path(digest).read_bytes() == BODY


@pytest.mark.parametrize("lazy", [None, NEVER], ids=["default", "lazy"])
@pytest.mark.parametrize("fault", [Status(503), Status(429, LATER), Status(404)], ids=str)
async def test_an_outage_is_no_refusal_of_ranges(
    rig: Rig, upstream: Upstream, clock: Clock, lazy: Threshold | None, fault: Fault
) -> None:
    digest = Digest(upstream.blob("a/b", BODY))
    await leave_holes(rig, digest, upstream, (0, 1000), (50_000, 90_000))
    down = [digest]
    for method in ("GET", "HEAD"):
        upstream.next(method, lambda request: request.reference in down, fault, times=100)
    for _ in range(2 if isinstance(fault, Status) and fault.code == 429 else 2 * LASTING):
        with pytest.raises(RegistryError):  # a limit that lasts would be taken for a refusal
            await rig.read(digest, 300_000, 300_100, lazy)
        clock.advance(60)
    down.clear()
    upstream.clear()
    assert await rig.read(digest, 300_000, 300_100, lazy) == BODY[300_000:300_100]
    assert (0, 0) not in asked(upstream)


def test_all_processes_know_of_refusals(clock: Clock) -> None:
    table, digest = SharedTable(), Digest.of(b"a")
    one, other = (RangeRefusals(clock, table, "up", digest) for _ in range(2))
    error = TooManyRequests(retry_after=30)
    for number in range(LASTING):
        assert one.counts and not other.lasting, number
        one.count(error)
        assert not other.counts  # what is refused meanwhile says no more
        clock.advance(29)
        assert not other.counts
        clock.advance(1)
    assert other.lasting
    assert not RangeRefusals(clock, table, "up", Digest.of(b"b")).lasting
    assert not RangeRefusals(clock, table, "down", digest).lasting
    other.reset()
    assert not one.lasting


def test_a_refused_range_is_not_asked_for_again_at_once(clock: Clock) -> None:
    refusals = RangeRefusals(clock, SharedTable(), "up", Digest.of(b"a"))
    refusals.add(100, 200, OriginFailed("it failed"))
    for offset in (100, 199):
        with pytest.raises(OriginFailed, match="it failed"):
            refusals.check(offset)
    refusals.check(99)
    refusals.check(200)
    refusals.forgive(200, 300)
    with pytest.raises(OriginFailed):
        refusals.check(150)
    clock.advance(RECENT)
    refusals.check(150)
    refusals.add(100, 200, OriginFailed("it failed"))
    refusals.forgive(0, 101)
    refusals.check(150)


def test_refused_ranges_that_are_asked_for_again_are_not_kept(clock: Clock) -> None:
    refusals = RangeRefusals(clock, SharedTable(), "up", Digest.of(b"a"))
    for number in range(3):
        try:
            raise OriginFailed(str(number))
        except OriginFailed as error:
            refusals.add(number, number + 1, error)
    assert [str(each) for each in refusals.errors()] == ["0", "1", "2"]
    assert all(each.__traceback__ is None for each in refusals.errors())
    clock.advance(RECENT)
    refusals.add(3, 4, OriginFailed("3"))
    assert [str(each) for each in refusals.errors()] == ["3"]


def test_pauses_grow_until_one_more_transfer_is_accepted(clock: Clock) -> None:
    refusals, error = RangeRefusals(clock, SharedTable(), "up", Digest.of(b"a")), OriginFailed("it failed")

    def pause(error: RegistryError) -> float:
        assert not refusals.paused
        refusals.pause(error)
        refusals.pause(OriginFailed("it failed as well"))  # at the same time
        before = clock()
        while refusals.paused:
            clock.advance(0.125)
        return clock() - before

    assert [pause(error) for _ in range(8)] == [0.25, 0.5, 1, 2, 4, 8, 10, 10]
    refusals.accepted()
    assert [pause(error) for _ in range(2)] == [0.25, 0.5]
    refusals.accepted()
    later = [pause(OriginFailed("it failed", retry_after=seconds)) for seconds in (0.0, 3, 0.5, 3600)]
    assert later == [0.25, 3, 1, REST]
    refusals.pause(error)
    refusals.pause(TooManyRequests("for longer", retry_after=5))
    clock.advance(4)
    assert refusals.paused
    refusals.resume()
    assert pause(error) == 0.25
    refusals.end()
    clock.advance(1e6)
    assert refusals.paused
    assert refusals.ended


def test_it_is_asked_with_care_for_as_long_after_a_pause_as_that_was(clock: Clock) -> None:
    refusals = RangeRefusals(clock, SharedTable(), "up", Digest.of(b"a"))
    assert not refusals.wary
    refusals.pause(OriginFailed("it failed", retry_after=3))
    clock.advance(5.75)
    assert (refusals.paused, refusals.wary) == (False, True)
    clock.advance(0.25)
    assert not refusals.wary


class Faulty(Registry):
    """An origin whose ranges meet a fault of the program; with `blob` it sends all of that."""

    def __init__(self, blob: Blob | None = None) -> None:
        self.asked = 0
        self._blob = blob

    async def resolve_blob(self, repository: str, digest: Digest) -> Descriptor:
        return Descriptor(OCTETS, digest, SIZE)

    async def get_blob(self, repository: str, digest: Digest, span: Span | None = None) -> Blob:
        if span is None and self._blob is not None:
            return self._blob
        self.asked += 1
        raise LookupError("a fault")


@pytest.mark.errors("fill.failed")
async def test_a_fault_in_a_range_is_met_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "ASSUMED", 1)
    digest, gate = Digest.of(BODY), asyncio.Event()
    origin = Faulty(Dealt(digest, 0, SIZE, gate))
    rig.source = replace(rig.source, origin=origin)
    failed = heard("fill.failed")
    assert await rig.read(digest, 0, 1000) == BODY[:1000]
    waiting = asyncio.create_task(rig.read(digest, 900_000, 900_100))
    await failed.wait()
    gate.set()
    assert await waiting == BODY[900_000:900_100]  # the fill brings it
    await rig.fills.ended(digest)
    assert origin.asked == 1


@pytest.mark.errors("fill.failed")
async def test_a_fault_in_a_range_of_a_lazy_namespace_is_told(rig: Rig) -> None:
    origin = Faulty()
    rig.source = replace(rig.source, origin=origin)
    with pytest.raises(OriginFailed, match="a range of a/b could not be fetched"):
        await rig.read(Digest.of(BODY), 900_000, 900_100, NEVER)
    with suppress(OriginFailed):
        await rig.fills.ended(Digest.of(BODY))
    assert origin.asked == 1
