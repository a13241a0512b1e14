"""What a cache asks its origin and when, and what it answers where that cannot be asked or says no."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from proxy.cache import negatives
from proxy.upstream.transport import RETRIES
from storage.disk.blobs import BlobFiles
from storage.disk.records import Records
from tests.conftest import Clock, Serve, Site
from tests.upstream import (
    OCI_INDEX,
    Fault,
    Hold,
    Image,
    NoDigest,
    Refuse,
    RetryAfter,
    Status,
    Upstream,
    WrongDigest,
    digest_of,
)

MANY = 50
FRESH = 600.0  # seconds, the default
TAG = "/v2/a/b/manifests/latest"
TAGS = "/v2/a/b/tags/list"


def manifest_of(reference: str) -> str:
    return f"/v2/a/b/manifests/{reference}"


async def warm(serve: Serve, upstream: Upstream, **keys: Any) -> tuple[Site, Image]:
    """A site that has pulled a/b:latest, and an upstream that has forgotten it was asked."""
    image = upstream.image("a/b", "latest")
    site = await serve(upstream, **keys)
    assert (await site.get(TAG))[2] == image.content
    upstream.clear()
    return site, image


async def pull(site: Site, path: str = TAG) -> tuple[int, bytes, str]:
    """Status, body, and what Cache-Status says."""
    status, headers, body = await site.get(path)
    return status, body, headers.get("Cache-Status", "")


def code_of(body: bytes) -> str:
    code = json.loads(body)["errors"][0]["code"]
    assert isinstance(code, str)
    return code


def on_disk(directory: Path) -> dict[Path, tuple[int, int]]:
    """Every file, when it was written and its size.  SQLite's -shm is memory that readers share."""
    files = [path for path in directory.rglob("*") if path.is_file() and not path.name.endswith("-shm")]
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


# Cold


async def test_fifty_cold_pulls_of_a_tag_are_one_request(serve: Serve, upstream: Upstream) -> None:
    image = upstream.image("a/b", "latest")
    site = await serve(upstream)
    found = await asyncio.gather(*(pull(site) for _ in range(MANY)))
    assert [(status, body) for status, body, _ in found] == [(200, image.content)] * MANY
    assert upstream.log == ["GET manifest a/b:latest"]


async def test_fifty_cold_pulls_of_a_manifest_by_digest_are_one_request(
    serve: Serve, upstream: Upstream
) -> None:
    image = upstream.image("a/b")
    site = await serve(upstream)
    found = await asyncio.gather(*(pull(site, manifest_of(image.digest)) for _ in range(MANY)))
    assert [(status, body) for status, body, _ in found] == [(200, image.content)] * MANY
    assert upstream.log == [f"GET manifest a/b@{image.digest[:19]}"]


async def test_fifty_cold_heads_of_a_blob_are_one_request(serve: Serve, upstream: Upstream) -> None:
    image = upstream.image("a/b")
    site = await serve(upstream)
    gate = asyncio.Event()
    hold = Hold(gate, after=None)
    upstream.next("HEAD", "blob", hold)

    async def head() -> str:
        async with site.request("HEAD", f"/v2/a/b/blobs/{image.layers[0]}") as response:
            assert response.status == 200
            return str(response.headers["Content-Length"])

    asking = [asyncio.ensure_future(head()) for _ in range(MANY)]
    await hold.reached.wait()
    gate.set()
    assert await asyncio.gather(*asking) == ["7"] * MANY
    assert len(upstream.log) == 1


async def test_a_client_that_leaves_does_not_cancel_what_others_wait_for(
    serve: Serve, upstream: Upstream
) -> None:
    image = upstream.image("a/b", "latest")
    site = await serve(upstream)
    gate = asyncio.Event()
    hold = Hold(gate, after=None)
    upstream.next("GET", "latest", hold)
    first = asyncio.ensure_future(pull(site))
    await hold.reached.wait()
    second = asyncio.ensure_future(pull(site))
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    gate.set()
    assert (await second)[:2] == (200, image.content)
    assert upstream.log == ["GET manifest a/b:latest"]


async def test_a_tag_brings_its_digest_along(serve: Serve, upstream: Upstream) -> None:
    site, image = await warm(serve, upstream)
    status, body, _ = await pull(site, manifest_of(image.digest))
    assert (status, body, upstream.log) == (200, image.content, [])


