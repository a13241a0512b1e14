"""Bundles from one directory to another: what goes out, and that it comes in as it was."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import subprocess
import tarfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from proxy.cache.refresh import refresh
from proxy.namespaces.composition import Composition, compose
from proxy.namespaces.references import FieldInvalid
from proxy.transfer import bundle_export
from proxy.transfer.bundle_export import BundleExport, Selection, earlier
from proxy.transfer.bundle_import import BundleImport, ImportOptions
from proxy.transfer.results import BundleImported, Exported
from storage.archives import importer
from storage.archives.exporter import named
from storage.errors import (
    ArchiveInvalid,
    BlobUnknown,
    Denied,
    Incomplete,
    ManifestUnknown,
    NameUnknown,
    StorageFailed,
)
from storage.keys import MANIFEST
from storage.maintenance.pins import Pin
from storage.maintenance.usage import Use
from storage.oci import ARTIFACTS, Digest, Manifest, Tag
from storage.store import Store
from tests.conftest import Clock, configuration
from tests.upstream import Image, Upstream
from tests.upstream import Manifest as Made

NAME = "docker.io/library/alpine"
HOOK = {"name": "hook", "url": "http://127.0.0.1:9/", "actions": ["move"]}


class Place:
    """A directory, and what stands on it."""

    def __init__(self, composition: Composition) -> None:
        self.parts = composition
        self.exports = BundleExport(composition)
        self.imports = BundleImport(composition)

    async def fetch(self, name: str, reference: str, *platforms: str, referrers: bool = True) -> None:
        parsed = Digest(reference) if ":" in reference else Tag(reference)
        await refresh(self.parts.namespaces, name, parsed, platforms, referrers)

    async def export(self, path: Path, *names: str, key: Path | None = None, **how: Any) -> Exported:
        since = [earlier(each) for each in how.pop("since", ())]
        selection = Selection(names=names, since=since, **how)
        return await self.exports.export(selection, str(path), lambda _: named(path), key)

    async def take(self, path: Path, **how: Any) -> BundleImported:
        return await self.imports.import_(path, ImportOptions(**how))

    async def manifest(self, name: str, reference: str) -> Manifest:
        parsed = Digest(reference) if ":" in reference else Tag(reference)
        return await self.parts.namespaces.get_manifest(name, parsed)

    async def blob(self, name: str, digest: str) -> bytes:
        found = await self.parts.namespaces.get_blob(name, Digest(digest))
        try:
            return b"".join([chunk async for chunk in found.chunks()])
        finally:
            await found.close()

    async def image(self, name: str, image: Image) -> None:
        """All of it is served, to the byte."""
        manifest = await self.manifest(name, image.digest)
        assert (manifest.content, manifest.media_type) == (image.content, image.media_type)
        for digest in (image.config, *image.layers):
            assert f"sha256:{hashlib.sha256(await self.blob(name, digest)).hexdigest()}" == digest

    def records(self) -> dict[str, bytes]:
        """All that anybody could see."""
        kinds = ("tag ", "manifest ", "link ", "referrers ", "pin ")
        stores = [each for each in (self.parts.store, self.parts.private) if each]
        return {key: value for store in stores for kind in kinds for key, value in store.records.scan(kind)}


Opened = Callable[..., Any]


@pytest.fixture
def at(tmp_path: Path, upstream: Upstream, clock: Clock) -> Opened:
    """`async with at("home") as place`; keys go to the namespace docker.io, `top` to the configuration."""

    @asynccontextmanager
    async def opened(
        name: str, *, offline: bool = False, top: dict[str, Any] | None = None, **keys: Any
    ) -> AsyncIterator[Place]:
        url = "http://127.0.0.1:9" if offline else upstream.url
        tree = {
            "disk": {"path": str(tmp_path / name)},
            "offline": offline,
            "namespaces": {
                "docker.io": {"upstream": {"url": url}, **keys},
                "ghcr.io": {"upstream": {"url": url}},
                "local": {"store": {"immutable_tags": ["v*"]}},
            },
            **(top or {}),
        }
        composition = compose(configuration(tmp_path, tree), clock)
        try:
            yield Place(composition)
        finally:
            await composition.close()

    return opened


@dataclass
class Stock:
    """What lies upstream, in library/alpine: `index`, tag 3, of `amd` and `arm`; `plain`, tag plain."""

    upstream: Upstream
    amd: Image
    arm: Image
    index: Made
    plain: Image
    signatures: list[Made] = field(default_factory=list)


@pytest.fixture
def stock(upstream: Upstream) -> Stock:
    amd = upstream.image("library/alpine", None, [b"amd" * 1000, b"common" * 1000], platform="linux/amd64")
    arm = upstream.image("library/alpine", None, [b"arm" * 1000, b"common" * 1000], platform="linux/arm64")
    index = upstream.index("library/alpine", "3", [amd, arm])
    plain = upstream.image("library/alpine", "plain", [b"plain" * 1000, b"common" * 1000])
    return Stock(upstream, amd, arm, index, plain)


@pytest.fixture(params=["bundle.tar", "bundle"])
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / str(request.param)


def told(path: Path) -> Any:
    """What a bundle says of itself."""
    if path.is_dir():
        return json.loads((path / "entrepot.json").read_bytes())
    with tarfile.open(path) as archive:
        found = archive.extractfile("entrepot.json")
        assert found is not None
        return json.loads(found.read())


def held(path: Path) -> set[str]:
    """The digests of what lies in a bundle; each is what it says."""
    if path.is_dir():
        found = {str(each.relative_to(path)): each.read_bytes() for each in path.rglob("blobs/*/*")}
    else:
        with tarfile.open(path) as archive:
            found = {
                each.name: (archive.extractfile(each) or io.BytesIO()).read()
                for each in archive
                if each.name.startswith("blobs/")
            }
    for name, content in found.items():
        assert hashlib.sha256(content).hexdigest() == name.split("/")[2]
    return {f"sha256:{name.split('/')[2]}" for name in found}


# There and back


async def test_what_goes_out_comes_in(at: Opened, stock: Stock, bundle: Path) -> None:
    async with at("home") as home:
        await home.fetch(NAME, "3")
        await home.fetch(NAME, "plain")
        done = await home.export(bundle, "alpine:3", "docker.io/library/alpine:plain")
    assert [each.reference for each in done.references] == [f"{NAME}:3", f"{NAME}:plain"]
    assert all(each.complete for each in done.references)
    assert stock.upstream.requests
    stock.upstream.clear()
    async with at("site", offline=True) as site:
        landed = await site.take(bundle)
        assert [(each.repository, each.tag, each.before) for each in landed.references] == [
            (NAME, "3", None),
            (NAME, "plain", None),
        ]
        assert (landed.manifests, landed.blobs, landed.bytes) == (4, 7, done.bytes - manifests_of(stock))
        assert (await site.manifest(NAME, "3")).content == stock.index.content
        for image in (stock.amd, stock.arm, stock.plain):
            await site.image(NAME, image)
        assert await site.parts.namespaces.tags(NAME) == ["3", "plain"]
        again = await site.take(bundle)
        assert (again.blobs, again.bytes) == (0, 0)
        assert [each.before for each in again.references] == [stock.index.digest, stock.plain.digest]
    assert stock.upstream.requests == []


def manifests_of(stock: Stock) -> int:
    return sum(len(each.content) for each in (stock.amd, stock.arm, stock.index, stock.plain))


async def test_what_a_bundle_says_of_itself(at: Opened, stock: Stock, clock: Clock, bundle: Path) -> None:
    async with at("home") as home:
        await home.fetch(NAME, "3")
        validated = clock.now
        clock.advance(1000)
        done = await home.export(bundle, "alpine:3")
    found = told(bundle)
    [reference] = found["references"]
    assert (found["bundle"], found["created"], found["base"]) == (1, clock.now, [])
    assert reference == {
        "repository": NAME,
        "tag": "3",
        "digest": stock.index.digest,
        "media_type": stock.index.media_type,
        "size": len(stock.index.content),
        "validated": validated,
        "platforms": ["linux/amd64", "linux/arm64"],
        "complete": True,
        "left_out": [],
    }
    assert set(found["blobs"]["docker.io"]) == held(bundle)
    assert done.digest.startswith("sha256:")


async def test_the_same_makes_the_same(at: Opened, stock: Stock, tmp_path: Path) -> None:
    async with at("home") as home:
        await home.fetch(NAME, "3")
        for name in ("one.tar", "two.tar"):
            await home.export(tmp_path / name, "alpine:3")
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()


async def test_of_an_index_only_what_is_wanted(at: Opened, stock: Stock, bundle: Path) -> None:
    async with at("home") as home:
        await home.fetch(NAME, "3")
        await home.export(bundle, "alpine:3", platforms=["linux/arm64"])
    [reference] = told(bundle)["references"]
    assert (reference["platforms"], reference["complete"]) == (["linux/arm64"], False)
    assert reference["left_out"] == [stock.amd.digest]
    wanted = {stock.index.digest, stock.arm.digest, stock.arm.config, *stock.arm.layers}
    assert held(bundle) == wanted
    async with at("site", offline=True) as site:
        await site.take(bundle)
        assert (await site.manifest(NAME, "3")).content == stock.index.content
        await site.image(NAME, stock.arm)
        with pytest.raises(ManifestUnknown, match=r"is not cached, and docker\.io is set offline"):
            await site.manifest(NAME, stock.amd.digest)


async def test_of_several_platforms_those_that_there_are(at: Opened, stock: Stock, bundle: Path) -> None:
    platforms = ["linux/amd64", "linux/s390x"]
    async with at("home") as home:
        await home.fetch(NAME, "3", *platforms)
        (reference,) = (await home.export(bundle, "alpine:3", platforms=platforms)).references
    assert (reference.platforms, reference.lacking) == (["linux/amd64"], ["linux/s390x"])
    async with at("site", offline=True) as site:
        done = await site.take(bundle, platforms=platforms)
        assert f"{stock.index.digest} has no image for linux/s390x" in done.notes
        await site.image(NAME, stock.amd)


async def test_of_an_index_only_what_is_here(at: Opened, stock: Stock, bundle: Path) -> None:
    async with at("home") as home:
        await home.fetch(NAME, "3", "linux/amd64")
        done = await home.export(bundle, "alpine:3")
    assert done.references[0].platforms == ["linux/amd64"]
    assert done.references[0].left_out == [stock.arm.digest]
    assert stock.arm.digest not in held(bundle)


async def test_what_is_not_whole_does_not_go(at: Opened, stock: Stock, bundle: Path) -> None:
    async with at("home") as home:
        await home.fetch(NAME, "3", "linux/amd64")
        await home.fetch(NAME, "plain")
        home.parts.store.files.path(Digest(stock.plain.layers[0])).unlink()
        for names, platforms, lacking in (
            (["alpine:3"], ["linux/arm64"], stock.arm.digest),
            (["alpine:3"], ["linux/s390x"], stock.amd.digest),
            (["alpine:3", "alpine:plain"], [], stock.plain.layers[0]),
        ):
            with pytest.raises(Incomplete) as raised:
                await home.export(bundle, *names, platforms=platforms)
            assert lacking in str(raised.value)
            assert "--skip-incomplete" in str(raised.value)
        done = await home.export(bundle, "docker.io/*", skip_incomplete=True)
    assert [each.reference for each in done.references] == [f"{NAME}:3"]
    assert [(each.reference, each.lacking) for each in done.skipped] == [
        (f"{NAME}:plain", [stock.plain.layers[0]])
    ]


INDEX, IMAGE = "application/vnd.oci.image.index.v1+json", "application/vnd.oci.image.manifest.v1+json"


@pytest.mark.parametrize(
    ("child", "whole"),
    [({}, True), ({"size": 1}, False), ({"mediaType": INDEX}, False)],
)
async def test_a_child_is_what_its_index_says_or_does_not_go(
    at: Opened, bundle: Path, child: dict[str, Any], whole: bool
) -> None:
    """Whoever imports it would refuse it."""
    async with at("home") as home:
        digest = await pushed(home, "app", "right", b"layer")
        size = len((await home.manifest("local/app", "right")).content)
        manifests = [{"mediaType": IMAGE, "digest": digest, "size": size} | child]
        await pushed_manifest(home, "app", "index", INDEX, {"manifests": manifests})
        done = await home.export(bundle, "local/app:*", skip_incomplete=True)
    assert [each.reference for each in done.references] == ["local/app:index"] * whole + ["local/app:right"]
    assert [(each.reference, each.lacking) for each in done.skipped] == [("local/app:index", [digest])] * (
        not whole
    )
    async with at("site", offline=True) as site:
        await site.take(bundle)


@pytest.mark.parametrize("size", [4, 6])
async def test_a_layer_has_the_size_that_is_listed_or_does_not_go(
    at: Opened, bundle: Path, size: int
) -> None:
    """The export goes on with the others: nothing is damaged."""
    async with at("home") as home:
        await pushed(home, "app", "right", b"layer")
        layer = {"mediaType": "application/x", "digest": str(Digest.of(b"layer")), "size": size}
        await pushed_manifest(home, "app", "wrong", IMAGE, {"config": layer, "layers": [layer]})
        done = await home.export(bundle, "local/app:*", skip_incomplete=True)
    assert [each.reference for each in done.references] == ["local/app:right"]
    assert [each.lacking for each in done.skipped] == [[str(Digest.of(b"layer"))]]


async def test_the_type_of_an_image_is_what_it_says_itself(at: Opened, stock: Stock, bundle: Path) -> None:
    """An upstream may have stated another one; an import would refuse that."""
    async with at("home") as home:
        await home.fetch(NAME, "plain")
        found = await home.manifest(NAME, "plain")
        mistyped = Manifest(INDEX, found.content, found.digest)
        home.parts.store.records.transaction(
            lambda batch: home.parts.store.put_manifest(batch, NAME, mistyped)
        )
        await home.export(bundle, "alpine:plain")
    async with at("site", offline=True) as site:
        await site.take(bundle)
        await site.image(NAME, stock.plain)


@pytest.mark.parametrize(
    ("platform", "wanted", "fits"),
    [
        ("linux/amd64", "linux/amd64", True),
        ("linux/amd64", "linux/amd64/v1", True),
        ("linux/arm/v7", "linux/arm", True),
        ("linux/amd64", "linux/arm64", False),
        ("linux/arm/v6", "linux/arm/v7", False),
        ("windows/amd64", "linux/amd64", False),
    ],
)
async def test_the_platform_of_an_image_is_that_of_its_config(
    at: Opened, upstream: Upstream, bundle: Path, platform: str, wanted: str, fits: bool
) -> None:
    image = upstream.image("library/alpine", "single", [b"single"], platform=platform)
    child = upstream.image("library/alpine", None, [b"child"], platform=wanted)
    upstream.index("library/alpine", "3", [child])
    async with at("home") as home:
        await home.fetch(NAME, "single")
        await home.fetch(NAME, "3")
        if fits:
            done = await home.export(bundle, "alpine:single", platforms=[wanted])
        else:
            with pytest.raises(FieldInvalid, match=f"{NAME}:single is an image for {platform}"):
                await home.export(bundle, "alpine:single", platforms=[wanted])
            names = ["alpine:single", "alpine:3"]
            done = await home.export(bundle, *names, platforms=[wanted], skip_incomplete=True)
            assert [(each.reference, each.platform) for each in done.skipped] == [
                (f"{NAME}:single", platform)
            ]
    assert (image.digest in held(bundle)) == fits


async def test_an_artifact_is_for_any_platform(at: Opened, stock: Stock, bundle: Path) -> None:
    sbom = stock.upstream.artifact("library/alpine", subject=stock.plain, artifact_type="application/x.sbom")
    async with at("home") as home:
        await home.fetch(NAME, sbom.digest)
        done = await home.export(bundle, f"alpine@{sbom.digest}", platforms=["linux/arm64"])
    assert (len(done.references), done.skipped) == (1, [])


@pytest.mark.parametrize("lost", ["manifest", "blob of a tag", "both"])
async def test_referrers_that_are_left_out_are_named(
    at: Opened, stock: Stock, bundle: Path, upstream: Upstream, lost: str
) -> None:
    sbom = upstream.artifact("library/alpine", subject=stock.plain, artifact_type="application/x.sbom")
    tag = f"{stock.plain.digest.replace(':', '-')}.sig"
    signature = upstream.image("library/alpine", tag, [b"a signature"])
    expected = {}
    async with at("home") as home:
        await home.fetch(NAME, "plain")
        if lost != "blob of a tag":
            home.parts.store.records.delete(MANIFEST.key(NAME, Digest(sbom.digest)))
            expected[f"{NAME}@{sbom.digest}"] = [sbom.digest]
        if lost != "manifest":
            home.parts.store.files.path(Digest(signature.layers[0])).unlink()
            expected[f"{NAME}:{tag}"] = [signature.layers[0]]
        done = await home.export(bundle, "alpine:plain")
    assert {each.reference: each.lacking for each in done.skipped} == expected
    assert done.referrers == (lost == "blob of a tag")
    assert len(done.references) == 1 + (lost == "manifest")


@pytest.mark.parametrize("media_type", ARTIFACTS)
async def test_artifacts_go_with_their_blobs(
    at: Opened, upstream: Upstream, bundle: Path, media_type: str
) -> None:
    blob = upstream.blob("library/notes", b"an sbom")
    listed = [{"mediaType": "application/json", "digest": blob, "size": 7}]
    upstream.manifest("library/notes", {"mediaType": media_type, "blobs": listed}, tag="1")
    async with at("home") as home:
        found = (await home.manifest("docker.io/library/notes", "1")).digest
        with pytest.raises(Incomplete, match=blob):
            await home.export(bundle, "notes:1")
        await home.fetch("docker.io/library/notes", "1")
        await home.export(bundle, "notes:1")
    assert blob in held(bundle)
    async with at("site", offline=True) as site:
        await site.take(bundle)
        assert (await site.manifest("docker.io/library/notes", "1")).digest == found
        assert await site.blob("docker.io/library/notes", blob) == b"an sbom"


@pytest.mark.parametrize("key", ["things", "Layers"])
async def test_what_names_content_that_cannot_be_read_stays(
    at: Opened, upstream: Upstream, bundle: Path, key: str
) -> None:
    listed = [{"mediaType": "a/b", "digest": upstream.blob("library/odd", b"layer"), "size": 5}]
    digest = upstream.manifest("library/odd", {"mediaType": "application/vnd.odd+json", key: listed}, tag="1")
    async with at("home") as home:
        await home.manifest("docker.io/library/odd", "1")
        with pytest.raises(Incomplete, match=digest):
            await home.export(bundle, "odd:1")


async def test_attestations_go_with_what_they_are_about(at: Opened, upstream: Upstream, bundle: Path) -> None:
    # BuildKit: an index has a further child for each platform, unknown/unknown, that says whose it is.
    amd = upstream.image("library/alpine", None, [b"amd"], platform="linux/amd64")
    arm = upstream.image("library/alpine", None, [b"arm"], platform="linux/arm64")
    children = []
    for image in (amd, arm):
        children.append(image.descriptor)
        said = upstream.image("library/alpine", None, [b"said of " + image.digest.encode()])
        about = {
            "vnd.docker.reference.digest": image.digest,
            "vnd.docker.reference.type": "attestation-manifest",
        }
        platform = {"os": "unknown", "architecture": "unknown"}
        children.append({**said.descriptor, "platform": platform, "annotations": about})
    media_type = "application/vnd.oci.image.index.v1+json"
    document = {"schemaVersion": 2, "mediaType": media_type, "manifests": children}
    upstream.manifest("library/alpine", document, tag="built")
    async with at("home") as home:
        await home.fetch(NAME, "built")
        await home.export(bundle, "alpine:built", platforms=["linux/amd64"])
    found = held(bundle)
    assert [each["digest"] in found for each in children] == [True, True, False, False]
    assert told(bundle)["references"][0]["platforms"] == ["linux/amd64"]


# Referrers


async def test_signatures_go_along(at: Opened, stock: Stock, bundle: Path) -> None:
    upstream = stock.upstream
    signature = upstream.artifact("library/alpine", subject=stock.amd, artifact_type="application/x.sig")
    deeper = upstream.artifact("library/alpine", subject=signature, artifact_type="application/x.note")
    async with at("home") as home:
        await home.fetch(NAME, "3")
        done = await home.export(bundle, "alpine:3")
        assert done.referrers == 2
    assert {signature.digest, deeper.digest} <= held(bundle)
    async with at("site", offline=True) as site:
        await site.take(bundle)
        [found] = await site.parts.namespaces.referrers(NAME, Digest(stock.amd.digest))
        assert (found.digest, found.artifact_type) == (signature.digest, "application/x.sig")
        [found] = await site.parts.namespaces.referrers(NAME, Digest(signature.digest))
        assert found.digest == deeper.digest
        assert (await site.manifest(NAME, signature.digest)).content == signature.content


async def test_signatures_stay_if_that_is_wanted(at: Opened, stock: Stock, bundle: Path) -> None:
    signature = stock.upstream.artifact("library/alpine", subject=stock.plain, artifact_type="application/x")
    async with at("home") as home:
        await home.fetch(NAME, "plain")
        done = await home.export(bundle, "alpine:plain", referrers=False)
    assert done.referrers == 0
    assert signature.digest not in held(bundle)


async def test_fallback_tags_go_along(at: Opened, stock: Stock, bundle: Path) -> None:
    encoded = stock.plain.digest.removeprefix("sha256:")
    cosign = stock.upstream.image("library/alpine", f"sha256-{encoded}.sig", [b"signature"])
    stock.upstream.image("library/alpine", "sha256-" + 64 * "0", [b"of something else"])
    async with at("home") as home:
        for tag in ("plain", f"sha256-{encoded}.sig", "sha256-" + 64 * "0"):
            await home.fetch(NAME, tag)
        await home.export(bundle, "alpine:plain")
    assert [each["tag"] for each in told(bundle)["references"]] == ["plain", f"sha256-{encoded}.sig"]
    async with at("site", offline=True) as site:
        await site.take(bundle)
        assert (await site.manifest(NAME, f"sha256-{encoded}.sig")).content == cosign.content


# What is chosen


async def test_chosen_by_glob_and_digest(at: Opened, stock: Stock, upstream: Upstream, bundle: Path) -> None:
    other = upstream.image("team/app", "1", [b"app"])
    async with at("home") as home:
        await home.fetch(NAME, "3")
        await home.fetch("ghcr.io/team/app", "1")
        done = await home.export(bundle, "ghcr.io/*", f"alpine@{stock.amd.digest}")
    assert [each.reference for each in done.references] == [
        f"{NAME}@{stock.amd.digest}",
        "ghcr.io/team/app:1",
    ]
    async with at("site", offline=True) as site:
        landed = await site.take(bundle)
        assert [(each.repository, each.tag) for each in landed.references] == [
            (NAME, None),
            ("ghcr.io/team/app", "1"),
        ]
        await site.image(NAME, stock.amd)
        await site.image("ghcr.io/team/app", other)


async def test_what_is_deleted_while_a_glob_is_looked_up_is_left_out(
    at: Opened, stock: Stock, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matching = bundle_export.matching

    def deleted_after(store: Store, pin: Pin) -> Any:
        found = list(matching(store, pin))
        if found:
            store._delete(NAME, Tag("plain"), None)
            store._delete(NAME, Digest(stock.plain.digest), None)
        return found

    async with at("home") as home:
        for tag in ("3", "plain"):
            await home.fetch(NAME, tag)
        monkeypatch.setattr(bundle_export, "matching", deleted_after)
        done = await home.export(bundle, "docker.io/*", "docker.io/library/alpine@sha256:*")
        assert f"{NAME}:3" in (names := {each.reference for each in done.references})
        assert not names & {f"{NAME}:plain", f"{NAME}@{stock.plain.digest}"}
        with pytest.raises(ManifestUnknown):
            await home.export(bundle.with_name("other"), "docker.io/*", "alpine:plain")


async def test_chosen_by_use(
    at: Opened, stock: Stock, clock: Clock, upstream: Upstream, bundle: Path
) -> None:
    upstream.image("library/old", "1", [b"old"])
    by_digest = upstream.image("library/alpine", None, [b"by digest"])
    async with at("home") as home:
        for tag in ("3", "plain"):
            await home.fetch(NAME, tag)
        await home.fetch("docker.io/library/old", "1")
        await home.fetch(NAME, by_digest.digest)
        now = clock.now
        # Whoever pulls a tag asks for manifests by digest too, and uses what they name.
        uses = {
            (NAME, "3"): Use(1, now - 86400, now),
            (NAME, stock.index.digest): Use(1, now - 86400, now),
            (NAME, stock.amd.digest): Use(1, now - 86400, now),
            (NAME, stock.plain.digest): Use(0, now - 86400, now),
            (NAME, by_digest.digest): Use(1, now - 86400, now),
            ("docker.io/library/old", "1"): Use(5, now - 40 * 86400, now),
        }
        home.parts.usage.record(uses, [], {})
        done = await home.export(bundle, used_within="30d")
        assert [each.reference for each in done.references] == [f"{NAME}:3", f"{NAME}@{by_digest.digest}"]
        done = await home.export(bundle.with_name("b.tar"), "docker.io/library/*:*", used_within="30d")
        assert [each.reference for each in done.references] == [f"{NAME}:3"]
        with pytest.raises(NameUnknown, match="no image that was asked for is stored completely"):
            await home.export(bundle.with_name("c.tar"), "docker.io/library/old:1", used_within="30d")


async def test_nothing_is_chosen(at: Opened, stock: Stock, bundle: Path) -> None:
    async with at("home") as home:
        await home.fetch(NAME, "3")
        with pytest.raises(FieldInvalid, match="name what to export"):
            await home.export(bundle)
        with pytest.raises(NameUnknown, match="nothing that is stored matches ghcr"):
            await home.export(bundle, "ghcr.io/*")
        with pytest.raises(ManifestUnknown, match="alpine:4 is not stored"):
            await home.export(bundle, "alpine:4")
        with pytest.raises(FieldInvalid, match="not a configured namespace"):
            await home.export(bundle, "quay.io/team/app:1")
    assert not bundle.exists()


# Deltas


async def test_a_delta_has_only_what_is_new(at: Opened, stock: Stock, tmp_path: Path, bundle: Path) -> None:
    delta = tmp_path / "delta.tar"
    async with at("home") as home:
        await home.fetch(NAME, "plain")
        first = await home.export(bundle, "alpine:plain")
        newer = stock.upstream.image("library/alpine", "plain", [b"newer", b"common" * 1000])
        await home.fetch(NAME, "plain")
        done = await home.export(delta, "alpine:plain", since=[bundle])
        assert done.spared == 1
        assert [each["digest"] for each in told(delta)["base"]] == [first.digest]
        assert held(delta) == {newer.digest, newer.config, newer.layers[0]}
        assert told(delta)["elsewhere"] == {"docker.io": [newer.layers[1]]}
    async with at("site", offline=True) as site:
        with pytest.raises(
            ArchiveInvalid, match=r"is based on the bundle of .* import that one first"
        ) as raised:
            await site.take(delta)
        assert newer.layers[1] in str(raised.value)
        assert site.records() == {}
        await site.take(bundle)
        landed = await site.take(delta)
        assert landed.references[0].before == stock.plain.digest
        await site.image(NAME, newer)
        assert (await site.manifest(NAME, "plain")).content == newer.content


async def test_a_delta_of_a_delta(at: Opened, stock: Stock, tmp_path: Path) -> None:
    first, second, third = (tmp_path / f"{each}.tar" for each in (1, 2, 3))
    async with at("home") as home:
        await home.fetch(NAME, "plain")
        await home.export(first, "alpine:plain")
        one = stock.upstream.image("library/alpine", "plain", [b"one", b"common" * 1000])
        await home.fetch(NAME, "plain")
        await home.export(second, "alpine:plain", since=[first])
        two = stock.upstream.image("library/alpine", "plain", [b"one", b"common" * 1000, b"two"])
        await home.fetch(NAME, "plain")
        # What carries the earlier ones may have gone: to know what they had, their entrepot.json is enough.
        contents = tmp_path / "second.json"
        contents.write_text(json.dumps(told(second)))
        await home.export(third, "alpine:plain", since=[contents])
        assert held(third) == {two.digest, two.config, two.layers[2]}
    async with at("site", offline=True) as site:
        for path in (first, second, third):
            await site.take(path)
        await site.image(NAME, two)
        await site.image(NAME, one)


async def test_a_delta_knows_namespaces_apart(at: Opened, upstream: Upstream, tmp_path: Path) -> None:
    """To know a digest is no permission: what another namespace shows is none to be spared."""
    upstream.image("team/one", "1", [b"shared"])
    two = upstream.image("team/two", "1", [b"shared", b"more"])
    first, second = tmp_path / "1.tar", tmp_path / "2.tar"
    async with at("home") as home:
        await home.fetch("docker.io/team/one", "1")
        await home.fetch("ghcr.io/team/two", "1")
        await home.export(first, "docker.io/team/one:1")
        await home.export(second, "ghcr.io/team/two:1", since=[first])
        assert two.layers[0] in held(second)


async def test_what_is_since_must_be_a_bundle(at: Opened, stock: Stock, tmp_path: Path) -> None:
    (tmp_path / "some.json").write_text("{}")
    async with at("home") as home:
        await home.fetch(NAME, "3")
        for name, says in (("none.tar", "No such file"), ("some.json", "entrepot.json cannot be read")):
            with pytest.raises(ArchiveInvalid, match=says):
                await home.export(tmp_path / "b.tar", "alpine:3", since=[tmp_path / name])


# Out, and something is wrong


async def test_what_is_damaged_is_not_exported(at: Opened, stock: Stock, bundle: Path) -> None:
    async with at("home") as home:
        await home.fetch(NAME, "plain")
        path = home.parts.store.files.path(Digest(stock.plain.layers[0]))
        good = path.read_bytes()
        for content in (good[:-1] + b"x", good[:-1], good + b"x", b""):
            path.write_bytes(content)
            with pytest.raises(BlobUnknown, match=f"{stock.plain.layers[0]} is damaged in {path}"):
                await home.export(bundle, "alpine:plain")
            assert list(bundle.parent.glob(".bundle*")) == []
            assert not bundle.exists()
        path.write_bytes(good)
        await home.export(bundle, "alpine:plain")


async def test_what_is_there_is_not_replaced(at: Opened, stock: Stock, bundle: Path) -> None:
    bundle.write_bytes(b"precious")
    async with at("home") as home:
        await home.fetch(NAME, "plain")
        with pytest.raises(StorageFailed, match=f"{bundle}: File exists"):
            await home.export(bundle, "alpine:plain")
    assert bundle.read_bytes() == b"precious"


async def test_no_room_for_a_bundle(at: Opened, stock: Stock, tmp_path: Path) -> None:
    async with at("home") as home:
        await home.fetch(NAME, "plain")
        with pytest.raises(StorageFailed, match="No such file or directory"):
            await home.export(tmp_path / "none" / "bundle.tar", "alpine:plain")


# In


async def test_tags_count_as_validated_when_they_were(
    at: Opened, stock: Stock, clock: Clock, bundle: Path
) -> None:
    async with at("home") as home:
        await home.fetch(NAME, "plain")
        await home.export(bundle, "alpine:plain")
    clock.advance(3600)
    async with at("site", fresh_for="10m") as site:
        await site.take(bundle)
        stock.upstream.clear()
        await site.manifest(NAME, "plain")
        assert [str(each).split()[0] for each in stock.upstream.requests] == ["HEAD"]  # it was due


async def test_tags_move_back_if_an_older_bundle_comes(
    at: Opened, stock: Stock, clock: Clock, tmp_path: Path
) -> None:
    older, newer = tmp_path / "older.tar", tmp_path / "newer.tar"
    async with at("home") as home:
        await home.fetch(NAME, "plain")
        await home.export(older, "alpine:plain")
        stock.upstream.image("library/alpine", "plain", [b"newer"])
        await home.fetch(NAME, "plain")
        await home.export(newer, "alpine:plain")
    async with at("site", offline=True) as site:
        await site.take(newer)
        await site.take(older)
        assert (await site.manifest(NAME, "plain")).content == stock.plain.content
        await site.parts.recorder.flush()
        [moved] = site.parts.usage.moves(NAME, Tag("plain"))
        assert moved.new == stock.plain.digest


async def test_a_tag_of_what_was_deleted_during_the_import_is_not_set(
    at: Opened, stock: Stock, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with at("home") as home:
        for tag in ("3", "plain"):
            await home.fetch(NAME, tag)
        await home.export(bundle, "alpine:3", "alpine:plain")
    binding = importer._binding
    async with at("site", offline=True) as site:

        def deleted_before(*arguments: Any) -> Any:
            site.parts.store._delete(NAME, Digest(stock.plain.digest), None)
            return binding(*arguments)

        monkeypatch.setattr(importer, "_binding", deleted_before)
        landed = await site.take(bundle)
        assert await site.parts.namespaces.tags(NAME) == ["3"]
        assert [each.tag for each in landed.references] == ["3"]
        assert landed.notes == [f"{NAME}:plain was not set: its manifest was deleted during the import"]


async def test_what_comes_in_is_pinned_if_that_is_wanted(at: Opened, stock: Stock, bundle: Path) -> None:
    async with at("home") as home:
        await home.fetch(NAME, "plain")
        await home.export(bundle, "alpine:plain")
    async with at("site", offline=True) as site:
        await site.take(bundle)
        assert list(site.parts.pins.list()) == []
        await site.take(bundle, pin=True)
        assert [each.pattern for each in site.parts.pins.list()] == [f"{NAME}:plain"]


async def test_a_dry_run_takes_nothing(at: Opened, stock: Stock, bundle: Path) -> None:
    async with at("home") as home:
        await home.fetch(NAME, "plain")
        done = await home.export(bundle, "alpine:plain")
    async with at("site", offline=True) as site:
        found = await site.take(bundle, dry_run=True)
        assert found.bytes == done.bytes - len(stock.plain.content)
        assert site.records() == {}
        assert list(site.parts.store.files.root.rglob("blobs/*/*/*")) == []


async def test_what_is_damaged_here_is_replaced(at: Opened, stock: Stock, bundle: Path) -> None:
    async with at("home") as home:
        await home.fetch(NAME, "plain")
        await home.export(bundle, "alpine:plain")
    async with at("site", offline=True) as site:
        await site.take(bundle)
        os.truncate(site.parts.store.files.path(Digest(stock.plain.layers[0])), 10)
        assert (await site.take(bundle)).blobs == 1
        await site.image(NAME, stock.plain)


async def test_what_was_begun_is_gone_on_with(at: Opened, stock: Stock, bundle: Path) -> None:
    async with at("home") as home:
        await home.fetch(NAME, "plain")
        await home.export(bundle, "alpine:plain")
    layer = b"plain" * 1000
    async with at("site", offline=True) as site:
        upload = await site.parts.store.files.resume(Digest(stock.plain.layers[0]))
        await upload.write(layer[:2000])
        await upload.suspend()
        landed = await site.take(bundle)
        assert landed.blobs == 3
        await site.image(NAME, stock.plain)


@pytest.mark.parametrize("left", [b"x" * 2000, b"x" * 9000])
async def test_what_was_begun_and_is_wrong_is_begun_anew(
    at: Opened, stock: Stock, bundle: Path, left: bytes
) -> None:
    async with at("home") as home:
        await home.fetch(NAME, "plain")
        await home.export(bundle, "alpine:plain")
    async with at("site", offline=True) as site:
        upload = await site.parts.store.files.resume(Digest(stock.plain.layers[0]))
        await upload.write(left)
        await upload.suspend()
        await site.take(bundle)
        await site.image(NAME, stock.plain)


async def test_no_room_for_what_is_to_come(
    at: Opened, stock: Stock, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with at("home") as home:
        await home.fetch(NAME, "plain")
        await home.export(bundle, "alpine:plain")
    async with at("site", offline=True) as site:
        monkeypatch.setattr(site.parts.store.files, "room", lambda: 1000)
        with pytest.raises(StorageFailed, match="bytes are needed, and 1000 are free"):
            await site.take(bundle)
        assert site.records() == {}


# Namespaces of our own


async def test_from_and_to_a_store_of_our_own(at: Opened, bundle: Path) -> None:
    async with at("home") as home:
        digest = await pushed(home, "team/app", "v1", b"layer")
        done = await home.export(bundle, "local/team/app:v1")
        assert [each.reference for each in done.references] == ["local/team/app:v1"]
    async with at("site", offline=True) as site:
        await site.take(bundle)
        assert (await site.manifest("local/team/app", "v1")).digest == digest
        assert site.parts.private is not None
        assert {key.split(" ")[0] for key, _ in site.parts.private.records.scan("")} >= {
            "tag",
            "link",
            "pushed",
        }
        await site.take(bundle)  # an immutable tag that is the same already


async def test_nothing_that_came_in_is_collected(at: Opened, clock: Clock, tmp_path: Path) -> None:
    first, second = tmp_path / "1.tar", tmp_path / "2.tar"
    async with at("home") as home:
        old = await pushed(home, "team/app", "1", b"layer")
        await home.export(first, "local/team/app:1")
        new = await pushed(home, "team/app", "1", b"newer")
        await home.export(second, "local/team/app:1")
    async with at("site", offline=True) as site:
        await site.take(first)
        clock.advance(30 * 86400)
        await site.take(second)
        # What has lost its tag is untagged from now on.
        assert site.parts.private is not None
        assert site.parts.private.records.get(f"lease local/team/app {old}") is not None
        clock.advance(30 * 86400)
        assert site.parts.maintenance.collection is not None
        await asyncio.to_thread(site.parts.maintenance.collection.run)
        assert (await site.manifest("local/team/app", "1")).digest == new
        assert await site.blob("local/team/app", str(Digest.of(b"newer"))) == b"newer"


async def test_what_came_in_counts_as_pushed_then(at: Opened, clock: Clock, bundle: Path) -> None:
    """A rule keeps what was just imported, and of several tags those that were pushed last."""
    async with at("home") as home:
        for tag in ("1", "9", "10"):
            await pushed(home, "app", tag, f"layer {tag}".encode())
            clock.advance(1)
        await home.export(bundle, "local/app:*")
    clock.advance(90 * 86400)
    top = {"namespaces": {"local": {"store": {"keep_tags": [{"last": 2, "pushed_within": "10d"}]}}}}
    async with at("site", offline=True, top=top) as site:
        landed = await site.take(bundle)
        assert [each.tag for each in landed.references] == ["1", "10", "9"]
        clock.advance(20 * 86400)
        assert site.parts.maintenance.collection is not None
        await asyncio.to_thread(site.parts.maintenance.collection.run)
        assert await site.parts.namespaces.tags("local/app") == ["10", "9"]
        clock.advance(1)
        await site.take(bundle)
        assert site.parts.private is not None
        pointers = [site.parts.private.pointer("local/app", Tag(tag)) for tag in ("1", "9", "10")]
        times = [each.validated_at for each in pointers if each is not None]
        assert times == sorted(set(times))
        assert times[-1] == clock()


async def test_what_moved_before_a_tag_was_refused_is_told(
    at: Opened, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It became immutable during the import."""
    async with at("home") as home:
        old = await pushed(home, "a", "1", b"old")
        new = await pushed(home, "a", "1", b"new")
        await pushed(home, "b", "v1", b"layer")
        await home.export(bundle, "local/*")
    async with at("site", offline=True, top={"webhooks": [HOOK]}) as site:
        await pushed(site, "a", "1", b"old")
        publish = importer.Importer._publish
        another = image_of(b"another")

        def published(each: importer.Importer) -> None:
            assert site.parts.private is not None
            site.parts.private._push("local/b", another, [Tag("v1")], None)
            publish(each)

        monkeypatch.setattr(importer.Importer, "_publish", published)
        with pytest.raises(Denied, match="tag v1 of local/b is immutable"):
            await site.take(bundle)
        assert (await site.manifest("local/a", "1")).digest == new
        assert site.parts.queue is not None
        told = [each.event for each in site.parts.queue.read("hook", "", 9)]
        assert [(each.action, each.former, each.digest) for each in told if each] == [("move", old, new)]


