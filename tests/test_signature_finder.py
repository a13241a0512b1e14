"""Where signatures are looked for, and how much of what is found is read."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proxy.signatures import finder
from proxy.signatures.finder import SignatureFinder
from proxy.signatures.forms import BUNDLE, DSSE_ENVELOPE, SIMPLE_SIGNING
from storage.disk.blobs import BlobFiles
from storage.disk.records import SQLiteRecords
from storage.oci import OCI_INDEX, OCI_MANIFEST, Digest, Manifest, Reference, Tag
from storage.registry import Blob
from storage.store import Store
from tests.conftest import Clock

NAME = "local/app"
IMAGE = Digest.of(b"the image")
TAG = IMAGE.replace(":", "-")


@pytest.fixture
async def store(tmp_path: Path, clock: Clock) -> AsyncIterator[Store]:
    store = Store(BlobFiles(tmp_path, clock), SQLiteRecords(tmp_path / "records", clock), clock)
    yield store
    await store.close()


async def signed(store: Store, *contents: bytes, tag: str = "", media_type: str = BUNDLE) -> Digest:
    """Store a manifest that refers to the image, with these layers."""
    layers = []
    for content in contents:
        upload = await store.start_upload(NAME)
        await upload.write(content)
        digest = (await upload.commit(Digest.of(content))).digest
        layers.append({"mediaType": media_type, "digest": digest, "size": len(content)})
    body = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "artifactType": media_type, "layers": layers}
    if not tag:
        body["subject"] = {"mediaType": OCI_MANIFEST, "digest": IMAGE, "size": 9}
    manifest = Manifest.of(OCI_MANIFEST, json.dumps(body).encode())
    await store.push_manifest(NAME, Tag(tag) if tag else manifest.digest, manifest)
    return manifest.digest


async def found(store: Store) -> list[bytes]:
    return [each.content async for each in SignatureFinder(store, NAME).find(IMAGE)]


async def test_each_is_found_once_wherever_it_is_listed(store: Store) -> None:
    await signed(store, b"classic", tag=f"{TAG}.sig", media_type=SIMPLE_SIGNING)
    await signed(store, b"attestation", tag=f"{TAG}.att", media_type=DSSE_ENVELOPE)
    referring = await signed(store, b"bundle")
    entry = {"mediaType": OCI_MANIFEST, "digest": referring, "size": 1, "artifactType": BUNDLE}
    other = {"mediaType": OCI_MANIFEST, "digest": Digest.of(b"gone"), "size": 1}
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry, other, entry]}
    await store.push_manifest(NAME, Tag(TAG), Manifest.of(OCI_INDEX, json.dumps(index).encode()))
    assert await found(store) == [b"classic", b"attestation", b"bundle"]


async def test_nothing_is_found_of_an_image_without_signatures(store: Store) -> None:
    assert await found(store) == []
    await signed(store, b"an sbom", media_type="application/spdx+json")
    await signed(store, b"an sbom", tag=f"{TAG}.sbom", media_type=SIMPLE_SIGNING)
    await store.push_manifest(NAME, Tag(TAG), Manifest.of(OCI_INDEX, b'{"manifests": [], "Manifests": []}'))
    assert await found(store) == []


async def test_tags_that_are_too_long_are_not_asked_for(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    right = Store.get_manifest

    async def get_manifest(self: Store, repository: str, reference: Reference) -> Manifest:
        asked.append(reference)
        return await right(self, repository, reference)

    monkeypatch.setattr(Store, "get_manifest", get_manifest)
    long = Digest.of(b"the image", "sha512")
    assert [each async for each in SignatureFinder(store, NAME).find(long)] == []
    assert asked == [f"sha512-{long.encoded[:64]}"]


async def test_no_more_is_read_than_is_reasonable(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finder, "LARGEST", 100)
    monkeypatch.setattr(finder, "MOST_BYTES", 250)
    await signed(store, b"a" * 100, b"b" * 101, b"c" * 100, b"d" * 60, b"e" * 50)
    assert await found(store) == [b"a" * 100, b"c" * 100, b"e" * 50]


async def test_a_blob_of_other_content_is_not_believed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    await signed(store, b"bundle")
    right = Store.get_blob

    async def wrong(self: Store, repository: str, digest: Digest, span: object = None) -> Blob:
        blob = await right(self, repository, digest)

        async def chunks(start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
            yield b"others"

        blob.chunks = chunks  # type: ignore[method-assign]
        return blob

    monkeypatch.setattr(Store, "get_blob", wrong)
    with pytest.raises(Exception, match="is damaged"):
        await found(store)
