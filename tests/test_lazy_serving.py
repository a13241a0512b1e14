"""`entrepot serve` with three workers of a lazy namespace, which are killed: every byte comes once."""

from __future__ import annotations

import asyncio
import os
import signal

import aiohttp
import pytest

from tests.processes import Place, Worker, place
from tests.upstream import Hold, Status, Upstream

__all__ = ["place"]  # the fixture

pytestmark = pytest.mark.clients

REPOSITORY = "library/lazy"
STEP = 100_000
SIZE = 40 * STEP


def asked(upstream: Upstream) -> list[str | None]:
    return [each.range for each in upstream.requests if each.method == "GET" and each.kind == "blob"]


class Reader:
    """Reads parts of one blob by any worker."""

    def __init__(self, path: str, content: bytes) -> None:
        self.path = path
        self.content = content

    async def read(self, worker: Worker, *parts: int) -> None:
        """These hundred thousands of bytes."""
        header = ",".join(f"{part * STEP}-{part * STEP + STEP - 1}" for part in parts)
        body = await worker.get(self.path, 206, Range=f"bytes={header}")
        for part in parts:
            assert self.content[part * STEP : part * STEP + STEP] in body


@pytest.mark.errors("worker.died")
async def test_what_came_is_kept_whoever_is_killed(place: Place, upstream: Upstream) -> None:
    content = os.urandom(SIZE)
    name = upstream.blob(REPOSITORY, content)
    reader = Reader(f"/v2/{REPOSITORY}/blobs/{name}", content)
    place.tree["workers"] = 3
    place.namespace |= {"lazy": True, "lazy_until": {"clients": "never"}}
    server = await place.start()
    first, second, third = await server.workers()
    await reader.read(first, 1)
    await reader.read(second, 1)
    await reader.read(second, 2, 1, 5)  # the first fetches two of them
    await reader.read(third, 5, 2)
    assert sorted(asked(upstream), key=str) == [
        f"bytes={part * STEP}-{part * STEP + STEP - 1}" for part in (1, 2, 5)
    ]
    os.kill(first.pid, signal.SIGKILL)
    await server.heard("worker.died")
    await reader.read(third, 1, 7)
    await reader.read(second, 7, 5, 8)
    assert upstream.bytes_sent == 5 * STEP
    await server.kill()
    server = await place.start()
    first, second, third = await server.workers()
    await reader.read(first, 1, 2, 5, 7, 8)
    assert upstream.bytes_sent == 5 * STEP
    upstream.next("GET", name, Status(500), times=100)
    upstream.next("HEAD", name, Status(500), times=100)
    for worker in (second, first, third):
        await reader.read(worker, 2, 8)
        assert b"UNAVAILABLE" in await worker.get(reader.path, 502, Range="bytes=0-99")
        assert b"UNAVAILABLE" in await worker.get(reader.path, 502)
        await reader.read(worker, 7)
    await server.stop()
    assert upstream.bytes_sent == 5 * STEP
    for path in server.partial():
        path.unlink()


async def test_all_of_it_is_completed_by_any_worker(place: Place, upstream: Upstream) -> None:
    content = os.urandom(SIZE)
    name = upstream.blob(REPOSITORY, content)
    reader = Reader(f"/v2/{REPOSITORY}/blobs/{name}", content)
    place.tree["workers"] = 3
    place.namespace["lazy"] = True
    server = await place.start()
    first, second, third = await server.workers()
    await reader.read(first, 30)
    await reader.read(second, 10)
    assert await third.get(reader.path) == content
    await server.heard("fill.committed")
    await reader.read(second, 10, 39, 0)
    assert upstream.bytes_sent == SIZE
    assert server.partial() == []


@pytest.mark.errors("worker.died")
@pytest.mark.parametrize("lazy", [False, True], ids=["default", "lazy"])
async def test_parts_at_once_by_three_workers_of_which_one_is_killed(
    place: Place, upstream: Upstream, lazy: bool
) -> None:
    content = os.urandom(SIZE)
    name = upstream.blob(REPOSITORY, content)
    reader = Reader(f"/v2/{REPOSITORY}/blobs/{name}", content)
    place.tree["workers"] = 3
    place.namespace |= {"lazy": lazy, "lazy_until": {"share": "100%", "clients": "never"}}
    server = await place.start()
    workers, beside = await server.workers(), await server.workers()
    gate = asyncio.Event()
    upstream.next("GET", name, Hold(gate, 5 * STEP))  # the blob, or a part of it
    await reader.read(workers[0], 0)
    held = [asyncio.create_task(reader.read(each, *range(10, 18))) for each in workers]
    await asyncio.gather(*(reader.read(each, 30) for each in beside))
    os.kill(workers[0].pid, signal.SIGKILL)
    await server.heard("worker.died")
    gate.set()
    killed, *others = await asyncio.gather(*held, return_exceptions=True)
    # It may have come before, and the client may have asked another one again.
    assert killed is None or isinstance(killed, aiohttp.ClientError) or "another worker" in str(killed)
    assert others == [None, None]
    assert await workers[1].get(reader.path) == content
    await server.heard("fill.committed")
    assert upstream.bytes_sent <= SIZE + 8 * STEP + (4 << 20)  # what was under way to the one that was killed
    assert server.partial() == []
