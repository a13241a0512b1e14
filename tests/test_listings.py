"""Listings of tags and referrers, kept like a tag."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from proxy.upstream.transport import RETRIES
from storage.listings import ListedReferrers
from storage.oci import Descriptor, Digest
from tests.conftest import Clock, Serve, Site
from tests.pulls import FRESH, TAG, TAGS, code_of, manifest_of, pull
from tests.upstream import (
    OCI_INDEX,
    Fault,
    NoDigest,
    Refuse,
    Status,
    Upstream,
)


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


async def pages_of(site: Site, path: str) -> list[list[str]]:
    """The digests on each page of a list of referrers."""
    pages = []
    while path:
        status, headers, body = await site.get(path)
        assert status == 200
        pages.append([each["digest"] for each in json.loads(body)["manifests"]])
        path = headers.get("Link", "<>").partition("<")[2].partition(">")[0]
    return pages


@pytest.mark.parametrize("state", ["fresh", "stale", "offline"])
async def test_a_page_of_referrers_decodes_what_it_shows(
    serve: Serve, upstream: Upstream, clock: Clock, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    image = upstream.image("a/b")
    made = [upstream.artifact("a/b", image, f"application/x-{n % 2}", {"n": str(n)}) for n in range(30)]
    site = await serve(upstream)
    path = f"/v2/a/b/referrers/{image.digest}"
    await site.get(path)
    if state == "offline":
        await site.app.stop()
        site = await serve(upstream, offline=True)
    elif state == "stale":
        clock.advance(FRESH + 1)
        upstream.next("GET", "referrers", Status(503), times=1 + RETRIES)
        await site.get(path)
    upstream.clear()
    digests = sorted(each.digest for each in made)
    decoded, real = [0], Descriptor.from_json

    def counted(value: Any) -> Descriptor:
        decoded[0] += 1
        return real(value)

    monkeypatch.setattr(Descriptor, "from_json", counted)
    assert await pages_of(site, f"{path}?n=7") == [digests[start : start + 7] for start in range(0, 30, 7)]
    # One more for each page tells whether it is the last; offline, another one whether there are any.
    assert decoded[0] <= 30 + 2 * 5
    odd = sorted(each.digest for each in made[1::2])
    assert await pages_of(site, f"{path}?n=4&artifactType=application/x-1") == [
        odd[start : start + 4] for start in range(0, 15, 4)
    ]
    assert upstream.log == []


async def test_a_page_that_is_read_in_parts(
    serve: Serve, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.web.pull.AT_ONCE", 2)
    image = upstream.image("a/b")
    digests = sorted(upstream.artifact("a/b", image, f"application/x-{n}").digest for n in range(5))
    site = await serve(upstream)
    path = f"/v2/a/b/referrers/{image.digest}"
    status, body, came = await pull(site, path)
    assert [each["digest"] for each in json.loads(body)["manifests"]] == digests
    assert (status, came) == (200, "entrepot; fwd=miss")
    assert await pages_of(site, f"{path}?n=3") == [digests[:3], digests[3:]]
    assert await pages_of(site, f"{path}?n=0") == [[each] for each in digests]
    assert await pages_of(site, f"{path}?last={digests[1]}") == [digests[2:]]


async def test_a_list_of_referrers_that_a_former_version_kept(
    serve: Serve, upstream: Upstream, tmp_path: Path
) -> None:
    image = upstream.image("a/b")
    site = await serve(upstream, offline=True)
    listed = [{"mediaType": "a/b", "digest": str(Digest.of(b"%d" % n)), "size": n} for n in range(5)]
    store = site.app.composition.store
    await store.listings.put("docker.io/a/b", f"referrers {image.digest}", listed)
    digests = sorted(each["digest"] for each in listed)
    path = f"/v2/a/b/referrers/{image.digest}"
    assert await pages_of(site, f"{path}?n=2") == [digests[:2], digests[2:4], digests[4:]]


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


async def test_a_listing_that_never_came_is_an_error_and_asked_for_again(
    serve: Serve, upstream: Upstream
) -> None:
    upstream.image("a/b", "latest")
    site = await serve(upstream)
    upstream.next("GET", "tags", Status(500), times=1 + RETRIES + 2)
    for _ in range(3):
        assert (await pull(site, TAGS))[0] == 502
    assert len(upstream.log) == 1 + RETRIES + 2
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


@pytest.mark.parametrize("count", [0, 1, 2, 30])
def test_listed_referrers_are_what_was_listed(count: int) -> None:
    made = [
        Descriptor(
            "a/b", Digest.of(b"%d" % n), n, f"t/{n}", {"new\nline": ",\n", "a": "é"} if n % 2 else None
        )
        for n in range(count)
    ]
    listed = ListedReferrers.of(made)
    ordered = sorted(made, key=lambda each: each.digest)
    for each in (listed, ListedReferrers.parse(listed.encode())):
        found = list(each.after())
        assert found == ordered
        assert [each.annotations for each in found] == [each.annotations for each in ordered]
        for number, last in enumerate(ordered):
            assert list(each.after(last.digest)) == ordered[number + 1 :]
    assert isinstance(json.loads(listed.encode()), list)
