"""A tag whose image the upstream no longer has is checked at once, though it is fresh."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proxy.cache import doubts as module
from proxy.cache.doubts import Doubts
from storage.disk.blobs import BlobFiles
from storage.disk.records import SQLiteRecords
from storage.oci import OCI_INDEX, OCI_MANIFEST, Digest, Manifest, Tag
from storage.store import Store
from tests.conftest import Clock, Serve, Site
from tests.pulls import FRESH, manifest_of, pull, warm
from tests.upstream import Image, Status, Upstream

NAME, TAG = "up/a/b", Tag("latest")
LOST, OTHER = Digest.of(b"lost"), Digest.of(b"other")


def manifest_naming(digest: Digest) -> Manifest:
    return Manifest.of(OCI_MANIFEST, f'{{"schemaVersion": 2, "layers": [{{"digest": "{digest}"}}]}}'.encode())


@pytest.fixture
async def store(tmp_path: Path, clock: Clock) -> AsyncIterator[Store]:
    store = Store(BlobFiles(tmp_path, clock), SQLiteRecords(tmp_path / "records", clock), clock)
    yield store
    await store.close()


async def doubted(doubts: Doubts, content: bytes, since: float) -> bool:
    return doubts.any(NAME, TAG, since) and await doubts.about(NAME, TAG, content, since)


async def test_it_is_of_what_the_image_names_until_the_tag_is_validated(store: Store, clock: Clock) -> None:
    doubts = Doubts(store, clock)
    before = clock()
    clock.advance(1)
    doubts.add(NAME, LOST)
    assert await doubted(doubts, manifest_naming(LOST).content, before)
    assert not await doubted(doubts, manifest_naming(OTHER).content, before)
    assert not doubts.any("up/other", TAG, before)
    assert not doubts.any(NAME, TAG, clock())
    clock.advance(1)
    doubts.add(NAME, OTHER)
    assert not await doubted(doubts, manifest_naming(LOST).content, before + 1)
    doubts.forget(NAME)
    assert not doubts.any(NAME, TAG, before)


async def test_what_is_not_of_the_image_is_looked_at_once(store: Store, clock: Clock) -> None:
    doubts, content = Doubts(store, clock), manifest_naming(LOST).content
    before = clock()
    clock.advance(1)
    doubts.add(NAME, OTHER)
    assert doubts.any(NAME, TAG, before)
    assert not await doubted(doubts, content, before)
    assert not doubts.any(NAME, TAG, before)
    assert doubts.any(NAME, Tag("other"), before)
    clock.advance(1)
    doubts.add(NAME, LOST)
    assert await doubted(doubts, content, before)


async def test_it_is_of_the_manifests_of_an_index_too(store: Store, clock: Clock) -> None:
    doubts = Doubts(store, clock)
    child = manifest_naming(LOST)
    index = f'{{"manifests": [{{"digest": "{OTHER}"}}, {{"digest": "{child.digest}"}}]}}'.encode()
    await store.push_manifest(NAME, child.digest, child)
    doubts.add(NAME, LOST)
    assert await doubted(doubts, Manifest.of(OCI_INDEX, index).content, clock() - 1)


async def test_the_oldest_are_dropped(store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REPOSITORIES", 1)
    monkeypatch.setattr(module, "LOST", 1)
    doubts = Doubts(store, clock)
    since = clock() - 1
    for name, digest in (("up/before", LOST), (NAME, LOST), (NAME, OTHER)):
        doubts.add(name, digest)
    assert not doubts.any("up/before", TAG, since)
    assert await doubted(doubts, manifest_naming(OTHER).content, since)
    assert not await doubted(doubts, manifest_naming(LOST).content, since)


async def replaced(site: Site, upstream: Upstream, old: Image, clock: Clock) -> Image:
    """The tag moves, and the upstream deletes what it stood for; a client finds that out."""
    new = upstream.image("a/b", "latest", [b"another layer"])
    repository = upstream.repositories["a/b"]
    del repository.manifests[old.digest], repository.blobs[old.config]
    clock.advance(1)
    assert (await site.get(f"/v2/a/b/blobs/{old.config}"))[0] == 404
    upstream.clear()
    return new


async def test_the_next_pull_gets_the_new_image(serve: Serve, upstream: Upstream, clock: Clock) -> None:
    site, old = await warm(serve, upstream)
    assert "hit" in (await pull(site))[2]
    new = await replaced(site, upstream, old, clock)
    clock.advance(60)  # the 404 is no longer remembered
    assert (await pull(site))[:2] == (200, new.content)
    assert upstream.log == ["HEAD manifest a/b:latest", f"GET manifest a/b@{new.digest[:19]}"]
    assert "hit" in (await pull(site))[2]
    assert len(upstream.log) == 2


async def test_while_it_does_not_say_the_old_one_is_served(
    serve: Serve, upstream: Upstream, clock: Clock
) -> None:
    site, old = await warm(serve, upstream)
    await replaced(site, upstream, old, clock)
    upstream.next("HEAD", "latest", Status(403))
    assert (await pull(site))[:2] == (200, old.content)


async def test_what_no_image_names_changes_nothing(serve: Serve, upstream: Upstream, clock: Clock) -> None:
    site, image = await warm(serve, upstream)
    clock.advance(1)
    for path in (f"/v2/a/b/blobs/{LOST}", manifest_of(LOST)):
        assert (await site.get(path))[0] == 404
    upstream.clear()
    for _ in range(3):
        status, content, how = await pull(site)
        assert (status, content) == (200, image.content) and "hit" in how
    assert upstream.log == []


async def test_an_upstream_that_lost_a_blob_is_asked_once_for_the_tag(
    serve: Serve, upstream: Upstream, clock: Clock
) -> None:
    site, image = await warm(serve, upstream)
    del upstream.repositories["a/b"].blobs[image.config]
    clock.advance(1)
    assert (await site.get(f"/v2/a/b/blobs/{image.config}"))[0] == 404
    upstream.clear()
    clock.advance(1)
    for _ in range(3):
        assert (await pull(site))[:2] == (200, image.content)
    assert upstream.log == ["HEAD manifest a/b:latest"]


async def test_a_tag_that_is_fresh_forever_is_not_checked(
    serve: Serve, upstream: Upstream, clock: Clock
) -> None:
    site, old = await warm(serve, upstream, fresh_for="forever")
    await replaced(site, upstream, old, clock)
    clock.advance(FRESH)
    assert (await pull(site))[:2] == (200, old.content)
    assert upstream.log == []