async def test_immutable_tags_stay(at: Opened, bundle: Path) -> None:
    async with at("home") as home:
        await pushed(home, "team/app", "v1", b"layer")
        await home.export(bundle, "local/team/app:v1")
    async with at("site", offline=True) as site:
        await pushed(site, "team/app", "v1", b"another")
        before = site.records()
        with pytest.raises(Denied, match=r"tag v1 of local/team/app is immutable"):
            await site.take(bundle)
        assert site.records() == before


async def test_a_store_of_our_own_wants_whole_indexes(at: Opened, stock: Stock, bundle: Path) -> None:
    async with at("home", top={"namespaces": {"docker.io": {"upstream": stock.upstream.url}}}) as home:
        await home.fetch(NAME, "3")
        await home.export(bundle, "alpine:3", platforms=["linux/amd64"])
    for sparse in (False, True):
        namespaces = {"docker.io": {"store": {"sparse": sparse}, "library": True}}
        async with at("site", top={"namespaces": namespaces}) as site:
            if sparse:
                await site.take(bundle)
                await site.image(NAME, stock.amd)
            else:
                with pytest.raises(ArchiveInvalid, match=r"namespaces\.docker\.io\.store\.sparse"):
                    await site.take(bundle)
                assert site.records() == {}


async def pushed(place: Place, repository: str, tag: str, layer: bytes) -> Digest:
    registry, name = place.parts.namespaces, f"local/{repository}"
    for content in (b"{}", layer):
        upload = await registry.start_upload(name)
        await upload.write(content)
        await upload.commit(Digest.of(content))
    manifest = image_of(layer)
    await registry.push_manifest(name, Tag(tag), manifest)
    return manifest.digest


