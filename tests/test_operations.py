"""What an operator sees and does, on a real composition whose upstream nobody needs."""

from __future__ import annotations

import asyncio
import json
import math
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from proxy.admin.fill_speeds import FillSpeeds
from proxy.admin.inventory import DEEPEST
from proxy.admin.local_operations import LocalOperations
from proxy.admin.models import ImageRow, PlatformRow
from proxy.admin.purge import AllPinned
from proxy.admin.reports import Purged, Scrubbing, Why
from proxy.cli.fills import fill_tables
from proxy.namespaces.composition import Composition, compose
from proxy.namespaces.hooks import Hooks
from proxy.namespaces.references import FieldInvalid
from proxy.processes.rows import SpanRow
from proxy.processes.server_processes import ServerProcesses
from proxy.processes.state import FillState, ProcessReport, UpstreamState
from storage.disk.blobs import BlobFiles
from storage.disk.kept import show_parts
from storage.errors import ManifestUnknown, NameUnknown, Unavailable, Unsupported
from storage.maintenance.counting import Counting
from storage.maintenance.usage import Counters, Move, Use
from storage.oci import OCI_INDEX, OCI_MANIFEST, Digest, Manifest, Tag
from tests.conftest import Clock, configuration
from tests.counted import COUNTING, assert_counted
from tests.upstream import Upstream

LAYER = "application/vnd.oci.image.layer.v1.tar"
ALPINE, OTHER = "docker.io/library/alpine", "docker.io/library/other"


class Everybody(ServerProcesses):
    """Processes as a test says they are."""

    def __init__(self) -> None:
        super().__init__(None, None)
        self.found: list[ProcessReport] = []
        self.forgotten: list[str] = []

    async def states(self) -> list[ProcessReport]:
        return self.found

    async def forget(self, repository: str) -> None:
        self.forgotten.append(repository)


class Site:
    def __init__(self, composition: Composition, everyone: Everybody, operations: LocalOperations) -> None:
        self.composition = composition
        self.everyone = everyone
        self.operations = operations
        self.store = composition.store

    async def blob(self, repository: str, content: bytes) -> dict[str, Any]:
        digest = Digest.of(content)
        if not self.store.holds(digest):
            upload = self.store.files.create()
            await upload.write(content)
            await upload.commit(digest)
        await self.store.link(repository, digest)
        return describe(digest, len(content))

    async def manifest(self, repository: str, body: dict[str, Any], tag: str | None = None) -> dict[str, Any]:
        kind = OCI_INDEX if "manifests" in body else OCI_MANIFEST
        manifest = Manifest.of(kind, json.dumps({"schemaVersion": 2, **body}).encode())
        await self.store.push_manifest(repository, Tag(tag) if tag else manifest.digest, manifest)
        return describe(manifest.digest, len(manifest.content), kind)

    async def image(self, repository: str, tag: str | None, *layers: bytes) -> dict[str, Any]:
        config = await self.blob(repository, b"{}" + b"".join(layers))
        named = [await self.blob(repository, layer) for layer in layers]
        return await self.manifest(repository, {"config": config, "layers": named}, tag)

    def records(self, prefix: str = "") -> set[str]:
        found = {key for key, _ in self.store.records.scan(prefix)}
        return {key for key in found if not key.startswith(COUNTING)}

    def holds(self, content: bytes) -> bool:
        return self.store.holds(Digest.of(content))


def describe(digest: Digest, size: int, kind: str = LAYER) -> dict[str, Any]:
    return {"mediaType": kind, "digest": str(digest), "size": size}


def on(platform: str, named: dict[str, Any]) -> dict[str, Any]:
    system, architecture = platform.split("/")
    return {**named, "platform": {"os": system, "architecture": architecture}}


@pytest.fixture
def settings() -> dict[str, Any]:
    return {}


@pytest.fixture
async def site(tmp_path: Path, clock: Clock, settings: dict[str, Any]) -> AsyncIterator[Site]:
    hub = {
        "upstream": "http://127.0.0.1:9",
        "aliases": ["index.docker.io"],
        "library": True,
        "fresh_for": "10m",
        "tags": [{"match": "v*", "fresh_for": "forever"}],
        "repositories": [{"match": "library/alpine", "keep_for": "7d"}],
        **settings,
    }
    tree = {
        "disk": {"path": str(tmp_path / "disk"), "min_free": 0, "cache_limit": "1GiB"},
        "namespaces": {
            "docker.io": hub,
            "ghcr.io": {"upstream": "http://127.0.0.1:9"},
            "lan:5000": {"upstream": "http://127.0.0.1:9"},
            "local": {"store": {}},
        },
        "pins": [{"match": "docker.io/library/base:*"}],
    }
    hooks = Hooks(pause=lambda seconds: None)
    composition = compose(configuration(tmp_path, tree), clock, hooks=hooks)
    everyone = Everybody()
    operations = LocalOperations(composition, everyone)
    yield Site(composition, everyone, operations)
    await operations.close()
    assert_counted(composition.store)
    await composition.close()


# What is stored


