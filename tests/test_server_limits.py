"""Limits and what is known of upstreams, over the three workers of one server."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import AsyncExitStack

import aiohttp
import pytest

from tests.processes import Place, Worker, place
from tests.upstream import Hold, RetryAfter, Upstream
from tests.upstream_client import USER
from tests.wire import connect

__all__ = ["place"]  # the fixture

pytestmark = pytest.mark.clients

REPOSITORY = "library/alpine"
PATH = f"/v2/{REPOSITORY}"


@pytest.fixture
def three(place: Place) -> Place:
    """With as many workers."""
    place.tree["workers"] = 3
    return place


def blobs(upstream: Upstream, number: int) -> list[tuple[str, Hold]]:
    """Blobs, whose transfers stand still at the beginning."""
    found = []
    for _ in range(number):
        name = upstream.blob(REPOSITORY, os.urandom(100_000))
        found.append((name, Hold(asyncio.Event(), after=1000)))
        upstream.next("GET", *found[-1])
    return found


def transfers(upstream: Upstream) -> int:
    return sum(each.startswith("GET blob") for each in upstream.log)


@pytest.mark.errors("worker.died")
async def test_so_many_transfers_and_a_killed_workers_slot_is_free(three: Place, upstream: Upstream) -> None:
    three.namespace["upstream"]["max_fills"] = 2
    image = upstream.image(REPOSITORY)
    names, holds = zip(*blobs(upstream, 3), strict=True)
    server = await three.start()
    workers = await server.workers()
    again = await server.worker(workers[2].pid)
    async with asyncio.TaskGroup() as pulls:
        lost = pulls.create_task(failing(workers[0], f"{PATH}/blobs/{names[0]}"))
        await holds[0].reached.wait()
        held = pulls.create_task(workers[1].get(f"{PATH}/blobs/{names[1]}"))
        await holds[1].reached.wait()
        waiting = pulls.create_task(workers[2].get(f"{PATH}/blobs/{names[2]}"))
        await asyncio.sleep(0)  # it is asked
        # What needs no slot is not held up.
        assert await again.get(f"{PATH}/manifests/{image.digest}") == image.content
        assert transfers(upstream) == 2
        os.kill(workers[0].pid, signal.SIGKILL)
        await holds[2].reached.wait()
        for each in holds:
            each.gate.set()
    assert lost.result()
    await server.heard("fill.committed", nth=2)
    (left,) = server.partial()
    assert names[0].rpartition(":")[2] in left.name
    left.unlink()
    assert len(held.result()) == len(waiting.result()) == 100_000


async def test_transfers_of_workers_that_drain_after_a_reload_are_counted(
    place: Place, upstream: Upstream
) -> None:
    place.tree["workers"] = 1
    place.namespace["upstream"]["max_fills"] = 1
    image = upstream.image(REPOSITORY)
    names, holds = zip(*blobs(upstream, 2), strict=True)
    server = await place.start()
    (old,) = await server.workers()
    async with asyncio.TaskGroup() as pulls:
        pulls.create_task(old.get(f"{PATH}/blobs/{names[0]}"))
        await holds[0].reached.wait()
        server.send(signal.SIGHUP)
        await server.heard("config.reloaded")
        (pid,) = set(server.pids()) - {old.pid}
        new, again = await server.worker(pid), await server.worker(pid)
        pulls.create_task(new.get(f"{PATH}/blobs/{names[1]}"))
        await asyncio.sleep(0)  # it is asked
        assert await again.get(f"{PATH}/manifests/{image.digest}") == image.content
        assert transfers(upstream) == 1
        for each in holds:
            each.gate.set()
        await holds[1].reached.wait()
    await server.heard("fill.committed", nth=2)


async def failing(worker: Worker, path: str) -> bool:
    try:
        await worker.get(path)
    except aiohttp.ClientError:
        return True
    return False


async def test_whoever_has_a_slot_free_transfers_all_that_it_allows(three: Place, upstream: Upstream) -> None:
    three.namespace["upstream"]["max_fills"] = 3
    held = blobs(upstream, 3)
    server = await three.start()
    worker = await server.worker(server.pids()[0])
    connections = [worker, await server.worker(worker.pid), await server.worker(worker.pid)]
    async with asyncio.TaskGroup() as pulls:
        for each, (name, _) in zip(connections, held, strict=True):
            pulls.create_task(each.get(f"{PATH}/blobs/{name}"))
        for _, hold in held:
            await hold.reached.wait()
        for _, hold in held:
            hold.gate.set()
    await server.heard("fill.committed", nth=3)


@pytest.mark.errors("worker.died")
async def test_an_address_may_have_so_many_connections(three: Place) -> None:
    three.tree["limits"] = {"connections_per_address": 4}
    server = await three.start()
    workers = await server.workers()
    async with AsyncExitStack() as stack:
        fourth = await stack.enter_async_context(connect(server.url))
        assert (await fourth.ask("GET", "/v2/")).status == 200
        async with connect(server.url) as fifth:
            assert await fifth.rest() == b""
        await server.heard("client.refused", connections=4)
        os.kill(workers[0].pid, signal.SIGKILL)
        await server.heard("worker.died")
        async with connect(server.url) as another:
            assert (await another.ask("GET", "/v2/")).status == 200
    assert len(server.said("client.refused")) == 1


async def test_a_failing_upstream_is_found_out_once(three: Place, upstream: Upstream) -> None:
    server = await three.start()
    workers = await server.workers()
    await upstream.stop()
    for worker in workers:
        await worker.get(f"{PATH}/manifests/latest", 502)
    await server.heard("upstream.opened")
    assert await server.metric("entrepot_upstream_open") == 1
    assert len(server.said("upstream.opened")) == 1


async def test_a_limited_upstream_is_left_alone_by_all(three: Place, upstream: Upstream) -> None:
    upstream.next("GET", "latest", RetryAfter(600), times=9)
    server = await three.start()
    for worker in await server.workers():
        async with worker.ask(f"{PATH}/manifests/latest") as response:
            assert response.status == 503
            assert 0 < int(response.headers["Retry-After"]) <= 600
    assert upstream.log == [f"GET manifest {REPOSITORY}:latest"]


async def test_refused_credentials_are_told_once(three: Place, upstream: Upstream) -> None:
    upstream.auth = USER
    three.namespace["upstream"] |= {"username": USER.user, "password": "no longer"}
    server = await three.start()
    for worker in await server.workers():
        async with worker.ask(f"{PATH}/manifests/latest") as response:
            assert response.status == 404
    await server.heard("upstream.refused")
    assert await server.metric("entrepot_upstream_refused_total") == 3
    assert len(server.said("upstream.refused")) == 1
