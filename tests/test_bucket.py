"""Blobs in a bucket: what is asked of it, and what happens when it fails."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from storage.bucket import objects
from storage.bucket.blobs import CLAIM, BucketBlobs
from storage.bucket.failures import AGAIN, KEYS
from storage.bucket.objects import CHUNK, PART, Bucket, BucketHealth
from storage.bucket.settings import BucketSettings
from storage.disk.health import DiskHealth
from storage.disk.records import SQLiteRecords
from storage.disk.troubles import Troubles
from storage.errors import BlobUnknown, Unavailable
from storage.keys import LEFTOVER
from storage.oci import Digest, Span
from storage.registry import NOTHING, Blob
from tests.conftest import Clock
from tests.objects import FakeBucket, answer

CONTENT = b"what a blob holds"
DIGEST = Digest.of(CONTENT)
LARGE = bytes(range(251)) * (5 * PART // 502)  # of several parts
DAY = 86400.0


class Place:
    """A bucket, and the blobs in it; `troubles` are what is wrong with it."""

    def __init__(self, fake: FakeBucket, directory: Path, clock: Clock) -> None:
        self.fake = fake
        self.records = SQLiteRecords(directory / "records", clock)
        troubles = Troubles()
        self.disk = DiskHealth(directory, clock, troubles)
        health = BucketHealth("s3://bucket", directory, clock, troubles)
        bucket = Bucket(fake.settings().connect(), "s3://bucket", health)
        self.blobs = BucketBlobs(bucket, self.records, directory, clock, self.disk, clock)

    async def put(self, content: bytes = CONTENT) -> Digest:
        upload = self.blobs.create()
        await upload.write(content)
        return (await upload.commit(Digest.of(content))).digest

    async def read(self, digest: Digest, span: Span | None = None) -> bytes:
        blob = self.blobs.open(digest)
        await blob.begin(span)
        start, stop = (0, None) if span is None else (span.start, span.stop)
        return await read(blob, start, stop)

    async def reap(self) -> int:
        return await asyncio.to_thread(self.blobs.reap, DAY)

    @property
    def troubles(self) -> list[str]:
        return self.disk.troubles()


async def read(blob: Blob, start: int = 0, stop: int | None = None) -> bytes:
    return b"".join([bytes(chunk) async for chunk in blob.chunks(start, stop)])


@pytest.fixture
async def place(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Place]:
    at_once = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=2)}
    once = {"max_retries": 1, "retry_timeout": timedelta(seconds=30), "backoff": at_once}
    monkeypatch.setattr("storage.bucket.settings._RETRY", once)
    async with FakeBucket() as fake:
        place = Place(fake, tmp_path / "private", clock)
        yield place
        place.records.close()


async def test_what_is_asked_for_a_small_blob(place: Place) -> None:
    await place.put()
    (key,) = place.fake.objects
    assert key.startswith(f"pre/fix/sha256/{DIGEST.encoded[:2]}/{DIGEST.encoded}.")
    assert place.fake.asked == [f"PUT {key}"]
    place.fake.asked.clear()
    assert await place.read(DIGEST) == CONTENT
    assert await place.read(DIGEST, Span(5, 9)) == CONTENT[5:9]
    await place.blobs.open(DIGEST).begin(NOTHING)
    assert place.fake.asked == [f"GET {key}", f"GET {key} bytes=5-8", f"HEAD {key}"]


@pytest.mark.clients
async def test_a_large_blob_is_put_in_parts(place: Place) -> None:
    digest = await place.put(LARGE)
    assert [each.split(" ")[0] for each in place.fake.asked] == ["POST", "PUT", "PUT", "PUT", "POST"]
    assert place.fake.uploads == {}
    assert await place.read(digest) == LARGE
    assert await place.read(digest, Span(PART - 1, PART + CHUNK)) == LARGE[PART - 1 : PART + CHUNK]


@pytest.mark.clients
async def test_few_parts_are_in_memory(place: Place) -> None:
    under_way, most = 0, 0

    async def counted(request: Any) -> Any:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        answered = await place.fake._put(request, "")
        under_way -= 1
        return answered

    place.fake.spoilt["PUT"] = [counted] * 8
    digest = await place.put(content := bytes(range(251)) * (8 * PART // 251))
    assert 1 <= most <= objects.AT_ONCE
    assert await place.read(digest) == content


async def test_what_the_bucket_has_is_not_put_again(place: Place) -> None:
    await place.put(LARGE)
    place.fake.asked.clear()
    await place.put(LARGE)
    (key,) = place.fake.objects
    assert place.fake.asked == [f"HEAD {key}"]


async def adopt(place: Place, directory: Path) -> None:
    path = directory / "verified"
    path.write_bytes(CONTENT)
    with path.open("rb") as file:
        path.unlink()
        await place.blobs.adopt(file.fileno(), DIGEST)


async def test_a_file_is_adopted_by_one_server_at_a_time(place: Place, tmp_path: Path, clock: Clock) -> None:
    name = f"sha256/{DIGEST.encoded[:2]}/{DIGEST.encoded}.other"
    place.records.put(LEFTOVER.key(name), str(clock()).encode())
    with pytest.raises(Unavailable):
        await adopt(place, tmp_path)
    assert place.fake.asked == []
    clock.advance(CLAIM + 1)  # it was killed: else it would have renewed its claim
    await adopt(place, tmp_path)
    await adopt(place, tmp_path)
    assert [each.split()[0] for each in place.fake.asked] == ["PUT", "HEAD"]
    assert await place.read(DIGEST) == CONTENT


async def test_a_claim_is_renewed(
    place: Place, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.bucket.blobs.CLAIM", 0.003)
    renewed, since, loop = asyncio.Event(), place.blobs._claim_since, asyncio.get_running_loop()

    def renew(key: str, at: float) -> None:
        since(key, at)
        assert place.records.get(LEFTOVER.key(key)) == str(at).encode()
        loop.call_soon_threadsafe(renewed.set)

    monkeypatch.setattr(place.blobs, "_claim_since", renew)

    async def put(request: Any) -> Any:
        clock.advance(1)
        await renewed.wait()
        return await place.fake._put(request, "")

    place.fake.spoilt["PUT"] = [put]
    await adopt(place, tmp_path)
    assert list(place.records.scan(LEFTOVER.prefix())) == []


@pytest.mark.errors("bucket.failed")
async def test_who_failed_to_put_it_may_try_again_at_once(place: Place, tmp_path: Path) -> None:
    place.fake.down = answer(503, "SlowDown")
    with pytest.raises(Unavailable):
        await adopt(place, tmp_path)
    place.fake.down = None
    await adopt(place, tmp_path)
    assert await place.read(DIGEST) == CONTENT


@pytest.mark.errors("blob.damaged")
async def test_what_the_bucket_has_lost_is_put_again(place: Place) -> None:
    await place.put()
    place.fake.objects.clear()
    for ask in (lambda blob: blob.begin(), lambda blob: blob.begin(NOTHING), read):
        with pytest.raises(BlobUnknown):
            await ask(place.blobs.open(DIGEST))
    with pytest.raises(BlobUnknown):
        await asyncio.to_thread(place.blobs.verify, DIGEST)
    with pytest.raises(BlobUnknown):
        await asyncio.to_thread(place.blobs.reader(DIGEST).read)
    await place.put()
    assert await place.read(DIGEST) == CONTENT
    await place.reap()
    assert len(place.fake.objects) == 1


async def test_content_that_is_not_what_was_put_is_dropped_when_it_is_verified(place: Place) -> None:
    await place.put()
    (key,) = place.fake.objects
    place.fake.objects[key] = CONTENT[::-1]
    with pytest.raises(BlobUnknown, match="its content is"):
        await asyncio.to_thread(place.blobs.verify, DIGEST)
    assert not place.blobs.holds(DIGEST)
    await place.put()
    await place.reap()
    assert await place.read(DIGEST) == CONTENT
    assert key not in place.fake.objects


@pytest.mark.errors("bucket.failed")
async def test_a_missing_bucket_is_no_missing_blob(place: Place, events: Any) -> None:
    await place.put()
    place.fake.down = answer(404, "NoSuchBucket")
    logged = len(events.entries)
    for ask in (lambda blob: blob.begin(), lambda blob: blob.begin(NOTHING), read):
        with pytest.raises(Unavailable, match="no such bucket"):
            await ask(place.blobs.open(DIGEST))
    upload = place.blobs.create()
    await upload.write(b"other")
    with pytest.raises(Unavailable, match="no such bucket"):
        await upload.commit(Digest.of(b"other"))
    assert place.troubles == ["s3://bucket: has no such bucket"]
    assert [each["event"] for each in events.entries[logged:]] == ["bucket.failed"]  # once for all
    place.fake.down = None
    assert await place.read(DIGEST) == CONTENT
    assert place.troubles == []
    await (await place.blobs.reopen(upload.id)).cancel()


@pytest.mark.parametrize(
    ("status", "code", "cause"),
    [
        (503, "SlowDown", "answers 503 Service Unavailable"),
        (500, "InternalError", "answers 500 Internal Server Error"),
        (403, "AccessDenied", "refuses access"),
        (401, "Unauthorized", "refuses access"),
    ],
)
@pytest.mark.errors("bucket.failed")
async def test_a_bucket_that_fails_is_an_outage(
    place: Place, events: Any, status: int, code: str, cause: str
) -> None:
    await place.put()
    place.fake.down = answer(status, code)
    with pytest.raises(Unavailable, match=cause) as found:
        await place.blobs.open(DIGEST).begin()
    assert (found.value.status, found.value.retry_after) == (503, AGAIN)
    assert "127.0.0.1" not in found.value.public
    upload = place.blobs.create("a/b")
    await upload.write(LARGE)
    with pytest.raises(Unavailable, match=cause):
        await upload.commit(Digest.of(LARGE))
    assert place.troubles == [f"s3://bucket: {cause}"]
    place.fake.down = None
    resumed = await place.blobs.reopen(upload.id, "a/b")  # it is kept: the client may finish it once more
    assert resumed.offset == len(LARGE)
    await resumed.commit(Digest.of(LARGE))
    assert await place.read(Digest.of(LARGE)) == LARGE
    assert place.troubles == []
    assert [each["event"] for each in events.entries if each["event"].startswith("bucket.")] == [
        "bucket.failed",
        "bucket.recovered",
    ]


@pytest.mark.errors("bucket.failed")
async def test_why_a_look_is_refused_is_asked_for(place: Place, events: Any) -> None:
    place.fake.spoilt = {"HEAD": [answer(403, "")], "GET": [answer(403, "SignatureDoesNotMatch")]}
    with pytest.raises(Unavailable, match=r"look at key: 403 SignatureDoesNotMatch; check access_key"):
        await place.blobs.bucket.size("key")
    assert [each["advice"] for each in events.entries if each["event"] == "bucket.failed"] == [KEYS]


@pytest.mark.errors("bucket.failed")
async def test_a_bucket_that_does_not_answer_is_an_outage(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    await place.put()
    place.fake.down = place.fake.hang
    monkeypatch.setattr(objects, "PATIENCE", 0.01)
    for span in (None, NOTHING):
        with pytest.raises(Unavailable, match="does not answer"):
            await place.blobs.open(DIGEST).begin(span)


async def test_what_waits_for_a_silent_bucket_ends_with_it(place: Place) -> None:
    asked, gate = asyncio.Semaphore(0), asyncio.Event()

    async def hold(request: web.Request) -> web.StreamResponse:
        asked.release()
        await gate.wait()
        return web.Response()

    await place.put()
    (key,), bucket = place.fake.objects, place.blobs.bucket
    place.fake.down = hold
    source = place.blobs.path_of("source")
    source.write_bytes(CONTENT)
    blocking = (bucket.read, bucket.delete, lambda key: bucket.create(key, b""), lambda key: bucket.probe())
    waiting = [asyncio.create_task(each) for each in (bucket.size(key), bucket.get(key))]
    waiting += [asyncio.create_task(bucket.put("other", source, len(CONTENT)))]
    waiting += [asyncio.create_task(asyncio.to_thread(each, key)) for each in blocking]
    for _ in waiting:
        await asked.acquire()
    place.blobs.end()
    for each in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(each, Unavailable | asyncio.CancelledError), each
    with pytest.raises(Unavailable, match="the server stops"):
        await bucket.size(key)
    gate.set()
    opened = Path("/proc/self/fd")
    while str(source) in map(os.path.realpath, opened.iterdir()):  # noqa: ASYNC110 - obstore tells nobody
        await asyncio.sleep(0)
    source.unlink()


@pytest.mark.errors("bucket.failed")
async def test_nothing_listens(place: Place) -> None:
    await place.put()
    await place.fake.__aexit__()
    with pytest.raises(Unavailable, match="cannot be reached"):
        await place.blobs.open(DIGEST).begin()
    assert place.troubles == ["s3://bucket: cannot be reached"]


@pytest.mark.errors("bucket.failed")
async def test_housekeeping_sees_that_a_bucket_works_again(place: Place) -> None:
    place.fake.down = answer(503, "SlowDown")
    for _ in range(2):
        with pytest.raises(Unavailable):
            await place.blobs._bucket.get("anything")
        await place.reap()
        assert place.troubles
    place.fake.down = None
    await place.reap()
    assert place.troubles == []


@pytest.mark.clients
@pytest.mark.parametrize("cut", [1, CHUNK + 1, 3 * CHUNK])
async def test_reading_goes_on_where_it_broke_off(place: Place, cut: int) -> None:
    digest = await place.put(LARGE)
    for span in (None, Span(3, 4 * CHUNK)):
        place.fake.cut = cut
        stop = None if span is None else span.stop
        assert await place.read(digest, span) == LARGE[span.start if span else 0 : stop]


@pytest.mark.errors("bucket.failed")
async def test_what_breaks_off_for_good_ends_short(place: Place) -> None:
    digest = await place.put(LARGE)
    place.fake.cut = 2 * CHUNK
    blob = place.blobs.open(digest)
    await blob.begin()
    place.fake.down = answer(503, "SlowDown")
    got = bytearray()
    with pytest.raises(Unavailable, match="answers 503"):
        async for chunk in blob.chunks():
            got += chunk
    assert 0 < len(got) < len(LARGE)
    assert LARGE.startswith(got)


async def test_what_a_killed_upload_left_is_deleted_after_a_day(place: Place, clock: Clock) -> None:
    key = f"sha256/{DIGEST.encoded[:2]}/{DIGEST.encoded}.0123"
    place.fake.objects[f"pre/fix/{key}"] = CONTENT
    place.records.put(f"leftover {key}", str(clock.now).encode())
    place.fake.objects["another's"] = b""
    assert await place.reap() == 0
    assert len(place.fake.objects) == 2
    clock.advance(DAY + 1)
    assert await place.reap() == 1
    assert list(place.fake.objects) == ["another's"]
    assert list(place.records.keys("leftover ")) == []


@pytest.mark.errors("bucket.failed")
async def test_what_cannot_be_deleted_is_deleted_later(place: Place, clock: Clock) -> None:
    await place.put()
    place.records.transaction(partial(place.blobs.remove_old, DIGEST, lambda used_at: True))
    place.fake.down = answer(503, "SlowDown")
    await place.reap()
    place.fake.down = None
    assert len(place.fake.objects) == 1
    await place.reap()
    assert place.fake.objects == {}
    assert list(place.records.keys("leftover ")) == []


async def test_an_upload_that_took_more_than_a_day_makes_no_blob(place: Place, clock: Clock) -> None:
    async def late(request: Any) -> Any:
        clock.advance(DAY + 1)
        assert await place.reap() == 1
        key = request.path.removeprefix("/bucket/")
        return await place.fake._put(request, key)

    place.fake.spoilt["PUT"] = [late]
    upload = place.blobs.create()
    await upload.write(CONTENT)
    with pytest.raises(Unavailable, match="took too long"):
        await upload.commit(DIGEST)
    assert not place.blobs.holds(DIGEST)
    resumed = await place.blobs.reopen(upload.id)
    await resumed.commit(DIGEST)
    assert await place.read(DIGEST) == CONTENT


async def test_a_blob_that_is_removed_while_it_is_put_again_is_there(place: Place, clock: Clock) -> None:
    await place.put()
    (former,) = place.fake.objects

    async def removed(request: Any) -> Any:
        place.records.transaction(partial(place.blobs.remove_old, DIGEST, lambda used_at: True))
        return await place.fake._get(request, former)

    place.fake.spoilt["HEAD"] = [removed]
    await place.put()
    await place.reap()
    assert former not in place.fake.objects
    assert await place.read(DIGEST) == CONTENT


@pytest.mark.errors("bucket.failed")
async def test_an_upload_of_which_a_part_fails_is_aborted(place: Place) -> None:
    place.fake.spoilt["PUT"] = [answer(400, "InvalidPart")]
    upload = place.blobs.create()
    await upload.write(LARGE)
    with pytest.raises(Unavailable, match="answers 400"):
        await upload.commit(Digest.of(LARGE))
    assert (place.fake.uploads, place.fake.objects) == ({}, {})
    await (await place.blobs.reopen(upload.id)).cancel()


async def test_few_uploads_are_put_at_once(place: Place) -> None:
    most, reached, opened = objects.UPLOADS, asyncio.Event(), asyncio.Event()
    under_way = 0

    async def held(request: Any) -> Any:
        nonlocal under_way
        under_way += 1
        if under_way == most:
            reached.set()
        await opened.wait()
        return await place.fake._put(request, request.path)

    place.fake.spoilt["PUT"] = [held] * (most + 2)
    putting = [asyncio.create_task(place.put(b"%d" % number)) for number in range(most + 2)]
    await reached.wait()
    assert len(place.fake.asked) == most
    opened.set()
    await asyncio.gather(*putting)
    assert len(place.fake.objects) == most + 2


async def test_an_upload_that_is_cancelled_comes_to_its_end(place: Place) -> None:
    reached, cancelled = asyncio.Event(), asyncio.Event()

    async def held(request: Any) -> Any:
        reached.set()
        await cancelled.wait()
        return await place.fake._put(request, "")

    place.fake.spoilt["PUT"] = [held]
    upload = place.blobs.create()
    await upload.write(LARGE)
    committing = asyncio.create_task(upload.commit(Digest.of(LARGE)))
    await reached.wait()
    committing.cancel()
    await asyncio.sleep(0)
    cancelled.set()
    with pytest.raises(asyncio.CancelledError):
        await committing
    assert place.fake.uploads == {}
    assert await place.read(Digest.of(LARGE)) == LARGE


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ca": Path("/nowhere")}, "nowhere"),
        ({"ca": Path(__file__)}, f"{Path(__file__).name} has no certificates"),
        ({"encryption": "rot13"}, "^Invalid encryption type: rot13"),
        ({"endpoint": "127.0.0.1:9000"}, "endpoint is '127.0.0.1:9000', but must begin with https://"),
        ({"url": "az://box"}, "^Account must be specified; set access_key to the account"),
        ({"url": "az://box", "access_key": "a", "secret_key": "b"}, "set secret_key to a key of the account"),
        ({"url": "gs://box", "secret_key": "{}"}, "set secret_key to the key of a service account"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises((ValueError, OSError), match=says):
        BucketSettings(**({"url": "s3://bucket/x"} | options)).connect()


async def test_google(place: Place) -> None:
    url = f"http://127.0.0.1:{place.fake.port}"
    none = {"client_email": "", "private_key": "", "private_key_id": "", "disable_oauth": True}
    settings = BucketSettings(url="gs://bucket/of/google", endpoint=url, secret_key=json.dumps(none))
    bucket = Bucket(settings.connect(), "gs://bucket", place.blobs._bucket.health, "NEARLINE")
    source = place.blobs.root / "source"
    for content in (CONTENT, LARGE):
        source.write_bytes(content)
        await bucket.put("key", source, len(content))
        assert place.fake.objects == {"of/google/key": content}
        assert await bucket.size("key") == len(content)
        got = [bytes(each) async for each in (await bucket.get("key", 3, 9)).chunks]
        assert b"".join(got) == content[3:9]
        await asyncio.to_thread(bucket.delete, "key")
        assert await bucket.size("key") is None
    assert (place.fake.objects, place.fake.uploads) == ({}, {})


@pytest.mark.parametrize("content", [CONTENT, LARGE], ids=["whole", "in parts"])
async def test_an_object_has_the_class_and_the_encryption_that_are_set(place: Place, content: bytes) -> None:
    given = {"storage_class": "STANDARD_IA", "encryption": "aws:kms", "encryption_key": "a-key"}
    settings = replace(place.fake.settings(), session_token="a-token", **given)
    bucket = Bucket(settings.connect(), "s3", place.blobs._bucket.health, settings.storage_class)
    method, seen = ("PUT" if content == CONTENT else "POST"), list[dict[str, str]]()

    async def look(request: web.Request) -> web.StreamResponse:
        seen.append({name.lower(): value for name, value in request.headers.items()})
        found = getattr(place.fake, f"_{method.lower()}")
        return await found(request, request.path.removeprefix("/bucket/"))  # type: ignore[no-any-return]

    place.fake.spoilt[method] = [look]  # the first request makes the object
    source = place.blobs.root / "source"
    source.write_bytes(content)
    await bucket.put("key", source, len(content))
    assert seen[0].items() >= {
        ("x-amz-storage-class", "STANDARD_IA"),
        ("x-amz-server-side-encryption", "aws:kms"),
        ("x-amz-server-side-encryption-aws-kms-key-id", "a-key"),
        ("x-amz-security-token", "a-token"),
    }
    assert place.fake.objects == {"pre/fix/key": content}


def test_each_cloud_has_its_settings(tmp_path: Path) -> None:
    made = BucketSettings(url="az://box/a/b/", access_key="account", secret_key="a2V5").connect()
    assert (type(made).__name__, made.prefix, made.config["account_name"]) == ("AzureStore", "a/b", "account")
    keys = {"access_key": "a", "secret_key": "b", "encryption": "aws:kms", "encryption_key": "k"}
    made = BucketSettings(url="s3://box", region="eu-central-1", **keys).connect()
    assert (type(made).__name__, made.prefix, made.config["region"]) == ("S3Store", None, "eu-central-1")