async def test_repositories(site: Site) -> None:
    await site.image(ALPINE, "3", b"base", b"three")
    await site.image(ALPINE, "latest", b"base", b"latest")
    await site.image("ghcr.io/x/y", None, b"base")
    found = (await site.operations.repositories()).repositories
    assert [(each.repository, each.tags, each.manifests) for each in found] == [
        (ALPINE, 2, 2),
        ("ghcr.io/x/y", 0, 1),
    ]
    blobs = len(b"base") + len(b"three") + len(b"latest") + len(b"{}basethree") + len(b"{}baselatest")
    manifests = sum(
        len(value.partition(b"\n")[2]) for _, value in site.store.records.scan(f"manifest {ALPINE} ")
    )
    assert found[0].bytes == blobs + manifests
    # A link whose blob is not there any more holds nothing.
    site.store.files.path(Digest.of(b"three")).unlink()
    Counting(site.store).run(everything=True)  # as a scrub does
    assert (await site.operations.repositories(ALPINE)).repositories[0].bytes == blobs + manifests - len(
        b"three"
    )


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*", ["docker.io/library/alpine", "docker.io/library/alpine-x", "ghcr.io/alpine/y"]),
        ("docker.io/*", ["docker.io/library/alpine", "docker.io/library/alpine-x"]),
        ("alpine", ["docker.io/library/alpine"]),
        ("docker.io/library/alpine", ["docker.io/library/alpine"]),
        ("index.docker.io/alpine:3", ["docker.io/library/alpine"]),
        ("*/alpine", ["docker.io/library/alpine"]),
        ("docker.io/[l]ibrary/*e", ["docker.io/library/alpine"]),
        ("alp*", []),
    ],
)
async def test_repositories_that_match(site: Site, pattern: str, found: list[str]) -> None:
    for repository in (ALPINE, f"{ALPINE}-x", "ghcr.io/alpine/y"):
        await site.image(repository, "1", b"layer")
    assert [each.repository for each in (await site.operations.repositories(pattern)).repositories] == found


async def image_row(site: Site, pattern: str) -> ImageRow:
    (row,) = (await site.operations.images(pattern)).images
    return row


async def test_an_index_of_which_one_platform_is_here(site: Site, clock: Clock) -> None:
    amd = await site.image(ALPINE, None, b"shared", b"amd")
    arm = await site.image(ALPINE, None, b"shared", b"arm")
    far = describe(Digest.of(b"elsewhere"), 1234, OCI_MANIFEST)
    site.store.files.path(Digest.of(b"arm")).unlink()
    children = [on("linux/amd64", amd), on("linux/arm64", arm), on("linux/s390x", far)]
    index = await site.manifest(ALPINE, {"manifests": children}, "3")
    site.composition.usage.record({(ALPINE, "3"): Use(2, 20.0, 10.0)}, [], {})
    row = await image_row(site, "alpine:3")
    of_amd = amd["size"] + len(b"{}sharedamd") + len(b"shared") + len(b"amd")
    of_arm = arm["size"] + len(b"{}sharedarm") + len(b"shared")
    assert row == ImageRow(
        repository=ALPINE,
        tag="3",
        digest=index["digest"],
        media_type=OCI_INDEX,
        bytes_held=index["size"] + of_amd + of_arm - len(b"shared"),  # which counts once
        bytes_whole=index["size"] + of_amd + of_arm - len(b"shared") + len(b"arm") + 1234,
        complete=False,
        platforms=[
            PlatformRow(platform="linux/amd64", complete=True, bytes_held=of_amd, bytes_whole=of_amd),
            PlatformRow(platform="linux/arm64", complete=False, bytes_held=of_arm, bytes_whole=of_arm + 3),
            PlatformRow(platform="linux/s390x", complete=False, bytes_held=0, bytes_whole=None),
        ],
        last_used=20.0,
        uses=2,
        fresh_until=clock() + 600,
        pinned=False,
    )


async def test_what_another_repository_holds_is_not_held(site: Site) -> None:
    await site.image(OTHER, "1", b"layer")
    config, layer = describe(Digest.of(b"{}layer"), 7), describe(Digest.of(b"layer"), 5)
    await site.manifest(ALPINE, {"config": config, "layers": [layer]}, "1")
    row = await image_row(site, "alpine:1")
    assert (row.complete, row.bytes_whole) == (False, row.bytes_held + 12)
    assert (await image_row(site, "other:1")).complete


async def test_a_tag_whose_manifest_has_gone(site: Site) -> None:
    made = await site.image(ALPINE, "1", b"layer")
    site.store.records.delete(f"manifest {ALPINE} {made['digest']}")
    row = await image_row(site, "alpine:1")
    assert (row.digest, row.media_type, row.complete) == (made["digest"], None, False)
    assert (row.bytes_held, row.bytes_whole) == (0, None)


async def test_a_layer_that_clients_get_elsewhere_is_not_missing(site: Site) -> None:
    config = await site.blob(ALPINE, b"{}")
    far = describe(Digest.of(b"windows"), 99, "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip")
    await site.manifest(ALPINE, {"config": config, "layers": [far]}, "1")
    assert (await image_row(site, "alpine:1")).complete


async def test_freshness_and_pins_of_images(site: Site, clock: Clock) -> None:
    for repository in (ALPINE, "docker.io/library/base"):
        await site.image(repository, "v1", b"layer")
        await site.image(repository, "1", b"layer")
    found = (await site.operations.images("docker.io/*")).images
    assert [(each.tag, each.fresh_until, each.pinned) for each in found] == [
        ("1", clock() + 600, False),
        ("v1", None, False),
        ("1", clock() + 600, True),
        ("v1", None, True),
    ]


