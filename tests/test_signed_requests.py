"""Requests to S3 that the server signs itself: puts, and the removal of what a dead writer has left."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from storage.bucket.blobs import BucketBlobs
from storage.bucket.objects import PART, Bucket, healthy
from storage.bucket.settings import BucketSettings
from storage.bucket.signed_requests import (
    NOTHING,
    REST,
    BucketRefused,
    SignedRequests,
    authorize,
    signed_requests,
)
from storage.disk.records import SQLiteRecords
from storage.errors import DigestInvalid, StorageFailed, Unavailable
from storage.keys import LEFTOVER
from storage.oci import Digest
from tests.conftest import Clock
from tests.objects import FakeBucket, answer
from tests.preloaded import PROGRAM
from tests.seaweed import Seaweed

DAY = 86400.0
LARGE = os.urandom(2 * PART)
KEYS = "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "us-east-1"


@pytest.mark.parametrize(
    ("method", "path", "query", "headers", "signature"),
    [
        (
            "GET",
            "/test.txt",
            {},
            {"range": "bytes=0-9"},
            "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41",
        ),
        (
            "PUT",
            "/test%24file.text",
            {},
            {
                "date": "Fri, 24 May 2013 00:00:00 GMT",
                "x-amz-storage-class": "REDUCED_REDUNDANCY",
                "x-amz-content-sha256": "44ce7dd67c959e0d3524ffac1771dfbba87d2b6b4b4e99e42034a8b803f8b072",
            },
            "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd",
        ),
        (
            "GET",
            "/",
            {"lifecycle": ""},
            {},
            "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543",
        ),
        (
            "GET",
            "/",
            {"prefix": "J", "max-keys": "2"},
            {},
            "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7",
        ),
    ],
)
def test_the_examples_of_the_specification(
    method: str, path: str, query: dict[str, str], headers: dict[str, str], signature: str
) -> None:
    """https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html"""
    common = {
        "host": "examplebucket.s3.amazonaws.com",
        "x-amz-content-sha256": NOTHING,
        "x-amz-date": "20130524T000000Z",
    }
    assert authorize(method, path, query, {**common, **headers}, *KEYS).endswith(f",Signature={signature}")


class Place:
    """A bucket with requests of its own, and a file that is put into it."""

    def __init__(self, settings: BucketSettings, directory: Path) -> None:
        self.ticks, store = Clock(), settings.connect()
        self.requests = requests = SignedRequests(settings, store, settings.secret_key, self.ticks)
        health = healthy(settings.url, directory)
        self.bucket = Bucket(store, settings.url, health, settings.storage_class, requests=requests)
        self.source = directory / "source"
        self.source.write_bytes(LARGE)

    async def put(self, key: str = "key", digest: Digest | None = None) -> None:
        await self.bucket.put(key, self.source, len(LARGE), digest or Digest.of(LARGE))


@pytest.fixture
async def fake() -> AsyncIterator[FakeBucket]:
    async with FakeBucket() as server:
        yield server


@pytest.mark.clients
async def test_over_http_one_request_puts_what_is_hashed(fake: FakeBucket, tmp_path: Path) -> None:
    place = Place(fake.settings(), tmp_path)
    await place.put()
    assert (fake.asked, fake.objects) == (["PUT pre/fix/key"], {"pre/fix/key": LARGE})
    await place.put("other", Digest.of(LARGE, "sha512"))  # of which the service knows nothing
    assert fake.asked[1].startswith("POST pre/fix/other uploads")
    await place.bucket.put("third", place.source, len(LARGE))
    assert set(fake.objects.values()) == {LARGE}


async def test_an_empty_object(fake: FakeBucket, tmp_path: Path) -> None:
    place, empty = Place(fake.settings(), tmp_path), tmp_path / "empty"
    empty.touch()
    await place.bucket.put("key", empty, 0, Digest.of(b""))
    assert (fake.asked, fake.objects) == (["PUT pre/fix/key"], {"pre/fix/key": b""})


async def test_it_has_the_class_and_the_encryption_that_are_set(fake: FakeBucket, tmp_path: Path) -> None:
    seen = list[dict[str, str]]()

    async def look(request: web.Request) -> web.StreamResponse:
        seen.append({name.lower(): value for name, value in request.headers.items()})
        return await fake._put(request, request.path.removeprefix("/bucket/"))

    given = {"storage_class": "STANDARD_IA", "encryption": "aws:kms", "encryption_key": "a-key"}
    fake.spoilt["PUT"] = [look]
    keys = {"access_key": "team/a", "session_token": "a-token"}
    await Place(replace(fake.settings(), **keys, **given), tmp_path).put()
    assert seen[0].items() >= {
        ("x-amz-content-sha256", hashlib.sha256(LARGE).hexdigest()),
        ("x-amz-storage-class", "STANDARD_IA"),
        ("x-amz-server-side-encryption", "aws:kms"),
        ("x-amz-server-side-encryption-aws-kms-key-id", "a-key"),
        ("x-amz-security-token", "a-token"),
    }
    for name in ("class", "encryption-aws-kms-key-id", "token", "checksum-sha256"):
        assert name in seen[0]["authorization"]
    assert re.search(r" Credential=team/a/\d{8}/us-east-1/s3/aws4_request,", seen[0]["authorization"])


@pytest.mark.errors("bucket.failed")
async def test_what_greets_everybody_has_stored_nothing(fake: FakeBucket, tmp_path: Path) -> None:
    async def greet(request: web.Request) -> web.StreamResponse:
        await request.read()
        return web.Response(text="<html>welcome</html>", content_type="text/html")

    fake.down = greet
    with pytest.raises(Unavailable, match="does not answer as object storage does"):
        await Place(fake.settings(), tmp_path).put()


@pytest.mark.clients
@pytest.mark.parametrize("fault", ["refused", "cut"])
async def test_what_is_refused_is_put_otherwise_for_a_while(
    fake: FakeBucket, tmp_path: Path, fault: str
) -> None:
    async def cut(request: web.Request) -> web.StreamResponse:
        await request.read()
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    place = Place(fake.settings(), tmp_path)
    fake.spoilt["PUT"] = [answer(501, "NotImplemented") if fault == "refused" else cut]
    await place.put()
    assert fake.asked[1].startswith("POST pre/fix/key uploads")
    asked = len(fake.asked)
    await place.put()
    assert fake.asked[asked].startswith("POST")
    place.ticks.advance(REST)
    await place.put()
    assert fake.asked[-1] == "PUT pre/fix/key"
    assert fake.objects == {"pre/fix/key": LARGE}


@pytest.mark.parametrize("left", [LARGE[:-1], LARGE + b"!", None])
async def test_a_file_of_another_size_is_not_put(
    fake: FakeBucket, tmp_path: Path, left: bytes | None
) -> None:
    place = Place(fake.settings(), tmp_path)
    place.source.unlink()
    if left is not None:
        place.source.write_bytes(left)
    for digest in (Digest.of(LARGE), Digest.of(LARGE, "sha512")):
        with pytest.raises(StorageFailed, match="No such file" if left is None else f"has {len(left)} of"):
            await place.put(digest=digest)
    assert fake.asked == []


async def test_a_file_of_other_content_is_not_put_otherwise(fake: FakeBucket, tmp_path: Path) -> None:
    place = Place(fake.settings(), tmp_path)
    place.source.write_bytes(bytes(len(LARGE)))
    fake.spoilt["PUT"] = [answer(400, "BadDigest")]
    with pytest.raises(DigestInvalid, match="content is sha256:"):
        await place.put()
    assert fake.objects == {}


@pytest.mark.parametrize(
    ("environment", "options", "found"),
    [
        ({}, {}, True),
        ({}, {"access_key": "", "secret_key": ""}, False),  # then an identity may give them
        (
            {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"},
            {"access_key": "", "secret_key": ""},
            True,
        ),
        ({"HTTPS_PROXY": "http://127.0.0.1:1"}, {}, False),
        ({"NO_PROXY": "127.0.0.1"}, {}, True),
        ({}, {"proxy": "http://127.0.0.1:1"}, False),
        ({}, {"url": "gs://bucket"}, False),
    ],
)
def test_keys_that_are_known_sign(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], options: dict[str, Any], found: bool
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = BucketSettings(**{"url": "s3://bucket", "access_key": "a", "secret_key": "b"} | options)
    assert (signed_requests(settings, None) is not None) == found


@pytest.mark.parametrize("variable", ["", "AWS_SERVER_SIDE_ENCRYPTION", "AWS_SSE_KMS_KEY_ID"])
def test_over_https_and_with_hidden_encryption_the_client_of_the_bucket_puts(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    if variable:
        monkeypatch.setenv(variable, "a")
    for scheme in ("http", "https"):
        url = f"{scheme}://127.0.0.1:1"
        settings = BucketSettings(url="s3://bucket", access_key="a", secret_key="b", endpoint=url)
        requests = signed_requests(settings, None)
        assert requests is not None
        assert requests.puts == (scheme == "http" and not variable)


async def test_only_unfinished_uploads_to_the_key_are_aborted(fake: FakeBucket, tmp_path: Path) -> None:
    for id, key in (("1", "a/b"), ("2", "a/b.c"), ("3", "a/b"), ("4", "a")):
        fake.uploads[id], fake.keys[id] = {}, f"of all/{key}"
    place = Place(fake.settings("of all"), tmp_path)
    await asyncio.to_thread(place.bucket.abort, "a/b")
    assert list(fake.uploads) == ["2", "4"]


async def test_what_may_not_be_listed_is_left(fake: FakeBucket, tmp_path: Path, events: Any) -> None:
    place = Place(fake.settings(), tmp_path)
    fake.spoilt["GET"] = [answer(403, "AccessDenied")]
    await asyncio.to_thread(place.bucket.abort, "key")
    (event,) = (each for each in events.entries if each["event"] == "bucket.parts_left")
    assert event["detail"] == "abort key: 403 AccessDenied"
    assert "s3:ListBucketMultipartUploads" in event["advice"]


@pytest.mark.errors("bucket.failed")
async def test_what_may_be_listed_later_is_an_outage(fake: FakeBucket, tmp_path: Path) -> None:
    place = Place(fake.settings(), tmp_path)
    fake.spoilt["GET"] = [answer(503, "SlowDown")]
    with pytest.raises(Unavailable, match="answers 503"):
        await asyncio.to_thread(place.bucket.abort, "key")


@pytest.mark.parametrize("text", ["<ListBucketResult/>", "{}"])
async def test_a_service_that_cannot_list_uploads(fake: FakeBucket, tmp_path: Path, text: str) -> None:
    async def other(request: web.Request) -> web.StreamResponse:
        return web.Response(text=text)

    place = Place(fake.settings(), tmp_path)
    fake.spoilt["GET"] = [other]
    with pytest.raises(BucketRefused, match="lists no uploads"):
        await asyncio.to_thread(place.requests.unfinished, "key")


@pytest.mark.clients
async def test_a_real_service_compares_what_is_put_with_its_digest(seaweed: Seaweed, tmp_path: Path) -> None:
    place = Place(seaweed.settings("tests", "si gned/ü~"), tmp_path)
    await place.put()
    assert await place.bucket.size("key") == len(LARGE)
    with pytest.raises(BucketRefused, match="BadDigest"):
        await asyncio.to_thread(place.requests.put, "wrong", place.source, len(LARGE), NOTHING)
    assert await place.bucket.size("wrong") is None


WRITER = """
import asyncio, json, sys
from pathlib import Path
from storage.bucket.blobs import BucketBlobs
from storage.bucket.objects import Bucket, healthy
from storage.bucket.settings import BucketSettings
from storage.disk.records import SQLiteRecords
from storage.oci import Digest

