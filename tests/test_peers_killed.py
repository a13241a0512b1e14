"""Replicas as people run them, of two workers each, whose owner of a blob is killed while it receives it."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from proxy.upstream.rendezvous import ranked
from tests.fleet import SECRET, free_ports
from tests.processes import Place, Server
from tests.upstream import Hold, Upstream

pytestmark = pytest.mark.clients

MIB = 1 << 20
LAYER = hashlib.shake_128(b"a layer").digest(12 * MIB)
HALF = 6 * MIB


class Fleet:
    """Three servers with disks of their own, by their URLs."""

    def __init__(self, servers: dict[str, Server]) -> None:
        self.servers = servers

    def ranked(self, key: str) -> list[str]:
        """The URL of the owner first."""
        return ranked(key, self.servers)


@pytest.fixture
async def fleet(tmp_path: Path, upstream: Upstream) -> AsyncIterator[Fleet]:
    ports = free_ports(3)
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    places = []
    with tempfile.TemporaryDirectory(prefix="entrepot-") as temporary:
        for port in ports:
            home, short = tmp_path / str(port), Path(temporary) / str(port)
            home.mkdir()
            short.mkdir()
            place = Place(home, short, upstream)
            place.tree |= {"listen": f"127.0.0.1:{port}", "peers": {"urls": urls, "secret": SECRET}}
            places.append(place)
        try:
            async with asyncio.TaskGroup() as group:
                starting = [group.create_task(each.start()) for each in places]
            servers = [each.result() for each in starting]
            yield Fleet(dict(zip(urls, servers, strict=True)))
        finally:
            for place in places:
                for server in place.servers:
                    await server.clear()
    for server in servers:
        assert not server.noise, "".join(server.noise)
        assert not [each for each in server.events if each["level"] == "error"]


class Puller:
    """A client that goes on by Range, at the next replica if one breaks off."""

    def __init__(self, session: aiohttp.ClientSession, urls: list[str], digest: str) -> None:
        self.received = bytearray()
        self.broken = 0
        self.halfway = asyncio.Event()
        self._session = session
        self._urls = urls
        self._digest = digest

    async def pull(self) -> None:
        while len(self.received) < len(LAYER):
            url = f"{self._urls[self.broken % len(self._urls)]}/v2/a/b/blobs/{self._digest}"
            headers = {"Range": f"bytes={len(self.received)}-"} if self.received else {}
            try:
                async with self._session.get(url, headers=headers) as response:
                    assert response.status == (206 if headers else 200), await response.text()
                    async for chunk in response.content.iter_any():
                        self.received += chunk
                        if len(self.received) > HALF - MIB:
                            self.halfway.set()
            except aiohttp.ClientError:
                self.broken += 1


def transfers(upstream: Upstream) -> list[str]:
    """Other workers of an owner ask by HEAD whether their repository has the blob."""
    return [each for each in upstream.log if each.startswith("GET")]


async def test_an_owner_that_is_killed_in_the_middle_costs_no_pull(fleet: Fleet, upstream: Upstream) -> None:
    digest = upstream.blob("a/b", LAYER)
    order = fleet.ranked(digest)
    hold = Hold(asyncio.Event(), after=HALF)  # which never ends: its connection is cut
    upstream.next("GET", digest, hold)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        pullers = [Puller(session, order[number % 3 :] + order[: number % 3], digest) for number in range(12)]
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            for each in pullers:
                group.create_task(each.pull())
            for each in pullers:
                await each.halfway.wait()
            assert len(transfers(upstream)) == 1
            await fleet.servers[order[0]].kill()
    assert all(bytes(each.received) == LAYER for each in pullers)
    # Only the clients of the one that was killed have noticed.
    assert [each.broken for each in pullers] == [1 if number % 3 == 0 else 0 for number in range(12)]
    assert upstream.bytes_sent <= 1.1 * len(LAYER)
    assert len(transfers(upstream)) == 2
    await _left_out(fleet, upstream, order[0])
    for path in fleet.servers[order[0]].partial():
        path.unlink()


async def _left_out(fleet: Fleet, upstream: Upstream, dead: str) -> None:
    """What the dead one owned is fetched once all the same."""
    others = [url for url in fleet.servers if url != dead]
    contents = [b"small %d" % number for number in range(12)]
    digests = [upstream.blob("a/b", each) for each in contents]
    upstream.clear()
    async with aiohttp.ClientSession() as session:
        for digest, content in zip(digests, contents, strict=True):
            for url in others:
                async with session.get(f"{url}/v2/a/b/blobs/{digest}") as response:
                    assert await response.read() == content
    assert len(transfers(upstream)) == len(digests)