async def test_pages_of_images(site: Site) -> None:
    names = []
    for repository in (ALPINE, f"{ALPINE}-x", OTHER):
        for tag in ("1", "2"):
            await site.image(repository, tag, b"layer")
            names.append(f"{repository}:{tag}")
    last, seen, pages = "", [], 0
    while True:
        page = await site.operations.images("*", limit=2, last=last)
        seen += [f"{each.repository}:{each.tag}" for each in page.images]
        pages += 1
        if page.next is None:
            break
        last = page.next
    assert (seen, pages) == (names, 3)
    # `last` may have gone meanwhile, and be before or after all that match.
    after = await site.operations.images(f"{ALPINE}:*", last=f"{ALPINE}:15")
    assert [each.tag for each in after.images] == ["2"]
    assert (await site.operations.images(ALPINE, last=f"{OTHER}:1")).images == []
    assert len((await site.operations.images(OTHER, last=f"{ALPINE}:1")).images) == 2


async def test_manifests_by_digest(site: Site) -> None:
    made = await site.image(ALPINE, None, b"layer")
    row = await image_row(site, "alpine@*")
    assert (row.tag, row.digest, row.fresh_until, row.complete) == (None, made["digest"], None, True)
    page = await site.operations.images("*@*", limit=1, last=f"{ALPINE}@{made['digest']}")
    assert page.images == []


async def test_the_tree(site: Site) -> None:
    amd = await site.image(ALPINE, None, b"amd")
    index = await site.manifest(ALPINE, {"manifests": [on("linux/amd64", amd), on("linux/arm64", amd)]}, "3")
    empty = await site.blob(ALPINE, b"{}")
    signature = await site.manifest(
        ALPINE, {"config": empty, "layers": [empty], "artifactType": "a/signature", "subject": index}
    )
    old = Digest.of(b"before")
    move = Move(5.0, old, Digest(index["digest"]))
    site.composition.usage.record({(ALPINE, "3"): Use(3, 9.0, 1.0)}, [(ALPINE, Tag("3"), move)], {})
    await site.operations.pin("alpine:3")
    site.store.files.path(Digest.of(b"amd")).unlink()
    tree = await site.operations.show("alpine:3")
    assert (tree.repository, tree.reference, tree.digest) == (ALPINE, "3", index["digest"])
    assert (tree.uses.count if tree.uses else 0, [each.old for each in tree.moves]) == (3, [str(old)])
    assert tree.pins == [f"{ALPINE}:3"]
    first, second = tree.node.children
    assert (first.platform, first.present, second.platform) == ("linux/amd64", True, "linux/arm64")
    assert [(each.role, each.present) for each in first.children] == [("config", True), ("layer", False)]
    assert second.children == []  # they are told where it is named first
    (referrer,) = tree.referrers
    assert (referrer.digest, referrer.artifact_type) == (signature["digest"], "a/signature")
    by_digest = await site.operations.show(f"alpine@{index['digest']}")
    assert by_digest.node == tree.node
    with pytest.raises(ManifestUnknown, match="alpine:4 is not stored"):
        await site.operations.show("alpine:4")


@pytest.mark.clients
async def test_indexes_nested_without_end(site: Site) -> None:
    named = await site.image(ALPINE, None, b"layer")
    for _ in range(DEEPEST + 1500):
        named = await site.manifest(ALPINE, {"manifests": [named]})
    await site.store.point(ALPINE, Tag("deep"), Digest(named["digest"]))
    assert (await image_row(site, "alpine:deep")).complete
    assert (await site.operations.show("alpine:deep")).node.present
    assert (await site.operations.purge("alpine:deep")).manifests == DEEPEST + 1501
    assert site.records(f"manifest {ALPINE} ") == set()


async def test_looking_is_no_use(site: Site, clock: Clock) -> None:
    await site.image(ALPINE, "3", b"layer")
    path = site.store.files.path(Digest.of(b"layer"))
    before = path.stat().st_mtime
    clock.advance(86400)
    await site.operations.images("*")
    await site.operations.show("alpine:3")
    await site.operations.why("alpine:3")
    assert path.stat().st_mtime == before
    assert site.records("use ") == set()


# Purge


async def test_purge_of_a_tag(site: Site) -> None:
    gone = await site.image(ALPINE, "3", b"base", b"three")
    stays = await site.image(ALPINE, "latest", b"base", b"latest")
    await site.image(OTHER, "1", b"three")
    site.composition.usage.record(
        {(ALPINE, "3"): Use(1, 1.0, 1.0), (ALPINE, "latest"): Use(1, 1.0, 1.0)}, [], {}
    )
    dry = await site.operations.purge("alpine:3", dry_run=True)
    assert await site.operations.purge("alpine:3") == Purged(
        references=[f"{ALPINE}:3"],
        kept=[],
        manifests=1,
        links=2,
        blobs=1,
        bytes=len(b"{}basethree"),
        dry_run=False,
    )
    assert dry.links == 2 and dry.blobs == 1 and dry.dry_run
    assert site.records("tag ") == {f"tag {ALPINE} latest", f"tag {OTHER} 1"}
    assert f"manifest {ALPINE} {gone['digest']}" not in site.records()
    assert f"link {ALPINE} {Digest.of(b'three')}" not in site.records()
    assert site.records("use ") == {f"use {ALPINE} latest"}
    # What others see has not changed.
    assert (await image_row(site, "alpine:latest")).complete
    assert (await image_row(site, "other:1")).complete
    assert stays["digest"] == (await image_row(site, "alpine:latest")).digest
    assert site.everyone.forgotten == [ALPINE]


async def test_a_dry_run_changes_nothing(site: Site) -> None:
    await site.image(ALPINE, "3", b"layer")
    before = site.records()
    assert (await site.operations.purge("*/*", dry_run=True)).blobs == 2
    assert (site.records(), site.holds(b"layer"), site.everyone.forgotten) == (before, True, [])