async def write(directory):
    settings = BucketSettings(**json.loads(sys.argv[2]))
    bucket = Bucket(settings.connect(), settings.url, healthy(settings.url, directory))
    upload = BucketBlobs(bucket, SQLiteRecords(directory / "records"), directory).create()
    content = bytes(40 << 20)
    await upload.write(content)
    await upload.commit(Digest.of(content))

asyncio.run(write(Path(sys.argv[1])))
"""


@asynccontextmanager
async def relay(endpoint: str, seen: bytes, reached: asyncio.Event) -> AsyncIterator[str]:
    """Passes requests on to a server, until one that contains `seen`, which it keeps."""
    host, port = endpoint.removeprefix("http://").split(":")

    async def passed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(1 << 16):
            if seen in chunk:
                reached.set()
                await asyncio.Event().wait()
            writer.write(chunk)
            await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(host, int(port))
        tasks = [asyncio.create_task(passed(reader, back)), asyncio.create_task(passed(there, writer))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            back.close()
            writer.close()

    serving = set[asyncio.Task[None]]()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.create_task(serve(reader, writer)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)


@pytest.mark.clients
async def test_parts_of_a_writer_that_was_killed_are_removed_after_a_day(
    seaweed: Seaweed, tmp_path: Path, clock: Clock
) -> None:
    reached, settings = asyncio.Event(), seaweed.settings("tests", tmp_path.name)
    async with relay(seaweed.endpoint, b"partNumber=3", reached) as endpoint:
        given = json.dumps(asdict(replace(settings, endpoint=endpoint)))
        writer = await asyncio.create_subprocess_exec(*PROGRAM, WRITER, str(tmp_path), given)
        await reached.wait()
        writer.kill()
        await writer.wait()
    place, records = Place(settings, tmp_path), SQLiteRecords(tmp_path / "records")
    try:
        (leftover,) = records.keys(LEFTOVER.prefix())
        key = LEFTOVER.parse(leftover)[0]
        (id,) = await asyncio.to_thread(place.requests.unfinished, key)
        for since, left in ((DAY - 60, [id]), (DAY + 3600, [])):
            clock.now = float(records.get(leftover) or 0) + since
            blobs = BucketBlobs(place.bucket, records, tmp_path, clock, ticks=clock)
            await asyncio.to_thread(blobs.reap, DAY)
            assert await asyncio.to_thread(place.requests.unfinished, key) == left
        with pytest.raises(BucketRefused, match="NoSuchUpload"):
            await asyncio.to_thread(place.requests._ask, "GET", place.requests._url(key), {"uploadId": id})
        assert list(records.keys(LEFTOVER.prefix())) == []
    finally:
        records.close()
