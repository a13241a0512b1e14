"""What can be pulled while no upstream answers: complete, partial, absent, and what is missing."""

from __future__ import annotations

from typing import Any

import pytest

from proxy.admin.reports import MissingRow, ReadyRow
from proxy.config.schema import Hosting
from proxy.namespaces.references import FieldInvalid
from storage.graph import fallback_tag
from storage.oci import ARTIFACTS, Digest, Tag
from tests.test_operations import ALPINE, Site, describe, on, settings, site

__all__ = ["settings", "site"]  # fixtures


async def judge(site: Site, reference: str = "alpine:3", *platforms: str, referrers: bool = True) -> ReadyRow:
    (row,) = await site.operations.ready([reference], platforms, referrers)
    return row


def lose(site: Site, content: bytes) -> str:
    """Its file is not there any more."""
    digest = Digest.of(content)
    site.store.files.path(digest).unlink()
    return str(digest)


async def index(site: Site) -> tuple[dict[str, Any], dict[str, Any]]:
    """alpine:3 for amd64 and arm64, with a layer in common."""
    amd = await site.image(ALPINE, None, b"base", b"amd")
    arm = await site.image(ALPINE, None, b"base", b"arm")
    named = [on("linux/amd64", amd), on("linux/arm64", arm)]
    await site.manifest(ALPINE, {"manifests": named}, "3")
    return amd, arm


async def test_what_is_complete(site: Site) -> None:
    await index(site)
    pointer = site.store.pointer(ALPINE, Tag("3"))
    assert pointer is not None
    assert await judge(site) == ReadyRow(
        asked="alpine:3", repository=ALPINE, reference="3", digest=str(pointer.digest), state="complete"
    )
    assert (await judge(site, f"alpine@{pointer.digest}")).state == "complete"


@pytest.mark.parametrize("reference", ["alpine:4", f"alpine@{Digest.of(b'')}", "ghcr.io/x/y"])
async def test_what_is_absent(site: Site, reference: str) -> None:
    await index(site)
    found = await judge(site, reference)
    assert (found.state, found.missing) == ("absent", [])


async def test_a_tag_whose_manifest_is_gone_is_absent(site: Site) -> None:
    made = await site.image(ALPINE, "3", b"layer")
    site.store.records.delete(f"manifest {ALPINE} {made['digest']}")
    found = await judge(site)
    assert (found.state, found.digest) == ("absent", made["digest"])


async def test_what_is_missing_is_told_with_its_platforms(site: Site) -> None:
    _, arm = await index(site)
    base, only = lose(site, b"base"), lose(site, b"arm")
    found = await judge(site)
    assert found.state == "partial"
    assert found.missing == [
        MissingRow(digest=base, kind="blob", size=4, platforms=["linux/amd64", "linux/arm64"]),
        MissingRow(digest=only, kind="blob", size=3, platforms=["linux/arm64"]),
    ]
    site.store.records.delete(f"manifest {ALPINE} {arm['digest']}")
    (row,) = (await judge(site, "alpine:3", "linux/arm64")).missing
    assert (row.digest, row.kind, row.size) == (arm["digest"], "manifest", arm["size"])


async def test_only_what_is_for_the_platforms_counts(site: Site) -> None:
    await index(site)
    lose(site, b"arm")
    assert (await judge(site, "alpine:3", "linux/amd64")).state == "complete"
    assert (await judge(site, "alpine:3", "linux/arm64")).state == "partial"
    assert (await judge(site, "alpine:3", "linux/amd64", "linux/arm64")).state == "partial"


async def test_an_image_that_is_not_made_for_a_platform_is_not_complete_for_it(site: Site) -> None:
    await index(site)
    found = await judge(site, "alpine:3", "linux/amd64", "linux/s390x")
    assert (found.state, found.lacking, found.missing) == ("partial", ["linux/s390x"], [])
    # What is no index may be for any.
    await site.image(ALPINE, "one", b"layer")
    assert (await judge(site, "alpine:one", "linux/s390x")).state == "complete"


async def test_what_another_repository_may_show_is_not_here(site: Site) -> None:
    await site.image(ALPINE, "3", b"layer")
    site.store.records.delete(f"link {ALPINE} {Digest.of(b'layer')}")
    (row,) = (await judge(site)).missing
    assert row.digest == str(Digest.of(b"layer"))


async def test_referrers_count_as_far_as_they_are_known(site: Site) -> None:
    made = await site.image(ALPINE, "3", b"layer")
    body = {"config": await site.blob(ALPINE, b"{}"), "layers": [await site.blob(ALPINE, b"signed")]}
    signature = await site.manifest(ALPINE, {**body, "subject": made})
    found = await judge(site)
    assert (found.state, found.referrers, found.referrers_known) == ("complete", 1, 1)
    listed = [signature, describe(Digest.of(b"bill"), 4, signature["mediaType"])]
    await site.store.listings.put(ALPINE, f"referrers {made['digest']}", listed)
    found = await judge(site)
    assert (found.state, found.referrers, found.referrers_known) == ("partial", 1, 2)
    assert [(row.digest, row.kind) for row in found.missing] == [(str(Digest.of(b"bill")), "referrer")]
    assert (await judge(site, referrers=False)).state == "complete"
    lost = lose(site, b"signed")
    assert {row.digest for row in (await judge(site)).missing} == {lost, str(Digest.of(b"bill"))}


