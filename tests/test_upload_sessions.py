"""Uploads that servers without a common directory resume: each request may reach another server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from storage.bucket.blobs import BucketBlobs
from storage.bucket.objects import Bucket, BucketHealth
from storage.disk.health import DiskHealth
from storage.disk.records import SQLiteRecords
from storage.disk.troubles import Troubles
from storage.errors import BlobUploadUnknown, DigestInvalid, StorageUnavailable, Unavailable
from storage.keys import LEFTOVER, OBJECT, UPLOAD
from storage.oci import Digest
from storage.registry import Upload
from storage.values import StoredObject
from tests.conftest import Clock
from tests.objects import FakeBucket, answer

PARTS = [b"the first part, ", b"the second, ", b"and the last"]
CONTENT = b"".join(PARTS)
DIGEST = Digest.of(CONTENT)
DAY = 86400.0


class RemoteRecords(SQLiteRecords):
    """Records that several servers share."""

    remote = True


class Servers:
    """Two servers, `one` and `other`, with a directory each."""

    def __init__(self, fake: FakeBucket, directory: Path, clock: Clock) -> None:
        self.fake = fake
        self.records = RemoteRecords(directory / "records", clock)
        self.one, self.other = (self._server(directory / name, clock) for name in ("one", "other"))

    def _server(self, root: Path, clock: Clock) -> BucketBlobs:
        troubles = Troubles()
        health = BucketHealth("s3://bucket", root, clock, troubles)
        bucket = Bucket(self.fake.settings().connect(), "s3://bucket", health)
        return BucketBlobs(bucket, self.records, root, clock, DiskHealth(root, clock, troubles), clock)

    async def begun(self, *parts: bytes, owner: str = "a") -> str:
        """The id of an upload; the servers take turns in receiving its parts."""
        upload = self.one.create(owner)
        await upload.suspend()
        for number, part in enumerate(parts):
            await self.add(upload.id, part, (self.one, self.other)[number % 2])
        return upload.id

    async def add(self, id: str, part: bytes, server: BucketBlobs) -> None:
        upload = await server.reopen(id, "a")
        await upload.write(part)
        await upload.suspend()

    async def read(self, digest: Digest) -> bytes:
        blob = self.one.open(digest)
        await blob.begin()
        return b"".join([bytes(each) async for each in blob.chunks()])

    async def left(self) -> list[str]:
        """What is there besides blobs, once it was cleaned up."""
        await asyncio.to_thread(self.other.reap, DAY)
        blobs = [StoredObject.parse(value) for _, value in self.records.scan(OBJECT.prefix())]
        keys = {f"pre/fix/{each.key}" for each in blobs if each is not None}
        found = [key for kind in (UPLOAD, LEFTOVER) for key in self.records.keys(kind.prefix())]
        return found + sorted(set(self.fake.objects) - keys)

    def asked(self) -> list[str]:
        return [each.split()[0] for each in self.fake.asked]


@pytest.fixture
async def servers(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Servers]:
    at_once = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=2)}
    once = {"max_retries": 1, "retry_timeout": timedelta(seconds=30), "backoff": at_once}
    monkeypatch.setattr("storage.bucket.settings._RETRY", once)
    async with FakeBucket() as fake:
        servers = Servers(fake, tmp_path, clock)
        yield servers
        servers.records.close()


async def test_each_part_is_received_by_another_server(servers: Servers) -> None:
    id = await servers.begun(*PARTS)
    upload = await servers.other.reopen(id, "a")
    assert upload.offset == len(CONTENT)
    assert (await upload.commit(DIGEST)).size == len(CONTENT)
    assert await servers.read(DIGEST) == CONTENT
    assert await servers.left() == []
    with pytest.raises(BlobUploadUnknown):
        await servers.one.reopen(id, "a")


async def test_a_single_part_is_put_once_and_fetched_by_nobody(servers: Servers) -> None:
    id = await servers.begun(CONTENT)
    assert (await (await servers.other.reopen(id, "a")).commit(DIGEST)).digest == DIGEST
    assert servers.asked() == ["PUT"]
    assert await servers.read(DIGEST) == CONTENT
    again = await servers.begun(CONTENT)
    await (await servers.other.reopen(again, "a")).commit(DIGEST)
    assert await servers.left() == []
    assert await servers.read(DIGEST) == CONTENT


@pytest.mark.parametrize("parts", [PARTS[:2], []], ids=["others before", "nothing before"])
async def test_the_last_request_brings_bytes(servers: Servers, parts: list[bytes]) -> None:
    id = await servers.begun(*parts)
    upload = await servers.other.reopen(id, "a")
    rest = CONTENT[upload.offset :]
    await upload.write(rest)
    assert upload.offset == len(CONTENT)
    await upload.commit(DIGEST)
    assert await servers.read(DIGEST) == CONTENT
    assert await servers.left() == []


@pytest.mark.parametrize("parts", [[], [CONTENT], PARTS], ids=["none", "one", "several"])
@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
async def test_a_digest_is_verified(servers: Servers, parts: list[bytes], algorithm: str) -> None:
    content = b"".join(parts)
    id = await servers.begun(*parts)
    digest = Digest.of(content, algorithm)
    await (await servers.one.reopen(id, "a")).commit(digest)
    assert await servers.read(digest) == content
    id = await servers.begun(*parts)
    wrong = await servers.one.reopen(id, "a")
    with pytest.raises(DigestInvalid):
        await wrong.commit(Digest.of(b"another", algorithm))
    assert await servers.left() == []
    with pytest.raises(BlobUploadUnknown):
        await servers.one.reopen(id, "a")


async def test_of_two_requests_at_once_one_wins(servers: Servers) -> None:
    id = await servers.begun()
    requests: list[Upload] = [await each.reopen(id, "a") for each in (servers.one, servers.other)]
    for request, part in zip(requests, (CONTENT, b"other bytes"), strict=True):
        await request.write(part)
    await requests[0].suspend()
    with pytest.raises(Unavailable):
        await requests[1].suspend()
    upload = await servers.other.reopen(id, "a")
    assert upload.offset == len(CONTENT)
    await upload.commit(DIGEST)
    assert await servers.read(DIGEST) == CONTENT


async def test_who_adds_to_an_upload_that_has_just_ended_finds_none(servers: Servers) -> None:
    id = await servers.begun(CONTENT[:1000])
    late, first = [await each.reopen(id, "a") for each in (servers.one, servers.other)]
    for each in (late, first):
        await each.write(CONTENT[1000:])
    await first.commit(DIGEST)
    with pytest.raises(BlobUploadUnknown):
        await late.commit(DIGEST)
    assert await servers.read(DIGEST) == CONTENT


async def test_who_cancels_leaves_nothing(servers: Servers) -> None:
    id = await servers.begun(*PARTS)
    upload = await servers.other.reopen(id, "a")
    await upload.write(b"more")
    await upload.cancel()
    assert await servers.left() == []
    with pytest.raises(BlobUploadUnknown):
        await servers.one.reopen(id, "a")


async def test_who_cancels_what_has_just_ended_keeps_the_blob(servers: Servers) -> None:
    id = await servers.begun(CONTENT)
    late = await servers.other.reopen(id, "a")
    await (await servers.one.reopen(id, "a")).commit(DIGEST)
    await late.cancel()
    assert await servers.left() == []
    assert await servers.read(DIGEST) == CONTENT


async def test_an_upload_that_ended_and_could_not_be_forgotten_keeps_its_blob(
    servers: Servers, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*arguments: object) -> None:
        raise StorageUnavailable("the database does not answer")

    id = await servers.begun(CONTENT)
    upload = await servers.one.reopen(id, "a")
    with monkeypatch.context() as patch:
        patch.setattr(servers.one, "forget_session", lost)
        await upload.commit(DIGEST)
    with pytest.raises(BlobUploadUnknown):
        await (await servers.other.reopen(id, "a")).commit(DIGEST)
    clock.advance(DAY + 1)
    assert await servers.left() == []
    assert await servers.read(DIGEST) == CONTENT


async def test_an_upload_is_of_one_repository(servers: Servers) -> None:
    id = await servers.begun(CONTENT)
    with pytest.raises(BlobUploadUnknown):
        await servers.other.reopen(id, "b")


async def test_an_upload_that_is_slow_keeps_its_parts(servers: Servers, clock: Clock) -> None:
    id = await servers.begun()
    for number, part in enumerate(PARTS):
        await servers.add(id, part, (servers.one, servers.other)[number % 2])
        clock.advance(0.7 * DAY)
        await asyncio.to_thread(servers.one.reap, DAY)
    await (await servers.one.reopen(id, "a")).commit(DIGEST)
    assert await servers.read(DIGEST) == CONTENT
    id = await servers.begun(*PARTS)
    clock.advance(DAY + 1)
    assert await servers.left() == []
    with pytest.raises(BlobUploadUnknown):
        await servers.one.reopen(id, "a")


async def test_all_parts_are_kept_for_a_day_after_the_last_one(servers: Servers, clock: Clock) -> None:
    id = await servers.begun(PARTS[0])
    clock.advance(DAY / 5)  # less than after which the parts are recorded as used again
    await servers.add(id, PARTS[1], servers.other)
    clock.advance(0.9 * DAY)
    await asyncio.to_thread(servers.one.reap, DAY)
    await servers.add(id, PARTS[2], servers.one)
    await (await servers.one.reopen(id, "a")).commit(DIGEST)
    assert await servers.read(DIGEST) == CONTENT
    assert await servers.left() == []


@pytest.mark.errors("bucket.failed")
async def test_a_bucket_that_is_down_keeps_what_it_has(servers: Servers) -> None:
    id = await servers.begun(*PARTS[:2])
    servers.fake.down = answer(503, "SlowDown")
    with pytest.raises(Unavailable):
        await servers.add(id, PARTS[2], servers.other)
    servers.fake.down = None
    upload = await servers.one.reopen(id, "a")
    assert upload.offset == len(PARTS[0] + PARTS[1])
    await servers.add(id, PARTS[2], servers.other)
    servers.fake.down = answer(503, "SlowDown")
    with pytest.raises(Unavailable):
        await (await servers.one.reopen(id, "a")).commit(DIGEST)
    servers.fake.down = None
    await (await servers.other.reopen(id, "a")).commit(DIGEST)
    assert await servers.read(DIGEST) == CONTENT