def image_of(layer: bytes) -> Manifest:
    described = [
        {"mediaType": "application/x", "digest": str(Digest.of(each)), "size": len(each)}
        for each in (b"{}", layer)
    ]
    document = {"mediaType": IMAGE, "config": described[0], "layers": described[1:]}
    return Manifest.of(IMAGE, json.dumps(document).encode())


async def pushed_manifest(
    place: Place, repository: str, tag: str, media_type: str, members: dict[str, Any]
) -> None:
    document = {"schemaVersion": 2, "mediaType": media_type, **members}
    manifest = Manifest.of(media_type, json.dumps(document).encode())
    await place.parts.namespaces.push_manifest(f"local/{repository}", Tag(tag), manifest)


# Signatures


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A private key and its public one, as openssl makes them."""
    private, public = tmp_path / "key.pem", tmp_path / "key.pub.pem"
    run("openssl", "genpkey", "-algorithm", "ed25519", "-out", private)
    run("openssl", "pkey", "-in", private, "-pubout", "-out", public)
    return private, public


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True)


async def test_only_what_is_signed_comes_in(
    at: Opened, stock: Stock, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    private, public = keys
    signed, unsigned = tmp_path / "signed", tmp_path / "unsigned"
    async with at("home") as home:
        await home.fetch(NAME, "plain")
        assert (await home.export(signed, "alpine:plain", key=private)).signed
        assert not (await home.export(unsigned, "alpine:plain")).signed
    checked = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin"]
    files = ["-in", signed / "entrepot.json", "-sigfile", signed / "entrepot.json.sig"]
    run(*checked, *files)
    async with at("site", offline=True) as site:
        with pytest.raises(ArchiveInvalid, match="is not signed"):
            await site.take(unsigned, key=public)
        for name in ("entrepot.json", "entrepot.json.sig"):
            content = (signed / name).read_bytes()
            (signed / name).write_bytes(
                content.replace(b"alpine", b"alpina", 1) if b"alpine" in content else bytes(64)
            )
            with pytest.raises(ArchiveInvalid, match="the signature is not by"):
                await site.take(signed, key=public)
            (signed / name).write_bytes(content)
        index = (signed / "index.json").read_bytes()
        (signed / "index.json").write_bytes(index.replace(b"alpine", b"alpina"))
        with pytest.raises(
            ArchiveInvalid, match=r"index\.json does not have the digest that entrepot\.json states"
        ):
            await site.take(signed, key=public)
        (signed / "index.json").write_bytes(index)
        assert site.records() == {}
        assert (await site.take(signed, key=public)).verified
        assert not (await site.take(signed)).verified


async def test_a_key_that_is_none(at: Opened, stock: Stock, keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    other = tmp_path / "other.pem"
    run("openssl", "genpkey", "-algorithm", "x25519", "-out", other)
    async with at("home") as home:
        await home.fetch(NAME, "plain")
        for key, says in (
            (public, "is not a private key"),
            (other, "is not an Ed25519 key"),
            (tmp_path / "n", "No such"),
        ):
            with pytest.raises((FieldInvalid, StorageFailed), match=says):
                await home.export(tmp_path / "b.tar", "alpine:plain", key=key)
        await home.export(tmp_path / "b.tar", "alpine:plain", key=private)
        for key, says in ((private, "is not a public key"), (tmp_path / "n", "No such")):
            with pytest.raises(FieldInvalid, match=says):
                await home.take(tmp_path / "b.tar", key=key)