async def test_what_tags_say_that_it_refers_counts_too(site: Site) -> None:
    made = await site.image(ALPINE, "3", b"layer")
    bill = await site.image(ALPINE, None, b"bill")
    await site.manifest(ALPINE, {"manifests": [bill]}, fallback_tag(Digest(made["digest"])))
    await site.image(ALPINE, f"{made['digest'].replace(':', '-')}.sig", b"signed")
    found = await judge(site)
    assert (found.state, found.referrers, found.referrers_known) == ("complete", 2, 2)
    lose(site, b"bill")
    lose(site, b"signed")
    assert [row.kind for row in (await judge(site)).missing] == ["referrer", "referrer"]


async def test_a_damaged_listing_says_nothing(site: Site) -> None:
    made = await site.image(ALPINE, "3", b"layer")
    for listed in ({}, [{"digest": "x"}]):
        await site.store.listings.put(ALPINE, f"referrers {made['digest']}", listed)
        assert (await judge(site)).state == "complete"


async def test_foreign_layers_are_nobodys_business(site: Site) -> None:
    foreign = describe(Digest.of(b"far"), 3, "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip")
    await site.manifest(ALPINE, {"config": await site.blob(ALPINE, b"{}"), "layers": [foreign]}, "3")
    assert (await judge(site)).state == "complete"


async def test_an_index_of_blobs_is_complete_when_they_are_stored(site: Site) -> None:
    layer = await site.blob(ALPINE, b"a layer")
    config = {**await site.blob(ALPINE, b"{}"), "mediaType": "application/vnd.buildkit.cacheconfig.v0"}
    await site.manifest(ALPINE, {"manifests": [layer, config]}, "cache")
    assert (await judge(site, "alpine:cache")).state == "complete"
    lost = lose(site, b"a layer")
    row = await judge(site, "alpine:cache")
    assert (row.state, [(each.digest, each.kind) for each in row.missing]) == ("partial", [(lost, "blob")])


async def test_an_artifact_is_complete_when_its_blobs_are_stored(site: Site) -> None:
    blob = await site.blob(ALPINE, b"an sbom")
    await site.manifest(ALPINE, {"mediaType": ARTIFACTS[1], "blobs": [blob]}, "sbom")
    assert (await judge(site, "alpine:sbom")).state == "complete"
    lost = lose(site, b"an sbom")
    row = await judge(site, "alpine:sbom")
    assert (row.state, [(each.digest, each.kind) for each in row.missing]) == ("partial", [(lost, "blob")])


@pytest.mark.parametrize(
    "body",
    [
        {"schemaVersion": 1, "fsLayers": [{"blobSum": str(Digest.of(b"1"))}]},
        {"mediaType": "application/vnd.example.thing+json", "things": [str(Digest.of(b"1"))]},
        {"Layers": [describe(Digest.of(b"1"), 1)]},
    ],
)
async def test_what_may_name_more_is_not_complete(site: Site, body: dict[str, Any]) -> None:
    digest = (await site.manifest(ALPINE, body, "odd"))["digest"]
    row = await judge(site, "alpine:odd")
    assert (row.state, [(each.digest, each.kind) for each in row.missing]) == (
        "partial",
        [(digest, "unreadable")],
    )
    await site.manifest(ALPINE, {"manifests": [on("linux/amd64", {"digest": digest, "size": 1})]}, "index")
    row = await judge(site, "alpine:index")
    assert (row.state, [each.kind for each in row.missing]) == ("partial", ["unreadable"])
    (listed,) = (await site.operations.images(f"{ALPINE}:odd")).images
    assert not listed.complete


async def test_what_cannot_be_read_is_told_beside_the_others(site: Site) -> None:
    await site.image(ALPINE, "3", b"layer")
    bad, good = await site.operations.ready(["nowhere.example/x:1", "alpine:3"])
    assert (bad.state, bad.repository) == ("absent", "")
    assert "nowhere.example" in (bad.error or "")
    assert good.state == "complete"
    with pytest.raises(FieldInvalid, match="platforms"):
        await site.operations.ready(["alpine:3"], ["amd64"])


async def test_nothing_counts_as_use(site: Site) -> None:
    await site.image(ALPINE, "3", b"layer")
    path = site.store.files.path(Digest.of(b"layer"))
    before = path.stat()
    await judge(site)
    assert path.stat().st_mtime_ns == before.st_mtime_ns


async def test_what_was_pushed_here_is_judged_in_its_own_store(site: Site) -> None:
    private = site.composition.private
    assert private is not None
    assert site.composition.config.namespaces["local"].store == Hosting()
    own = Site(site.composition, site.everyone, site.operations)
    own.store = private
    await own.image("local/app", "1", b"layer")
    assert (await judge(site, "local/app:1")).state == "complete"
    assert (await judge(site, "local/app:2")).state == "absent"
    row = await site.operations.warm("local/app:1")
    assert (row.here, row.code) == (False, "UNSUPPORTED")
    assert "local is not a cache" in (row.error or "")
