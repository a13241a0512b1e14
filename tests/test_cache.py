"""What a cache asks its origin and when: cold, fresh, and due."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from storage.disk.blobs import BlobFiles
from storage.disk.records import SQLiteRecords
from storage.oci import Descriptor, Digest
from tests.conftest import Clock, Serve
from tests.pulls import FRESH, MANY, TAG, TAGS, manifest_of, on_disk, pull, warm
from tests.upstream import (
    Hold,
    Status,
    Upstream,
    WrongDigest,
)

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

    cache = site.app.composition.caches["docker.io"]
    resolve, arrived = cache.resolve_blob, asyncio.Semaphore(0)

    async def arriving(repository: str, digest: Digest) -> Descriptor:
        arrived.release()
        return await resolve(repository, digest)

    cache.resolve_blob = arriving  # type: ignore[method-assign]
    asking = [asyncio.ensure_future(head()) for _ in range(MANY)]
    for _ in range(MANY):
        await arrived.acquire()
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
    serve: Serve, upstream: Upstream, clock: Clock, tmp_path: Path, method: str
) -> None:
    # The first scrub writes down what it has found, whenever it ends.
    where = {"path": str(tmp_path / "disk"), "scrub": "off"}
    site, image = await warm(serve, upstream, top={"disk": where})
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
    serve: Serve, upstream: Upstream, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # The first scrub writes down what it has found, whenever it ends.
    where = {"path": str(tmp_path / "disk"), "scrub": "off"}
    site, _ = await warm(serve, upstream, top={"disk": where})

    def refuse(*arguments: object) -> None:
        raise AssertionError("a write")

    for kind, name in (
        (SQLiteRecords, "put"),
        (SQLiteRecords, "delete"),
        (BlobFiles, "create"),
        (BlobFiles, "resume"),
    ):
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
