"""`entrepot serve` with two workers that are asked for ranges of one blob, and one of which is killed."""

from __future__ import annotations

import asyncio
import os
import re
import signal

import pytest

from storage.disk.extents import Extents
from tests.processes import Place, digest, place
from tests.upstream import Hold, Upstream

__all__ = ["place"]  # the fixture

pytestmark = pytest.mark.clients

REPOSITORY = "library/model"
MIB = 1 << 20
STARTS = (90 * MIB, 30 * MIB, 60 * MIB)
PART = 2 * MIB


def asked(upstream: Upstream) -> list[tuple[int, int]]:
    """The ranges that upstream was asked for."""
    found = [re.fullmatch(r"bytes=(\d+)-(\d*)", each.range) for each in upstream.requests if each.range]
    return [(int(each[1]), int(each[2] or 100 * MIB - 1) + 1) for each in found if each]


@pytest.mark.errors("worker.died")
@pytest.mark.parametrize("killed", ["writer", "follower"])
async def test_what_both_had_asked_for_is_kept_where_one_is_killed(
    place: Place, upstream: Upstream, killed: str
) -> None:
    content = os.urandom(100 * MIB)
    name = upstream.blob(REPOSITORY, content)
    path = f"/v2/{REPOSITORY}/blobs/{name}"
    hold = Hold(gate := asyncio.Event(), MIB)
    upstream.next("GET", name, hold)
    server = await place.start()
    writer, follower = await server.workers()
    async with writer.ask(path) as one, follower.ask(path) as two:
        begun = [await each.content.readexactly(MIB - 1) for each in (one, two)]
        writing, following = await server.workers()
        for start in STARTS:
            for each in (following, writing):
                body = await each.get(path, 206, Range=f"bytes={start}-{start + PART - 1}")
                assert body == content[start : start + PART]
        before = asked(upstream)
        assert sorted(before) == [(start, start + PART) for start in sorted(STARTS)]
        os.kill(writer.pid if killed == "writer" else follower.pid, signal.SIGKILL)
        await server.heard("worker.died")
        gate.set()
        left, had = (two, begun[1]) if killed == "writer" else (one, begun[0])
        assert await digest(left, had) == name
    # What had come is not asked for again, whoever goes on.
    extents = Extents(before)
    for start, stop in asked(upstream)[len(before) :]:
        assert extents.gap(start, stop) == (start, stop)
        extents.add(start, stop)
    await server.heard("fill.committed")
    assert server.partial() == []
