"""Lazy namespaces: what clients read of a blob is fetched once and kept, and the rest only when it is due."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.admin.purge import Purge
from proxy.cache import rest
from proxy.cache.policy import Threshold
from storage.disk.extents import ExtentList, Extents
from storage.disk.sparse import SparseUpload
from storage.maintenance.pins import Pin
from storage.oci import Digest
from tests.conftest import Clock, Serve, Site
from tests.test_fetcher import Rig
from tests.test_fills import blobs, content_of, heard
from tests.upstream import Corrupt, Reset, Status, Upstream

SIZE = 400_000
BODY = content_of(SIZE, 3)

NEVER = {"share": "100%", "clients": "never"}


@pytest.fixture
def at_once_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody reads is left at once."""
    monkeypatch.setattr(rest, "LINGER", 0.0)


@pytest.fixture(autouse=True)
def kept(request: pytest.FixtureRequest) -> Iterator[None]:
    """Remove what a test leaves, which is meant to stay."""
    yield
    if "tmp_path" in request.fixturenames:
        for path in request.getfixturevalue("tmp_path").glob("**/partial/*"):
            path.unlink()


@pytest.fixture
def digest(upstream: Upstream) -> str:
    return upstream.blob("library/alpine", BODY)


def extents(site: Site) -> list[tuple[int, int]]:
    """What is kept of the only blob."""
    (path,) = (site.directory / "cache" / "partial").glob("*.extents")
    found = ExtentList.find(path)
    assert found is not None
    here = Extents()
    found.read(here)
    found.close()
    return list(here)


def ranges(upstream: Upstream) -> list[str | None]:
    return [each.range for each in upstream.requests if each.method == "GET" and each.kind == "blob"]


async def read(site: Site, digest: str, asked: str, status: int = 206) -> bytes:
    found, _, body = await site.get(f"/v2/alpine/blobs/{digest}", Range=f"bytes={asked}")
    assert found == status, body
    return body


async def test_a_range_is_fetched_once_and_no_more(serve: Serve, upstream: Upstream, digest: str) -> None:
    site = await serve(upstream, lazy=True)
    for _ in range(2):
        status, headers, body = await site.get(f"/v2/alpine/blobs/{digest}", Range="bytes=1000-1999")
        assert (status, body) == (206, BODY[1000:2000])
        assert headers["Content-Range"] == f"bytes 1000-1999/{SIZE}"
    assert len(upstream.log) == 1
    assert (ranges(upstream), upstream.bytes_sent) == (["bytes=1000-1999"], 1000)
    assert await read(site, digest, "1500-2499") == BODY[1500:2500]
    assert ranges(upstream)[1:] == ["bytes=2000-2499"]
    assert extents(site) == [(1000, 2500)]


async def test_all_of_it_completes_what_is_here(serve: Serve, upstream: Upstream, digest: str) -> None:
    site = await serve(upstream, lazy=True)
    await read(site, digest, "1000-1999")
    committed = heard("fill.committed")
    assert (await site.get(f"/v2/alpine/blobs/{digest}"))[2] == BODY
    await committed.wait()
    assert upstream.bytes_sent == SIZE
    upstream.clear()
    assert await read(site, digest, "5-9") == BODY[5:10]
    assert (upstream.log, site.partial, blobs(site)) == ([], [], [BODY])


@pytest.mark.parametrize(
    ("asked", "spans"),
    [
        ("0-49,1000-1049,2000-2049", [(0, 50), (1000, 1050), (2000, 2050)]),
        ("2000-2049,0-49", [(0, 50), (2000, 2050)]),
        ("999999-,0-49", [(0, 50)]),
        ("-51", [(SIZE - 51, SIZE)]),
        ("0-49,-51", [(0, 50), (SIZE - 51, SIZE)]),
        ("399000-", [(399_000, SIZE)]),
        ("100-299,200-399", [(100, 400)]),
    ],
)
async def test_several_ranges_and_the_last_bytes(
    serve: Serve, upstream: Upstream, digest: str, asked: str, spans: list[tuple[int, int]]
) -> None:
    site = await serve(upstream, lazy=True)
    for _ in range(2):
        body = await read(site, digest, asked)
        assert all(BODY[start:stop] in body for start, stop in spans if len(spans) > 1)
        assert upstream.bytes_sent == sum(stop - start for start, stop in spans)
    assert extents(site) == spans


