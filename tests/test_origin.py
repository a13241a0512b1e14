"""What a cache answers if its origin cannot be asked, says no, or must not be asked."""

from __future__ import annotations

import asyncio
import json

import pytest

from proxy.cache import negatives
from proxy.upstream.transport import RETRIES
from tests.conftest import Clock, Serve
from tests.pulls import FRESH, TAG, TAGS, code_of, manifest_of, pull, warm
from tests.upstream import (
    Fault,
    Hold,
    Refuse,
    RetryAfter,
    Status,
    Upstream,
    digest_of,
)

# The origin cannot be asked: stale


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    "fault",
    [Status(429), Status(500), Status(502), Status(503), Status(504), Refuse(), RetryAfter(3)],
    ids=str,
)
async def test_stale_where_the_origin_cannot_be_asked(
    serve: Serve, upstream: Upstream, clock: Clock, fault: Fault, method: str
) -> None:
    site, image = await warm(serve, upstream)
    clock.advance(FRESH + 1)
    upstream.next("HEAD", "latest", fault, times=2)
    async with site.request(method, TAG) as response:
        assert response.status == 200
        assert response.headers["Docker-Content-Digest"] == image.digest
        assert await response.read() == (image.content if method == "GET" else b"")
    assert "GET manifest a/b:latest" not in upstream.log


async def test_stale_where_the_origin_is_gone(serve: Serve, upstream: Upstream, clock: Clock) -> None:
    site, image = await warm(serve, upstream)
    clock.advance(FRESH + 1)
    await upstream.stop()
    assert (await pull(site))[:2] == (200, image.content)


async def test_stale_where_the_origin_is_slow(serve: Serve, upstream: Upstream, clock: Clock) -> None:
    site, image = await warm(serve, upstream, options={"header_timeout": "100ms"})
    clock.advance(FRESH + 1)
    upstream.next("HEAD", "latest", Hold(asyncio.Event(), after=None))
    assert (await pull(site))[:2] == (200, image.content)


async def test_stale_where_only_the_new_manifest_cannot_be_had(
    serve: Serve, upstream: Upstream, clock: Clock
) -> None:
    site, old = await warm(serve, upstream)
    new = upstream.image("a/b", "latest", [b"new"])
    clock.advance(FRESH + 1)
    upstream.next("GET", new.digest, Status(500), times=1 + RETRIES)
    assert (await pull(site))[:2] == (200, old.content)
    clock.advance(11)
    assert (await pull(site))[:2] == (200, new.content)


@pytest.mark.parametrize(
    ("fault", "seconds"),
    [
        (RetryAfter(5, 500), 10),
        (RetryAfter(60), 60),
        (RetryAfter(30, 503), 30),
        (RetryAfter(3), 10),
        (RetryAfter(86400, 503), 600),
    ],
    ids=str,
)
async def test_an_origin_that_failed_is_let_alone_for_a_while(
    serve: Serve, upstream: Upstream, clock: Clock, fault: Fault, seconds: float
) -> None:
    site, image = await warm(serve, upstream)
    clock.advance(FRESH + 1)
    upstream.next("HEAD", "latest", fault)
    for elapsed in (0, 0, seconds - 0.5):
        clock.advance(elapsed)
        assert (await pull(site))[:2] == (200, image.content)
    assert len(upstream.log) == 1
    clock.advance(1)
    assert "stale" in (await pull(site))[2]
    assert len(upstream.log) == 2


async def test_a_clock_that_was_set_back_does_not_prolong_a_pause(
    serve: Serve, upstream: Upstream, clock: Clock
) -> None:
    site, _ = await warm(serve, upstream)
    await pull(site, manifest_of("absent"))
    clock.advance(FRESH + 1)
    upstream.next("HEAD", "latest", Status(503))
    await pull(site)
    upstream.clear()
    clock.advance(-86400)
    upstream.image("a/b", "absent")
    assert (await pull(site))[0] == (await pull(site, manifest_of("absent")))[0] == 200
    assert len(upstream.log) == 2


async def test_of_a_cached_digest_nothing_is_ever_asked(
    serve: Serve, upstream: Upstream, clock: Clock
) -> None:
    site, image = await warm(serve, upstream)
    blob = f"/v2/a/b/blobs/{image.layers[0]}"
    await site.get(blob)
    upstream.clear()
    clock.advance(10 * 365 * 86400)
    for path in (manifest_of(image.digest), blob):
        for method in ("GET", "HEAD"):
            async with site.request(method, path) as response:
                assert response.status == 200
    assert upstream.log == []


# The origin says no


