"""Blobs that clients are sent to the bucket for: a private registry and caches before a fake bucket."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest

from storage.oci import Digest
from tests.conftest import Serve, Site
from tests.objects import FakeBucket, answer
from tests.postgres import PostgresServer
from tests.upstream import Upstream

SMALL, LARGE = bytes(1000), bytes(range(250)) * 8
REDIRECT = {"above": "1000B", "endpoint": "https://public.example", "never_for": ["old/*", "re:Older .*"]}
PUBLIC = "https://public.example/bucket/regis/try"


@pytest.fixture
async def fake(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeBucket]:
    at_once = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=2)}
    once = {"max_retries": 1, "retry_timeout": timedelta(seconds=30), "backoff": at_once}
    monkeypatch.setattr("storage.bucket.settings._RETRY", once)
    async with FakeBucket() as fake:
        yield fake


def shared(fake: FakeBucket) -> dict[str, Any]:
    settings = fake.settings("regis/try")
    keys = {"access_key": settings.access_key, "secret_key": settings.secret_key}
    return {"bucket": settings.url, "endpoint": settings.endpoint, **keys}


@pytest.fixture
async def site(fake: FakeBucket, serve: Serve, upstream: Upstream) -> Site:
    top = {"shared": shared(fake), "redirect": REDIRECT}
    return await serve(upstream, top=top, more={"local": {"store": {}}})


async def push(site: Site, content: bytes, repository: str = "local/app") -> str:
    digest = Digest.of(content)
    path = f"/v2/{repository}/blobs/uploads/?digest={digest}"
    async with site.request("POST", path, data=content) as response:
        assert response.status == 201
    return f"/v2/{repository}/blobs/{digest}"


async def test_a_large_blob_is_answered_by_a_signed_url(site: Site, fake: FakeBucket, events: Any) -> None:
    path = await push(site, LARGE)
    (key,) = fake.objects
    fake.asked.clear()
    status, headers, body = await site.get(path)
    assert (status, body) == (307, b"")
    assert headers["Location"].startswith(f"{PUBLIC}{key.removeprefix('regis/try')}?")
    assert "X-Amz-Expires=1200" in headers["Location"] and "X-Amz-Signature=" in headers["Location"]
    assert headers["Docker-Content-Digest"] == path.rpartition("/")[2]
    assert headers["Cache-Control"] == "no-store"
    assert fake.asked == [f"HEAD {key}"]
    assert "X-Amz" not in json.dumps(events.entries, default=str)


async def test_what_is_sent_from_here(site: Site) -> None:
    small, large = await push(site, SMALL), await push(site, LARGE)
    assert (await site.get(small))[::2] == (200, SMALL)
    for headers in (
        {"Entrepot_Redirect": "never"},
        {"User_Agent": "old/1.2"},
        {"User_Agent": "Older client"},
        {"Range": "bytes=0-9,20-29"},
        {"If_Range": '"x"', "Range": "bytes=0-9"},
    ):
        assert (await site.get(large, **headers))[0] in (200, 206), headers
    for headers in ({"User_Agent": "newold/1.2"}, {"Range": "bytes=5-9"}, {"Entrepot_Redirect": "yes"}):
        assert (await site.get(large, **headers))[0] == 307, headers
    async with site.request("HEAD", large) as response:
        assert (response.status, response.headers["Content-Length"]) == (200, str(len(LARGE)))
    etag = f'"{large.rpartition("/")[2]}"'
    assert (await site.get(large, If_None_Match=etag))[0] == 304
    status, found, _ = await site.get(large, Range=f"bytes={len(LARGE)}-")
    assert (status, found["Content-Range"]) == (416, f"bytes */{len(LARGE)}")


async def test_no_login_is_led_to_the_bucket(site: Site) -> None:
    """Clients send it along to the host that they asked, and to those below it."""
    path = await push(site, LARGE)
    login = "Basic YWxpY2U6eA=="
    for host in ("public.example", "PUBLIC.example:5000", "example", "example:5000"):
        assert (await site.get(path, Host=host))[0] == 307, host
        assert (await site.get(path, Host=host, Authorization=login))[::2] == (200, LARGE), host
    for host in ("lic.example", "registry.public.example", "registry.example:5000"):
        assert (await site.get(path, Host=host, Authorization=login))[0] == 307, host


@pytest.mark.errors("blob.damaged", "bucket.failed")
async def test_who_may_not_have_it_gets_no_url(site: Site, fake: FakeBucket) -> None:
    path = await push(site, LARGE)
    assert (await site.get(path.replace("local/app", "local/other")))[0] == 404
    objects, fake.objects = fake.objects, {}
    assert (await site.get(path))[0] == 404
    fake.objects = objects
    fake.down = answer(503, "SlowDown")
    assert (await site.get(path))[0] == 503
    fake.down = None
    assert (await site.get(path))[0] == 307


async def test_what_cannot_be_signed_is_sent(
    site: Site, monkeypatch: pytest.MonkeyPatch, events: Any
) -> None:
    path = await push(site, LARGE)

    def fail(*_: object) -> str:
        raise ValueError("no key")

    monkeypatch.setattr("obstore.sign", fail)
    assert (await site.get(path))[::2] == (200, LARGE)
    assert [each["error"] for each in events.entries if each["event"] == "redirect.failed"] == ["no key"]


@pytest.mark.clients
async def test_a_cache_sends_what_it_has(
    fake: FakeBucket, serve: Serve, upstream: Upstream, postgres_server: PostgresServer, tmp_path: Any
) -> None:
    records = {"records": postgres_server.database(), "caches": {}}
    top = {"shared": {**shared(fake), **records}, "redirect": REDIRECT}
    one = await serve(upstream, directory=tmp_path / "one", top=top)
    other = await serve(upstream, directory=tmp_path / "other", top=top)
    path = f"/v2/a/b/blobs/{upstream.blob('a/b', LARGE)}"
    assert (await one.get(path))[::2] == (200, LARGE)
    for fill in one.app.composition.fills.in_flight():
        assert fill.task is not None
        await fill.task
    assert one.app.composition.deposits is not None
    await one.app.composition.deposits.ended()
    upstream.clear()
    assert (await one.get(path))[::2] == (200, LARGE)
    status, headers, _ = await other.get(path)
    assert status == 307
    assert headers["Location"].startswith(f"{PUBLIC}/caches/sha256/")
    assert (await other.get(path, Entrepot_Redirect="never"))[::2] == (200, LARGE)
    assert (await other.get(path))[::2] == (200, LARGE)
    assert upstream.log == []