async def test_a_range_that_the_blob_has_not(serve: Serve, upstream: Upstream, digest: str) -> None:
    site = await serve(upstream, lazy=True)
    kept = heard("fill.kept")
    status, headers, _ = await site.get(f"/v2/alpine/blobs/{digest}", Range=f"bytes={SIZE}-")
    assert (status, headers["Content-Range"]) == (416, f"bytes */{SIZE}")
    await kept.wait()
    assert (site.partial, upstream.bytes_sent) == ([], 0)


@pytest.mark.parametrize("sends_ranges", [True, False])
@pytest.mark.parametrize("asked", ["0-", "0-,-9", "500-599"])
async def test_what_comes_whole_is_stored(
    serve: Serve, upstream: Upstream, digest: str, asked: str, sends_ranges: bool
) -> None:
    upstream.ranges = sends_ranges
    site = await serve(upstream, lazy=True)
    committed = heard("fill.committed")
    assert (await site.get(f"/v2/alpine/blobs/{digest}", Range=f"bytes={asked}"))[0] in (200, 206)
    if sends_ranges and asked == "500-599":
        assert extents(site) == [(500, 600)]
        return
    await committed.wait()
    assert (blobs(site), site.partial) == ([BODY], [])


# The threshold


@pytest.mark.parametrize(
    ("share", "last", "whole"),
    [("50%", 199_998, False), ("50%", 199_999, True), ("10%", 39_999, True), ("100%", 399_998, False)],
)
async def test_the_rest_is_due_when_a_share_is_here(
    serve: Serve, upstream: Upstream, digest: str, share: str, last: int, whole: bool
) -> None:
    site = await serve(upstream, lazy=True, lazy_until={"share": share})
    committed = heard("fill.committed")
    await read(site, digest, "0-999")
    assert await read(site, digest, f"1000-{last}") == BODY[1000 : last + 1]
    if whole:
        await committed.wait()
        assert (blobs(site), upstream.bytes_sent) == ([BODY], SIZE)
    else:
        assert (blobs(site), upstream.bytes_sent) == ([], last + 1)


async def test_all_parts_are_the_blob(serve: Serve, upstream: Upstream, digest: str) -> None:
    site = await serve(upstream, lazy=True, lazy_until=NEVER)
    committed = heard("fill.committed")
    steps = [(start, start + 49_999) for start in range(0, SIZE, 50_000)]
    bodies = await asyncio.gather(*(read(site, digest, f"{first}-{last}") for first, last in steps))
    assert b"".join(bodies) == BODY
    await committed.wait()
    assert (blobs(site), upstream.bytes_sent) == ([BODY], SIZE)


async def test_the_rest_is_due_when_a_second_client_misses(
    serve: Serve, upstream: Upstream, digest: str
) -> None:
    site = await serve(upstream, lazy=True, lazy_until={"share": "100%"})
    committed = heard("fill.committed")

    async def client(address: str, asked: str) -> None:
        connector = aiohttp.TCPConnector(local_addr=(address, 0))
        async with aiohttp.ClientSession(connector=connector) as session:
            headers = {"Range": f"bytes={asked}"}
            async with session.get(f"{site.url}/v2/alpine/blobs/{digest}", headers=headers) as response:
                assert response.status == 206
                await response.read()

    await client("127.0.0.2", "0-999")
    await client("127.0.0.2", "5000-5999")
    await client("127.0.0.3", "0-999")  # is here
    assert (blobs(site), upstream.bytes_sent) == ([], 2000)
    await client("127.0.0.3", "0-1999")
    await committed.wait()
    assert (blobs(site), upstream.bytes_sent) == ([BODY], SIZE)


async def test_a_rest_that_cannot_be_got_waits_for_more(
    serve: Serve, upstream: Upstream, digest: str
) -> None:
    site = await serve(upstream, lazy=True, lazy_until={"share": "10%"})
    postponed, committed = heard("fill.postponed"), heard("fill.committed")
    upstream.next("GET", lambda request: request.range in ("bytes=50000-", None), Status(503), times=100)
    assert await read(site, digest, "0-49999") == BODY[:50_000]
    await postponed.wait()
    assert await read(site, digest, "10-19") == BODY[10:20]
    site.clock.advance(3600)
    assert await read(site, digest, "50000-89999") == BODY[50_000:90_000]
    await committed.wait()
    assert (blobs(site), upstream.bytes_sent) == ([BODY], SIZE)


# Without the upstream


