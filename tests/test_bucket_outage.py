"""Servers and buckets that are killed while clients push and pull: what was acknowledged is there.

Real servers, of two workers each, and a real bucket.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import obstore
import pytest

from storage.oci import Digest
from tests.conftest import OPEN
from tests.processes import Place, Server, place  # noqa: F401  a fixture
from tests.seaweed import Seaweed, seaweed_server

pytestmark = pytest.mark.clients

BLOBS = "/v2/local/team/app/blobs"
MOST = 3 << 20  # bytes of a blob
ERRORS = pytest.mark.errors("bucket.failed", "blob.damaged")


class Crowd:
    """Clients that push and pull until they are told to stop; `stored` is what was acknowledged.

    They begin requests only while there is a server, which is `serving`.
    """

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.url = ""
        self.serving = asyncio.Event()
        self.stored: dict[Digest, bytes] = {}
        self.refused = 0  # requests answered 503
        self._session = session
        self._moved = asyncio.Event()
        self._ended = False

    async def until(self, reached: Callable[[], bool]) -> None:
        while not reached():
            self._moved.clear()
            await self._moved.wait()

    async def end(self) -> None:
        self._ended = True

    async def repeat(self, work: Callable[[], Awaitable[int]]) -> None:
        while not self._ended:
            await self.serving.wait()
            try:
                status = await work()
            except aiohttp.ClientError:
                await asyncio.sleep(0)  # cut off, as a response is whose end cannot be had
                continue
            assert status in (200, 201, 503), status
            self.refused += status == 503
            self._moved.set()

    async def push(self) -> int:
        content = os.urandom(random.randrange(MOST))
        digest = Digest.of(content)
        url = f"{self.url}{BLOBS}/uploads/?digest={digest}"
        async with self._session.post(url, data=content) as response:
            if response.status == 201:
                self.stored[digest] = content
            else:
                assert "Retry-After" in response.headers
            return response.status

    async def pull(self) -> int:
        if not self.stored:
            await asyncio.sleep(0)
            return 200
        return await self.check(random.choice(list(self.stored)))

    async def check(self, digest: Digest) -> int:
        async with self._session.get(f"{self.url}{BLOBS}/{digest}") as response:
            content = await response.read()
            assert response.status == 503 or content == self.stored[digest]
            return response.status


@pytest.fixture
async def crowd() -> AsyncIterator[Crowd]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        yield Crowd(session)


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[Seaweed]:
    with seaweed_server(tmp_path / "seaweed") as server:
        yield server


async def serve(place: Place, bucket: Seaweed) -> Server:  # noqa: F811
    settings = bucket.settings("tests", "outage")
    keys = {"access_key": settings.access_key, "secret_key": settings.secret_key}
    place.tree["namespaces"]["local"] = {"store": {}}
    place.tree |= {
        "access": OPEN,
        "shared": {"bucket": settings.url, "endpoint": settings.endpoint, **keys},
    }
    return await place.start()


async def working(crowd: Crowd, stack: AsyncExitStack) -> None:
    group = await stack.enter_async_context(asyncio.TaskGroup())
    for work in [crowd.push] * 3 + [crowd.pull] * 3:
        group.create_task(crowd.repeat(work))
    stack.push_async_callback(crowd.end)


@ERRORS
async def test_a_bucket_that_is_killed_loses_nothing(
    place: Place,  # noqa: F811
    bucket: Seaweed,
    crowd: Crowd,
) -> None:
    crowd.url = (await serve(place, bucket)).url
    crowd.serving.set()
    async with AsyncExitStack() as stack:
        await working(crowd, stack)
        await crowd.until(lambda: len(crowd.stored) >= 10)
        bucket.kill()
        await crowd.until(lambda: crowd.refused >= 10)
        await asyncio.to_thread(bucket.start)
        enough = len(crowd.stored) + 10
        await crowd.until(lambda: len(crowd.stored) >= enough)
    for digest in crowd.stored:
        assert await crowd.check(digest) == 200


@ERRORS
async def test_a_server_that_is_killed_loses_nothing(
    place: Place,  # noqa: F811
    bucket: Seaweed,
    crowd: Crowd,
) -> None:
    server = await serve(place, bucket)
    crowd.url = server.url
    crowd.serving.set()
    async with AsyncExitStack() as stack:
        await working(crowd, stack)
        for enough in (5, 10, 15):
            await crowd.until(lambda enough=enough: len(crowd.stored) >= enough)  # type: ignore[misc]
            crowd.serving.clear()
            await server.clear()
            server = await place.start()
            crowd.url = server.url
            crowd.serving.set()
    for digest in crowd.stored:
        assert await crowd.check(digest) == 200
    for left in (place.directory / "private" / "partial").iterdir():
        left.unlink()  # what it was receiving when it was killed
    names = [
        str(each["path"]).rpartition("/")[2].partition(".")[0]
        for portion in obstore.list(bucket.settings("tests", "outage").connect())
        for each in portion
    ]
    assert {digest.encoded for digest in crowd.stored} <= set(names)
