"""Objects that are read by signed URLs, past the client of the bucket."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import obstore
import pytest
import trustme
from structlog.testing import LogCapture

from proxy.config.shared import SharedConfig
from proxy.namespaces.engines import signed_objects
from proxy.upstream.connect import Connect
from proxy.upstream.signed_objects import REST, SignedObjects
from storage.bucket.blob import BucketBlob
from storage.bucket.objects import LEAST, Bucket, healthy
from storage.errors import OriginTimeout, Unavailable
from storage.oci import OCTETS, Descriptor, Digest, Span
from storage.registry import ReadInto
from tests.objects import FakeBucket, answer
from tests.pools import PORTS
from tests.relay import Relay, server_side
from tests.test_bucket_server import Registry, registry  # noqa: F401  a fixture
from tests.test_copies import blob_of

CONTENT = os.urandom(LEAST)
BLOB = Descriptor(OCTETS, Digest.of(CONTENT), len(CONTENT))
KEY = "an object"


class Place:
    """A bucket with an object, and what reads it."""

    def __init__(self, fake: FakeBucket, connect: Connect) -> None:
        self.fake = fake
        self.fake.objects[f"pre/fix/{KEY}"] = CONTENT
        self.now = 0.0
        self.store = fake.settings().connect()
        self.reader = SignedObjects("a bucket", connect, True, lambda: self.now)

    @property
    def url(self) -> str:
        return obstore.sign(self.store, "GET", KEY, timedelta(minutes=1))

    def blob(self, patience: float | None = None) -> BucketBlob:
        bucket = Bucket(
            self.store, "a bucket", healthy("a bucket", Path()), patience=patience, reader=self.reader
        )
        return BucketBlob(bucket, KEY, BLOB, 0.0)


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    async with FakeBucket() as fake:
        made = Place(fake, Connect())
        yield made
        await made.reader.close()


async def copied(blob: BucketBlob, span: Span | None = None) -> bytes:
    """What a thread reads of the blob."""
    found = bytearray()
    await blob.begin(span)

    async def write(readinto: ReadInto) -> int:
        memory = memoryview(bytearray(10_000))
        number = readinto(memory)
        found.extend(memory[:number])
        return number

    incoming = blob.incoming()
    assert incoming is not None
    while await incoming.pass_on(write):
        pass
    await blob.close()
    return bytes(found)


async def test_all_of_an_object(place: Place) -> None:
    assert await copied(place.blob()) == CONTENT
    assert (place.fake.asked, place.fake.signed) == ([f"GET pre/fix/{KEY}"], 1)


async def test_a_range_of_an_object(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.bucket.objects.LEAST", 100)
    blob = place.blob()
    await blob.begin(Span(100, 300))
    assert b"".join([each async for each in blob.chunks(100, 300)]) == CONTENT[100:300]
    await blob.close()
    assert (place.fake.asked, place.fake.signed) == ([f"GET pre/fix/{KEY} bytes=100-299"], 1)


async def test_few_bytes_are_not_worth_it(place: Place) -> None:
    assert await copied(place.blob(), Span(1)) == CONTENT[1:]
    assert place.fake.signed == 0


@pytest.mark.parametrize("cut", [1, LEAST // 2, LEAST - 1])
async def test_what_breaks_off_is_continued_by_the_client_of_the_bucket(place: Place, cut: int) -> None:
    place.fake.cut = cut
    assert await copied(place.blob()) == CONTENT
    place.fake.cut = cut
    blob = place.blob()
    await blob.begin()
    assert b"".join([each async for each in blob.chunks()]) == CONTENT
    await blob.close()
    assert (len(place.fake.asked), place.fake.signed) == (4, 2)


@pytest.mark.parametrize("status", [400, 401, 403, 405, 501])
async def test_a_bucket_that_refuses_signed_urls_is_left_alone(place: Place, status: int) -> None:
    place.fake.spoilt["GET"] = [answer(status, "AccessDenied")]
    for _ in range(2):
        assert await copied(place.blob()) == CONTENT
    assert place.fake.signed == 1
    place.now = REST
    assert await copied(place.blob()) == CONTENT
    assert place.fake.signed == 2


@pytest.mark.parametrize("status", [404, 503])
async def test_another_failure_is_that_of_one_object(place: Place, status: int) -> None:
    place.fake.spoilt["GET"] = [answer(status, "Sorry", "0")]
    for _ in range(2):
        assert await copied(place.blob()) == CONTENT
    assert (len(place.fake.asked), place.fake.signed) == (3, 2)


async def test_an_object_of_another_size_is_not_taken(place: Place) -> None:
    for size in (BLOB.size - 1, BLOB.size + 1):
        other = Descriptor(OCTETS, BLOB.digest, size)
        assert await place.reader.open(place.url, other, 0, size) is None
        assert await place.reader.open(place.url, other, 5, size) is None
    assert not place.reader.resting


async def test_a_bucket_that_does_not_answer() -> None:
    async with FakeBucket() as fake:
        place = Place(fake, Connect(header_timeout=0.01))
        place.fake.down = fake.hang
        with pytest.raises(OriginTimeout):
            await place.reader.open(place.url, BLOB, 0, BLOB.size)
        await place.reader.close()


@pytest.mark.errors("bucket.failed")
async def test_nobody_waits_twice_for_a_bucket_that_does_not_answer(place: Place) -> None:
    place.fake.down = place.fake.hang
    with pytest.raises(Unavailable, match="a bucket"):
        await place.blob(patience=0.01).begin()
    assert len(place.fake.asked) <= 1


async def test_a_bucket_that_is_down_is_no_refusal(place: Place) -> None:
    url = place.url
    await place.fake.__aexit__()
    assert await place.reader.open(url, BLOB, 0, BLOB.size) is None
    assert not place.reader.resting


@pytest.mark.clients
async def test_a_server_reads_by_them_and_logs_none(
    registry: Registry,  # noqa: F811
    events: LogCapture,
) -> None:
    path = await blob_of(registry)
    assert (await registry.ask("GET", path)).status == 200
    await registry.filled()
    assert registry.fake.signed == 1
    assert "fill.committed" in str(events.entries)
    assert "Amz" not in str(events.entries)


@pytest.mark.parametrize("through", ["TLS", "a proxy"])
async def test_the_authority_and_the_proxy_that_are_set_serve_both_ways(
    place: Place, tmp_path: Path, through: str
) -> None:
    authority = trustme.CA()
    tls = server_side(authority) if through == "TLS" else None
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    async with Relay(place.fake.port, tls) as relay:
        PORTS.add(relay.port)
        here = f"http://127.0.0.1:{relay.port}"
        endpoint = here.replace("http", "https") if tls else f"http://127.0.0.1:{place.fake.port}"
        given = {"ca": tmp_path / "ca.pem"} if tls else {"proxy": here}
        config = SharedConfig(bucket="s3://bucket/pre/fix", endpoint=endpoint, **KEYS, **given)
        reader = signed_objects(config)
        assert reader is not None
        for signed in (0, 1):
            bucket = Bucket(
                config.settings().connect(),
                "a bucket",
                healthy("a bucket", tmp_path),
                reader=reader if signed else None,
            )
            assert await copied(BucketBlob(bucket, KEY, BLOB, 0.0)) == CONTENT
            assert place.fake.signed == signed
            assert tls is not None or len(relay.seen) > signed
        await reader.close()


KEYS = {"access_key": "key", "secret_key": "secret"}
S3 = {"bucket": "s3://a/b", **KEYS}


def test_where_they_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    found = signed_objects(SharedConfig(**S3))
    assert found is not None and found.quick
    found = signed_objects(SharedConfig(bucket="s3://a"))
    assert found is not None and not found.quick
    assert signed_objects(SharedConfig()) is None
    for other in ("gs://a", "az://a", "extension://a"):  # a signature may be a request
        assert signed_objects(SharedConfig(bucket=other)) is None
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")  # which the client of the bucket uses
    assert signed_objects(SharedConfig(**S3)) is None
    assert signed_objects(SharedConfig(**S3, proxy="http://127.0.0.1:1")) is not None
