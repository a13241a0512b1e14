"""Answers to ranges that are wrong, or all of the blob: one says nothing about the next ones."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from proxy.cache.policy import Threshold
from proxy.cache.range_requests import PATIENCE
from storage.oci import Digest
from tests.conftest import Clock
from tests.test_fetcher import BODY, SIZE, Rig, asked, impatient, leave_holes, rig, small, to_ranges
from tests.test_fills import heard
from tests.upstream import Fault, Hold, Request, Upstream
from tests.upstream.messages import Answer

__all__ = ["impatient", "rig", "small"]  # fixtures

NEVER = Threshold(share=1.0, clients=99)
WRONG: dict[str, Callable[[int, int], str]] = {
    "another start": lambda first, last: f"bytes {first + 1}-{last}/{SIZE}",
    "another size": lambda first, last: f"bytes {first}-{last}/{SIZE + 5}",
    "all of it": lambda first, last: f"bytes 0-{SIZE - 1}/{SIZE}",
    "no grammar": lambda first, last: "bytes of it",
}


@dataclass(frozen=True)
class WrongRange(Fault):
    how: str

    def strike(self, answer: Answer, request: Request) -> Answer:
        first = answer.offset
        answer.headers["Content-Range"] = WRONG[self.how](first, first + len(answer.content) - 1)
        return answer


@dataclass(frozen=True)
class Ignored(Fault):
    """All of the blob, whatever was asked for."""

    def strike(self, answer: Answer, request: Request) -> Answer:
        answer.headers.popall("Content-Range", None)
        return replace(answer, status=200, content=BODY, offset=0)


async def begin(rig: Rig, upstream: Upstream) -> tuple[Digest, asyncio.Event]:
    """A fill that is held, beside which the origin has sent a range."""
    digest, gate = Digest(upstream.blob("a/b", BODY)), asyncio.Event()
    upstream.next("GET", digest, Hold(gate, after=1000))
    assert await rig.read(digest, 0, 999) == BODY[:999]
    assert await rig.read(digest, 400_000, 450_000) == BODY[400_000:450_000]
    return digest, gate


def ranges_before(upstream: Upstream, stop: int) -> list[int]:
    """Where the ranges began that were asked for, from 800,000 on."""
    return [start for start, _ in asked(upstream) if 800_000 <= start < stop]


async def finish(rig: Rig, upstream: Upstream, digest: Digest, gate: asyncio.Event) -> None:
    gate.set()
    await rig.fills.ended(digest)
    assert rig.store.files.path(digest).read_bytes() == BODY
    assert asked(upstream).count((0, 0)) == 1


@pytest.mark.parametrize("how", WRONG)
async def test_a_wrong_range_is_asked_for_again(
    rig: Rig, upstream: Upstream, clock: Clock, small: None, how: str
) -> None:
    digest, gate = await begin(rig, upstream)
    refused = heard("fill.range_refused")
    upstream.next("GET", to_ranges, WrongRange(how))
    pull = asyncio.create_task(rig.read(digest, 800_000, 1_300_000))
    await refused.wait()
    clock.advance(0.25)
    assert await pull == BODY[800_000:1_300_000]
    assert ranges_before(upstream, 900_000) == [800_000, 800_000]
    await finish(rig, upstream, digest, gate)


@pytest.mark.parametrize("lazy", [None, NEVER], ids=["default", "lazy"])
@pytest.mark.parametrize("times", [1, PATIENCE])
async def test_who_ignores_a_range_is_asked_again_at_once(
    rig: Rig, upstream: Upstream, small: None, times: int, lazy: Threshold | None
) -> None:
    if lazy is None:
        digest, gate = await begin(rig, upstream)
    else:
        digest, gate = Digest(upstream.blob("a/b", BODY)), asyncio.Event()
        assert await rig.read(digest, 0, 1000, lazy) == BODY[:1000]
    for start in (800_000, 1_300_000):  # each good one counts
        upstream.next("GET", to_ranges, Ignored(), times=times)
        assert await rig.read(digest, start, start + 50_000, lazy) == BODY[start : start + 50_000]
    assert ranges_before(upstream, SIZE) == [800_000] * (times + 1) + [1_300_000] * (times + 1)
    if lazy is None:
        await finish(rig, upstream, digest, gate)
    await rig.fills.close()
    for path in rig.partial.iterdir():
        path.unlink()


async def test_who_ignores_all_ranges_is_asked_for_none_any_more(
    rig: Rig, upstream: Upstream, small: None
) -> None:
    digest, gate = await begin(rig, upstream)
    upstream.ranges, ignored = False, Hold(asyncio.Event(), after=None)
    upstream.next("GET", to_ranges, Hold(ignored.gate, after=0), times=PATIENCE)
    upstream.next("GET", to_ranges, ignored)
    ignored.gate.set()
    pull = asyncio.create_task(rig.read(digest, 800_000, 850_000))
    await ignored.reached.wait()
    gate.set()  # what is in sequence brings it
    assert await pull == BODY[800_000:850_000]
    assert await rig.read(digest, 1_300_000, 1_350_000) == BODY[1_300_000:1_350_000]
    assert ranges_before(upstream, SIZE) == [800_000] * (PATIENCE + 1)
    await rig.fills.ended(digest)
    assert rig.store.files.path(digest).read_bytes() == BODY


@pytest.mark.parametrize("fault", [Ignored(), *map(WrongRange, WRONG)], ids=str)
async def test_gaps_are_asked_for_again(rig: Rig, upstream: Upstream, fault: Fault) -> None:
    digest = Digest(upstream.blob("a/b", BODY))
    holes = ((0, 1000), (50_000, 90_000), (1_000_000, 1_500_000))
    await leave_holes(rig, digest, upstream, *holes)
    upstream.next("GET", lambda request: (request.range or "").startswith("bytes=90000-"), fault)
    assert await rig.read(digest, 0, SIZE) == BODY
    await rig.fills.ended(digest)
    assert asked(upstream) == [
        (1000, 50_000),
        (90_000, 1_000_000),
        (90_000, 1_000_000),
        (1_500_000, SIZE),
    ]
    assert rig.store.files.path(digest).read_bytes() == BODY
