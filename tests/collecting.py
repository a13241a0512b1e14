"""A store of our own with its collection, for tests; and pushes in the middle of one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from obstore.store import LocalStore

from storage.bucket.blobs import BucketBlobs
from storage.bucket.objects import Bucket, healthy
from storage.content import BlobContent
from storage.disk.blobs import BlobFiles
from storage.disk.records import SQLiteRecords
from storage.maintenance import collection as module
from storage.maintenance.collection import Collection, CollectionReport
from storage.maintenance.leases import Leases
from storage.maintenance.retention import RetentionRules
from storage.oci import OCI_INDEX, OCI_MANIFEST, Digest, Manifest, Tag
from storage.records import Batch
from storage.store import Store
from tests.conftest import Clock

DAY = 86400.0
GRACE = DAY
GONE = 2 * DAY  # seconds after which nothing is young any more
APP = "local/app"


class Place:
    """A store of our own and its collection; time is `clock`.  Its content may be in a `bucket`."""

    def __init__(self, root: Path, clock: Clock, bucket: Path | None = None) -> None:
        self.clock = clock
        self.records = SQLiteRecords(root / "records", clock)
        self.files: BlobContent = BlobFiles(root, clock, private=True)
        if bucket is not None:
            objects = Bucket(LocalStore(bucket, mkdir=True), "a bucket", healthy("a bucket", root))
            self.files = BucketBlobs(objects, self.records, root, clock)
        self.store = Store(self.files, self.records, clock, collected=True)
        self.leases = Leases(self.store, GRACE, clock)
        self.rules = RetentionRules()

    def collection(self, pause: Callable[[float], None] = lambda seconds: None) -> Collection:
        return Collection(self.store, lambda repository: self.rules, self.leases, self.clock, pause)

    def collect(self, dry_run: bool = False) -> CollectionReport:
        return self.collection().run(dry_run)

    async def blob(self, content: bytes, repository: str = APP) -> Digest:
        digest = Digest.of(content)
        upload = await self.store.start_upload(repository)
        await upload.write(content)
        await upload.commit(digest)
        return digest

    async def push(self, tree: dict[str, Any], tag: str | None = None, **keys: str) -> Digest:
        media_type = keys.get("media_type", OCI_INDEX if "manifests" in tree else OCI_MANIFEST)
        manifest = Manifest.of(media_type, json.dumps({"schemaVersion": 2, **tree}).encode())
        reference = Tag(tag) if tag else manifest.digest
        await self.store.push_manifest(keys.get("repository", APP), reference, manifest)
        return manifest.digest

    async def image(
        self, tag: str | None, *layers: Digest, subject: Digest | None = None, repository: str = APP
    ) -> Digest:
        tree: dict[str, Any] = {"layers": [descriptor(each) for each in layers]}
        if subject:
            tree["subject"] = descriptor(subject, OCI_MANIFEST)
        return await self.push(tree, tag, repository=repository)

    async def index(self, tag: str | None, *children: Digest) -> Digest:
        return await self.push({"manifests": [descriptor(each, OCI_MANIFEST) for each in children]}, tag)

    def manifests(self, repository: str = APP) -> set[str]:
        return {key.split(" ")[2] for key in self.records.keys(f"manifest {repository} ")}

    def tags(self, repository: str = APP) -> set[str]:
        return {key.split(" ")[2] for key in self.records.keys(f"tag {repository} ")}

    def links(self, repository: str = APP) -> set[str]:
        return {key.split(" ")[2] for key in self.records.keys(f"link {repository} ")}

    def held(self, *digests: Digest) -> list[bool]:
        return [self.store.holds(each) for each in digests]

    def all_keys(self) -> set[str]:
        return {key for kind in module.KINDS for key in self.records.keys(f"{kind} ")}


def descriptor(digest: Digest, media_type: str = "x") -> dict[str, Any]:
    return {"mediaType": media_type, "digest": str(digest), "size": 1}


def counts(report: CollectionReport) -> tuple[int, ...]:
    return report.tags, report.manifests, report.links, report.blobs


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Iterator[Place]:
    """Its content is in files, unless a test is parametrized by `BOTH`."""
    in_bucket = getattr(request, "param", "files") == "bucket"
    place = Place(tmp_path / "private", clock, tmp_path / "bucket" if in_bucket else None)
    yield place
    place.records.close()


BOTH = pytest.mark.parametrize("place", ["files", "bucket"], indirect=True)


class Interruption:
    """Something that happens at a step of a collection, once: before its n-th transaction."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int, what: Callable[[], object]) -> None:
        self.number = number
        transaction = SQLiteRecords.transaction

        def interrupted(
            records: SQLiteRecords, work: Callable[[Batch], object], shared: bool = False
        ) -> object:
            self.number -= 1
            if self.number == 0:
                what()
            return transaction(records, work, shared)

        monkeypatch.setattr(SQLiteRecords, "transaction", interrupted)


def push_now(place: Place, tag: str | None, tree: dict[str, Any]) -> Digest:
    manifest = Manifest.of(OCI_MANIFEST, json.dumps({"schemaVersion": 2, **tree}).encode())
    place.store._push(APP, manifest, [Tag(tag)] if tag else [], None)
    return manifest.digest