async def test_purge_of_a_tag_leaves_what_another_names(site: Site) -> None:
    await site.image(ALPINE, "3", b"layer")
    await site.image(ALPINE, "latest", b"layer")
    purged = await site.operations.purge("alpine:3")
    assert (purged.references, purged.manifests, purged.blobs) == ([f"{ALPINE}:3"], 0, 0)
    assert (await image_row(site, "alpine:latest")).complete


async def test_purge_takes_what_an_index_consists_of(site: Site) -> None:
    amd, arm = await site.image(ALPINE, None, b"amd"), await site.image(ALPINE, None, b"arm")
    apart = await site.image(ALPINE, None, b"by digest")
    shared = await site.manifest(ALPINE, {"manifests": [arm]}, "arm")
    index = await site.manifest(ALPINE, {"manifests": [amd, arm]}, "3")
    empty = await site.blob(ALPINE, b"{}")
    await site.manifest(ALPINE, {"config": empty, "layers": [empty], "subject": index})
    purged = await site.operations.purge("alpine:3")
    assert (purged.references, purged.manifests) == ([f"{ALPINE}:3"], 3)
    kept = {f"manifest {ALPINE} {each['digest']}" for each in (arm, apart, shared)}
    assert site.records("manifest ") == kept
    assert site.records("referrers ") == set()
    assert (site.holds(b"amd"), site.holds(b"arm"), site.holds(b"by digest")) == (False, True, True)


async def test_purge_of_a_digest_takes_its_tags(site: Site) -> None:
    made = await site.image(ALPINE, "3", b"layer")
    await site.manifest(ALPINE, {"manifests": [made]}, "index")
    purged = await site.operations.purge(f"alpine@{made['digest']}")
    assert purged.references == [f"{ALPINE}:3", f"{ALPINE}@{made['digest']}"]
    assert site.records("tag ") == {f"tag {ALPINE} index"}
    row = await image_row(site, "alpine:index")
    assert (row.complete, row.bytes_whole) == (False, row.bytes_held + made["size"])
    assert not site.holds(b"layer")


@pytest.mark.parametrize("pattern", ["alpine", "docker.io/library/a*"])
async def test_purge_of_a_repository(site: Site, pattern: str) -> None:
    await site.image(ALPINE, "3", b"layer", b"shared")
    await site.image(ALPINE, None, b"by digest")
    await site.image(OTHER, "1", b"shared")
    await site.blob(ALPINE, b"named by nothing")
    await site.store.listings.put(ALPINE, "tags", ["3"])
    move = Move(1.0, Digest.of(b"a"), Digest.of(b"b"))
    site.composition.usage.record({(ALPINE, "gone"): Use(1, 1.0, 1.0)}, [(ALPINE, Tag("3"), move)], {})
    elsewhere = {key for key in site.records() if OTHER in key}
    purged = await site.operations.purge(pattern)
    assert len(purged.references) == 2  # the tag, and the manifest that none names
    assert (purged.manifests, purged.blobs) == (2, 5)
    assert {key for key in site.records() if not key.startswith("stats ")} == elsewhere
    assert (await image_row(site, "other:1")).complete
    assert not site.holds(b"named by nothing")
    assert (await site.operations.purge(pattern)).references == []


async def test_purge_of_tags_by_glob(site: Site) -> None:
    for repository in (ALPINE, OTHER):
        for tag in ("3.1", "3.2", "4"):
            await site.image(repository, tag, tag.encode(), repository.encode())
    purged = await site.operations.purge("docker.io/*:3.*")
    assert len(purged.references) == 4
    assert site.records("tag ") == {f"tag {ALPINE} 4", f"tag {OTHER} 4"}
    assert [each.complete for each in (await site.operations.images("*")).images] == [True, True]
    assert set(site.everyone.forgotten) == {ALPINE, OTHER}


async def test_what_is_pinned_stays_unless_it_is_named(site: Site) -> None:
    await site.image(ALPINE, "3", b"base", b"three")
    await site.image(ALPINE, "4", b"base", b"four")
    await site.operations.pin("alpine:3")
    purged = await site.operations.purge("docker.io/*")
    assert (purged.references, purged.kept) == ([f"{ALPINE}:4"], [f"{ALPINE}:3"])
    assert (await image_row(site, "alpine:3")).complete
    assert not site.holds(b"four")
    for pattern in ("alpine", "alpine:*", "docker.io/*"):
        with pytest.raises(AllPinned, match=r"alpine:3: pinned.* named? .*exactly.*force"):
            await site.operations.purge(pattern)
    assert (await image_row(site, "alpine:3")).complete
    assert (await site.operations.purge("alpine:3")).blobs == 3


async def test_what_is_pinned_by_digest_keeps_what_it_names(site: Site) -> None:
    made = await site.image(ALPINE, "3", b"layer")
    await site.operations.pin(f"alpine@{made['digest']}")
    purged = await site.operations.purge("alpine:3")
    assert (purged.references, purged.manifests, purged.blobs) == ([f"{ALPINE}:3"], 0, 0)
    assert (await image_row(site, "alpine@*")).complete
    with pytest.raises(AllPinned):
        await site.operations.purge("alpine@*")
    assert (await site.operations.purge("alpine@*", force=True)).blobs == 2


async def test_a_digest_that_a_pinned_tag_names_stays(site: Site) -> None:
    made = await site.image("docker.io/library/base", "1", b"layer")
    with pytest.raises(AllPinned):
        await site.operations.purge(f"base@{made['digest']}")
    assert (await image_row(site, "base:1")).complete
    assert (await site.operations.purge("base", force=True)).manifests == 1


