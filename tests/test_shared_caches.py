"""Caches of several servers over one bucket and one database: what one has fetched, all have."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from storage.bucket.blobs import BucketBlobs
from storage.errors import Unavailable
from storage.keys import BLOB, DEPOSIT, LINK, MANIFEST, OBJECT
from storage.keys import TAG as TAG_RECORD
from storage.maintenance.pins import Pin
from storage.oci import Digest
from tests.conftest import Serve, Site
from tests.objects import FakeBucket, answer
from tests.postgres import PostgresServer
from tests.upstream import Image, Upstream

pytestmark = pytest.mark.clients

TAG = "/v2/a/b/manifests/latest"
LAYER = bytes(range(251)) * 5000
FRESH = 600.0  # seconds, the default

Start = Callable[..., Awaitable[Site]]


def blob_of(digest: str) -> str:
    return f"/v2/a/b/blobs/{digest}"


def content_of(upstream: Upstream, image: Image) -> dict[str, bytes]:
    """Its config and layers, by digest."""
    return {each: upstream.repositories["a/b"].blobs[each] for each in (image.config, *image.layers)}


async def filled(site: Site) -> None:
    """Wait until all that it fetches is stored: clients have their last byte a moment before."""
    for fill in site.app.composition.fills.in_flight():
        assert fill.task is not None
        await asyncio.wait([fill.task])


async def deposited(site: Site) -> None:
    """Wait until it has handed over all that it fetched."""
    await filled(site)
    deposits = site.app.composition.deposits
    assert deposits is not None
    await deposits.ended()


@pytest.fixture
async def fake(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeBucket]:
    at_once = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=2)}
    once = {"max_retries": 1, "retry_timeout": timedelta(seconds=30), "backoff": at_once}
    monkeypatch.setattr("storage.bucket.settings._RETRY", once)
    monkeypatch.setattr("proxy.cache.shared_store.REST", 0.0)
    monkeypatch.setattr("proxy.cache.deposits.FIRST", 0.001)
    async with FakeBucket() as fake:
        yield fake


@pytest.fixture
def start(
    fake: FakeBucket, serve: Serve, upstream: Upstream, postgres_server: PostgresServer, tmp_path: Path
) -> Start:
    """Starts one server more; each has a directory of its own."""
    database = postgres_server.database()

    async def start(name: str, caches: dict[str, Any] | None = None, **keys: Any) -> Site:
        settings = fake.settings("fleet")
        shared = {
            "records": database,
            "bucket": settings.url,
            "endpoint": settings.endpoint,
            "access_key": settings.access_key,
            "secret_key": settings.secret_key,
            "caches": caches or {},
        }
        return await serve(upstream, directory=tmp_path / name, top={"shared": shared}, **keys)

    return start


async def pull(site: Site, upstream: Upstream, image: Image) -> None:
    """The whole image, by its tag."""
    status, _, manifest = await site.get(TAG)
    assert (status, manifest) == (200, image.content)
    for digest, content in content_of(upstream, image).items():
        status, _, body = await site.get(blob_of(digest))
        assert (status, body) == (200, content)


async def test_a_new_server_asks_the_upstream_nothing(
    start: Start, upstream: Upstream, fake: FakeBucket
) -> None:
    image = upstream.image("a/b", "latest", [LAYER])
    one = await start("one")
    await pull(one, upstream, image)
    await deposited(one)
    assert len(fake.objects) == len(content_of(upstream, image))
    upstream.clear()
    other = await start("other")
    await pull(other, upstream, image)
    await pull(other, upstream, image)
    assert upstream.log == []
    await deposited(other)
    assert len(fake.objects) == len(content_of(upstream, image))


async def test_the_freshness_of_a_tag_is_that_of_the_shared_records(start: Start, upstream: Upstream) -> None:
    image = upstream.image("a/b", "latest")
    one, other = await start("one"), await start("other")
    await pull(one, upstream, image)
    upstream.clear()
    one.clock.advance(FRESH - 100)
    assert (await other.get(TAG))[2] == image.content
    one.clock.advance(99)
    assert (await other.get(TAG))[2] == image.content
    assert upstream.log == []
    one.clock.advance(2)  # since the upstream was asked, and not since the other learned of it
    assert (await other.get(TAG))[1]["Cache-Status"].startswith("entrepot; fwd=stale")
    assert upstream.log == ["HEAD manifest a/b:latest"]
    assert (await one.get(TAG))[2] == image.content
    assert len(upstream.log) == 1


async def test_a_tag_that_moved_is_fetched_once(start: Start, upstream: Upstream) -> None:
    image = upstream.image("a/b", "latest")
    one, other = await start("one"), await start("other")
    await pull(one, upstream, image)
    await pull(other, upstream, image)
    moved = upstream.image("a/b", "latest", [b"another"])
    one.clock.advance(FRESH + 1)
    upstream.clear()
    for site in (one, other, one):
        await pull(site, upstream, moved)
        await deposited(site)
    assert sorted(set(upstream.log)) == sorted(upstream.log)


async def test_an_upstream_that_is_down_takes_nothing_away(start: Start, upstream: Upstream) -> None:
    image = upstream.image("a/b", "latest")
    one = await start("one")
    await pull(one, upstream, image)
    await deposited(one)
    one.clock.advance(FRESH + 1)
    await upstream.stop()
    other = await start("other")
    await pull(other, upstream, image)
    await pull(one, upstream, image)
    assert "; ttl=-" in (await one.get(TAG))[1]["Cache-Status"]


@pytest.mark.errors("bucket.failed")
async def test_a_bucket_that_is_down_costs_no_pull(
    start: Start, upstream: Upstream, fake: FakeBucket
) -> None:
    image = upstream.image("a/b", "latest", [LAYER])
    one = await start("one")
    fake.down = answer(503, "SlowDown")
    await pull(one, upstream, image)
    await pull(one, upstream, image)
    assert fake.objects == {}
    common = one.app.composition.common
    assert common is not None and isinstance(common.files, BucketBlobs)
    with pytest.raises(Unavailable):  # as its attempts to store what it fetched
        await asyncio.to_thread(common.files.bucket.probe)
    assert (await ready(one))["status"] == "degraded"
    fake.down = None
    await deposited(one)
    assert len(fake.objects) == len(content_of(upstream, image))
    assert (await ready(one))["status"] == "ready"
    upstream.clear()
    other = await start("other")
    fake.down = answer(503, "SlowDown")
    await pull(other, upstream, image)
    assert [each.split()[0] for each in upstream.log] == ["GET"] * len(content_of(upstream, image))
    fake.down = None


@pytest.mark.errors("bucket.failed")
async def test_the_first_blob_that_is_stored_ends_the_wait_of_the_others(
    start: Start, upstream: Upstream, fake: FakeBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.cache.deposits.FIRST", 3600.0)
    one = await start("one")
    deposits = one.app.composition.deposits
    assert deposits is not None
    attempt, waiting, failed = deposits._deposit, asyncio.Event(), list[Digest]()

    async def count(digest: Digest) -> None:
        try:
            await attempt(digest)
        except Unavailable:
            failed.append(digest)
            if len(failed) == 2:
                waiting.set()
            raise

    monkeypatch.setattr(deposits, "_deposit", count)
    fake.down = answer(503, "SlowDown")
    for size in (10, 20):
        assert (await one.get(blob_of(upstream.blob("a/b", LAYER[:size]))))[0] == 200
    await waiting.wait()
    fake.down = None
    assert (await one.get(blob_of(upstream.blob("a/b", LAYER))))[0] == 200
    await deposited(one)
    assert len(fake.objects) == 3


@pytest.mark.errors("records.failed")
async def test_a_database_that_is_down_costs_no_pull(
    start: Start, upstream: Upstream, postgres_server: PostgresServer
) -> None:
    image, fresh = upstream.image("a/b", "latest", [LAYER]), upstream.image("a/b", "other", [b"new"])
    one = await start("one")
    await pull(one, upstream, image)
    await deposited(one)
    upstream.clear()
    with postgres_server.lost():
        await pull(one, upstream, image)
        assert upstream.log == []
        one.clock.advance(FRESH + 1)
        await pull(one, upstream, image)
        assert upstream.log == ["HEAD manifest a/b:latest"]
        assert (await one.get("/v2/a/b/manifests/other"))[2] == fresh.content
        for digest, content in content_of(upstream, fresh).items():
            assert (await one.get(blob_of(digest)))[2] == content
    await deposited(one)
    upstream.clear()
    other = await start("other")
    for digest, content in {**content_of(upstream, image), **content_of(upstream, fresh)}.items():
        assert (await other.get(blob_of(digest)))[2] == content
    assert upstream.log == []


@pytest.mark.errors("fill.failed", "blob.damaged")
async def test_an_object_that_is_wrong_is_replaced(
    start: Start, upstream: Upstream, fake: FakeBucket
) -> None:
    image = upstream.image("a/b", "latest", [LAYER])
    (layer,) = image.layers
    one, other = await start("one"), await start("other")
    await pull(one, upstream, image)
    await deposited(one)
    (key,) = (each for each in fake.objects if layer.partition(":")[2] in each)
    fake.objects[key] = bytes(len(LAYER))
    with pytest.raises(aiohttp.ClientPayloadError):
        await other.get(blob_of(layer))
    assert (await other.get(blob_of(layer)))[2] == LAYER
    await deposited(other)
    third = await start("third")
    fake.asked.clear()
    upstream.clear()
    assert (await third.get(blob_of(layer)))[2] == LAYER
    assert upstream.log == []


@pytest.mark.errors("blob.damaged")
async def test_an_object_that_is_lost_is_put_again(
    start: Start, upstream: Upstream, fake: FakeBucket
) -> None:
    image = upstream.image("a/b", "latest", [LAYER])
    one, other = await start("one"), await start("other")
    await pull(one, upstream, image)
    await deposited(one)
    fake.objects.clear()
    await pull(other, upstream, image)
    await deposited(other)
    assert len(fake.objects) == len(content_of(upstream, image))


async def test_two_servers_upload_a_blob_once(start: Start, upstream: Upstream, fake: FakeBucket) -> None:
    digest = upstream.blob("a/b", LAYER)
    one, other = await start("one"), await start("other")
    gate, reached = asyncio.Event(), asyncio.Event()

    async def hold(request: web.Request) -> web.StreamResponse:
        reached.set()
        await gate.wait()
        return await fake._put(request, request.path.removeprefix("/bucket/"))

    fake.spoilt["PUT"] = [hold]
    for site in (one, other):
        assert (await site.get(blob_of(digest)))[2] == LAYER
    await reached.wait()
    deposits = other.app.composition.deposits
    assert deposits is not None
    await deposits.resume()
    gate.set()
    await deposited(one)
    await deposited(other)
    assert [each.split()[0] for each in fake.asked].count("PUT") == 1, fake.asked
    for site in (one, other):
        assert list(site.app.composition.store.records.keys(DEPOSIT.prefix())) == []


@pytest.mark.errors("bucket.failed")
async def test_what_was_not_handed_over_is_after_a_restart(
    start: Start, upstream: Upstream, fake: FakeBucket
) -> None:
    digest = upstream.blob("a/b", LAYER)
    one = await start("one")
    fake.down = answer(503, "SlowDown")
    assert (await one.get(blob_of(digest)))[2] == LAYER
    await one.app.stop()
    assert fake.objects == {}
    fake.down = None
    again = await start("one")
    deposits = again.app.composition.deposits
    assert deposits is not None
    await deposits.resume()
    assert len(fake.objects) == 1


@pytest.mark.errors("bucket.failed")
@pytest.mark.parametrize("left", [LAYER[:-1], bytes(len(LAYER))], ids=["truncated", "other"])
async def test_a_file_that_was_damaged_meanwhile_is_not_handed_over(
    start: Start, upstream: Upstream, fake: FakeBucket, left: bytes
) -> None:
    digest = upstream.blob("a/b", LAYER)
    one = await start("one")
    fake.down = answer(503, "SlowDown")
    assert (await one.get(blob_of(digest)))[2] == LAYER
    await one.app.stop()
    (file,) = one.directory.glob("cache/blobs/*/*/*")
    file.chmod(0o600)
    file.write_bytes(left)
    fake.down, fake.spoilt["PUT"] = None, [answer(400, "BadDigest")]
    again = await start("one")
    deposits = again.app.composition.deposits
    assert deposits is not None
    await deposits.resume()
    assert fake.objects == {}
    assert list(again.app.composition.store.records.keys(DEPOSIT.prefix())) == []
    assert (await again.get(blob_of(digest)))[2] == LAYER  # it is fetched again
    fake.spoilt.clear()
    await deposited(again)
    assert list(fake.objects.values()) == [LAYER]


async def test_a_server_that_is_offline_serves_what_others_have(
    start: Start, upstream: Upstream, fake: FakeBucket
) -> None:
    image = upstream.image("a/b", "latest", [LAYER])
    one = await start("one")
    await pull(one, upstream, image)
    await deposited(one)
    upstream.clear()
    other = await start("other", offline=True)
    one.clock.advance(FRESH + 1)
    await pull(other, upstream, image)
    assert (await other.get("/v2/a/b/manifests/unknown"))[0] == 404
    assert upstream.log == []


async def test_what_the_upstream_did_not_have_is_known_to_all(start: Start, upstream: Upstream) -> None:
    upstream.image("a/b", "latest")
    one, other = await start("one"), await start("other")
    assert (await one.get("/v2/a/b/manifests/unknown"))[0] == 404
    await upstream.stop()
    one.clock.advance(FRESH + 1)
    assert (await other.get("/v2/a/b/manifests/unknown"))[0] == 404
    assert (await other.get("/v2/a/b/manifests/new"))[0] == 502
    assert other.app.admin_url is not None
    where = (other.app.admin_url / "api/v1/why").with_query(ref="a/b:unknown")
    async with other.session.get(where) as response:
        assert (await response.json())["absent"]["since"] == one.clock() - FRESH - 1


async def test_a_digest_that_is_known_is_no_permission(
    start: Start, upstream: Upstream, fake: FakeBucket
) -> None:
    digest = upstream.blob("a/secret", LAYER)
    one, other = await start("one"), await start("other")
    assert (await one.get(f"/v2/a/secret/blobs/{digest}"))[2] == LAYER
    await deposited(one)
    for site in (one, other):
        assert (await site.get(blob_of(digest)))[0] == 404


async def test_listings_are_shared(start: Start, upstream: Upstream) -> None:
    image = upstream.image("a/b", "latest")
    one, other = await start("one"), await start("other")
    found = [await one.get(path) for path in ("/v2/a/b/tags/list", f"/v2/a/b/referrers/{image.digest}")]
    upstream.clear()
    for site in (one, other):
        for path, (status, _, body) in zip(
            ("/v2/a/b/tags/list", f"/v2/a/b/referrers/{image.digest}"), found, strict=True
        ):
            assert (await site.get(path))[::2] == (status, body)
    assert upstream.log == []


async def ready(site: Site) -> dict[str, str]:
    assert site.app.admin_url is not None
    async with site.session.get(site.app.admin_url / "readyz") as response:
        found: dict[str, str] = await response.json()
        return found


# What is evicted


async def expired(site: Site) -> None:
    """Have it do what its housekeeping does of the store of all."""
    upkeep = site.app.composition.maintenance.shared
    assert upkeep is not None
    await site.app.composition.recorder.flush()
    await asyncio.to_thread(upkeep.uses.report)
    await asyncio.to_thread(upkeep.counting.run)
    await asyncio.to_thread(upkeep.eviction.expire)
    if await asyncio.to_thread(upkeep.eviction.over):
        await asyncio.to_thread(upkeep.eviction.shrink)
    await asyncio.to_thread(site.app.composition.all_stores[-1].files.reap, 86400.0)


async def test_what_no_server_uses_is_evicted(start: Start, upstream: Upstream, fake: FakeBucket) -> None:
    image = upstream.image("a/b", "latest", [LAYER])
    one, other = await start("one", {"keep_for": "10d"}), await start("other", {"keep_for": "10d"})
    await pull(one, upstream, image)
    await deposited(one)
    one.clock.advance(9 * 86400.0)
    await pull(one, upstream, image)  # a hit, of which nobody else learns at once
    await expired(one)
    one.clock.advance(9 * 86400.0)
    await expired(other)
    assert len(fake.objects) == len(content_of(upstream, image))
    upstream.clear()
    await pull(other, upstream, image)
    assert upstream.log == ["HEAD manifest a/b:latest"]
    await deposited(other)
    one.clock.advance(11 * 86400.0)
    await expired(other)
    assert fake.objects == {}
    common = one.app.composition.common
    assert common is not None
    for kind in (TAG_RECORD, MANIFEST, LINK, BLOB, OBJECT):
        assert list(common.records.keys(kind.prefix())) == []
    await pull(other, upstream, image)  # its own copy


async def test_the_limit_is_of_all_servers(start: Start, upstream: Upstream, fake: FakeBucket) -> None:
    digests = [upstream.blob("a/b", bytes([number]) * 1000) for number in range(10)]
    one, other = await start("one", {"cache_limit": "5000B"}), await start("other", {"cache_limit": "5000B"})
    for number, digest in enumerate(digests):
        site = (one, other)[number % 2]
        assert (await site.get(blob_of(digest)))[0] == 200
        await deposited(site)
        site.clock.advance(100)
    assert (await one.get(blob_of(digests[0])))[0] == 200
    await expired(one)
    left = {Digest(digest) for digest in digests if any(digest[7:] in key for key in fake.objects)}
    assert left == {digests[0], *digests[-3:]}  # to 90 % of the limit


async def test_what_is_pinned_stays(start: Start, upstream: Upstream, fake: FakeBucket) -> None:
    image = upstream.image("a/b", "latest", [LAYER])
    one = await start("one", {"keep_for": "10d"})
    await pull(one, upstream, image)
    await deposited(one)
    one.app.composition.pins.add(Pin("docker.io/a/b:latest"))
    one.clock.advance(20 * 86400.0)
    await expired(one)
    assert len(fake.objects) == len(content_of(upstream, image))


async def test_a_purge_is_of_all_servers(start: Start, upstream: Upstream, fake: FakeBucket) -> None:
    image = upstream.image("a/b", "latest", [LAYER])
    one = await start("one")
    await pull(one, upstream, image)
    await deposited(one)
    assert one.app.admin_url is not None
    async with one.session.post(
        one.app.admin_url / "api/v1/purge", json={"pattern": "docker.io/a/b"}
    ) as response:
        purged = await response.json()
    assert response.status == 200, purged
    assert (purged["references"], purged["blobs"]) == (["docker.io/a/b:latest"], 4)
    await expired(one)
    assert fake.objects == {}
    upstream.clear()
    await pull(await start("other"), upstream, image)
    assert "GET manifest a/b:latest" in upstream.log


async def test_an_image_that_only_the_fleet_has_is_complete(
    start: Start, upstream: Upstream, fake: FakeBucket
) -> None:
    whole, part = upstream.image("a/b", "latest", [LAYER]), upstream.image("a/b", "part", [b"never pulled"])
    one, other = await start("one"), await start("other")
    await pull(one, upstream, whole)
    assert (await one.get("/v2/a/b/manifests/part"))[2] == part.content
    await deposited(one)
    await upstream.stop()
    # The first request learns that the upstream is down.
    assert (await other.get("/v2/a/b/manifests/unknown"))[0] == 502
    podman = {"User_Agent": "containers/5.34 (github.com/containers/image)"}
    assert (await other.get(TAG, **podman))[::2] == (200, whole.content)
    assert (await other.get("/v2/a/b/manifests/part", **podman))[0] == 503
    assert (await other.get("/v2/a/b/manifests/part"))[::2] == (200, part.content)
