"""A server whose private registry has its content in a bucket, which fails now and then."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest

from proxy.config.errors import StartError
from proxy.namespaces.private import private_store
from storage.disk.blobs import BlobFiles
from storage.oci import OCI_MANIFEST, Digest
from tests.conftest import Serve, Site, configuration
from tests.objects import FakeBucket, answer
from tests.test_push import image
from tests.upstream import Upstream

APP, OTHER = "/v2/local/team/app", "/v2/local/other"
CONFIG = b"{}"
LAYER = bytes(range(251)) * 80_000  # of several parts


@dataclass
class Registry:
    """A server with a bucket."""

    site: Site
    fake: FakeBucket

    async def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> Any:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.site.request(method, path, data=body or None, headers=given) as response:
            response.content_read = await response.read()
            return response

    async def push(self, content: bytes, repository: str = APP) -> Digest:
        digest = Digest.of(content)
        found = await self.ask("POST", f"{repository}/blobs/uploads/?digest={digest}", content)
        assert found.status == 201, found.content_read
        return digest

    async def push_image(self, tag: str = "1") -> Digest:
        layer = await self.push(LAYER)
        await self.push(CONFIG)
        found = await self.ask("PUT", f"{APP}/manifests/{tag}", image(layer), Content_Type=OCI_MANIFEST)
        assert found.status == 201, found.content_read
        return layer

    async def collect(self) -> Any:
        composition = self.site.app.composition
        assert composition.maintenance.collection is not None
        report = await asyncio.to_thread(composition.maintenance.collection.run)
        assert composition.private is not None
        await asyncio.to_thread(composition.private.files.reap, 86400.0)
        return report

    async def evict(self) -> None:
        """Remove all copies of blobs from the disk."""
        composition = self.site.app.composition
        await composition.copies.settled()
        await asyncio.to_thread(composition.maintenance.eviction.shrink, to=0)

    async def filled(self) -> None:
        """Wait until what has been pulled is stored: clients have the last byte before."""
        fills = self.site.app.composition.fills
        await asyncio.gather(*(fills.ended(each.digest) for each in fills.in_flight()))

    @property
    def copies(self) -> set[str]:
        """The digests of the blobs that are copied on the disk."""
        return {f"{each.parts[-3]}:{each.name}" for each in self.site.directory.glob("cache/blobs/*/*/*")}

    async def ready(self) -> dict[str, str]:
        assert self.site.app.admin_url is not None
        async with self.site.session.get(self.site.app.admin_url / "readyz") as response:
            found: dict[str, str] = await response.json()
            return found


def shared(fake: FakeBucket) -> dict[str, str]:
    settings = fake.settings("regis/try")
    keys = {"access_key": settings.access_key, "secret_key": settings.secret_key}
    return {"bucket": settings.url, "endpoint": settings.endpoint, **keys}


@pytest.fixture
async def registry(
    serve: Serve, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Registry]:
    at_once = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=2)}
    once = {"max_retries": 1, "retry_timeout": timedelta(seconds=30), "backoff": at_once}
    monkeypatch.setattr("storage.bucket.settings._RETRY", once)
    async with FakeBucket() as fake:
        site = await serve(upstream, top={"shared": shared(fake)}, more={"local": {"store": {}}})
        yield Registry(site, fake)


@pytest.mark.clients
async def test_an_image_is_pushed_and_pulled(registry: Registry) -> None:
    layer = await registry.push_image()
    assert sorted(key.split(".")[0] for key in registry.fake.objects) == sorted(
        f"regis/try/sha256/{each.encoded[:2]}/{each.encoded}" for each in (layer, Digest.of(CONFIG))
    )
    private = registry.site.directory / "private"
    assert list((private / "partial").iterdir()) == []
    assert not (private / "blobs").exists()
    assert (await registry.ask("GET", f"{APP}/manifests/1")).content_read == image(layer)
    path = f"{APP}/blobs/{layer}"
    head = await registry.ask("HEAD", path)
    assert (head.status, head.headers["Content-Length"]) == (200, str(len(LAYER)))
    for _ in range(2):
        assert (await registry.ask("GET", path)).content_read == LAYER
    await registry.evict()
    registry.fake.asked.clear()
    part = await registry.ask("GET", path, Range="bytes=1000000-1999999")
    assert (part.status, part.content_read) == (206, LAYER[1_000_000:2_000_000])
    assert part.headers["Content-Range"] == f"bytes 1000000-1999999/{len(LAYER)}"
    assert [each.partition(" bytes=")[2] for each in registry.fake.asked] == ["1000000-1999999"]
    parts = await registry.ask("GET", path, Range="bytes=0-9,5000000-5000009")
    assert parts.status == 206
    assert LAYER[:10] in parts.content_read and LAYER[5_000_000:5_000_010] in parts.content_read
    assert (await registry.ask("GET", path, Range=f"bytes={len(LAYER)}-")).status == 416


@pytest.mark.clients
async def test_an_upload_in_chunks(registry: Registry) -> None:
    begun = await registry.ask("POST", f"{APP}/blobs/uploads/")
    where, half = begun.headers["Location"], len(LAYER) // 2
    sent = await registry.ask("PATCH", where, LAYER[:half], Content_Range=f"0-{half - 1}")
    assert sent.status == 202
    assert registry.fake.objects == {}
    digest = Digest.of(LAYER, "sha512")
    wrong = await registry.ask("PUT", f"{sent.headers['Location']}?digest={digest}", LAYER[half:])
    assert wrong.status == 201
    assert (await registry.ask("GET", f"{APP}/blobs/{digest}")).content_read == LAYER


@pytest.mark.clients
async def test_a_mount_asks_the_bucket_for_no_more_than_a_look(registry: Registry) -> None:
    layer = await registry.push_image()
    registry.fake.asked.clear()
    mounted = await registry.ask("POST", f"{OTHER}/blobs/uploads/?mount={layer}&from=local/team/app")
    assert mounted.status == 201
    assert [each.split(" ")[0] for each in registry.fake.asked] == ["HEAD"]


@pytest.mark.clients
async def test_what_is_deleted_is_collected(registry: Registry) -> None:
    layer = await registry.push_image()
    assert (await registry.ask("DELETE", f"{APP}/manifests/{Digest.of(image(layer))}")).status == 202
    registry.site.clock.advance(3 * 86400)
    report = await registry.collect()
    assert (report.blobs, report.bytes) == (2, len(LAYER) + len(CONFIG))
    assert registry.fake.objects == {}
    assert (await registry.ask("GET", f"{APP}/blobs/{layer}")).status == 404
    await registry.push_image()
    assert (await registry.ask("GET", f"{APP}/blobs/{layer}")).content_read == LAYER


@pytest.mark.clients
async def test_a_pull_keeps_what_it_pulls(registry: Registry) -> None:
    layer = await registry.push_image()
    await registry.ask("DELETE", f"{APP}/manifests/{Digest.of(image(layer))}")
    registry.site.clock.advance(3 * 86400)
    assert (await registry.ask("HEAD", f"{APP}/blobs/{layer}")).status == 200
    assert (await registry.collect()).blobs == 1  # the config
    assert (await registry.ask("GET", f"{APP}/blobs/{layer}")).content_read == LAYER


@pytest.mark.clients
@pytest.mark.errors("bucket.failed")
async def test_a_bucket_that_is_down(registry: Registry) -> None:
    layer = await registry.push_image()
    await registry.evict()
    begun = await registry.ask("POST", f"{APP}/blobs/uploads/")
    registry.fake.down = answer(503, "SlowDown")
    for method in ("GET", "HEAD"):
        found = await registry.ask(method, f"{APP}/blobs/{layer}")
        assert (found.status, found.headers["Retry-After"]) == (503, "1")
    assert (await registry.ask("GET", f"{APP}/manifests/1")).status == 200  # of the records
    content = os.urandom(100_000)
    finish = f"{begun.headers['Location']}?digest={Digest.of(content)}"
    refused = await registry.ask("PUT", finish, content)
    assert (refused.status, refused.headers["Retry-After"]) == (503, "1")
    assert b"127.0.0.1" not in refused.content_read
    assert (await registry.ready())["store"] == "s3://bucket/regis/try: answers 503 Service Unavailable"
    assert (await registry.ask("HEAD", f"{APP}/blobs/{Digest.of(content)}")).status == 404
    registry.fake.down = None
    assert (await registry.ask("PUT", finish)).status == 201  # the bytes are there
    assert (await registry.ask("GET", f"{APP}/blobs/{Digest.of(content)}")).content_read == content
    assert (await registry.ask("GET", f"{APP}/blobs/{layer}")).content_read == LAYER
    assert (await registry.ready())["status"] == "ready"


@pytest.mark.errors("bucket.failed")
async def test_nothing_is_kept_of_what_no_client_can_finish(registry: Registry) -> None:
    registry.fake.down = answer(503, "SlowDown")
    refused = await registry.ask("POST", f"{APP}/blobs/uploads/?digest={Digest.of(LAYER)}", LAYER)
    assert refused.status == 503
    assert list((registry.site.directory / "private" / "partial").iterdir()) == []


@pytest.mark.clients
async def test_a_pin_counts_what_it_matches_here(registry: Registry) -> None:
    await registry.push_image()
    url = registry.site.app.admin_url
    assert url is not None
    async with registry.site.session.post(url / "api/v1/pins", json={"pattern": "local/team/*"}) as response:
        found = await response.json()
    counts = [found[0][each] for each in ("references", "manifests", "blobs")]
    assert counts == [1, 1, 2]


@pytest.mark.clients
async def test_a_restart_finds_all(registry: Registry, serve: Serve, upstream: Upstream) -> None:
    layer = await registry.push_image()
    await registry.site.app.stop()
    top = {"shared": shared(registry.fake)}
    again = await serve(upstream, top=top, more={"local": {"store": {}}})
    assert (await again.get(f"{APP}/blobs/{layer}"))[2] == LAYER


@pytest.mark.clients
async def test_content_is_either_here_or_there(registry: Registry) -> None:
    await registry.push_image()
    directory, store = registry.site.directory, {"namespaces": {"local": {"store": {}}}}
    here = {"disk": {"path": str(directory)}, **store}
    with pytest.raises(StartError, match=r"in a bucket: set shared\.bucket"):
        private_store(configuration(directory, here))
    blob = directory / "elsewhere" / "private" / "blobs" / "sha256" / "00" / ("00" * 32)
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"")
    there = {"disk": {"path": str(directory / "elsewhere")}, "shared": shared(registry.fake), **store}
    store = private_store(configuration(directory, there))  # which has to be moved first
    store.records.close()
    assert isinstance(store.files, BlobFiles)