async def test_purge_of_what_is_not_there(site: Site) -> None:
    purged = await site.operations.purge("nothing:1")
    assert (purged.references, purged.blobs) == ([], 0)
    # Also what was remembered of it is not to be believed any more.
    assert site.everyone.forgotten == ["docker.io/library/nothing"]


async def test_purge_of_what_has_no_name(site: Site) -> None:
    await site.blob(ALPINE, b"alone")
    purged = await site.operations.purge("alpine")
    assert (purged.references, purged.links, purged.blobs) == ([ALPINE], 1, 1)
    assert site.records() == set()


async def test_purge_of_a_repository_keeps_the_history_of_what_is_pinned(site: Site) -> None:
    for tag in ("3", "4"):
        await site.image(ALPINE, tag, tag.encode())
        site.composition.usage.record({(ALPINE, tag): Use(1, 1.0, 1.0)}, [], {})
    await site.operations.pin("alpine:3")
    await site.operations.purge("docker.io/*")
    assert site.records("use ") == {f"use {ALPINE} 3"}


async def test_purge_of_a_tag_that_points_nowhere(site: Site) -> None:
    site.store.records.put(f"tag {ALPINE} bad", b"no digest 1.0")
    assert (await site.operations.purge("alpine:bad")).references == [f"{ALPINE}:bad"]
    assert site.records() == set()


# Pins, eviction, scrub


async def test_pins(site: Site, clock: Clock) -> None:
    await site.image(ALPINE, "3", b"layer")
    (made,) = await site.operations.pin("alpine:3", 3600.0, ["linux/amd64"])
    assert (made.pattern, made.keep_fresh, made.platforms) == (f"{ALPINE}:3", 3600.0, ["linux/amd64"])
    assert (made.references, made.manifests, made.blobs, made.bytes) == (1, 1, 2, len(b"{}layerlayer"))
    configured, listed = await site.operations.pins()
    assert (configured.pattern, configured.since, configured.references) == (
        "docker.io/library/base:*",
        None,
        0,
    )
    assert (listed, listed.since) == (made, clock())
    assert (await site.operations.unpin("alpine:3")).pattern == f"{ALPINE}:3"
    assert len(await site.operations.pins()) == 1
    with pytest.raises(NameUnknown, match="alpine:3 is not pinned"):
        await site.operations.unpin("alpine:3")
    with pytest.raises(NameUnknown, match="by the configuration"):
        await site.operations.unpin("docker.io/library/base:*")


async def test_evict(site: Site, clock: Clock) -> None:
    await site.image(ALPINE, "3", b"old")
    clock.advance(60)
    await site.image(ALPINE, "4", b"new one")
    whole = site.composition.maintenance.eviction.stored()
    dry = await site.operations.evict(whole - 1, dry_run=True)
    assert (dry.blobs, dry.dry_run, site.holds(b"old")) == (1, True, True)
    assert (await site.operations.evict(0)).bytes == whole
    assert (await site.operations.evict()).blobs == 0
    with pytest.raises(FieldInvalid, match="to: must be"):
        await site.operations.evict(-1)


async def test_one_evicts_at_a_time(site: Site) -> None:
    evicting = asyncio.Lock()
    operations = LocalOperations(site.composition, site.everyone, evicting)
    await evicting.acquire()
    waiting = asyncio.ensure_future(operations.evict(0))
    await asyncio.sleep(0)
    assert not waiting.done()
    evicting.release()
    assert (await waiting).blobs == 0


@pytest.mark.parametrize("settings", [{"keep_for": "1h", "repositories": []}])
async def test_evict_what_is_too_old(site: Site, clock: Clock) -> None:
    await site.image(ALPINE, "3", b"old")
    clock.advance(7200)
    await site.image(ALPINE, "4", b"new")
    dry = await site.operations.evict(dry_run=True)
    assert (dry.tags, dry.blobs, site.holds(b"old")) == (1, 2, True)
    done = await site.operations.evict()
    assert (done.tags, done.blobs, done.short) == (1, 2, 0)
    assert (site.holds(b"old"), site.holds(b"new")) == (False, True)


async def ended(site: Site) -> Scrubbing:
    async with asyncio.timeout(30):
        while (found := await site.operations.scrubbing()).asked.running:  # noqa: ASYNC110 (as clients see it)
            await asyncio.sleep(0.01)
    return found


@pytest.mark.errors("blob.damaged")
async def test_scrub(site: Site) -> None:
    await site.image(ALPINE, "3", b"layer")
    before = await site.operations.scrubbing()
    assert (before.asked.running, before.asked.begun) == (False, 0)
    site.store.files.path(Digest.of(b"layer")).write_bytes(b"LAYER")
    assert (await site.operations.scrub()).asked.running
    assert (await site.operations.scrub()).asked.running  # the same
    found = await ended(site)
    assert (found.asked.damaged, found.asked.healed, found.error) == (1, 0, None)
    assert found.asked.checked >= 2
    assert not site.holds(b"layer")


# What goes on


