"""Clients that read blobs by ranges, each by its pattern, of upstreams of each kind: bytes come once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.ranges import KINDS, PATTERNS, SIZE, Client, Pattern, containerd, union, upstreams
from tests.test_fills import blobs, content_of, heard, path_of
from tests.upstream import Upstream

BODY = content_of(SIZE, 11)


@pytest.fixture(autouse=True)
def kept(tmp_path: Path) -> Iterator[None]:
    """Remove what a lazy namespace keeps."""
    yield
    for path in tmp_path.glob("**/partial/*"):
        path.unlink()


@pytest.fixture(params=KINDS)
async def source(request: pytest.FixtureRequest) -> AsyncIterator[Upstream]:
    async with upstreams([request.param]) as (upstream,):
        yield upstream


@pytest.mark.parametrize("lazy", [False, True], ids=["default", "lazy"])
@pytest.mark.parametrize("pattern", PATTERNS)
async def test_every_byte_comes_once(serve: Serve, source: Upstream, pattern: Pattern, lazy: bool) -> None:
    digest = source.blob("a/b", BODY)
    site = await serve(source, lazy=lazy, lazy_until={"share": "100%", "clients": "never"})
    committed = heard("fill.committed")
    client = Client(site.request, path_of(digest), BODY)
    await pattern(client)
    if lazy and source.ranges and pattern is not containerd:
        assert source.bytes_sent == len(union(client.read_spans))
    second = Client(site.request, path_of(digest), BODY)
    if pattern is not containerd:
        before = source.bytes_sent
        await pattern(second)
        assert not lazy or source.bytes_sent == before or not source.ranges
    assert (await site.get(path_of(digest)))[2] == BODY
    await committed.wait()
    assert (blobs(site), site.partial) == ([BODY], [])
    sent = [each for each in source.requests if each.method == "GET" and each.kind == "blob"]
    if not source.ranges:
        assert len(sent) == 1
        assert source.bytes_sent == SIZE
    elif pattern is not containerd or not lazy:  # what was under way to a reader that has left comes again
        assert source.bytes_sent == SIZE
