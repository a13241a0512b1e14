"""Archives that others made, and archives that nobody should have made."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from proxy.namespaces.composition import Composition, compose
from proxy.namespaces.references import FieldInvalid
from proxy.transfer.bundle_import import BundleImport, ImportOptions
from proxy.transfer.results import BundleImported
from storage.archives.importer import TRIES, Importer
from storage.errors import ArchiveInvalid, RegistryError, StorageFailed
from storage.oci import ARTIFACTS, OCI_INDEX, Digest, Tag
from tests import archives
from tests.archives import IMAGE_NAME, REF_NAME, Files, Made, block, image, layout, member, saved, tar
from tests.conftest import Clock, configuration

NAME = "docker.io/library/alpine"
KINDS = ("tag ", "manifest ", "link ", "referrers ", "pin ")


class Site:
    """A directory that holds nothing, and no upstream."""

    def __init__(self, composition: Composition, directory: Path) -> None:
        self.parts = composition
        self._directory = directory

    async def take(self, archive: Files | bytes, **how: Any) -> BundleImported:
        """An archive, as a tar."""
        path = self._directory / "archive.tar"
        path.write_bytes(tar(archive) if isinstance(archive, dict) else archive)
        return await self.take_path(path, **how)

    async def take_path(self, path: Path, **how: Any) -> BundleImported:
        return await BundleImport(self.parts).import_(path, ImportOptions(**how))

    async def holds(self, repository: str, reference: str, made: Made) -> None:
        """All of it is served."""
        registry = self.parts.namespaces
        parsed = Digest(reference) if ":" in reference else Tag(reference)
        found = await registry.get_manifest(repository, parsed)
        assert (found.content, found.media_type) == (made.manifest, made.media_type)
        for each in json.loads(made.manifest).get("layers", []):
            assert await self.blob(repository, each["digest"]) in made.blobs

    async def blob(self, repository: str, digest: str) -> bytes:
        found = await self.parts.namespaces.get_blob(repository, Digest(digest))
        try:
            return b"".join([chunk async for chunk in found.chunks()])
        finally:
            await found.close()

    @property
    def empty(self) -> bool:
        """Nobody could see anything, and nothing is left half done."""
        seen = any(self.parts.store.records.first(kind) for kind in KINDS)
        partial = list((self.parts.store.files.root / "partial").iterdir())
        return not seen and not partial


@pytest.fixture
async def site(tmp_path: Path, clock: Clock) -> AsyncIterator[Site]:
    tree = {
        "disk": {"path": str(tmp_path / "site")},
        "offline": True,
        "namespaces": {
            "docker.io": {"upstream": {"url": "http://127.0.0.1:9"}},
            "ghcr.io": {"upstream": {"url": "http://127.0.0.1:9"}},
        },
    }
    composition = compose(configuration(tmp_path, tree), clock)
    yield Site(composition, tmp_path)
    await composition.close()


# Layouts of others


@pytest.mark.parametrize(
    ("annotations", "repository", "tag"),
    [
        ({REF_NAME: "docker.io/library/alpine:3"}, NAME, "3"),
        ({REF_NAME: "alpine:3"}, NAME, "3"),
        ({REF_NAME: "ghcr.io/team/app"}, "ghcr.io/team/app", "latest"),
        ({REF_NAME: "3", IMAGE_NAME: "docker.io/library/alpine:3"}, NAME, "3"),
        ({IMAGE_NAME: "ghcr.io/team/app:1.2"}, "ghcr.io/team/app", "1.2"),
    ],
)
@pytest.mark.parametrize("form", ["tar", "directory", "compressed"])
async def test_layouts_are_bound_by_their_names(
    site: Site, tmp_path: Path, annotations: dict[str, str], repository: str, tag: str, form: str
) -> None:
    made = image()
    files = layout([(made, annotations)])
    if form == "directory":
        landed = await site.take_path(archives.write(files, tmp_path / "layout"))
    else:
        landed = await site.take(gzip.compress(tar(files)) if form == "compressed" else files)
    assert [(each.repository, each.tag, each.digest) for each in landed.references] == [
        (repository, tag, made.digest)
    ]
    await site.holds(repository, tag, made)


async def test_an_index_of_blobs(site: Site) -> None:
    layers = [b"a layer", bytes(5 << 20)]  # the latter is larger than a manifest may be
    kind = "application/vnd.oci.image.layer.v1.tar"
    listed = [archives.describe(kind, Digest.of(each), len(each)) for each in layers]
    content = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": listed}).encode()
    cache = Made(content, OCI_INDEX, [*layers, content])
    await site.take(layout([(cache, {REF_NAME: "docker.io/team/cache:1"})]))
    await site.holds("docker.io/team/cache", "1", cache)


@pytest.mark.parametrize("media_type", ARTIFACTS)
async def test_an_artifact_of_blobs(site: Site, media_type: str) -> None:
    listed = [archives.describe("text/plain", Digest.of(b"notes"), 5)]
    content = json.dumps({"mediaType": media_type, "blobs": listed}).encode()
    made = Made(content, media_type, [b"notes", content])
    await site.take(layout([(made, {REF_NAME: "docker.io/team/notes:1"})]))
    assert await site.blob("docker.io/team/notes", Digest.of(b"notes")) == b"notes"
    lean = Made(content, media_type, [content])
    with pytest.raises(ArchiveInvalid, match="does not contain 1 of the blobs"):
        await site.take(layout([(lean, {REF_NAME: "ghcr.io/team/notes:1"})]))


@pytest.mark.parametrize("key", ["things", "blobs"])
async def test_what_names_content_that_cannot_be_read(site: Site, key: str) -> None:
    kind = "application/vnd.example.thing+json"
    listed = [archives.describe("text/plain", Digest.of(b"notes"), 5)]
    content = json.dumps({"mediaType": kind, key: listed}).encode()
    with pytest.raises(ArchiveInvalid, match="what it names cannot be read"):
        await site.take(layout([(Made(content, kind, [b"notes", content]), {REF_NAME: "a:1"})]))
    assert site.empty


async def test_a_name_is_given_to_what_has_none(site: Site) -> None:
    made = image()
    with pytest.raises(ArchiveInvalid, match=r"has no name for .*: name it with --as"):
        await site.take(layout([(made, {})]))
    with pytest.raises(ArchiveInvalid, match=r"has only the tag '3' for .*: name it with --as"):
        await site.take(layout([(made, {REF_NAME: "3"})]))
    assert site.empty
    await site.take(layout([(made, {})]), name="alpine:3.20")
    await site.holds(NAME, "3.20", made)
    await site.take(layout([(made, {REF_NAME: "3"})]), name="ghcr.io/team/app")
    await site.holds("ghcr.io/team/app", "3", made)


async def test_a_name_is_given_to_one_thing_only(site: Site) -> None:
    files = layout([(image(b"one"), {}), (image(b"two"), {})])
    with pytest.raises(ArchiveInvalid, match=r"two images named docker\.io/library/alpine:3"):
        await site.take(files, name="alpine:3")
    with pytest.raises(FieldInvalid, match="name"):
        await site.take(files, name="quay.io/team/app")
    assert site.empty


async def test_a_name_of_no_namespace(site: Site) -> None:
    with pytest.raises(ArchiveInvalid, match=r"'quay\.io' is not a configured namespace") as raised:
        await site.take(layout([(image(), {REF_NAME: "quay.io/team/app:1"})]))
    assert "archive.tar: quay.io/team/app:1: " in str(raised.value)
    assert site.empty


async def test_what_refers_goes_with_what_it_refers_to(site: Site) -> None:
    made = image(b"layer")
    signature = image(b"signature", subject=made)
    deeper = image(b"deeper", subject=signature)
    landed = await site.take(layout([(deeper, {}), (signature, {}), (made, {REF_NAME: "alpine:3"})]))
    assert (len(landed.references), landed.manifests) == (1, 3)
    for subject, referrer in ((made, signature), (signature, deeper)):
        [found] = await site.parts.namespaces.referrers(NAME, Digest(subject.digest))
        assert found.digest == referrer.digest
    # And where the image has its name from outside.
    await site.take(layout([(signature, {}), (made, {})]), name="ghcr.io/team/app:1")
    await site.holds("ghcr.io/team/app", "1", made)
    [found] = await site.parts.namespaces.referrers("ghcr.io/team/app", Digest(made.digest))
    assert found.digest == signature.digest


async def test_what_is_listed_apart_though_it_is_part_of_something(site: Site) -> None:
    amd, arm = image(b"amd"), image(b"arm")
    whole = archives.index({"linux/amd64": amd, "linux/arm64": arm})
    landed = await site.take(layout([(amd, {}), (whole, {REF_NAME: "alpine:3"}), (arm, {})]))
    assert [(each.tag, each.digest) for each in landed.references] == [("3", whole.digest)]
    await site.holds(NAME, arm.digest, arm)


async def test_an_index_of_which_a_part_is_there(site: Site) -> None:
    amd, arm = image(b"amd"), image(b"arm")
    whole = archives.index({"linux/amd64": amd, "linux/arm64": arm})
    files = layout(
        [(Made(whole.manifest, whole.media_type, [*amd.blobs, whole.manifest]), {REF_NAME: "a:3"})]
    )
    await site.take(files)
    await site.holds("docker.io/library/a", "3", whole)
    await site.holds("docker.io/library/a", amd.digest, amd)
    alone = layout([(Made(whole.manifest, whole.media_type, [whole.manifest]), {REF_NAME: "b:3"})])
    with pytest.raises(ArchiveInvalid, match=r"contains no child of the index sha256:"):
        await site.take(alone)


async def test_what_is_shown_already_need_not_be_there(site: Site) -> None:
    first, second = image(b"common", n=1), image(b"common", b"more", n=2)
    await site.take(layout([(first, {REF_NAME: "one:1"})]))
    lean = Made(second.manifest, blobs=[each for each in second.blobs if each != b"common"])
    await site.take(layout([(lean, {REF_NAME: "two:1"})]))
    await site.holds("docker.io/library/two", "1", second)
    # To know a digest is no permission: it is shown, but by another namespace.
    with pytest.raises(ArchiveInvalid, match="does not contain 1 of the blobs that it names"):
        await site.take(layout([(lean, {REF_NAME: "ghcr.io/team/two:1"})]))
    assert site.parts.store.records.first("tag ghcr.io/") is None


# Options that do not apply


async def test_a_name_for_what_has_one_is_refused(site: Site) -> None:
    made = image()
    for files in (
        layout([(made, {REF_NAME: "alpine:3"})]),
        layout([(made, {REF_NAME: "3", IMAGE_NAME: "docker.io/library/alpine:3"})]),
        saved([tar({"a": b"x"})], ["alpine:3"]),
    ):
        with pytest.raises(FieldInvalid, match=r"name: every image in .* has a name: --as does not apply"):
            await site.take(files, name="alpine:4")
        assert site.empty
    await site.take(layout([(made, {REF_NAME: "alpine:3"}), (image(b"x"), {})]), name="alpine:4")
    assert await site.parts.namespaces.tags(NAME) == ["3", "4"]


async def test_a_tag_for_what_has_another_is_refused(site: Site) -> None:
    made = image()
    for name in ("alpine:4", "alpine:latest", f"alpine@{made.digest}"):
        with pytest.raises(
            ArchiveInvalid, match=r"has the tag '3' for .*: give --as docker\.io/library/alpine"
        ):
            await site.take(layout([(made, {REF_NAME: "3"})]), name=name)
    assert site.empty
    await site.take(layout([(made, {REF_NAME: "3"})]), name="alpine:3")
    await site.holds(NAME, "3", made)


async def test_a_pin_of_what_has_no_tag_is_refused(site: Site) -> None:
    made = image()
    with pytest.raises(FieldInvalid, match=r"pin: .* has no tag for a cache: --pin does not apply"):
        await site.take(layout([(made, {REF_NAME: f"alpine@{made.digest}"})]), pin=True)
    assert site.empty
    other, signature = image(b"x"), image(b"signature", subject=made)
    named = [(made, {REF_NAME: "alpine:3"}), (other, {REF_NAME: f"alpine@{other.digest}"}), (signature, {})]
    done = await site.take(layout(named), pin=True)
    assert done.notes == [f"{NAME}@{other.digest} is not pinned: only tags are"]


# What is left out


async def test_what_is_left_out_is_told(site: Site) -> None:
    amd, arm = image(b"amd"), image(b"arm")
    whole = archives.index({"linux/amd64": amd, "linux/arm64": arm})
    part = Made(whole.manifest, whole.media_type, [*amd.blobs, whole.manifest])
    done = await site.take(layout([(part, {REF_NAME: "alpine:3"})]))
    assert done.notes == [
        f"left out of alpine:3, since the archive does not contain it: linux/arm64 ({arm.digest})"
    ]
    done = await site.take(layout([(whole, {REF_NAME: "alpine:3"})]))
    assert done.notes == []


@pytest.mark.parametrize("which", ["attestation", "image"])
@pytest.mark.parametrize("lost", [0, 1])
async def test_a_child_without_its_blobs(site: Site, which: str, lost: int) -> None:
    """Only an attestation may be left out: docker save does so."""
    made, attestation = image(b"amd"), image(b"statement")
    whole = archives.index({"linux/amd64": made, "unknown/unknown": attestation})
    missing = (attestation if which == "attestation" else made).blobs[lost]
    part = Made(whole.manifest, whole.media_type, [each for each in whole.blobs if each != missing])
    files = layout([(part, {REF_NAME: "alpine:3"})])
    if which == "image":
        with pytest.raises(ArchiveInvalid, match="does not contain 1 of the blobs"):
            await site.take(files)
        assert site.empty
        return
    done = await site.take(files)
    assert done.notes == [
        f"left out of alpine:3, since the archive does not contain it: unknown/unknown ({attestation.digest})"
    ]
    await site.holds(NAME, made.digest, made)
    assert site.parts.store.records.get(f"manifest {NAME} {attestation.digest}") is None


@pytest.mark.parametrize("times", [2, 3])
async def test_what_is_evicted_before_it_is_linked_is_imported_again(
    site: Site, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    made = image(b"a layer")
    path = site.parts.store.files.path(Digest(archives.digest_of(b"a layer")))
    assert path is not None
    publish, left = Importer._publish, times

    def evicted(self: Importer) -> None:
        nonlocal left
        if left:
            left -= 1
            path.unlink()
        publish(self)

    monkeypatch.setattr(Importer, "_publish", evicted)
    files = layout([(made, {REF_NAME: "alpine:3"})])
    if times < TRIES:
        await site.take(files)
        await site.holds(NAME, "3", made)
        return
    with pytest.raises(StorageFailed, match="are evicted before all are imported: the cache is too small"):
        await site.take(files)
    assert site.parts.store.records.first("tag ") is None


async def test_only_some_platforms(site: Site) -> None:
    amd, arm = image(b"amd"), image(b"arm")
    whole = archives.index({"linux/amd64": amd, "linux/arm64": arm})
    part = Made(whole.manifest, whole.media_type, [each for each in whole.blobs if each != b"arm"])
    files = layout([(part, {REF_NAME: "alpine:3"})])
    for platforms, says in (
        ((), "does not contain 1 of the blobs"),
        (("linux/arm64",), "does not contain 1 of the blobs"),
        (("linux/riscv64", "linux/s390x"), "has no image for linux/riscv64, linux/s390x"),
    ):
        with pytest.raises(ArchiveInvalid, match=says):
            await site.take(files, platforms=platforms)
        assert site.empty
    left_out = f"left out of alpine:3, which is for other platforms: linux/arm64 ({arm.digest})"
    done = await site.take(files, platforms=["linux/amd64"])
    assert done.notes == [left_out]
    done = await site.take(files, platforms=["linux/amd64", "linux/s390x"])
    assert done.notes == [f"{whole.digest} has no image for linux/s390x", left_out]
    await site.holds(NAME, "3", whole)
    await site.holds(NAME, amd.digest, amd)
    assert site.parts.store.records.get(f"manifest {NAME} {arm.digest}") is None


async def test_a_platform_that_is_wanted_must_be_there(site: Site) -> None:
    amd, arm = image(b"amd"), image(b"arm")
    whole = archives.index({"linux/amd64": amd, "linux/arm64": arm})
    part = Made(whole.manifest, whole.media_type, [*amd.blobs, whole.manifest])
    with pytest.raises(ArchiveInvalid, match=f"does not contain the manifest {arm.digest}"):
        await site.take(layout([(part, {REF_NAME: "alpine:3"})]), platforms=["linux/arm64"])
    with pytest.raises(FieldInvalid, match=r"platforms: .* has no index: --platform does not apply"):
        await site.take(layout([(amd, {REF_NAME: "alpine:3"})]), platforms=["linux/amd64"])
    assert site.empty


async def test_an_attestation_whose_blobs_are_stored_is_not_left_out(site: Site) -> None:
    made, attestation = image(b"amd"), image(b"statement")
    await site.take(layout([(attestation, {REF_NAME: "other:1"})]))
    whole = archives.index({"linux/amd64": made, "unknown/unknown": attestation})
    lean = [each for each in whole.blobs if each != b"statement"]
    done = await site.take(layout([(Made(whole.manifest, whole.media_type, lean), {REF_NAME: "alpine:3"})]))
    assert done.notes == []
    await site.holds(NAME, attestation.digest, attestation)


# docker save


@pytest.mark.parametrize("suffix", ["", ".gz"])
async def test_what_docker_save_wrote(site: Site, suffix: str) -> None:
    layers = [tar({"a": b"first"}), tar({"b": b"second"})]
    given = [gzip.compress(each, mtime=0) for each in layers] if suffix else layers
    files = saved(given, ["alpine:3", "ghcr.io/team/app:1"], suffix)
    landed = await site.take(files)
    assert [(each.repository, each.tag) for each in landed.references] == [
        (NAME, "3"),
        ("ghcr.io/team/app", "1"),
    ]
    found = await site.parts.namespaces.get_manifest(NAME, Tag("3"))
    document = json.loads(found.content)
    assert found.media_type == document["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    kind = "application/vnd.oci.image.layer.v1.tar" + ("+gzip" if suffix else "")
    assert document["layers"] == [
        {"mediaType": kind, "digest": archives.digest_of(each), "size": len(each)} for each in given
    ]
    for layer in given:
        assert await site.blob(NAME, archives.digest_of(layer)) == layer
    assert (await site.take(files)).references[0].before == found.digest  # the same makes the same


async def test_a_layer_that_docker_save_linked(site: Site) -> None:
    layer = tar({"a": b"twice"})
    files = saved([layer, layer], ["alpine:3"])
    first, second = (name for name in files if name.endswith("layer.tar"))
    del files[second]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, each in files.items():
            archive.addfile(member(name, len(each)), io.BytesIO(each))
        archive.addfile(member(second, kind=tarfile.SYMTYPE, link=f"../{first}"))
    await site.take(buffer.getvalue())
    found = json.loads((await site.parts.namespaces.get_manifest(NAME, Tag("3"))).content)
    assert [each["digest"] for each in found["layers"]] == [archives.digest_of(layer)] * 2


async def test_saved_by_id_it_has_no_name(site: Site) -> None:
    files = saved([tar({"a": b"x"})], None)
    with pytest.raises(ArchiveInvalid, match="has no name for"):
        await site.take(files)
    await site.take(files, name="alpine")
    assert await site.parts.namespaces.tags(NAME) == ["latest"]


def without(files: Files, end: str) -> Files:
    return {name: content for name, content in files.items() if not name.endswith(end)}


def changed(files: Files, end: str, content: bytes) -> Files:
    return {name: content if name.endswith(end) else each for name, each in files.items()}


SAVED = saved([tar({"a": b"x"})], ["alpine:3"])


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (without(SAVED, "layer.tar"), "does not contain 000"),
        (without(SAVED, f"{json.loads(SAVED['manifest.json'])[0]['Config']}"), "does not contain "),
        (changed(SAVED, "layer.tar", tar({"a": b"y"})), "is damaged: sha256:"),
        (
            changed(SAVED, "layer.tar", gzip.compress(tar({"a": b"y"}))),
            "is damaged: its uncompressed digest is sha256:",
        ),
        (changed(SAVED, "layer.tar", gzip.compress(tar({"a": b"x"}))[:-4]), "is damaged or truncated"),
        (changed(SAVED, "manifest.json", b"{"), "manifest.json cannot be read"),
        (changed(SAVED, "manifest.json", b"[" * 100_000), "manifest.json cannot be read"),
        (changed(SAVED, "manifest.json", b"[" + b" " * (5 << 20) + b"]"), "manifest.json has 5242882 bytes"),
        (changed(SAVED, "manifest.json", b"[]"), "contains no images"),
        (
            changed(SAVED, "manifest.json", b'[{"Config": "../../etc/passwd"}]'),
            "does not contain ../../etc/passwd",
        ),
    ],
)
async def test_what_docker_save_never_wrote(site: Site, files: Files, says: str) -> None:
    with pytest.raises(ArchiveInvalid) as raised:
        await site.take(files)
    assert says in str(raised.value)
    assert "archive.tar" in str(raised.value)
    assert site.empty


async def test_layers_and_diff_ids_that_do_not_match(site: Site) -> None:
    files = saved([tar({"a": b"x"})], ["alpine:3"])
    [entry] = json.loads(files["manifest.json"])
    entry["Layers"] *= 2
    with pytest.raises(ArchiveInvalid, match=r"names 1 layers, manifest\.json 2"):
        await site.take({**files, "manifest.json": archives.packed([entry])})


# What nobody should have made

Change = Callable[[Files, Made], Files]


def blob(content: bytes) -> str:
    return f"blobs/sha256/{archives.digest_of(content).removeprefix('sha256:')}"


def rewritten(made: Made, change: Callable[[dict[str, Any]], Any]) -> Files:
    """A layout whose manifest says something else; the rest is as it should be."""
    document = json.loads(made.manifest)
    change(document)
    other = Made(archives.packed(document), made.media_type, made.blobs)
    other.blobs = [*made.blobs[:-1], other.manifest]
    return layout([(other, {REF_NAME: "alpine:3"})])


MADE = image(b"layer" * 100, b"another")
GOOD = layout([(MADE, {REF_NAME: "alpine:3"})])
LAYER = blob(MADE.blobs[1])
LAST = blob(MADE.blobs[2])


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def described(**members: Any) -> Files:
    """The descriptor in index.json says something else."""
    document = json.loads(GOOD["index.json"])
    document["manifests"][0].update(members)
    return {**GOOD, "index.json": archives.packed(document)}


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "contains neither index.json nor manifest.json"),
        (without(GOOD, "index.json"), "contains neither index.json nor manifest.json"),
        ({**GOOD, "oci-layout": b'{"imageLayoutVersion": "2.0.0"}'}, "states an unsupported version"),
        ({**GOOD, "index.json": b"{}"}, "contains no images"),
        ({**GOOD, "index.json": b"nonsense"}, "index.json: not a manifest"),
        ({**GOOD, "index.json": b"[" * 100_000}, "index.json: not a manifest"),
        ({**GOOD, "index.json": b" " * (17 << 20)}, "index.json has 17825792 bytes, more than 16777216"),
        (without(GOOD, LAYER), "does not contain 1 of the blobs that it names, such as sha256:"),
        (without(GOOD, blob(MADE.manifest)), "does not contain the manifest sha256:"),
        ({**GOOD, LAYER: flipped(GOOD[LAYER])}, "is damaged: sha256:"),
        ({**GOOD, LAST: flipped(GOOD[LAST])}, "is damaged: sha256:"),
        ({**GOOD, LAYER: GOOD[LAYER] + b"x"}, "has 501 bytes, but is listed with 500"),
        ({**GOOD, LAYER: GOOD[LAYER][:-1]}, "has 499 bytes, but is listed with 500"),
        ({**GOOD, blob(MADE.manifest): flipped(MADE.manifest)}, "is damaged: its content is sha256:"),
        ({**GOOD, blob(MADE.manifest): MADE.manifest + b" "}, "is listed with"),
        (described(size=17), "bytes, but is listed with 17"),
        (described(size=-1), "bytes, but is listed with -1"),
        (described(size=1 << 70), "bytes, but is listed with 1180591620717411303424"),
        (described(digest="sha256:../../../etc/passwd"), "index.json: not a manifest"),
        (described(digest="md5:" + 32 * "a"), "index.json: not a manifest"),
        (
            described(mediaType="application/vnd.docker.distribution.manifest.v2+json"),
            "has the type application/vnd.oci.image.manifest.v1+json, but is listed as application/vnd",
        ),
        (described(annotations={REF_NAME: "alpine:.x"}), "is not a tag"),
        (described(annotations={REF_NAME: "docker.io/../x:1"}), "is not a repository name"),
        (described(annotations={REF_NAME: "docker.io/A/x:1"}), "is not a repository name"),
        (described(annotations={REF_NAME: "a b:1"}), "'library/a b' is not a repository name"),
        (
            described(annotations={REF_NAME: f"alpine@sha256:{64 * '0'}"}),
            f"the name alpine@sha256:{64 * '0'}",
        ),
        (
            described(mediaType="application/vnd.docker.distribution.manifest.v1+prettyjws"),
            "has Docker's schema 1",
        ),
        (rewritten(MADE, lambda document: document["layers"][0].update(size=1)), "is listed with 1"),
        (rewritten(MADE, lambda document: document["layers"][0].update(size=-1)), "at `$.layers[0].size`"),
        (rewritten(MADE, lambda document: document["config"].update(data="W10=")), "is other content"),
        (
            rewritten(MADE, lambda document: document["layers"].append({"digest": 1})),
            "is not a valid application/vnd.oci.image.manifest.v1+json",
        ),
        (
            rewritten(MADE, lambda document: document.update(Layers=document["layers"][:1])),
            "clients read its key 'Layers' differently",
        ),
        (
            described(mediaType="application/vnd.example.thing+json"),
            "has the type application/vnd.oci.image.manifest.v1+json, but is listed as application",
        ),
        ({"index.json": GOOD["index.json"], "entrepot.json": b"{}"}, "entrepot.json cannot be read"),
        ({**GOOD, "entrepot.json": b'{"bundle":9,"created":1,"index":""}'}, "is a bundle of format 9"),
        (
            {**GOOD, "entrepot.json": b'{"created":1,"index":"sha256:0"}'},
            "index.json does not have the digest",
        ),
    ],
)
@pytest.mark.parametrize("form", ["tar", "directory"])
async def test_what_is_wrong_changes_nothing(
    site: Site, tmp_path: Path, files: Files, says: str, form: str
) -> None:
    with pytest.raises(RegistryError) as raised:
        if form == "tar":
            await site.take(files)
        else:
            directory = tmp_path / "archive.tar"
            directory.mkdir()
            await site.take_path(archives.write(files, directory))
    assert type(raised.value) is ArchiveInvalid
    assert "archive.tar" in str(raised.value)
    assert says in str(raised.value)
    assert site.empty


async def test_it_is_the_last_blob_that_is_wrong(site: Site) -> None:
    """What came before it stays, but nobody sees it; with the right archive it is not taken again."""
    with pytest.raises(ArchiveInvalid, match="is damaged"):
        await site.take({**without(GOOD, LAST), LAST: flipped(GOOD[LAST])})
    assert site.empty
    assert (await site.take(GOOD)).blobs == 1
    await site.holds(NAME, "3", MADE)


@pytest.mark.parametrize("at", range(0, len(tar(GOOD)), 700))
async def test_truncated_wherever(site: Site, at: int) -> None:
    content = tar(GOOD).rstrip(b"\0")
    with pytest.raises(ArchiveInvalid, match=r"archive\.tar"):
        await site.take(content[: min(at, len(content))])
    assert site.empty


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (member("../../evil", 0), "outside of the archive"),
        (member("/evil", 0), "outside of the archive"),
        (member("evil", kind=tarfile.LNKTYPE, link="index.json"), "is a hard link"),
        (member("evil", kind=tarfile.CHRTYPE), "is a device"),
        (member(LAYER, 0), "a second member is named"),
        (member(f"./{LAYER}", 0), "a second member is named"),
        (member("evil", kind=tarfile.GNUTYPE_SPARSE), "is a sparse file"),
    ],
)
async def test_a_member_too_many(site: Site, extra: tarfile.TarInfo, says: str) -> None:
    content = tar(GOOD).rstrip(b"\0")
    content += bytes(-len(content) % 512) + block(extra) + bytes(1024)
    with pytest.raises(ArchiveInvalid) as raised:
        await site.take(content)
    assert says in str(raised.value)
    assert site.empty


async def test_a_blob_that_is_a_link(site: Site, tmp_path: Path) -> None:
    """To what lies outside: in a tar it leads nowhere, in a directory it is none."""
    secret = tmp_path / "secret"
    secret.write_bytes(GOOD[LAYER])
    content = tar(without(GOOD, LAYER)).rstrip(b"\0")
    content += bytes(-len(content) % 512) + block(member(LAYER, kind=tarfile.SYMTYPE, link=str(secret)))
    with pytest.raises(ArchiveInvalid, match="does not contain 1 of the blobs"):
        await site.take(content + bytes(1024))
    directory = archives.write(without(GOOD, LAYER), tmp_path / "layout")
    (directory / LAYER).symlink_to(secret)
    with pytest.raises(ArchiveInvalid, match="does not contain 1 of the blobs"):
        await site.take_path(directory)
    assert site.empty


async def test_a_manifest_that_is_none(site: Site) -> None:
    giant = b"{" + b" " * (4 << 20) + b"}"
    for content, says in (
        (giant, "more than 4194304"),
        (b"[" * 9000, "is not a valid application/vnd.oci.image.manifest"),
        (b"x", "is not a valid application/vnd.oci.image.manifest"),
    ):
        made = Made(content, blobs=[content])
        with pytest.raises(ArchiveInvalid, match=says):
            await site.take(layout([(made, {REF_NAME: "alpine:3"})]))
        assert site.empty


async def test_indexes_within_indexes(site: Site) -> None:
    """However deep, it takes no stack, and each is read once."""
    deepest = made = image(b"layer")
    for _ in range(300):
        made = archives.index({"linux/amd64": made, "linux/arm64": made})
        made.blobs = list(dict.fromkeys(made.blobs))
    await site.take(layout([(made, {REF_NAME: "alpine:3"})]))
    await site.holds(NAME, deepest.digest, deepest)


@pytest.mark.clients
async def test_a_bomb_is_put_out(site: Site) -> None:
    bomb = io.BytesIO()
    with gzip.GzipFile(fileobj=bomb, mode="wb") as file:
        file.write(block(member("zeros", 1 << 40)))
        for _ in range(128):
            file.write(bytes(1 << 20))
    with pytest.raises(ArchiveInvalid, match="inflate to"):
        await site.take(bomb.getvalue())
    assert site.empty


async def test_a_good_blob_is_not_given_up_for_a_lie(site: Site) -> None:
    """An archive that names a digest of ours, and brings something shorter under it."""
    await site.take(GOOD)
    document = json.loads(MADE.manifest)
    document["layers"][0]["size"] = 4
    lie = archives.packed(document)
    files = layout([(Made(lie, blobs=[*MADE.blobs[:-1], lie]), {REF_NAME: "lie:1"})])
    with pytest.raises(ArchiveInvalid, match="is damaged"):
        await site.take({**files, LAYER: b"liar"})
    await site.holds(NAME, "3", MADE)


# And offline


async def test_what_was_listed_once_hides_nothing_that_came_in(site: Site) -> None:
    store = site.parts.store
    await store.listings.put(NAME, "tags", ["2", "9"])
    signature = image(b"signature", subject=MADE)
    await store.listings.put(NAME, f"referrers {MADE.digest}", [])
    await site.take(layout([(MADE, {REF_NAME: "alpine:3"}), (signature, {})]))
    assert await site.parts.namespaces.tags(NAME) == ["2", "3", "9"]
    [found] = await site.parts.namespaces.referrers(NAME, Digest(MADE.digest))
    assert found.digest == signature.digest


async def test_what_lacks_is_told_clearly(site: Site) -> None:
    await site.take(GOOD)
    registry = site.parts.namespaces
    for asked in (
        lambda: registry.get_manifest(NAME, Tag("4")),
        lambda: registry.get_manifest(NAME, Digest("sha256:" + 64 * "0")),
        lambda: registry.get_blob(NAME, Digest("sha256:" + 64 * "0")),
        lambda: registry.tags("docker.io/library/busybox"),
    ):
        await told(asked)


async def told(ask: Callable[[], Awaitable[Any]]) -> None:
    with pytest.raises(RegistryError, match=r"is not cached, and docker\.io is set offline") as raised:
        await ask()
    assert raised.value.status == 404