async def test_stats(site: Site, clock: Clock) -> None:
    now = int(clock())
    counted = Counters(
        requests=10, hits=6, misses=2, hit_bytes=300, sent_bytes=400, received_bytes=100, upstream_requests=4
    )
    site.composition.usage.record(
        {}, [], {(now, "docker.io"): counted, (now, "ghcr.io"): Counters(requests=1)}
    )
    await site.blob(ALPINE, b"12345")
    found = await site.operations.stats("2h")
    assert (found.period, found.since, found.limit) == (7200.0, now - 7200, 1 << 30)
    hub, other = found.namespaces
    assert (hub.namespace, hub.hits, hub.hit_ratio, hub.byte_hit_ratio) == ("docker.io", 6, 0.75, 0.75)
    assert (hub.bytes_saved, hub.requests_saved) == (300, 6)
    assert (other.namespace, other.hit_ratio, other.byte_hit_ratio) == ("ghcr.io", None, None)
    assert (found.total.requests, found.total.hits) == (11, 6)
    assert found.stored_bytes == 5
    (day,) = found.days
    assert (day.requests, day.sent_bytes, day.bytes_saved, day.requests_saved) == (11, 400, 300, 7)
    with pytest.raises(FieldInvalid, match="period: expected a duration"):
        await site.operations.stats("yesterday")


def fill(bytes: int, size: int, started: float) -> FillState:
    return FillState(
        digest=str(Digest.of(b"x")),
        namespace="docker.io",
        repository=ALPINE,
        bytes=bytes,
        size=size,
        started=started,
        followers=2,
        pid=7,
        own=True,
        extents=[SpanRow(start=0, stop=bytes)],
        coming=[],
        repeated=3,
    )


async def test_fills(site: Site, clock: Clock) -> None:
    begun = clock()

    async def look(bytes: int, size: int = 1000) -> tuple[float, float | None]:
        site.everyone.found = [
            ProcessReport(pid=7, fills=[fill(bytes, size, begun)], upstreams=[], troubles=[])
        ]
        (row,) = await site.operations.fills()
        assert (row.bytes, row.size, row.followers) == (bytes, size, 2)
        assert (row.extents, row.coming, row.repeated) == ([SpanRow(start=0, stop=bytes)], [], 3)
        return row.speed, row.eta

    assert await look(0) == (0.0, None)
    clock.advance(0.5)
    assert await look(25) == (50.0, 19.5)  # since its beginning
    clock.advance(1.5)
    assert await look(200) == (100.0, 8.0)
    assert await look(210) == (100.0, 7.9)  # too soon to tell more
    clock.advance(4)
    assert await look(400) == (50.0, 12.0)
    clock.advance(4)
    assert await look(400) == (0.0, None)
    clock.advance(1)
    assert await look(500, -1) == (100.0, None)
    site.everyone.found = []
    assert await site.operations.fills() == []


async def keep_parts(site: Site, content: bytes, *spans: tuple[int, int], name: str = ALPINE) -> str:
    """Leave these parts of a blob; its digest."""
    files, digest = site.composition.store.files, Digest.of(content)
    assert isinstance(files, BlobFiles)
    upload = await files.resume(digest)
    await upload.keep(len(content), ("0123456789abcdef",))
    for start, stop in spans:
        await upload.write_at(start, content[start:stop])
    show_parts(files.root, digest, name)
    await upload.suspend(Unavailable("nobody reads"))
    return str(digest)


async def test_kept_parts_are_listed_after_the_fills(site: Site, clock: Clock) -> None:
    older = await keep_parts(site, bytes(5000), (0, 1000), (4000, 5000))
    clock.advance(60)
    newer = await keep_parts(site, b"n" * 2000, (500, 1000), name="ghcr.io/team/app")
    found = await site.operations.fills()
    assert [(each.digest, each.repository, each.bytes, each.size) for each in found] == [
        (older, ALPINE, 2000, 5000),
        (newer, "ghcr.io/team/app", 500, 2000),
    ]
    assert found[0].extents == [SpanRow(start=0, stop=1000), SpanRow(start=4000, stop=5000)]
    assert [(each.idle, each.started) for each in found] == [(True, clock() - 60), (True, clock())]
    assert all((each.namespace, each.coming) == (each.repository.partition("/")[0], []) for each in found)
    assert [each.expires for each in found] == [found[0].started + 7 * 86400, None]

    running = msgspec.structs.replace(fill(1000, 5000, clock()), digest=older)
    site.everyone.found = [ProcessReport(pid=7, fills=[running], upstreams=[], troubles=[])]
    now = await site.operations.fills()
    assert [(each.digest, each.idle) for each in now] == [(older, False), (newer, True)]

    transfers, kept = fill_tables(now, clock())
    assert (len(transfers.rows), len(kept.rows)) == (1, 1)
    assert kept.rows[0][0] == "ghcr.io/team/app"
    assert {"500 B", "25.0%", "0 s ago", "never"} <= set(kept.rows[0])
    for path in site.composition.store.files.root.glob("partial/*"):
        path.unlink()


@pytest.mark.parametrize(("expires", "told"), [(None, "never"), (0.0, "now"), (7200.0, "in 2 h")])
def test_when_kept_parts_expire(expires: float | None, told: str) -> None:
    [row] = FillSpeeds().rows([fill(10, 100, 0.0)], 0.0)
    _, table = fill_tables([msgspec.structs.replace(row, idle=True, expires=expires)], 0.0)
    assert told in table.rows[0]


# Why


def upstream(**keys: Any) -> UpstreamState:
    told: dict[str, Any] = {
        "namespace": "docker.io",
        "url": "http://127.0.0.1:9",
        "host": "127.0.0.1:9",
        "open": False,
        "until": None,
        "error": None,
        "ratelimit_limit": None,
        "ratelimit_remaining": None,
        "limited_until": None,
        "limits": [],
        "refused": [],
    }
    return UpstreamState(**{**told, **keys})


