"""Which content of an index a bundle needs."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from storage.archives.export_plan import ExportPlanner, ExportReference
from storage.disk.blobs import BlobFiles
from storage.disk.records import SQLiteRecords
from storage.oci import OCI_INDEX, Digest, Manifest, Tag
from storage.store import Store
from tests.conftest import Clock

CACHE = "docker.io/team/cache"


@pytest.fixture
async def store(tmp_path: Path, clock: Clock) -> AsyncIterator[Store]:
    store = Store(BlobFiles(tmp_path, clock), SQLiteRecords(tmp_path / "records", clock), clock)
    yield store
    await store.close()


async def test_an_index_of_blobs_is_exported_with_all_of_them(store: Store, clock: Clock) -> None:
    layers = [b"a layer", b"another"]
    kind = "application/vnd.oci.image.layer.v1.tar"
    listed = [{"mediaType": kind, "digest": Digest.of(each), "size": len(each)} for each in layers]
    index = Manifest.of(OCI_INDEX, json.dumps({"schemaVersion": 2, "manifests": listed}).encode())
    await store.push_manifest(CACHE, Tag("1"), index)
    planner, wanted = ExportPlanner(["linux/arm64"]), ExportReference(store, CACHE, Tag("1"))
    assert not planner.add(wanted)
    assert planner.incomplete == {f"{CACHE}:1": {Digest.of(each) for each in layers}}
    for each in layers:
        upload = await store.start_upload(CACHE)
        await upload.write(each)
        await upload.commit(Digest.of(each))
    assert planner.add(wanted)
    plan = planner.plan(clock(), {})
    assert plan.sources.keys() == {index.digest, *map(Digest.of, layers)}
    assert plan.contents.references[0].complete
