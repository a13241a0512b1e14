"""Copies, on the disk, of what the private registry has in a bucket."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import math
import os
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from storage.disk.blobs import BlobFiles
from storage.keys import COPIED, COPIES
from storage.oci import Digest
from tests.conftest import Serve, configuration
from tests.objects import FakeBucket, answer
from tests.test_bucket_server import APP, LAYER, OTHER, Registry, registry, shared  # noqa: F401  a fixture
from tests.test_push import image
from tests.upstream import Upstream

pytestmark = pytest.mark.usefixtures("registry")


async def blob_of(registry: Registry, content: bytes = LAYER) -> str:  # noqa: F811
    """The path of a blob that is in the bucket alone."""
    digest = await registry.push(content)
    await registry.evict()
    registry.fake.asked.clear()
    return f"{APP}/blobs/{digest}"


@pytest.mark.clients
async def test_a_push_leaves_a_copy(registry: Registry) -> None:  # noqa: F811
    digest = await registry.push(LAYER)
    await registry.site.app.composition.copies.settled()
    assert registry.copies == {str(digest)}
    registry.fake.asked.clear()
    path = f"{APP}/blobs/{digest}"
    assert (await registry.ask("GET", path)).content_read == LAYER
    assert (await registry.ask("GET", path, Range="bytes=5-9")).content_read == LAYER[5:10]
    assert (await registry.ask("HEAD", path)).headers["Content-Length"] == str(len(LAYER))
    assert registry.fake.asked == []


@pytest.mark.clients
async def test_a_pull_leaves_a_copy_that_others_follow(registry: Registry) -> None:  # noqa: F811
    path = await blob_of(registry)
    found = await asyncio.gather(*(registry.ask("GET", path) for _ in range(5)))
    assert {each.content_read for each in found} == {LAYER}
    assert [each.split(" ")[0] for each in registry.fake.asked] == ["GET"]
    await registry.filled()
    assert registry.copies == {path.rpartition("/")[2]}
    assert (await registry.ask("GET", path)).content_read == LAYER
    assert len(registry.fake.asked) == 1


@pytest.mark.clients
async def test_copies_are_not_listed_as_a_repository(registry: Registry) -> None:  # noqa: F811
    await registry.push_image()
    await registry.site.app.composition.copies.settled()
    assert registry.copies
    assert registry.site.app.admin_url is not None
    async with registry.site.session.get(registry.site.app.admin_url / "api/v1/repositories") as response:
        found = await response.json()
    assert [each["repository"] for each in found["repositories"]] == ["local/team/app"]


@pytest.mark.clients
async def test_sha512_is_copied(registry: Registry) -> None:  # noqa: F811
    digest = Digest(f"sha512:{hashlib.sha512(LAYER).hexdigest()}")
    made = await registry.ask("POST", f"{APP}/blobs/uploads/?digest={digest}", LAYER)
    assert made.status == 201
    await registry.evict()
    assert (await registry.ask("GET", f"{APP}/blobs/{digest}")).content_read == LAYER
    await registry.filled()
    assert registry.copies == {str(digest)}


@pytest.mark.clients
async def test_a_range_is_read_as_a_range(registry: Registry) -> None:  # noqa: F811
    path = await blob_of(registry)
    part = await registry.ask("GET", path, Range="bytes=100-199")
    assert (part.status, part.content_read) == (206, LAYER[100:200])
    assert registry.copies == set()
    assert [each.partition(" bytes=")[2] for each in registry.fake.asked] == ["100-199"]
    whole = await registry.ask("GET", path, Range="bytes=0-")  # as containerd asks for all of it
    assert (whole.status, whole.content_read) == (206, LAYER)
    await registry.filled()
    assert registry.copies == {path.rpartition("/")[2]}


@pytest.mark.clients
async def test_records_decide_who_may_have_a_copy(registry: Registry) -> None:  # noqa: F811
    layer = await registry.push_image()
    await registry.site.app.composition.copies.settled()
    assert (await registry.ask("GET", f"{OTHER}/blobs/{layer}")).status == 404
    assert (await registry.ask("GET", f"/v2/library/app/blobs/{layer}?ns=docker.io")).status == 404
    assert (await registry.ask("DELETE", f"{APP}/blobs/{layer}")).status == 202
    for method in ("GET", "HEAD"):
        assert (await registry.ask(method, f"{APP}/blobs/{layer}")).status == 404
    assert str(layer) in registry.copies
    for name in (COPIES, "%28bucket%29/copies"):
        assert (await registry.ask("GET", f"/v2/{name}/blobs/{layer}")).status in (400, 404)


@pytest.mark.clients
async def test_what_is_collected_is_not_served_of_a_copy(registry: Registry) -> None:  # noqa: F811
    layer = await registry.push_image()
    assert (await registry.ask("DELETE", f"{APP}/manifests/{Digest.of(image(layer))}")).status == 202
    registry.site.clock.advance(3 * 86400)
    await registry.collect()
    assert str(layer) in registry.copies
    assert (await registry.ask("GET", f"{APP}/blobs/{layer}")).status == 404


@pytest.mark.clients
@pytest.mark.errors("bucket.failed")
async def test_copies_are_served_while_the_bucket_is_down(registry: Registry) -> None:  # noqa: F811
    path = await blob_of(registry, other := os.urandom(70_000))
    layer = await registry.push(LAYER)
    await registry.site.app.composition.copies.settled()
    registry.fake.down = answer(503, "SlowDown")
    assert (await registry.ask("GET", path)).status == 503
    for method in ("GET", "HEAD"):
        assert (await registry.ask(method, f"{APP}/blobs/{layer}")).status == 200
    registry.fake.down = None
    assert (await registry.ask("GET", path)).content_read == other


# Small blobs are read whole, before their first byte is sent

SMALL = os.urandom(1 << 20)


@pytest.fixture
def fills(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> list[Digest]:  # noqa: F811
    """The blobs that are filled."""
    seen: list[Digest] = []
    real = registry.site.app.composition.fills.join

    async def join(source: Any, digest: Digest, *more: Any) -> Any:
        seen.append(digest)
        return await real(source, digest, *more)

    monkeypatch.setattr(registry.site.app.composition.fills, "join", join)
    return seen


@pytest.mark.parametrize("range_", ["", "bytes=0-"])
async def test_a_small_blob_is_read_once_and_copied(
    registry: Registry,  # noqa: F811
    fills: list[Digest],
    range_: str,
) -> None:
    path = await blob_of(registry, SMALL)
    asked = {"Range": range_} if range_ else {}
    found = await asyncio.gather(*(registry.ask("GET", path, **asked) for _ in range(5)))
    assert {each.content_read for each in found} == {SMALL}
    copies = registry.site.app.composition.copies
    await copies.settled()
    assert [each.split(" ")[0] for each in registry.fake.asked] == ["GET"]
    assert registry.copies == {path.rpartition("/")[2]}
    assert (await registry.ask("GET", path)).content_read == SMALL
    assert (len(registry.fake.asked), fills, copies.held) == (1, [], 0)


async def test_of_many_small_blobs_some_are_filled(
    registry: Registry,  # noqa: F811
    fills: list[Digest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("proxy.cache.copies.SMALL_AT_ONCE", 2)
    contents = [os.urandom(1000) for _ in range(5)]
    paths = [await blob_of(registry, each) for each in contents]
    found = await asyncio.gather(*(registry.ask("GET", each) for each in paths))
    assert [each.content_read for each in found] == contents
    assert 1 <= len(fills) <= 3
    composition = registry.site.app.composition
    await asyncio.gather(*map(composition.fills.ended, fills))
    await composition.copies.settled()
    assert len(registry.copies) == 5


@pytest.mark.errors("disk.failed")
@pytest.mark.parametrize("evicted", [False, True])
async def test_a_small_blob_whose_copy_is_gone_at_once_is_there(
    registry: Registry,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    evicted: bool,
) -> None:
    path = await blob_of(registry, SMALL)
    reading = registry.site.app.composition.copies._reading
    real = reading.join

    async def join(*given: Any) -> None:
        await real(*given)
        await registry.site.app.composition.copies.settled()
        if evicted:
            await registry.evict()

    def place(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(reading, "join", join)
    if not evicted:
        monkeypatch.setattr(BlobFiles, "place", place)
    found = await registry.ask("GET", path)
    assert (found.status, found.content_read) == (200, SMALL)


async def test_a_small_blob_that_breaks_off_continues(registry: Registry) -> None:  # noqa: F811
    path = await blob_of(registry, SMALL)
    registry.fake.cut = 300_000
    assert (await registry.ask("GET", path)).content_read == SMALL
    assert len(registry.fake.asked) == 2


@pytest.mark.errors("fill.failed")
async def test_no_byte_of_a_small_blob_is_wrong(registry: Registry) -> None:  # noqa: F811
    path = await blob_of(registry, SMALL)
    (key,) = registry.fake.objects
    registry.fake.objects[key] = SMALL[:-1] + bytes([SMALL[-1] ^ 1])
    with pytest.raises(Exception, match=r"payload|reset|Connection"):
        await registry.ask("GET", path)
    composition = registry.site.app.composition
    assert (registry.copies, composition.copies.held) == (set(), 0)
    assert isinstance(composition.store.files, BlobFiles)
    assert not list((composition.store.files.root / "partial").glob("*"))
    registry.fake.objects[key] = SMALL
    assert (await registry.ask("GET", path)).content_read == SMALL


@pytest.mark.errors("bucket.failed", "blob.damaged")
async def test_a_small_blob_of_a_bucket_that_fails(registry: Registry) -> None:  # noqa: F811
    path = await blob_of(registry, SMALL)
    registry.fake.down = answer(503, "SlowDown")
    assert (await registry.ask("GET", path)).status == 503
    registry.fake.down, (key,) = None, registry.fake.objects
    del registry.fake.objects[key]
    assert (await registry.ask("GET", path)).status == 404


@pytest.mark.errors("disk.failed")
async def test_a_small_blob_is_served_from_a_disk_that_fails(
    registry: Registry,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = await blob_of(registry, SMALL)

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("proxy.cache.copies.create_file", fail)
    monkeypatch.setattr("storage.disk.directory.create_file", fail)
    assert (await registry.ask("GET", path)).content_read == SMALL
    assert registry.copies == set()


@pytest.mark.clients
@pytest.mark.errors("fill.failed")
async def test_wrong_content_of_the_bucket_is_no_copy(registry: Registry) -> None:  # noqa: F811
    path = await blob_of(registry)
    (key,) = registry.fake.objects
    registry.fake.objects[key] = LAYER[:-1] + b"!"
    with pytest.raises(Exception, match=r"payload|reset|Connection"):
        await registry.ask("GET", path)
    assert registry.copies == set()
    registry.fake.objects[key] = LAYER
    assert (await registry.ask("GET", path)).content_read == LAYER


@pytest.mark.clients
async def test_a_damaged_copy_is_replaced(registry: Registry) -> None:  # noqa: F811
    digest = await registry.push(LAYER)
    composition = registry.site.app.composition
    await composition.copies.settled()
    assert isinstance(composition.store.files, BlobFiles)
    copy = composition.store.files.path(digest)
    copy.chmod(0o600)
    os.truncate(copy, 1000)
    assert (await registry.ask("GET", f"{APP}/blobs/{digest}")).content_read == LAYER
    await registry.filled()
    assert copy.stat().st_size == len(LAYER)


@pytest.mark.clients
async def test_a_transfer_that_breaks_off_continues(registry: Registry) -> None:  # noqa: F811
    path = await blob_of(registry)
    registry.fake.cut = 5 << 20
    assert (await registry.ask("GET", path)).content_read == LAYER
    assert len(registry.fake.asked) > 1
    await registry.filled()
    assert registry.copies == {path.rpartition("/")[2]}


@pytest.mark.clients
@pytest.mark.errors("bucket.failed")
async def test_a_transfer_outlives_the_link_that_it_began_for(registry: Registry) -> None:  # noqa: F811
    path = await blob_of(registry)
    digest = await registry.push(LAYER, OTHER)
    await registry.evict()
    others: list[asyncio.Task[Any]] = []

    async def unlink(request: web.Request) -> web.StreamResponse:
        assert (await registry.ask("DELETE", path)).status == 202
        others.append(asyncio.create_task(registry.ask("GET", f"{OTHER}/blobs/{digest}")))
        registry.fake.cut = 5 << 20
        registry.fake.spoilt["GET"] = [answer(503, "SlowDown")] * 4  # so that the object is opened again
        return await registry.fake._get(request, request.path.removeprefix("/bucket/"))

    registry.fake.spoilt["GET"] = [unlink]
    assert (await registry.ask("GET", path)).content_read == LAYER
    assert (await others[0]).content_read == LAYER
    assert (await registry.ask("GET", path)).status == 404


@pytest.mark.clients
async def test_copies_are_bounded_by_the_limit_of_the_cache(
    serve: Serve, upstream: Upstream, tmp_path: Path
) -> None:
    async with FakeBucket() as fake:
        top = {"shared": shared(fake), "disk": {"path": str(tmp_path / "small"), "cache_limit": "35MiB"}}
        site = await serve(upstream, directory=tmp_path / "small", top=top, more={"local": {"store": {}}})
        here = Registry(site, fake)
        first = await blob_of(here, LAYER)
        second = await blob_of(here, LAYER[::-1])
        for path in (first, second):
            assert (await here.ask("GET", path)).status == 200
            site.clock.advance(100)
        eviction = site.app.composition.maintenance.eviction
        await asyncio.to_thread(eviction.shrink)  # unless it has just been done
        assert here.copies == {second.rpartition("/")[2]}


async def test_copies_are_in_no_namespace_of_all_hosts(tmp_path: Path) -> None:
    every = {"upstream": {"hosts": ["*"]}, "keep_for": "1h"}
    config = configuration(tmp_path, {"namespaces": {"*": every}})
    assert config.key_of("ghcr.io") == "*"
    assert config.key_of(COPIED) == COPIED
    assert config.keep_for(COPIES) == math.inf