async def why(site: Site, reference: str, *states: UpstreamState) -> Why:
    site.everyone.found = [
        ProcessReport(pid=n, fills=[], upstreams=[each], troubles=[]) for n, each in enumerate(states)
    ]
    return await site.operations.why(reference)


async def test_why(site: Site, clock: Clock) -> None:
    made = await site.image(ALPINE, "3", b"layer")
    clock.advance(100)
    found = await why(site, "alpine:3", upstream(ratelimit_limit=100, ratelimit_remaining=7))
    assert (found.asked, found.namespace, found.repository, found.reference) == (
        "alpine:3",
        "docker.io",
        ALPINE,
        "3",
    )
    assert found.qualified == "the name has no registry, so this is default_namespace"
    assert (found.fresh_rule, found.fresh_for) == ("namespaces.docker.io.fresh_for", 600)
    assert (found.keep_rule, found.keep_for) == ("namespaces.docker.io.repositories[0]", 7 * 86400)
    assert (found.digest, found.stored, found.complete, found.pin) == (made["digest"], True, True, None)
    assert (found.age, found.fresh_until) == (100, clock() + 500)
    assert [each.ratelimit_remaining for each in found.upstreams] == [7]
    assert (found.verdict, found.because) == ("hit", "the tag is fresh, so upstream is not asked")


async def test_why_a_tag_that_is_due(site: Site, clock: Clock) -> None:
    await site.image(ALPINE, "3", b"layer")
    clock.advance(600)
    assert (await why(site, "alpine:3", upstream())).verdict == "revalidate"
    # One process lets it alone: then it may be served stale.
    alone = upstream(open=True, until=clock() + 5, error="connection refused")
    found = await why(site, "alpine:3", upstream(), alone)
    assert (found.verdict, found.upstreams[0].until) == ("stale", clock() + 5)
    assert "127.0.0.1:9 failed (connection refused)" in found.because
    assert (await why(site, "alpine:3", upstream(limited_until=clock() + 9))).verdict == "stale"
    # There is another one to ask.
    assert (await why(site, "alpine:3", alone, upstream(url="http://b", host="b"))).verdict == "revalidate"
    clock.advance(-1000)  # set back
    assert (await why(site, "alpine:3")).verdict == "revalidate"


async def test_why_what_is_not_cached(site: Site, clock: Clock) -> None:
    found = await why(site, "index.docker.io/other:v2")
    assert (found.verdict, found.digest, found.stored, found.complete) == ("miss", None, False, False)
    assert found.qualified == "index.docker.io is an alias of it"
    port = await why(site, "LAN_5000/app:1")
    assert port.repository == "lan:5000/app"
    assert port.qualified == "the name begins with it, with _ in place of the colon"
    assert (found.fresh_rule, found.fresh_for) == ("namespaces.docker.io.tags[0]", None)
    assert (found.keep_rule, found.keep_for) == ("disk.keep_for", None)
    alone = upstream(open=True, until=clock() + 5, error="no")
    assert (await why(site, "other", alone)).verdict == "refused"
    assert (await why(site, "ghcr.io/x/y:1", alone)).verdict == "miss"  # that is another's


async def test_why_of_a_digest(site: Site) -> None:
    made = await site.image("docker.io/library/base", "1", b"layer")
    found = await why(site, f"docker.io/library/base:1@{made['digest']}")
    assert (found.verdict, found.reference, found.fresh_rule, found.fresh_until) == (
        "hit",
        made["digest"],
        None,
        None,
    )
    assert found.qualified == "the name begins with it"
    assert (await why(site, "base:1")).pin == "docker.io/library/base:*"
    assert (await why(site, f"base@{Digest.of(b'x')}")).digest is None


@pytest.mark.parametrize("settings", [{"offline": True}])
async def test_why_offline(site: Site, clock: Clock) -> None:
    await site.image(ALPINE, "3", b"layer")
    clock.advance(1e9)
    found = await why(site, "alpine:3")
    assert (found.verdict, found.offline, found.fresh_until) == ("hit", True, None)
    assert (await why(site, "alpine:4")).verdict == "refused"


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("", "ref: "),
        ("a b", "ref: "),
        ("alpine:", "ref: '' is not a tag"),
        ("alpine@sha256:12", "ref: 'sha256:12' is not"),
        ("Alpine", "ref: "),
        ("unknown.example/x", "ref: 'unknown.example' is not a configured namespace"),
    ],
)
async def test_references_that_are_none(site: Site, reference: str, says: str) -> None:
    with pytest.raises(FieldInvalid) as raised:
        await site.operations.why(reference)
    assert (raised.value.field, str(raised.value).startswith(says)) == ("ref", True)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (("repositories", "a b"), "match"),
        (("purge", ""), "pattern"),
        (("purge", "unknown.example/x"), "pattern"),
        (("pin", "alpine:3", 0.0), "keep_fresh"),
        (("pin", "alpine:3", math.inf), "keep_fresh"),
        (("pin", "alpine:3", None, ["linux"]), "platforms"),
        (("pin", "alpine@sha256:12"), "pattern"),
        (("unpin", "a b"), "pattern"),
        (("refresh", "alpine", ["x"]), "platforms"),
    ],
)
async def test_fields_that_cannot_be_read(site: Site, call: tuple[Any, ...], field: str) -> None:
    with pytest.raises(FieldInvalid) as raised:
        await getattr(site.operations, call[0])(*call[1:])
    assert raised.value.field == field


# Refresh