@pytest.mark.parametrize("status", [401, 403])
async def test_refused_is_not_deleted(serve: Serve, upstream: Upstream, clock: Clock, status: int) -> None:
    site, image = await warm(serve, upstream)
    clock.advance(FRESH + 1)
    upstream.next("HEAD", "latest", Status(status))
    for _ in range(2):
        found = await pull(site)
        assert (found[:2], "ttl=-" in found[2]) == ((200, image.content), True)
    clock.advance(11)
    new = upstream.image("a/b", "latest", [b"new"])
    assert (await pull(site))[:2] == (200, new.content)


@pytest.mark.parametrize("status", [401, 403])
async def test_a_tag_that_is_refused_is_dropped_where_that_is_wanted(
    serve: Serve, upstream: Upstream, clock: Clock, status: int
) -> None:
    site, image = await warm(serve, upstream, on_upstream_delete="drop")
    clock.advance(FRESH + 1)
    upstream.next("HEAD", "latest", Status(status))
    found = await pull(site)
    assert (found[0], code_of(found[1])) == (404, "MANIFEST_UNKNOWN")
    # Its credentials may be accepted at the next request.
    assert (await pull(site))[:2] == (200, image.content)


async def test_keep_serves_what_the_origin_has_deleted(
    serve: Serve, upstream: Upstream, clock: Clock
) -> None:
    site, image = await warm(serve, upstream)
    upstream.delete_manifest("a/b", image.digest)
    clock.advance(FRESH + 1)
    for _ in range(3):
        assert (await pull(site))[:2] == (200, image.content)
    assert upstream.log == ["HEAD manifest a/b:latest"]
    # It is asked again, and so seen when it is back.
    new = upstream.image("a/b", "latest", [b"new"])
    clock.advance(11)
    assert (await pull(site))[:2] == (200, new.content)


async def test_drop_forgets_what_the_origin_has_deleted(
    serve: Serve, upstream: Upstream, clock: Clock
) -> None:
    site, image = await warm(serve, upstream, on_upstream_delete="drop")
    upstream.delete_tag("a/b", "latest")
    clock.advance(FRESH + 1)
    for _ in range(3):
        status, body, _ = await pull(site)
        assert (status, code_of(body)) == (404, "MANIFEST_UNKNOWN")
    assert upstream.log == ["HEAD manifest a/b:latest"]
    # The tag went, not the manifest.
    assert (await pull(site, manifest_of(image.digest)))[:2] == (200, image.content)
    await upstream.stop()
    clock.advance(11)
    assert (await pull(site))[0] == 404
    await upstream.start()
    clock.advance(1)
    upstream.image("a/b", "latest")
    assert (await pull(site))[:2] == (200, image.content)


# Negative