@pytest.mark.parametrize("how", ["down", "offline"])
async def test_what_is_here_is_served_without_the_upstream(
    serve: Serve, upstream: Upstream, digest: str, how: str
) -> None:
    site = await serve(upstream, lazy=True)
    await read(site, digest, "1000-1999,5000-5999")
    if how == "offline":
        await site.app.stop()
        site = await serve(upstream, lazy=True, offline=True)
    upstream.clear()
    upstream.next("GET", "blob", Status(500), times=1000)
    upstream.next("HEAD", "blob", Status(500), times=1000)
    assert await read(site, digest, "1100-1199") == BODY[1100:1200]
    assert BODY[5000:6000] in await read(site, digest, "1000-1999,5000-5999")
    async with site.request("HEAD", f"/v2/alpine/blobs/{digest}") as response:
        assert (response.status, response.headers["Content-Length"]) == (200, str(SIZE))
    assert upstream.log == []
    status, code = (404, b"BLOB_UNKNOWN") if how == "offline" else (502, b"UNAVAILABLE")
    for asked in ("7000-7999", "1900-2099", "1000-1999,7000-7999"):
        assert code in await read(site, digest, asked, status)
    assert (await site.get(f"/v2/alpine/blobs/{digest}"))[0] == status
    assert await read(site, digest, "5000-5999") == BODY[5000:6000]
    assert extents(site) == [(1000, 2000), (5000, 6000)]


async def test_the_upstream_is_asked_again_when_it_is_back(
    serve: Serve, upstream: Upstream, digest: str
) -> None:
    site = await serve(upstream, lazy=True)
    await read(site, digest, "0-99")
    upstream.next("GET", digest, Status(404))
    await read(site, digest, "1000-1099", 404)
    site.clock.advance(60)
    assert await read(site, digest, "900-1099") == BODY[900:1100]


async def test_a_range_that_breaks_off_is_continued(serve: Serve, upstream: Upstream, digest: str) -> None:
    site = await serve(upstream, lazy=True)
    upstream.next("GET", digest, Reset(after=30_000))
    assert await read(site, digest, "1000-150999") == BODY[1000:151_000]
    assert extents(site) == [(1000, 151_000)]


# What is kept


async def test_another_server_reads_from_here(
    serve: Serve, upstream: Upstream, digest: str, tmp_path: Path
) -> None:
    site = await serve(upstream, lazy=True)
    await read(site, digest, "0-9999")
    upstream.clear()
    below = await serve(f"{site.url}", lazy=True, directory=tmp_path / "below", library=False)
    asked = {"Range": "bytes=500-1499,9000-9999"}
    async with below.request("GET", f"/v2/library/alpine/blobs/{digest}", headers=asked) as response:
        body = await response.read()
    assert BODY[500:1500] in body
    assert BODY[9000:10_000] in body
    assert upstream.log == []


@pytest.mark.errors("fill.failed")
async def test_parts_of_other_content_are_thrown_away(serve: Serve, upstream: Upstream, digest: str) -> None:
    site = await serve(upstream, lazy=True)
    upstream.next("GET", digest, Corrupt(at=1500))
    assert await read(site, digest, "1000-1999") != BODY[1000:2000]
    failed = heard("fill.failed")
    with pytest.raises(aiohttp.ClientPayloadError):
        await site.get(f"/v2/alpine/blobs/{digest}")
    await failed.wait()
    assert (blobs(site), site.partial) == ([], [])
    assert await read(site, digest, "1000-1999") == BODY[1000:2000]


async def test_no_other_repository_sees_what_is_kept(serve: Serve, upstream: Upstream, digest: str) -> None:
    site = await serve(upstream, lazy=True)
    await read(site, digest, "1000-1999")
    status, _, _ = await site.get(f"/v2/other/blobs/{digest}", Range="bytes=1000-1999")
    assert status == 404
    assert await read(site, digest, "1000-1999") == BODY[1000:2000]


