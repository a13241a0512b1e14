"""Real servers of two workers each, whose caches share a bucket and a database, of which one is killed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest

from storage.bucket.settings import BucketSettings
from tests.postgres import PostgresServer
from tests.processes import Place, Server, place  # noqa: F401  a fixture
from tests.seaweed import Seaweed, seaweed_server
from tests.upstream import Hold, Upstream

pytestmark = pytest.mark.clients

CONTENT = bytes(range(251)) * 40_000  # 10 MB, of two parts
BLOBS = "/v2/a/b/blobs"


class Servers:
    """Servers with disks of their own."""

    def __init__(self, place: Place, session: aiohttp.ClientSession, database: str) -> None:  # noqa: F811
        self._place = place
        self._session = session
        self._database = database

    async def start(self, name: str, settings: BucketSettings) -> Server:
        keys = {"access_key": settings.access_key, "secret_key": settings.secret_key}
        self._place.tree["disk"] = {"path": str(self._place.home / name)}
        self._place.tree["shared"] = {
            "records": self._database,
            "bucket": settings.url,
            "endpoint": settings.endpoint,
            **keys,
            "caches": {},
        }
        return await self._place.start()

    async def pull(self, server: Server, digest: str) -> bytes:
        async with self._session.get(f"{server.url}{BLOBS}/{digest}") as response:
            assert response.status == 200, await response.read()
            return await response.read()


@pytest.fixture
async def servers(
    place: Place,  # noqa: F811
    postgres_server: PostgresServer,
) -> AsyncIterator[Servers]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        yield Servers(place, session, postgres_server.database())


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[Seaweed]:
    with seaweed_server(tmp_path / "seaweed") as server:
        yield server


async def test_a_server_that_is_killed_while_it_fetches(
    servers: Servers, seaweed: Seaweed, upstream: Upstream, tmp_path: Path
) -> None:
    digest, gate = upstream.blob("a/b", CONTENT), asyncio.Event()
    settings = seaweed.settings("tests", tmp_path.name)
    one, other = await servers.start("one", settings), await servers.start("other", settings)
    hold = Hold(gate, after=len(CONTENT) // 2)
    upstream.next("GET", digest, hold)
    pulling = asyncio.create_task(servers.pull(one, digest))
    await hold.reached.wait()
    await one.kill()
    with pytest.raises(aiohttp.ClientError):
        await pulling
    assert await servers.pull(other, digest) == CONTENT
    gate.set()
    await other.heard("fill.committed")
    await other.heard("deposit.done")
    upstream.clear()
    again = await servers.start("one", settings)
    assert await servers.pull(again, digest) == CONTENT
    assert await servers.pull(await servers.start("third", settings), digest) == CONTENT
    assert upstream.log == []


@pytest.mark.errors("bucket.failed")
async def test_a_bucket_that_is_killed_costs_no_pull(
    servers: Servers, bucket: Seaweed, upstream: Upstream
) -> None:
    contents = [bytes([number]) * 100_000 for number in range(6)]
    digests = [upstream.blob("a/b", each) for each in contents]
    settings = bucket.settings("tests", "caches")
    one, other = await servers.start("one", settings), await servers.start("other", settings)
    for digest, content in zip(digests[:2], contents, strict=False):
        assert await servers.pull(one, digest) == content
        await one.heard("deposit.done", digest=digest)
    bucket.kill()
    for server in (one, other):
        for digest, content in zip(digests, contents, strict=True):
            assert await servers.pull(server, digest) == content
    await asyncio.to_thread(bucket.start)
    for digest in digests[2:]:
        await one.until(lambda digest=digest: done(digest, one, other))  # type: ignore[misc]
    upstream.clear()
    third = await servers.start("third", settings)
    for digest, content in zip(digests, contents, strict=True):
        assert await servers.pull(third, digest) == content
    assert upstream.log == []


def done(digest: str, *servers: Server) -> bool:
    return any(each.said("deposit.done", digest=digest) for each in servers)
