"""A thousand slow readers at once, of a blob that is there and of one that is coming in."""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from tests.processes import Place, descriptors, memory, place
from tests.upstream import Hold, Upstream
from tests.wire import Wire, connect

__all__ = ["place"]  # the fixture

pytestmark = pytest.mark.clients

READERS = 1000
BUFFER = 4 << 10  # bytes that a reader takes without reading
BOUND = 150 << 20  # bytes of memory
REPOSITORY = "library/alpine"
WARM, COLD = os.urandom(4 << 20), os.urandom(4 << 20)


@pytest.fixture
async def room() -> AsyncIterator[None]:
    """Descriptors enough for our ends of the connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4 * READERS:
        pytest.skip(f"only {hard} open files are allowed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def begin(stack: AsyncExitStack, url: str, digest: str) -> Wire:
    wire = await stack.enter_async_context(connect(url, buffer=BUFFER))
    await wire.send(f"GET /v2/{REPOSITORY}/blobs/{digest} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert (await wire.head())[0] == 200
    return wire


async def test_a_thousand_slow_readers_cost_little_and_slow_nobody(
    place: Place, upstream: Upstream, room: None
) -> None:
    warm, cold = upstream.blob(REPOSITORY, WARM), upstream.blob(REPOSITORY, COLD)
    image = upstream.image(REPOSITORY, "latest")
    place.tree["workers"] = 1
    place.tree["limits"] = {"connections_per_address": READERS + 50}
    server = await place.start()
    (worker,) = await server.workers()
    assert await worker.get(f"/v2/{REPOSITORY}/blobs/{warm}") == WARM
    await server.heard("fill.committed", digest=warm)
    hold = Hold(asyncio.Event(), after=len(COLD) // 2)
    upstream.next("GET", cold, hold)
    async with AsyncExitStack() as stack:
        readers: dict[Wire, bytes] = {}
        for number in range(READERS):
            content = COLD if number % 2 else WARM
            readers[await begin(stack, server.url, cold if number % 2 else warm)] = content
        assert await server.metric("entrepot_followers") == READERS / 2
        assert await worker.get(f"/v2/{REPOSITORY}/manifests/latest") == image.content
        assert memory(worker.pid) < BOUND
        hold.gate.set()
        # Whoever does read gets all, whatever the others do.
        for wire in list(readers)[-10:]:
            assert await wire.read(len(WARM)) == readers[wire]
        await server.heard("fill.committed", digest=cold)
        assert memory(worker.pid) < BOUND
    # They have left: nothing of them stays.
    for nth in range(1, READERS + 1):
        await server.heard("request.served", nth=nth, kind="blob")
    assert await server.metric("entrepot_followers") == 0
    assert descriptors(worker.pid).total() < 50
    assert upstream.bytes_sent == len(WARM) + len(COLD)


async def test_thousands_of_unknown_names_leave_little(place: Place, upstream: Upstream) -> None:
    place.tree["workers"] = 1
    place.tree["log"] = {"level": "error"}
    server = await place.start()
    (worker,) = await server.workers()
    before = memory(worker.pid)
    async with connect(server.url) as wire:
        for number in range(0, 6000, 100):
            names = [
                f"GET /v2/n{each}/a/manifests/t HTTP/1.1\r\nHost: x\r\n\r\n"
                for each in range(number, number + 100)
            ]
            await wire.send("".join(names).encode())
            for _ in names:
                assert (await wire.reply()).status == 404
    assert len(upstream.log) == 6000
    assert memory(worker.pid) - before < 40 << 20
