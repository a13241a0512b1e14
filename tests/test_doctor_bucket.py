"""The bucket looked over: one that is well, and one that refuses this or that."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest
from aiohttp import web

from proxy.config.shared import SharedConfig
from proxy.config.values import Secret
from proxy.doctor import bucket
from proxy.doctor.checks import Check
from storage.disk.records import SQLiteRecords
from storage.keys import IDENTITY
from tests.objects import FakeBucket, Spoil, answer


@pytest.fixture
async def fake(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeBucket]:
    monkeypatch.setattr(
        "storage.bucket.settings._RETRY", {"max_retries": 0, "retry_timeout": timedelta(seconds=9)}
    )
    async with FakeBucket() as server:
        yield server


async def look(fake: FakeBucket) -> Check:
    endpoint, key = f"http://127.0.0.1:{fake.port}", Secret("a")
    found, *others = await bucket.check(
        SharedConfig(bucket="s3://bucket/x", endpoint=endpoint, access_key=key, secret_key=key)
    )
    assert (found.name, found.subject) == ("bucket", "s3://bucket/x")
    clocks = [each for each in others if each.name == "clock"]
    # The objects of this bucket were made long ago.
    assert [(each.name, each.state) for each in clocks] == [("clock", "warning")] * (found.state != "failed")
    assert all("behind" in each.message for each in clocks)
    return found


def got(fake: FakeBucket) -> Spoil:
    """The answer to a GET that is not spoilt."""

    async def get(request: web.Request) -> web.StreamResponse:
        return await fake._get(request, request.path.removeprefix("/bucket/"))

    return get


async def parts(fake: FakeBucket, keys: bool = True) -> Check:
    """What is found of the parts of interrupted uploads."""
    endpoint, key = f"http://127.0.0.1:{fake.port}", Secret("a") if keys else None
    given = {"endpoint": endpoint, "access_key": key, "secret_key": key}
    checks = await bucket.check(SharedConfig(bucket="s3://bucket/x", **given))
    return next(each for each in checks if "parts of interrupted uploads" in each.message)


@pytest.mark.clients
async def test_who_removes_the_parts_of_interrupted_uploads(
    fake: FakeBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = await parts(fake)
    assert (found.state, found.message.endswith("are removed after a day")) == ("ok", True)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    found = await parts(fake, keys=False)
    assert (found.state, found.message.endswith("are removed after a day")) == ("ok", True)
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{fake.port}")  # not for http
    found = await parts(fake)
    assert (found.state, "cannot remove" in found.message, "lifecycle" in found.message) == ("ok", True, True)


async def test_uploads_that_may_not_be_listed_are_a_warning(fake: FakeBucket) -> None:
    # Three objects are read, and one that is missing; then uploads are listed.
    fake.spoilt["GET"] = [got(fake)] * 4 + [answer(403, "AccessDenied")]
    found = await parts(fake)
    assert (found.state, "refuses access" in found.message) == ("warning", True)
    assert "s3:ListBucketMultipartUploads" in found.advice
    assert "lifecycle rule" in found.advice


async def test_a_bucket_that_is_well(fake: FakeBucket) -> None:
    assert (await look(fake)).state == "ok"
    assert (fake.objects, fake.uploads) == ({}, {})
    methods = [each.partition(" ")[0] for each in fake.asked]
    assert methods[:3] == ["PUT", "GET", "POST"]
    assert all(
        key.startswith("x/doctor/") for key in (each.split(" ")[1] for each in fake.asked) if key != "/bucket"
    )


async def test_the_condition_of_a_put_is_met(fake: FakeBucket) -> None:
    assert "if there is none" in (await look(fake)).message
    last = [each.partition(" ")[0] for each in fake.asked]
    # Put, refused, compared, deleted, looked at; then its uploads are listed.
    assert last[-7:-2] == ["PUT", "PUT", "GET", "POST", "HEAD"]


@pytest.mark.parametrize("fault", ["careless", "not implemented"])
async def test_a_bucket_that_puts_on_no_condition_says_what_follows(fake: FakeBucket, fault: str) -> None:
    fake.careless, fake.conditional = fault == "careless", fault == "careless"
    found = await look(fake)
    assert (found.state, found.message) == ("warning", bucket.UNCONDITIONAL)
    assert "a prefix of its own" in found.advice
    assert fake.objects == {}


async def test_what_a_failed_condition_leaves_is_deleted(fake: FakeBucket) -> None:
    async def put(request: web.Request) -> web.StreamResponse:
        return await fake._put(request, request.path.removeprefix("/bucket/"))

    # The object, the two parts of another, the one that is put if there is none, and its second.
    fake.spoilt["PUT"] = [put, put, put, put, answer(403, "AccessDenied")]
    found = await look(fake)
    assert (found.state, found.message.partition(":")[0]) == ("failed", "put if there is none fails")
    assert "If-None-Match" in found.advice
    assert fake.objects == {}


@pytest.mark.clients
async def test_a_bucket_of_other_records_is_named(fake: FakeBucket, tmp_path: Path) -> None:
    async def state() -> str:
        endpoint, key = f"http://127.0.0.1:{fake.port}", Secret("a")
        shared = SharedConfig(bucket="s3://bucket/x", endpoint=endpoint, access_key=key, secret_key=key)
        last = (await bucket.check(shared, tmp_path))[-1]
        return last.message if last.state == "failed" else "ok"

    assert await state() == "ok"  # nobody's
    fake.markers["x/entrepot"] = b"theirs"
    assert await state() == "it belongs to other records"
    assert not (tmp_path / "records").exists()
    with closing(SQLiteRecords(tmp_path / "records")) as records:
        assert await state() == "it belongs to other records"
        records.put(IDENTITY.key(), b"theirs")
        assert await state() == "ok"


async def test_none_is_not_asked() -> None:
    assert await bucket.check(SharedConfig()) == []


@pytest.mark.parametrize(
    ("method", "step", "right"),
    [
        ("PUT", "put fails", "s3:PutObject"),
        ("GET", "get fails", "s3:GetObject"),
        ("HEAD", "look fails", "s3:ListBucket"),
    ],
)
async def test_a_right_that_is_missing_is_named(fake: FakeBucket, method: str, step: str, right: str) -> None:
    fake.spoilt[method] = [answer(403, "AccessDenied")] * 3
    if method == "HEAD":  # without that right S3 does not say of an object that it is not there
        fake.spoilt["GET"] = [got(fake)] * 3 + [answer(403, "AccessDenied")]
    found = await look(fake)
    assert (found.state, found.message.partition(":")[0]) == ("failed", step)
    assert "refuses access" in found.message
    assert right in found.advice


async def test_a_bucket_that_gives_another_range(fake: FakeBucket) -> None:
    async def wrong(request: web.Request) -> web.StreamResponse:
        fake.objects = {key: content[::-1] for key, content in fake.objects.items()}
        return await fake._get(request, request.path.removeprefix("/bucket/"))

    fake.spoilt["GET"] = [wrong]
    found = await look(fake)
    assert (found.state, found.message) == ("failed", "get fails: a range of the object is not what was put")


async def test_a_bucket_that_is_not_there(fake: FakeBucket) -> None:
    fake.down = answer(404, "NoSuchBucket")
    found = await look(fake)
    assert (found.state, "has no such bucket" in found.message) == ("failed", True)
    assert found.advice.startswith("make the bucket")
