"""Whose objects those of a bucket are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from storage.bucket.blobs import BucketBlobs
from storage.bucket.objects import Bucket, healthy
from storage.bucket.owner import ForeignBucket
from storage.disk.records import SQLiteRecords
from storage.errors import Unavailable
from storage.oci import Digest
from tests.objects import FakeBucket, answer


@pytest.fixture
async def fake() -> AsyncIterator[FakeBucket]:
    async with FakeBucket() as fake:
        yield fake


class Server:
    """One that has records in a directory, and blobs in the bucket."""

    def __init__(self, fake: FakeBucket, root: Path, prefix: str = "a") -> None:
        self.records = SQLiteRecords(root / "records")
        name = f"s3://bucket/{prefix}"
        bucket = Bucket(fake.settings(prefix).connect(), name, healthy(name, root))
        self.blobs = BucketBlobs(bucket, self.records, root)

    async def push(self, content: bytes) -> None:
        upload = self.blobs.create()
        await upload.write(content)
        try:
            await upload.commit(Digest.of(content))
        except Unavailable:  # it may be committed again
            await upload.cancel()
            raise

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.records.close()


async def test_the_first_records_own_the_bucket(fake: FakeBucket, tmp_path: Path) -> None:
    for content in (b"one", b"two"):  # the second time as after a restart
        with Server(fake, tmp_path / "one") as server:
            await server.push(content)
    assert list(fake.markers) == ["a/entrepot"]
    assert len(fake.objects) == 2


@pytest.mark.errors("bucket.foreign")
async def test_other_records_put_nothing_into_it(fake: FakeBucket, tmp_path: Path, events: Any) -> None:
    with Server(fake, tmp_path / "one") as one, Server(fake, tmp_path / "two") as two:
        await one.push(b"one")
        with pytest.raises(ForeignBucket, match=r"^s3://bucket/a belongs to other records: .* entrepot$"):
            await two.push(b"two")
        assert len(fake.objects) == 1
        assert await asyncio.to_thread(two.blobs.reap, 86400.0) == 0
        named = [each["bucket"] for each in events.entries if each["event"] == "bucket.foreign"]
        assert named == ["s3://bucket/a"]  # once for all pushes
        with Server(fake, tmp_path / "three", "b") as three:  # another prefix is another bucket
            await three.push(b"three")
        fake.markers.clear()  # as its error says
        await two.push(b"two")
    assert len(fake.objects) == 3


@pytest.mark.errors("bucket.failed")
async def test_a_bucket_that_cannot_be_asked_is_asked_again(fake: FakeBucket, tmp_path: Path) -> None:
    fake.down = answer(403, "AccessDenied")
    with Server(fake, tmp_path) as server:
        with pytest.raises(Unavailable, match="refuses access"):
            await server.push(b"one")
        fake.down = None
        await server.push(b"one")
    assert fake.markers and fake.objects


@pytest.mark.errors("bucket.foreign")
async def test_a_service_that_cannot_put_conditionally(
    fake: FakeBucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.bucket.settings._RETRY", {"max_retries": 0})
    fake.conditional = False
    with Server(fake, tmp_path / "one") as one, Server(fake, tmp_path / "two") as two:
        await one.push(b"one")
        assert fake.markers
        with pytest.raises(ForeignBucket):
            await two.push(b"two")


@pytest.mark.errors("bucket.foreign")
async def test_of_two_that_begin_at_once_one_owns_it(fake: FakeBucket, tmp_path: Path) -> None:
    with Server(fake, tmp_path / "one") as one, Server(fake, tmp_path / "two") as two:
        found = await asyncio.gather(one.push(b"one"), two.push(b"two"), return_exceptions=True)
    assert sorted(type(each).__name__ for each in found) == ["ForeignBucket", "NoneType"]
