"""Clients that read blobs by ranges, each by its pattern, of upstreams of each kind: bytes come once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Serve, Site
from tests.test_fills import blobs, content_of, heard, path_of
from tests.upstream import Upstream

SIZE = 1_600_000
BODY = content_of(SIZE, 11)

Spans = list[tuple[int, int]]
Pattern = Callable[["Client"], Awaitable[None]]


class Client:
    """A client of one blob, which compares what it gets; `read_spans` are those that it has read."""

    def __init__(self, site: Site, digest: str) -> None:
        self.site = site
        self.digest = digest
        self.read_spans: Spans = []

    async def read(self, *spans: tuple[int, int]) -> None:
        """All of these ranges, in one header."""
        header = "bytes=" + ",".join(f"{start}-{stop - 1}" for start, stop in spans)
        status, headers, body = await self.site.get(path_of(self.digest), Range=header)
        self.read_spans += spans
        if status == 200:  # of several ranges that are all of it
            assert body == BODY
        elif len(spans) == 1:
            assert (status, body) == (206, BODY[spans[0][0] : spans[0][1]])
            assert headers["Content-Range"] == f"bytes {spans[0][0]}-{spans[0][1] - 1}/{SIZE}"
        else:
            parts = body.split(b"\r\n--" + headers["Content-Type"].rpartition("=")[2].encode())
            found = [part.partition(b"\r\n\r\n")[2] for part in parts[1:-1]]
            assert found == [BODY[start:stop] for start, stop in spans]

    async def head(self) -> None:
        async with self.site.request("HEAD", path_of(self.digest)) as response:
            assert (response.status, response.headers["Content-Length"]) == (200, str(SIZE))

    async def drop(self, start: int) -> None:
        """Read the beginning of an open range, and leave."""
        header = {"Range": f"bytes={start}-"}
        async with self.site.request("GET", path_of(self.digest), headers=header) as response:
            assert response.status == 206
            assert await response.content.readexactly(1000) == BODY[start : start + 1000]
            response.close()


async def ollama(client: Client) -> None:
    """A HEAD, and 16 parts at once."""
    await client.head()
    step = SIZE // 16
    await asyncio.gather(*(client.read((start, start + step)) for start in range(0, SIZE, step)))


async def stargz(client: Client) -> None:
    """Whether it is redirected, the size, the end, and chunks of 50,000 bytes, several in a header."""
    await client.read((0, 2))
    await client.head()
    await client.read((SIZE - 51, SIZE))
    await client.read((SIZE - 50_000, SIZE))
    await client.read((0, 50_000), (200_000, 300_000), (800_000, 850_000))
    await client.read((250_000, 350_000), (0, 50_000))


async def soci(client: Client) -> None:
    """The size, and large chunks at once, up to the end."""
    await client.read((0, 2))
    starts = range(0, SIZE, 300_000)
    await asyncio.gather(*(client.read((start, min(start + 300_000, SIZE))) for start in starts))


async def nydus(client: Client) -> None:
    """Single ranges, one after the other and in no order; the same ones by a second reader."""
    for start in (900_000, 40_000, 1_200_000, 900_000):
        await asyncio.gather(*(client.read((start, start + 70_000)) for _ in range(2)))


async def containerd(client: Client) -> None:
    """A pull that is cut, and continued from where it was cut, twice."""
    await client.drop(700_000)
    await client.drop(300_000)
    await client.read((300_000, SIZE - 1))


PATTERNS = [ollama, stargz, soci, nydus, containerd]


@pytest.fixture(autouse=True)
def kept(tmp_path: Path) -> Iterator[None]:
    """Remove what a lazy namespace keeps."""
    yield
    for path in tmp_path.glob("**/partial/*"):
        path.unlink()


@pytest.fixture(params=["plain", "redirects", "sends no ranges"])
async def source(request: pytest.FixtureRequest) -> AsyncIterator[Upstream]:
    async with Upstream(cdn=request.param == "redirects") as upstream:
        upstream.ranges = request.param != "sends no ranges"
        yield upstream


def union(spans: Spans) -> int:
    """How many bytes they have together."""
    return len(set().union(*(range(start, stop) for start, stop in spans)))


@pytest.mark.parametrize("lazy", [False, True], ids=["default", "lazy"])
@pytest.mark.parametrize("pattern", PATTERNS)
async def test_every_byte_comes_once(serve: Serve, source: Upstream, pattern: Pattern, lazy: bool) -> None:
    digest = source.blob("a/b", BODY)
    site = await serve(source, lazy=lazy, lazy_until={"share": "100%", "clients": "never"})
    committed = heard("fill.committed")
    client = Client(site, digest)
    await pattern(client)
    if lazy and source.ranges and pattern is not containerd:
        assert source.bytes_sent == union(client.read_spans)
    second = Client(site, digest)
    if pattern is not containerd:
        before = source.bytes_sent
        await pattern(second)
        assert not lazy or source.bytes_sent == before or not source.ranges
    assert (await site.get(path_of(digest)))[2] == BODY
    await committed.wait()
    assert (blobs(site), site.partial) == ([BODY], [])
    sent = [each for each in source.requests if each.method == "GET" and each.kind == "blob"]
    if not source.ranges:
        # A range from 0 does not tell; those that do are closed, and one request brings the rest.
        assert len(sent) <= 4
    elif pattern is not containerd or not lazy:  # what was under way to a reader that has left comes again
        assert source.bytes_sent == SIZE