@pytest.mark.parametrize(
    ("path", "code"),
    [
        (manifest_of("absent"), "MANIFEST_UNKNOWN"),
        (manifest_of(digest_of(b"absent")), "MANIFEST_UNKNOWN"),
        (f"/v2/a/b/blobs/{digest_of(b'absent')}", "BLOB_UNKNOWN"),
        ("/v2/c/d/tags/list", "NAME_UNKNOWN"),
    ],
    ids=["tag", "manifest", "blob", "tags"],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_unknown_is_remembered_for_seconds(
    serve: Serve, upstream: Upstream, clock: Clock, path: str, code: str, method: str
) -> None:
    upstream.image("a/b", "latest")
    site = await serve(upstream)
    for seconds, requests in ((0, 1), (9.9, 1), (0.2, 2)):
        clock.advance(seconds)
        async with site.request(method, path) as response:
            assert response.status == 404
            if method == "GET":
                assert code_of(await response.read()) == code
        assert len(upstream.log) == requests
    assert ("negative" in response.headers["Cache-Status"]) == (requests == 1)


async def test_a_pushed_tag_appears_when_the_negative_lapses(
    serve: Serve, upstream: Upstream, clock: Clock
) -> None:
    upstream.blob("a/b", b"")
    site = await serve(upstream, negative_for="5s")
    assert (await pull(site))[0] == 404
    image = upstream.image("a/b", "latest")
    assert (await pull(site))[0] == 404
    clock.advance(5)
    assert (await pull(site))[:2] == (200, image.content)


async def test_a_digest_that_is_no_blob_may_be_a_manifest(serve: Serve, upstream: Upstream) -> None:
    # containerd asks HEAD blobs/<digest>, then HEAD manifests/<digest>.
    image = upstream.image("a/b")
    site = await serve(upstream)
    for kind, status in (("blobs", 404), ("manifests", 200), ("blobs", 404)):
        async with site.request("HEAD", f"/v2/a/b/{kind}/{image.digest}") as response:
            assert response.status == status


async def test_a_tag_named_tags_is_not_the_list(serve: Serve, upstream: Upstream) -> None:
    upstream.image("a/b", "latest")
    site = await serve(upstream)
    assert (await pull(site, manifest_of("tags")))[0] == 404
    assert json.loads((await pull(site, TAGS))[1])["tags"] == ["latest"]


async def test_another_repository_has_its_own_negatives(serve: Serve, upstream: Upstream) -> None:
    upstream.image("a/b", "latest")
    site = await serve(upstream)
    assert (await pull(site, "/v2/c/d/manifests/latest"))[0] == 404
    assert (await pull(site))[0] == 200


async def test_negatives_are_bounded(
    serve: Serve, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(negatives, "REMEMBERED", 3)
    upstream.image("a/b", "latest")
    site = await serve(upstream)
    tags = [f"absent-{number}" for number in range(4)]
    for tag in tags:
        await pull(site, manifest_of(tag))
    upstream.clear()
    for tag in reversed(tags):
        await pull(site, manifest_of(tag))
    assert upstream.log == ["GET manifest a/b:absent-0"]  # the oldest had to go


@pytest.mark.parametrize("path", ["manifests/latest", "blobs/{layer}"], ids=["tag", "blob"])
async def test_a_limit_holds_as_long_as_the_origin_says(
    serve: Serve, upstream: Upstream, clock: Clock, path: str
) -> None:
    image = upstream.image("a/b", "latest")
    site = await serve(upstream, top={"fallback": "deny"})
    path = "/v2/a/b/" + path.format(layer=image.layers[0])
    upstream.next("GET", lambda request: True, RetryAfter(60))
    for seconds in (0, 59):
        clock.advance(seconds)
        status, headers, body = await site.get(path)
        assert (status, code_of(body)) == (503, "TOOMANYREQUESTS")
        assert headers["Retry-After"] == str(60 - seconds)
    assert len(upstream.log) == 1
    clock.advance(2)
    assert (await site.get(path))[0] == 200


@pytest.mark.parametrize(
    ("fault", "times"), [(RetryAfter(5, 500), 2), (Refuse(), 2 * (1 + RETRIES))], ids=str
)
async def test_what_could_not_be_asked_is_not_remembered_as_unknown(
    serve: Serve, upstream: Upstream, fault: Fault, times: int
) -> None:
    image = upstream.image("a/b", "latest")
    site = await serve(upstream)
    upstream.next("GET", "latest", fault, times=times)
    statuses = [(await pull(site))[0] for _ in range(3)]
    assert statuses[0] == 502
    assert (statuses[2], (await pull(site))[1]) == (200, image.content)


# Offline


async def test_offline_never_dials(serve: Serve, upstream: Upstream, clock: Clock) -> None:
    site, image = await warm(serve, upstream)
    layer, config = f"/v2/a/b/blobs/{image.layers[0]}", f"/v2/a/b/blobs/{image.config}"
    artifact = upstream.artifact("a/b", image, "application/x-signature")
    referrers = f"/v2/a/b/referrers/{image.digest}"
    for path in (layer, TAGS, referrers, manifest_of(artifact.digest)):
        assert (await pull(site, path))[0] == 200
    await site.app.stop()
    upstream.clear()
    clock.advance(365 * 86400)
    site = await serve(upstream, offline=True)
    for path in (TAG, manifest_of(image.digest), layer, TAGS, referrers):
        assert (await pull(site, path))[0] == 200, path
    absent = {
        manifest_of("absent"): "MANIFEST_UNKNOWN",
        manifest_of(digest_of(b"absent")): "MANIFEST_UNKNOWN",
        config: "BLOB_UNKNOWN",
        "/v2/c/d/tags/list": "NAME_UNKNOWN",
        f"/v2/a/b/referrers/{digest_of(b'absent')}": "MANIFEST_UNKNOWN",
    }
    for path, code in absent.items():
        status, body, _ = await pull(site, path)
        assert (status, code_of(body)) == (404, code), path
        assert b"offline" in body
        async with site.request("HEAD", path) as response:
            assert response.status == 404
    assert upstream.log == []


async def test_offline_lists_what_was_pulled(serve: Serve, upstream: Upstream) -> None:
    site, image = await warm(serve, upstream)
    artifact = upstream.artifact("a/b", image, "application/x-signature")
    await pull(site, manifest_of(artifact.digest))
    await site.app.stop()
    upstream.clear()
    site = await serve(upstream, top={"offline": True})  # for every namespace
    assert json.loads((await pull(site, TAGS))[1])["tags"] == ["latest"]
    index = json.loads((await pull(site, f"/v2/a/b/referrers/{image.digest}"))[1])
    assert [each["digest"] for each in index["manifests"]] == [artifact.digest]
    assert upstream.log == []