async def test_refresh(tmp_path: Path, clock: Clock, upstream: Upstream) -> None:
    image = upstream.image("library/alpine", "3", [b"one", b"two"])
    tree = {
        "disk": {"path": str(tmp_path / "disk")},
        "namespaces": {"docker.io": {"upstream": upstream.url, "library": True}},
    }
    composition = compose(configuration(tmp_path, tree), clock)
    everyone = Everybody()
    operations = LocalOperations(composition, everyone)
    try:
        done = await operations.refresh("alpine:3", ["linux/amd64"])
        assert (done.repository, done.reference, done.digest, done.new) == (ALPINE, "3", image.digest, True)
        assert (done.manifests, done.blobs, done.fetched) == (1, 3, 3)
        again = await operations.refresh("alpine:3")
        assert (again.new, again.moved, again.fetched) == (False, None, 0)
        assert everyone.forgotten == [ALPINE, ALPINE]
    finally:
        await operations.close()
        await composition.close()


# What was pushed


@pytest.fixture
async def both(site: Site) -> Site:
    """Images in the cache and in the private store, by turns of their names."""
    private = site.composition.private
    assert private is not None
    await site.image("docker.io/library/alpine", "3", b"one")
    await site.image("ghcr.io/z/app", "1", b"two")
    site.store = private
    await site.image("local/a/app", "1", b"three")
    await site.image("local/a/app", "2", b"four")
    site.store = site.composition.store
    await site.image("ghcr.io/m/app", "1", b"five")
    return site


async def test_ls_has_what_was_pushed_among_what_is_cached(both: Site) -> None:
    listed = await both.operations.repositories()
    names = ["docker.io/library/alpine", "ghcr.io/m/app", "ghcr.io/z/app", "local/a/app"]
    assert [row.repository for row in listed.repositories] == names
    assert listed.repositories[-1].tags == 2
    listed = await both.operations.images("local/*")
    assert [(row.tag, row.complete, row.fresh_until) for row in listed.images] == [
        ("1", True, None),
        ("2", True, None),
    ]


async def test_stats_of_stores_are_apart_and_save_nothing(both: Site, clock: Clock) -> None:
    pulled = Counters(requests=5, hits=5, hit_bytes=500, sent_bytes=500, pushed_bytes=70)
    day = 86400
    now = int(clock())
    both.composition.usage.record(
        {},
        [],
        {(at, name): pulled for at in (now, now - day, now - 13 * day) for name in ("local", "ghcr.io")},
    )
    both.composition.usage.record({}, [], {(now - 14 * day, "ghcr.io"): pulled})
    found = await both.operations.stats("24h")
    (store,) = found.stores
    assert (store.namespace, store.requests, store.pushed_bytes) == ("local", 10, 140)
    assert (store.bytes_saved, store.requests_saved) == (0, 0)
    assert [each.namespace for each in found.namespaces] == ["ghcr.io"]
    assert (found.total.requests, found.total.bytes_saved) == (10, 1000)
    assert [(each.day, each.bytes_saved) for each in found.days] == [
        (time.strftime("%Y-%m-%d", time.gmtime(now - ago * day)), 500) for ago in (13, 1, 0)
    ]


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 6])
async def test_ls_of_both_page_by_page(both: Site, limit: int) -> None:
    whole = await both.operations.images()
    assert whole.next is None and len(whole.images) == 5
    found, last = [], ""
    while True:
        page = await both.operations.images(limit=limit, last=last)
        assert len(page.images) <= limit
        found += page.images
        if page.next is None:
            break
        last = page.next
    assert found == whole.images


async def test_show_and_why_of_what_was_pushed(both: Site) -> None:
    tree = await both.operations.show("local/a/app:1")
    assert [child.present for child in tree.node.children] == [True, True]
    why = await both.operations.why("local/a/app:1")
    assert (why.verdict, why.stored, why.complete) == ("hit", True, True)
    assert (why.fresh_rule, why.keep_rule, why.keep_for) == (None, "namespaces.local.store", None)
    why = await both.operations.why("local/a/app:9")
    assert (why.verdict, why.digest) == ("refused", None)
    with pytest.raises(Unsupported):
        await both.operations.refresh("local/a/app:1")
    with pytest.raises(Unsupported, match=r"local is a private registry.*: entrepot delete local/\*"):
        await both.operations.purge("local/*")
    assert not [each for each in (await both.operations.purge("*")).references if each.startswith("local/")]
    assert (await both.operations.show("local/a/app:1")).node.present


async def test_what_is_evicted_next(site: Site, clock: Clock) -> None:
    for content in (b"first", b"second!", b"third!!!!"):
        clock.now += 10
        digest = Digest((await site.blob(ALPINE, content))["digest"])
        path = site.store.files.path(digest)
        assert path is not None
        os.utime(path, (clock.now, clock.now))
        Counting(site.store).run(everything=True)
    found = await site.operations.evictable(2)
    assert (found.stored, found.limit, found.over, found.more) == (21, 1 << 30, 0, True)
    assert [(each.digest, each.bytes, each.left, each.repositories) for each in found.rows] == [
        (Digest.of(b"first"), 5, 16, [ALPINE]),
        (Digest.of(b"second!"), 7, 9, [ALPINE]),
    ]
    assert found.rows[0].expires == found.rows[0].last_used + 7 * 86400
    assert not (await site.operations.evictable(3)).more
    gone = await site.operations.evict(found.rows[0].left)
    assert (gone.blobs, gone.bytes) == (1, 5)
    assert [each.digest for each in (await site.operations.evictable(3)).rows] == [
        Digest.of(b"second!"),
        Digest.of(b"third!!!!"),
    ]