# Fresh


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_fresh_tag_costs_no_request_and_no_write(
    serve: Serve, upstream: Upstream, clock: Clock, method: str
) -> None:
    site, image = await warm(serve, upstream)
    before = on_disk(site.directory / "cache")
    for seconds in (0, 1, FRESH - 2):
        clock.advance(seconds)
        async with site.request(method, TAG) as response:
            assert response.status == 200
            assert response.headers["Docker-Content-Digest"] == image.digest
            assert response.headers["Age"] == str(int(clock.now - 1_700_000_000))
    assert upstream.log == []
    assert on_disk(site.directory / "cache") == before


async def test_a_fresh_tag_makes_no_call_that_writes(
    serve: Serve, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, _ = await warm(serve, upstream)

    def refuse(*arguments: object) -> None:
        raise AssertionError("a write")

    for kind, name in ((Records, "put"), (Records, "delete"), (BlobFiles, "create"), (BlobFiles, "resume")):
        monkeypatch.setattr(kind, name, refuse)
    assert (await pull(site))[0] == 200


async def test_freshness_by_tag_pattern(serve: Serve, upstream: Upstream, clock: Clock) -> None:
    rules = [
        {"match": "re:v?\\d+(\\.\\d+)+", "fresh_for": "7d"},
        {"match": "pinned-*", "fresh_for": "forever"},
        {"match": "edge", "fresh_for": 0},
    ]
    site = await serve(upstream, fresh_for="1m", tags=rules)
    tags = ("latest", "1.2", "pinned-x", "edge")
    for tag in tags:
        upstream.image("a/b", tag)
        await pull(site, manifest_of(tag))

    async def asked(seconds: float) -> list[str]:
        clock.advance(seconds)
        upstream.clear()
        for tag in tags:
            assert (await pull(site, manifest_of(tag)))[0] == 200
        return [str(request.reference) for request in upstream.requests]

    assert await asked(0) == ["edge"]
    assert await asked(59) == ["edge"]
    assert await asked(2) == ["latest", "edge"]
    assert await asked(7 * 86400) == ["latest", "1.2", "edge"]


async def test_freshness_by_namespace(serve: Serve, upstream: Upstream, clock: Clock) -> None:
    async with Upstream() as other:
        other.image("a/b", "latest")
        more = {"other.example": {"upstream": other.url, "fresh_for": "1h"}}
        site, _ = await warm(serve, upstream, fresh_for="1m", more=more)
        await pull(site, "/v2/other.example/a/b/manifests/latest")
        other.clear()
        clock.advance(120)
        await pull(site)
        await pull(site, "/v2/other.example/a/b/manifests/latest")
        assert (upstream.log, other.log) == (["HEAD manifest a/b:latest"], [])


async def test_a_restart_keeps_freshness(serve: Serve, upstream: Upstream, clock: Clock) -> None:
    site, image = await warm(serve, upstream)
    clock.advance(FRESH - 1)
    await site.app.stop()
    site = await serve(upstream)
    assert (await pull(site))[:2] == (200, image.content)
    assert upstream.log == []
    clock.advance(2)
    assert (await pull(site))[:2] == (200, image.content)
    assert upstream.log == ["HEAD manifest a/b:latest"]


async def test_a_clock_that_was_set_back_keeps_nothing_fresh(
    serve: Serve, upstream: Upstream, clock: Clock
) -> None:
    site, image = await warm(serve, upstream)
    await pull(site, TAGS)
    upstream.clear()
    clock.advance(-86400)
    assert (await pull(site))[:2] == (200, image.content)
    await pull(site, TAGS)
    assert upstream.log == ["HEAD manifest a/b:latest", "GET tags a/b"]
    # From now on it counts as validated now.
    await pull(site)
    assert len(upstream.log) == 2


# Due


async def test_revalidation_is_one_head_for_all(serve: Serve, upstream: Upstream, clock: Clock) -> None:
    site, image = await warm(serve, upstream)
    clock.advance(FRESH + 1)
    gate = asyncio.Event()
    hold = Hold(gate, after=None)
    upstream.next("HEAD", "latest", hold)
    asking = [asyncio.ensure_future(pull(site)) for _ in range(MANY)]
    await hold.reached.wait()
    gate.set()
    found = await asyncio.gather(*asking)
    assert [(status, body) for status, body, _ in found] == [(200, image.content)] * MANY
    assert upstream.log == ["HEAD manifest a/b:latest"]
    assert "hit" in (await pull(site))[2]  # fresh again
    assert len(upstream.log) == 1


async def test_a_moved_tag_is_a_head_and_a_get_by_digest(
    serve: Serve, upstream: Upstream, clock: Clock
) -> None:
    site, old = await warm(serve, upstream)
    new = upstream.image("a/b", "latest", [b"another layer"])
    clock.advance(FRESH + 1)
    found = await asyncio.gather(*(pull(site) for _ in range(MANY)))
    assert [(status, body) for status, body, _ in found] == [(200, new.content)] * MANY
    assert upstream.log == ["HEAD manifest a/b:latest", f"GET manifest a/b@{new.digest[:19]}"]
    # What it was stays pullable by digest.
    assert (await pull(site, manifest_of(old.digest)))[:2] == (200, old.content)
    assert len(upstream.log) == 2


async def test_a_tag_that_moves_again_in_between(serve: Serve, upstream: Upstream, clock: Clock) -> None:
    site, _ = await warm(serve, upstream)
    between = upstream.image("a/b", "latest", [b"between"])
    clock.advance(FRESH + 1)
    gate = asyncio.Event()
    hold = Hold(gate, after=None)
    upstream.next("GET", between.digest, Status(404), hold)
    asking = asyncio.ensure_future(pull(site))
    await hold.reached.wait()
    new = upstream.image("a/b", "latest", [b"new"])
    gate.set()
    assert (await asking)[:2] == (200, new.content)


async def test_a_head_that_says_no_digest_costs_a_get(serve: Serve, upstream: Upstream, clock: Clock) -> None:
    upstream.digest_header = False
    site, image = await warm(serve, upstream)
    clock.advance(FRESH + 1)
    assert (await pull(site))[:2] == (200, image.content)
    assert upstream.log == ["HEAD manifest a/b:latest", "GET manifest a/b:latest"]


@pytest.mark.errors("upstream.wrong_digest")
async def test_a_head_with_a_wrong_digest_changes_nothing(
    serve: Serve, upstream: Upstream, clock: Clock
) -> None:
    site, image = await warm(serve, upstream)
    clock.advance(FRESH + 1)
    upstream.next("HEAD", "latest", WrongDigest())
    assert (await pull(site))[:2] == (200, image.content)


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
    upstream.next("GET", new.digest, Status(500))
    assert (await pull(site))[:2] == (200, old.content)
    clock.advance(11)
    assert (await pull(site))[:2] == (200, new.content)


@pytest.mark.parametrize(
    ("fault", "seconds"),
    [(Status(500), 10), (RetryAfter(60), 60), (RetryAfter(30, 503), 30), (RetryAfter(3), 10)],
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
async def test_who_is_refused_now_gets_nothing_stale(
    serve: Serve, upstream: Upstream, clock: Clock, status: int
) -> None:
    site, image = await warm(serve, upstream)
    clock.advance(FRESH + 1)
    upstream.next("HEAD", "latest", Status(status))
    found = await pull(site)
    assert (found[0], code_of(found[1])) == (404, "MANIFEST_UNKNOWN")
    # Refused once is not deleted.
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
    assert (await pull(site))[0] == 502
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
    site = await serve(upstream)
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


@pytest.mark.parametrize(("fault", "times"), [(Status(500), 2), (Refuse(), 2 * (1 + RETRIES))], ids=str)
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


# Listings


async def test_a_listing_is_kept_like_a_tag(serve: Serve, upstream: Upstream, clock: Clock) -> None:
    upstream.image("a/b", "one")
    site = await serve(upstream)
    for tags, seconds, requests in ((["one"], 0, 1), (["one"], FRESH - 1, 1), (["one", "two"], 2, 2)):
        clock.advance(seconds)
        found = await asyncio.gather(*(pull(site, TAGS) for _ in range(5)))
        assert [json.loads(body) for _, body, _ in found] == [{"name": "a/b", "tags": tags}] * 5
        assert len(upstream.log) == requests
        upstream.image("a/b", "two")


async def test_a_listing_that_is_fresh_forever(serve: Serve, upstream: Upstream, clock: Clock) -> None:
    image = upstream.image("a/b", "one")
    site = await serve(upstream, fresh_for="forever")
    for path in (TAGS, f"/v2/a/b/referrers/{image.digest}"):
        first = await pull(site, path)
        clock.advance(FRESH)
        assert await pull(site, path) == (200, first[1], "entrepot; hit")
    upstream.image("a/b", "two")
    clock.advance(-10 * FRESH)  # set back: it is not known how old the listing is
    upstream.next("GET", "tags", Status(503), times=RETRIES + 1)
    status, body, came = await pull(site, TAGS)
    assert (status, json.loads(body)["tags"], came) == (
        200,
        ["one"],
        "entrepot; fwd=stale; detail=UNAVAILABLE",
    )


async def test_pages_come_from_what_is_kept(serve: Serve, upstream: Upstream) -> None:
    for tag in ("c", "a", "d", "b"):
        upstream.image("a/b", tag)
    site = await serve(upstream)
    path, pages = f"{TAGS}?n=3", []
    while path:
        _, headers, body = await site.get(path)
        pages.append(json.loads(body)["tags"])
        path = headers.get("Link", "<>").partition("<")[2].partition(">")[0]
    assert pages == [["a", "b", "c"], ["d"]]
    assert upstream.log == ["GET tags a/b"]


async def test_referrers_are_kept_and_filtered_here(serve: Serve, upstream: Upstream) -> None:
    image = upstream.image("a/b")
    one = upstream.artifact("a/b", image, "application/x-one", {"a": "b"})
    two = upstream.artifact("a/b", image, "application/x-two")
    site = await serve(upstream)
    path = f"/v2/a/b/referrers/{image.digest}"
    for query, expected in (
        ("", sorted([one.digest, two.digest])),
        ("?artifactType=application/x-one", [one.digest]),
        ("?artifactType=application/x-none", []),
    ):
        status, headers, body = await site.get(path + query)
        assert (status, headers["Content-Type"]) == (200, OCI_INDEX)
        assert [each["digest"] for each in json.loads(body)["manifests"]] == expected
        assert headers.get("OCI-Filters-Applied") == ("artifactType" if query else None)
    listed = {each["digest"]: each for each in json.loads((await site.get(path))[2])["manifests"]}
    assert listed[one.digest]["annotations"] == {"a": "b"}
    assert len(upstream.log) == 1


@pytest.mark.parametrize("kind", ["tags", "referrers"])
@pytest.mark.parametrize("fault", [Status(500), Status(429), Refuse()], ids=str)
async def test_a_stale_listing(
    serve: Serve, upstream: Upstream, clock: Clock, kind: str, fault: Fault
) -> None:
    image = upstream.image("a/b", "latest")
    site = await serve(upstream)
    path = TAGS if kind == "tags" else f"/v2/a/b/referrers/{image.digest}"
    _, known, _ = await pull(site, path)
    clock.advance(FRESH + 1)
    upstream.clear()
    upstream.next("GET", kind, fault, times=1 + RETRIES)
    for _ in range(3):
        assert (await pull(site, path))[:2] == (200, known)
    assert set(upstream.log) == {upstream.log[0]}
    asked = len(upstream.log)
    clock.advance(61)
    await pull(site, path)
    await pull(site, path)
    assert len(upstream.log) > asked


async def test_a_listing_that_never_came_is_an_error(serve: Serve, upstream: Upstream, clock: Clock) -> None:
    upstream.image("a/b", "latest")
    site = await serve(upstream)
    upstream.next("GET", "tags", Status(500))
    for _ in range(3):
        assert (await pull(site, TAGS))[0] == 502
    assert len(upstream.log) == 1
    clock.advance(11)
    assert (await pull(site, TAGS))[0] == 200


async def test_no_referrers_api_leads_to_the_fallback_tag(
    serve: Serve, upstream: Upstream, clock: Clock
) -> None:
    image = upstream.image("a/b", "latest")
    upstream.referrers_api = False
    tag = image.digest.replace(":", "-")
    site = await serve(upstream)
    status, body, _ = await pull(site, f"/v2/a/b/referrers/{image.digest}")
    assert (status, code_of(body)) == (404, "MANIFEST_UNKNOWN")  # on NAME_UNKNOWN oras would give up
    assert (await pull(site, manifest_of(tag)))[0] == 404
    index = upstream.index("a/b", tag, [image])
    clock.advance(11)
    # It is cached as the tag that it is.
    for _ in range(2):
        assert (await pull(site, manifest_of(tag)))[:2] == (200, index.content)
    assert upstream.log.count(f"GET manifest a/b:{tag}") == 2
    clock.advance(FRESH + 1)
    await pull(site, manifest_of(tag))
    assert upstream.log[-1] == f"HEAD manifest a/b:{tag}"


async def test_no_digest_header_at_all(serve: Serve, upstream: Upstream) -> None:
    image = upstream.image("a/b", "latest")
    site = await serve(upstream)
    upstream.next("GET", "latest", NoDigest())
    status, headers, body = await site.get(TAG)
    assert (status, body, headers["Docker-Content-Digest"]) == (200, image.content, image.digest)
