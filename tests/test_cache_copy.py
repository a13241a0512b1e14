"""What caches have stored, copied into what servers share and back."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from proxy.config.loader import load
from proxy.config.schema import Config
from proxy.namespaces.engines import shared_caches
from proxy.transfer.engine_moves import CACHES, EngineMoves, NotMovable
from storage.disk.blobs import BlobFiles
from storage.disk.records import SQLiteRecords
from storage.disk.troubles import Troubles
from storage.errors import BlobUnknown
from storage.migration.move import MoveReport
from storage.oci import OCI_MANIFEST, Digest, Manifest, Tag
from storage.store import Store
from tests.objects import FakeBucket
from tests.postgres import PostgresServer
from tests.test_move import in_bucket, push

NAME = "docker.io/library/a"
LAYER = bytes(range(251)) * 1000


@pytest.fixture
async def fake() -> AsyncIterator[FakeBucket]:
    async with FakeBucket() as fake:
        yield fake


@pytest.fixture
def config(tmp_path: Path, fake: FakeBucket, postgres_server: PostgresServer) -> Config:
    shared = {"records": postgres_server.database(), "caches": {}, **in_bucket(fake)}
    tree: dict[str, Any] = {"disk": {"path": str(tmp_path)}, "shared": shared}
    tree["namespaces"] = {"docker.io": {"upstream": "https://registry-1.docker.io"}}
    path = tmp_path / "entrepot.yml"
    path.write_text(yaml.safe_dump(tree))
    return load(path)


@asynccontextmanager
async def stores(config: Config) -> AsyncIterator[tuple[Store, Store]]:
    """That of the server, and that of all."""
    root = config.disk.path / "cache"
    store = Store(BlobFiles(root), SQLiteRecords(root / "records"))
    common, _ = shared_caches(config, store, time.time, Troubles())
    yield store, common
    await common.close()
    await store.close()


async def copied(config: Config, shared: bool) -> MoveReport:
    async with EngineMoves(config, shared) as moves:
        ((name, job),) = moves.jobs(caches=True)
        assert name == CACHES
        expected = await moves.expected(name, job)
        await moves.check_room(job)
        report = await job.run()
        await moves.settle()
        assert (expected.blobs, expected.bytes, expected.records) == (
            report.blobs,
            report.bytes,
            report.records,
        )
        assert (expected.expected is not None) == bool(report.blobs)
    return report


@pytest.mark.clients
async def test_what_a_cache_has_is_shared_and_comes_back(config: Config) -> None:
    manifest = Manifest.of(OCI_MANIFEST, b'{"schemaVersion": 2}')
    newer = Manifest.of(OCI_MANIFEST, b'{"schemaVersion": 2, "layers": []}')
    async with stores(config) as (store, common):
        await push(store, LAYER, b"small")
        for each in (manifest, newer):
            await store.push_manifest(NAME, each.digest, each)
        await store.push_manifest(NAME, Tag("1"), manifest)
        await store.point(NAME, Tag("moved"), newer.digest)
        await store.point(NAME, Tag("ahead"), manifest.digest, age=50.0)
        await common.push_manifest(NAME, newer.digest, newer)
        await common.point(NAME, Tag("moved"), manifest.digest, age=100.0)
        await common.point(NAME, Tag("ahead"), newer.digest)
    report = await copied(config, shared=True)
    assert (report.blobs, report.bytes) == (2, len(LAYER) + 5)
    assert (await copied(config, shared=True)).blobs == 0
    async with stores(config) as (store, common):
        blob = await common.get_blob("local/a", Digest.of(LAYER))
        assert b"".join([chunk async for chunk in blob.chunks()]) == LAYER
        assert (await common.get_manifest(NAME, Tag("1"))).content == manifest.content
        for tag in ("moved", "ahead"):  # whichever was confirmed later
            assert (await common.get_manifest(NAME, Tag(tag))).content == newer.content
        store.records.transaction(
            lambda batch: store.files.remove_old(Digest.of(LAYER), lambda at: True, batch)
        )
        with pytest.raises(BlobUnknown):
            await store.get_blob("local/a", Digest.of(LAYER))
    report = await copied(config, shared=False)
    assert (report.blobs, report.bytes) == (1, len(LAYER))
    async with stores(config) as (store, _):
        blob = await store.get_blob("local/a", Digest.of(LAYER))
        assert b"".join([chunk async for chunk in blob.chunks()]) == LAYER
        await blob.close()
        assert (await store.get_manifest(NAME, Tag("ahead"))).content == newer.content


async def test_a_damaged_blob_stays_where_it_is(config: Config, fake: FakeBucket) -> None:
    async with stores(config) as (store, _):
        await push(store, LAYER, b"small")
        path = store.files.path(Digest.of(LAYER))
        assert path is not None
        path.write_bytes(b"!" + LAYER[1:])
    async with EngineMoves(config, True) as moves:
        ((_, job),) = moves.jobs(caches=True)
        report = await job.run()
    assert report.blobs == 1
    assert list(fake.objects.values()) == [b"small"]


async def test_a_disk_without_room_is_not_filled(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    async with stores(config) as (_, common):
        await push(common, LAYER)
    monkeypatch.setattr(BlobFiles, "room", lambda self: len(LAYER) - 1)
    async with EngineMoves(config, False) as moves:
        ((_, job),) = moves.jobs(caches=True)
        with pytest.raises(NotMovable, match=r"245\.1 KiB are to be copied.*--no-caches"):
            await moves.check_room(job)
    async with EngineMoves(config, False) as moves:
        assert list(moves.jobs(caches=False)) == []
