"""Clients that read one blob by ranges, each by the pattern of its kind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from tests.upstream import Upstream

SIZE = 1_600_000

Spans = list[tuple[int, int]]
Pattern = Callable[["Client"], Awaitable[None]]
Request = Callable[..., Any]  # as aiohttp's, of a method and a path


class Client:
    """A client of one blob, which compares what it gets; `read_spans` are those that it has read."""

    def __init__(self, request: Request, path: str, body: bytes) -> None:
        self.request = request
        self.path = path
        self.body = body
        self.read_spans: Spans = []

    async def read(self, *spans: tuple[int, int]) -> None:
        """All of these ranges, in one header."""
        header = "bytes=" + ",".join(f"{start}-{stop - 1}" for start, stop in spans)
        async with self.request("GET", self.path, headers={"Range": header}) as response:
            status, headers, body = response.status, response.headers, await response.read()
        if status == 200:  # of several ranges that are all of it
            assert body == self.body
        elif len(spans) == 1:
            assert (status, body) == (206, self.body[spans[0][0] : spans[0][1]])
            assert headers["Content-Range"] == f"bytes {spans[0][0]}-{spans[0][1] - 1}/{SIZE}"
        else:
            parts = body.split(b"\r\n--" + headers["Content-Type"].rpartition("=")[2].encode())
            found = [part.partition(b"\r\n\r\n")[2] for part in parts[1:-1]]
            assert found == [self.body[start:stop] for start, stop in spans]
        self.read_spans += spans

    async def all(self) -> None:
        async with self.request("GET", self.path) as response:
            assert (response.status, await response.read()) == (200, self.body)

    async def head(self) -> None:
        async with self.request("HEAD", self.path) as response:
            assert response.status == 200
            assert response.headers.get("Content-Length", str(SIZE)) == str(SIZE)

    async def drop(self, start: int) -> None:
        """Read the beginning of an open range, and leave."""
        header = {"Range": f"bytes={start}-"}
        async with self.request("GET", self.path, headers=header) as response:
            assert response.status == 206
            assert await response.content.readexactly(1000) == self.body[start : start + 1000]
            response.close()


async def together(*reads: Coroutine[Any, Any, None]) -> None:
    """All of them, also if one fails."""
    for found in await asyncio.gather(*reads, return_exceptions=True):
        if found is not None:
            raise found


async def ollama(client: Client) -> None:
    """A HEAD, and 16 parts at once."""
    await client.head()
    step = SIZE // 16
    await together(*(client.read((start, start + step)) for start in range(0, SIZE, step)))


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
    await together(*(client.read((start, min(start + 300_000, SIZE))) for start in starts))


async def nydus(client: Client) -> None:
    """Single ranges, one after the other and in no order; the same ones by a second reader."""
    for start in (900_000, 40_000, 1_200_000, 900_000):
        await together(*(client.read((start, start + 70_000)) for _ in range(2)))


async def containerd(client: Client) -> None:
    """A pull that is cut, and continued from where it was cut, twice."""
    await client.drop(700_000)
    await client.drop(300_000)
    await client.read((300_000, SIZE - 1))


PATTERNS = [ollama, stargz, soci, nydus, containerd]
KINDS = ["plain", "redirects", "sends no ranges", "tells no size"]


@asynccontextmanager
async def upstreams(kinds: Sequence[str]) -> AsyncIterator[list[Upstream]]:
    """One of each kind."""
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                Upstream(
                    cdn=kind == "redirects",
                    ranges=kind != "sends no ranges",
                    content_length=kind != "tells no size",
                )
            )
            for kind in kinds
        ]


def union(spans: Spans) -> set[int]:
    """The bytes that they have together."""
    return set().union(*(range(start, stop) for start, stop in spans))