async def test_what_is_kept_counts_and_is_evicted(
    serve: Serve, upstream: Upstream, digest: str, at_once_idle: None
) -> None:
    other = upstream.blob("library/alpine", BODY[::-1])
    site = await serve(upstream, lazy=True, keep_for="10d")
    kept = heard("fill.kept")
    await read(site, digest, "0-99999")
    await kept.wait()
    ((found, _, _),) = site.app.composition.maintenance.eviction.parts()
    assert (found.digest, found.size // 4096) == (digest, 25)
    site.clock.advance(6 * 86400)
    assert site.app.composition.store.files.reap(3600) == 0
    again = heard("fill.kept")
    await read(site, other, "0-99999")
    await again.wait()
    site.clock.advance(5 * 86400)
    eviction = site.app.composition.maintenance.eviction
    report = await asyncio.to_thread(eviction.expire)
    assert report.blobs == 1
    assert [each.blob.digest for each in eviction.parts()] == [other]
    report = await asyncio.to_thread(eviction.shrink, 0, 0)
    assert (report.blobs, report.bytes, site.partial) == (1, found.size, [])


# Whatever is read


class Asked(NamedTuple):
    """A range that a client reads, and whether it leaves before the end."""

    start: int
    length: int
    dropped: bool


@pytest.mark.clients
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    asked=st.lists(st.builds(Asked, st.integers(0, 9999), st.integers(1, 3000), st.booleans()), max_size=12),
    share=st.sampled_from([0.1, 0.5, 1.0]),
    restart=st.integers(0, 12),
    whole=st.booleans(),
)
async def test_whatever_is_read_and_dropped(
    tmp_path_factory: pytest.TempPathFactory, asked: list[Asked], share: float, restart: int, whole: bool
) -> None:
    content, root = BODY[:10_000], tmp_path_factory.mktemp("rig")
    threshold = Threshold(share, math.inf)
    async with Upstream() as upstream:
        digest = Digest(upstream.blob("a/b", content))
        rig = Rig(root, upstream, Clock())
        pulls = []
        for number, each in enumerate(asked):
            if number == restart:  # as a process that is replaced
                await asyncio.gather(*pulls, return_exceptions=True)
                await rig.close()
                rig = Rig(root, upstream, Clock())
            pulls.append(
                asyncio.create_task(rig.read(digest, each.start, each.start + each.length, threshold))
            )
            await asyncio.sleep(0)
            if each.dropped:
                pulls[number].cancel()
        found = await asyncio.gather(*pulls, return_exceptions=True)
        for each, body in zip(asked, found, strict=True):
            assert isinstance(body, asyncio.CancelledError) or body == content[each.start :][: each.length]
        if whole:
            assert await rig.read(digest, 0, 10_000) == content
            with suppress(KeyError):
                await rig.fills.ended(digest)
            assert rig.store.files.path(digest).read_bytes() == content
            assert list(rig.partial.iterdir()) == []
        here = Extents((each.start, min(each.start + each.length, 10_000)) for each in asked)
        enough = share * 10_000 <= here.total
        if not (whole or enough or any(each.dropped for each in asked)):
            assert upstream.bytes_sent == here.total
        if restart >= len(asked) and not any(each.dropped for each in asked):
            assert upstream.bytes_sent <= 10_000  # what is under way when a process ends comes again
        await rig.close()


@pytest.mark.errors("disk.failed")
async def test_a_disk_that_is_full(
    serve: Serve, upstream: Upstream, digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = await serve(upstream, lazy=True)
    await read(site, digest, "0-999")

    def fail(self: SparseUpload, batch: object) -> None:
        raise OSError(28, "full")

    monkeypatch.setattr(SparseUpload, "_append", fail)
    uncached = heard("fill.uncached")
    assert await read(site, digest, "5000-5999") == BODY[5000:6000]
    await uncached.wait()
    assert site.partial == []
    assert await read(site, digest, "0-1999") == BODY[:2000]


async def test_the_limit_of_a_namespace_counts_parts(
    serve: Serve, upstream: Upstream, digest: str, at_once_idle: None
) -> None:
    other = upstream.blob("library/alpine", BODY[::-1])
    site = await serve(upstream, lazy=True, cache_limit="150kB")
    for number, each in enumerate((digest, other), 1):
        kept = heard("fill.kept")
        await read(site, each, "0-99999")
        await kept.wait()
        site.clock.advance(3600 * number)
    eviction = site.app.composition.maintenance.eviction
    report = await asyncio.to_thread(eviction.shrink)
    assert report.blobs == 1
    assert [each.blob.digest for each in eviction.parts()] == [other]


async def test_parts_are_purged_with_their_repository(
    serve: Serve, upstream: Upstream, digest: str, at_once_idle: None
) -> None:
    site = await serve(upstream, lazy=True)
    kept = heard("fill.kept")
    await read(site, digest, "0-999")
    await kept.wait()
    purge = Purge(site.app.composition.store, site.app.composition.pins)
    dry = await asyncio.to_thread(purge.purge, Pin("docker.io/library/alpine"), True)
    others = await asyncio.to_thread(purge.purge, Pin("docker.io/library/other"))
    assert (dry.blobs, others.blobs, len(site.partial)) == (1, 0, 2)
    purged = await asyncio.to_thread(purge.purge, Pin("docker.io/library/alpine"))
    assert (purged.blobs, site.partial) == (1, [])
