"""What an origin does not have of an image's referrers, and what is answered while it cannot be asked."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import msgspec
import pytest

from proxy.admin.reports import AbsenceRow, Why
from proxy.cache import absences
from proxy.cache.absences import subject_of
from proxy.cli.status import why_tables
from proxy.telemetry.exchange import Exchange, current_exchange
from proxy.upstream.transport import RETRIES
from storage.errors import ManifestUnknown, Unavailable
from storage.oci import Digest, Tag
from tests.conftest import Clock, Serve, Site
from tests.pulls import FRESH, TAG, code_of, manifest_of, pull
from tests.upstream import Fault, Manifest, RetryAfter, Status, Upstream

DIGEST = "sha256:" + "1" * 64
DAY = 86_400.0  # seconds
UNASKED = [manifest_of("new"), "/v2/new/tags/list", f"/v2/a/b/blobs/{DIGEST}"]


def referrers_of(image: Manifest | str) -> str:
    return f"/v2/a/b/referrers/{image if isinstance(image, str) else image.digest}"


def tag_of(image: Manifest, suffix: str = "") -> str:
    return image.digest.replace(":", "-") + suffix


async def listed(site: Site, image: Manifest, query: str = "") -> list[str]:
    status, _, body = await site.get(referrers_of(image) + query)
    assert status == 200, body
    return [each["digest"] for each in json.loads(body)["manifests"]]


@pytest.fixture
def registry(upstream: Upstream) -> Upstream:
    """An upstream without a referrers API."""
    upstream.referrers_api = False
    return upstream


@pytest.mark.parametrize(
    ("reference", "subject"),
    [
        (Tag(f"sha256-{'1' * 64}"), DIGEST),
        (Tag(f"sha256-{'1' * 64}.sig"), DIGEST),
        (Tag(f"sha256-{'1' * 64}.att"), DIGEST),
        (Tag(f"sha256-{'1' * 64}.sbom"), DIGEST),
        (Tag(f"sha256-{'1' * 64}.other"), None),
        (Tag(f"sha256-{'1' * 63}"), None),
        (Tag(f"sha512-{'1' * 64}"), None),
        (Tag("latest"), None),
        (Digest(DIGEST), None),
    ],
)
def test_tags_of_referrers_name_their_subject(reference: Any, subject: str | None) -> None:
    assert subject_of(reference) == subject


async def test_the_cached_fallback_tag_answers_for_the_api(
    serve: Serve, registry: Upstream, clock: Clock
) -> None:
    image = registry.image("a/b", "latest")
    one = registry.artifact("a/b", image, "application/x-one")
    two = registry.artifact("a/b", image, "application/x-two")
    registry.index("a/b", tag_of(image), [one, two])
    site = await serve(registry)
    assert (await pull(site, TAG))[0] == 200
    assert (await pull(site, referrers_of(image)))[0] == 404
    assert (await pull(site, manifest_of(tag_of(image))))[0] == 200
    await registry.stop()
    clock.advance(FRESH + 1)
    assert await listed(site, image) == sorted([one.digest, two.digest])
    status, _, came = await pull(site, referrers_of(image))
    assert (status, came.partition(";")[0], came.rpartition(";")[2]) == (
        200,
        "entrepot",
        " detail=UNAVAILABLE",
    )
    await registry.start()
    clock.advance(FRESH + 1)
    # Asked again, the origin still has no such API, and clients look at the fallback tag themselves.
    assert (await pull(site, referrers_of(image)))[0] == 404


@pytest.mark.parametrize("fault", [Status(500), Status(503), RetryAfter(7)], ids=str)
async def test_without_a_cached_fallback_tag_referrers_are_unknown(
    serve: Serve, registry: Upstream, clock: Clock, fault: Fault
) -> None:
    image, other = registry.image("a/b", "latest"), registry.image("a/b", "other", [b"another"])
    site = await serve(registry)
    for path in (TAG, manifest_of("other"), referrers_of(image)):
        await pull(site, path)
    clock.advance(FRESH + 1)
    registry.next("GET", "referrers", fault, times=4 * (RETRIES + 1))
    for each in (image, other):  # that of `other` was never asked, but the registry is the same
        status, body, came = await pull(site, referrers_of(each))
        assert (status, code_of(body), came) == (404, "MANIFEST_UNKNOWN", "entrepot; hit; detail=negative")


async def test_it_is_known_after_a_restart_too(serve: Serve, registry: Upstream, clock: Clock) -> None:
    image = registry.image("a/b", "latest")
    site = await serve(registry)
    for path in (TAG, referrers_of(image), manifest_of(tag_of(image, ".sig"))):
        await pull(site, path)
    await site.app.stop()
    await registry.stop()
    site = await serve(registry)
    clock.advance(FRESH + 1)
    for path in (referrers_of(image), manifest_of(tag_of(image, ".sig"))):
        assert (await pull(site, path))[0] == 404


async def test_an_origin_with_the_api_is_not_said_to_have_none(
    serve: Serve, upstream: Upstream, clock: Clock
) -> None:
    image, other = upstream.image("a/b", "latest"), upstream.image("a/b", "other", [b"another"])
    site = await serve(upstream)
    upstream.referrers_api = False
    for path in (TAG, manifest_of("other"), referrers_of(image)):
        await pull(site, path)
    upstream.referrers_api = True  # a newer version of the registry
    clock.advance(FRESH + 1)
    assert await listed(site, image) == []
    upstream.next("GET", "referrers", Status(500), times=1 + RETRIES)
    assert (await pull(site, referrers_of(other)))[0] == 502


async def purge(site: Site, pattern: str = "docker.io/a/b") -> int:
    """How many records of absences it drops."""
    assert site.app.admin_url is not None
    given = {"pattern": pattern}
    async with site.session.post(site.app.admin_url / "api/v1/purge", json=given) as response:
        assert response.status == 200
        return int((await response.json())["absences"])


async def why(site: Site, reference: str) -> Why:
    assert site.app.admin_url is not None
    where = (site.app.admin_url / "api/v1/why").with_query(ref=reference)
    async with site.session.get(where) as response:
        return msgspec.json.decode(await response.read(), type=Why)


ABSENT = [
    manifest_of("other"),
    manifest_of(DIGEST),
    manifest_of(DIGEST.replace(":", "-") + ".sig"),
    referrers_of(DIGEST),
    "/v2/a/tags/list",
    "/v2/a/manifests/latest",
    manifest_of("tags"),
    manifest_of("referrers"),
]


async def test_the_last_404_is_answered_for_a_day(serve: Serve, registry: Upstream, clock: Clock) -> None:
    registry.image("a/b", "latest")
    site = await serve(registry)
    codes = [code_of((await pull(site, path))[1]) for path in ABSENT]
    await site.app.stop()
    await registry.stop()
    site = await serve(registry)
    clock.advance(DAY - 1)
    for path, code in zip(ABSENT, codes, strict=True):
        status, body, came = await pull(site, path)
        assert (status, code_of(body), came) == (404, code, "entrepot; hit; detail=negative")
        assert "when it was last asked, and cannot be asked now" in body.decode()
        async with site.request("HEAD", path) as response:
            assert response.status == 404
    assert [(await pull(site, path))[0] for path in UNASKED] == [502] * len(UNASKED)
    clock.advance(1)
    assert [(await pull(site, path))[0] for path in ABSENT] == [502] * len(ABSENT)


async def test_an_absence_may_be_kept_for_no_time(serve: Serve, registry: Upstream, clock: Clock) -> None:
    registry.image("a/b", "latest")
    site = await serve(registry, absent_for="0s")
    for path in ABSENT:
        await pull(site, path)
    await registry.stop()
    clock.advance(FRESH + 1)
    assert [(await pull(site, path))[0] for path in ABSENT] == [502] * len(ABSENT)


@pytest.mark.parametrize("path", [manifest_of("other"), manifest_of(DIGEST), "/v2/a/b/tags/list"])
@pytest.mark.parametrize("deny", [True, False])
async def test_the_last_refusal_is_answered(
    serve: Serve, registry: Upstream, clock: Clock, path: str, deny: bool
) -> None:
    """Docker Hub answers 401 for what it does not have."""
    site = await serve(registry, top={"fallback": "deny"} if deny else {})
    registry.next("GET", path, Status(401))
    refused = (await pull(site, path))[0]
    assert refused == (403 if deny else 404)
    await registry.stop()
    clock.advance(FRESH + 1)
    assert (await pull(site, path))[0] == refused


@pytest.mark.parametrize("path", [manifest_of("other"), "/v2/a/tags/list"])
async def test_what_came_since_is_absent_no_more(
    serve: Serve, registry: Upstream, clock: Clock, path: str
) -> None:
    site = await serve(registry)
    assert (await pull(site, path))[0] == 404
    registry.image("a/b", "other")
    registry.image("library/a", "latest")
    clock.advance(FRESH + 1)
    assert (await pull(site, path))[0] == 200
    store = site.app.composition.store  # evicted:
    await store.listings.delete("docker.io/library/a", "tags")
    with suppress(ManifestUnknown):
        await store.delete_manifest("docker.io/a/b", Tag("other"))
    await registry.stop()
    clock.advance(FRESH + 1)
    assert (await pull(site, path))[0] == 502


async def test_a_purge_drops_absences(serve: Serve, registry: Upstream, clock: Clock) -> None:
    site = await serve(registry)
    for path in ("/v2/a/tags/list", manifest_of("other"), "/v2/other/tags/list"):
        assert (await pull(site, path))[0] == 404
    await registry.stop()
    assert (await purge(site), await purge(site)) == (1, 0)
    clock.advance(FRESH + 1)
    assert (await pull(site, manifest_of("other")))[0] == 502
    assert (await pull(site, "/v2/a/tags/list"))[0] == 404
    assert await purge(site, "*/a") == 1
    assert (await pull(site, "/v2/a/tags/list"))[0] == 502


@pytest.mark.parametrize(("denied", "code"), [(False, "MANIFEST_UNKNOWN"), (True, "DENIED")])
async def test_an_absence_is_explained(
    serve: Serve, registry: Upstream, clock: Clock, denied: bool, code: str
) -> None:
    site = await serve(registry)
    if denied:
        registry.next("GET", manifest_of("other"), Status(401))
    assert (await pull(site, manifest_of("other")))[0] == 404
    clock.advance(60)
    found = await why(site, "a/b:other")
    assert found.absent == AbsenceRow(code, since=clock() - 60, until=clock() - 60 + DAY)
    assert (found.verdict, found.stored) == ("miss", False)
    assert "upstream did not have it when it was last asked" in found.because
    told = {row[0]: row[1] for row in why_tables(found, clock())[0].rows}
    assert told["absent"] == f"{code} 1 min ago, which is answered while upstream cannot be asked, for 23 h"
    assert (await why(site, "a/b:new")).absent is None
    clock.advance(DAY)
    assert (await why(site, "a/b:other")).absent is None


async def test_an_absence_is_why_a_pull_is_refused(serve: Serve, registry: Upstream, clock: Clock) -> None:
    image = registry.image("a/b", "latest")
    site = await serve(registry)
    for path in (TAG, manifest_of("other"), manifest_of(tag_of(image, ".sig"))):
        await pull(site, path)
    await registry.stop()
    clock.advance(FRESH + 1)
    while site.app.composition.upstreams["docker.io"].healthy:
        await pull(site, manifest_of("new"))
    found = await why(site, "a/b:other")
    assert found.verdict == "refused"
    assert found.because.startswith("upstream did not have it when it was last asked, and is paused: ")
    assert found.absent is not None
    # Of a stored image it is kept without limit.
    found = await why(site, f"a/b:{tag_of(image, '.sig')}")
    assert found.absent is not None
    assert found.absent.until is None
    assert (await why(site, "a/b:latest")).absent is None


async def test_the_records_of_absences_are_bounded(
    serve: Serve, registry: Upstream, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(absences, "SLOTS", 1)
    site = await serve(registry)
    for name in "abc":
        assert (await pull(site, f"/v2/{name}/tags/list"))[0] == 404
    await registry.stop()
    clock.advance(FRESH + 1)
    assert [(await pull(site, f"/v2/{name}/tags/list"))[0] for name in "abc"] == [502, 502, 404]


async def test_a_tag_that_was_dropped_is_absent(serve: Serve, registry: Upstream, clock: Clock) -> None:
    registry.image("a/b", "latest")
    site = await serve(registry, on_upstream_delete="drop")
    assert (await pull(site))[0] == 200
    registry.delete_tag("a/b", "latest")
    clock.advance(FRESH + 1)
    assert (await pull(site))[0] == 404
    await registry.stop()
    clock.advance(FRESH + 1)
    assert (await pull(site))[0] == 404


@pytest.mark.parametrize("path", ABSENT)
async def test_another_replica_is_not_told_of_an_absence(
    serve: Serve, registry: Upstream, clock: Clock, path: str
) -> None:
    """It may be able to ask, and takes a 404 for that of the upstream."""
    site = await serve(registry)
    assert (await pull(site, path))[0] == 404
    await registry.stop()
    clock.advance(FRESH + 1)
    name, _, what = path.removeprefix("/v2/").partition("/tags/" if "/tags/" in path else "/manifests/")
    cache = site.app.composition.caches["docker.io"]
    current_exchange.set(Exchange(peer="https://replica.example"))
    with pytest.raises(Unavailable):
        if "/tags/" in path:
            await cache.tags(name)
        elif "/referrers/" in path:
            await cache.referrers("a/b", Digest(DIGEST))
        else:
            await cache.get_manifest(name, Digest(what) if what == DIGEST else Tag(what))


async def test_referrers_of_referrers_are_known_to_be_none(
    serve: Serve, registry: Upstream, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = registry.image("a/b", "latest")
    made = [registry.artifact("a/b", image, f"application/x-{name}") for name in ("one", "two")]
    registry.index("a/b", tag_of(image), made)
    site = await serve(registry)
    monkeypatch.setattr(absences, "MOST", 3)
    # What a client does that shows a tree: the manifests of the referrers are not pulled.
    paths = [referrers_of(each.digest) for each in made] + [
        manifest_of(each.digest.replace(":", "-")) for each in made
    ]
    for path in (TAG, referrers_of(image), manifest_of(tag_of(image)), *paths):
        await pull(site, path)
    await registry.stop()
    clock.advance(FRESH + 1)
    assert await listed(site, image) == sorted(each.digest for each in made)
    for each in made:  # a 404 would end what began with a list: oras discover
        assert await listed(site, each) == []
        assert (await pull(site, manifest_of(tag_of(each))))[0] == 404
    await site.app.stop()
    site = await serve(registry, offline=True)
    assert await listed(site, image) == sorted(each.digest for each in made)
    assert [await listed(site, each) for each in made] == [[], []]


async def test_without_the_api_an_unsigned_image_has_an_empty_list(
    serve: Serve, registry: Upstream, clock: Clock
) -> None:
    image = registry.image("a/b", "latest")
    site = await serve(registry)
    for path in (TAG, referrers_of(image), manifest_of(tag_of(image))):
        await pull(site, path)
    await registry.stop()
    clock.advance(FRESH + 1)
    status, _, came = await pull(site, referrers_of(image))
    assert (status, came) == (200, "entrepot; fwd=stale; ttl=0; detail=UNAVAILABLE")
    assert await listed(site, image, "?artifactType=application/x-one") == []


async def test_offline_a_stored_referrer_has_an_empty_list(serve: Serve, upstream: Upstream) -> None:
    """Of an upstream with the API that was never asked for it; of what is not stored nothing is known."""
    image = upstream.image("a/b", "latest")
    made = [upstream.artifact("a/b", image, f"application/x-{name}") for name in ("one", "two")]
    site = await serve(upstream)
    for path in (TAG, referrers_of(image), manifest_of(made[0].digest)):
        await pull(site, path)
    await site.app.stop()
    site = await serve(upstream, offline=True)
    assert await listed(site, image) == sorted(each.digest for each in made)
    assert await listed(site, made[0]) == []
    assert (await pull(site, referrers_of(made[1].digest)))[0] == 404


async def test_absences_of_what_is_not_stored_are_bounded(
    serve: Serve, registry: Upstream, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.image("a/b", "latest")
    monkeypatch.setattr(absences, "MOST", 3)
    site = await serve(registry)
    paths = [manifest_of(f"sha256-{number:064x}.sig") for number in range(5)]
    for path in (TAG, *paths):
        await pull(site, path)
    await registry.stop()
    clock.advance(DAY)
    assert [(await pull(site, path))[0] for path in paths] == [404] * 3 + [502] * 2


@pytest.mark.parametrize("suffix", ["", ".sig", ".att", ".sbom"])
async def test_the_last_404_of_a_signature_is_kept(
    serve: Serve, registry: Upstream, clock: Clock, suffix: str
) -> None:
    image = registry.image("a/b", "latest")
    site = await serve(registry)
    path = manifest_of(tag_of(image, suffix))
    await pull(site, TAG)
    registry.next("GET", tag_of(image, suffix), Status(500), times=1 + RETRIES)
    assert (await pull(site, path))[0] == 502  # nothing is known yet
    assert (await pull(site, path))[0] == 404
    clock.advance(FRESH + 1)
    registry.next("GET", tag_of(image, suffix), Status(500), times=1 + RETRIES)
    status, body, came = await pull(site, path)
    assert (status, code_of(body), came) == (404, "MANIFEST_UNKNOWN", "entrepot; hit; detail=negative")


async def test_a_signature_that_came_later_is_no_longer_unknown(
    serve: Serve, registry: Upstream, clock: Clock
) -> None:
    image = registry.image("a/b", "latest")
    site = await serve(registry)
    tag = tag_of(image, ".sig")
    for path in (TAG, manifest_of(tag)):
        await pull(site, path)
    signature = registry.image("a/b", tag)
    clock.advance(FRESH + 1)
    assert (await pull(site, manifest_of(tag)))[:2] == (200, signature.content)
    await registry.stop()
    clock.advance(FRESH + 1)
    assert (await pull(site, manifest_of(tag)))[:2] == (200, signature.content)


async def test_a_fallback_tag_that_is_no_index_lists_nothing(
    serve: Serve, registry: Upstream, clock: Clock
) -> None:
    image = registry.image("a/b", "latest")
    registry.image("a/b", tag_of(image))
    site = await serve(registry)
    for path in (TAG, referrers_of(image), manifest_of(tag_of(image))):
        await pull(site, path)
    await registry.stop()
    clock.advance(FRESH + 1)
    assert (await pull(site, referrers_of(image)))[0] == 404


async def test_offline_the_fallback_tag_is_listed(serve: Serve, registry: Upstream) -> None:
    image = registry.image("a/b", "latest")
    one = registry.artifact("a/b", image, "application/x-one")
    registry.index("a/b", tag_of(image), [one])
    site = await serve(registry)
    for path in (TAG, manifest_of(tag_of(image))):
        await pull(site, path)
    await site.app.stop()
    site = await serve(registry, offline=True)
    assert await listed(site, image) == [one.digest]
    assert await listed(site, image, "?artifactType=application/x-two") == []
