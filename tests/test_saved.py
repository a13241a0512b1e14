"""What docker save writes: manifest.json and index.json, and what becomes of it when the two disagree."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from typing import Any

import pytest

from storage.archives.saved import short_name
from storage.errors import ArchiveInvalid
from storage.oci import Digest, Tag
from tests.archives import IMAGE_NAME, REF_NAME, Files, digest_of, index, packed, saved, tar, zstd
from tests.archives import Made as Image
from tests.test_import_plan import NAME, Site, site
from tests.upstream.content import OCI_CONFIG, OCI_MANIFEST, describe

__all__ = ["site"]  # a fixture

TAR = "application/vnd.oci.image.layer.v1.tar"
LAYERS = [tar({"a": b"first"}), tar({"b": b"second"}), tar({"c": b"third"})]


def place(content: bytes) -> str:
    return f"blobs/sha256/{digest_of(content).removeprefix('sha256:')}"


def built(
    layers: Sequence[bytes], listed: Sequence[bytes] | None = None, kind: str = TAR, **more: Any
) -> Image:
    """An image of uncompressed layers, whose manifest lists others where `listed` says so."""
    config = packed({"rootfs": {"type": "layers", "diff_ids": [digest_of(each) for each in layers]}, **more})
    described = [
        describe(kind, digest_of(each), len(each)) for each in (layers if listed is None else listed)
    ]
    manifest = packed(
        {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": describe(OCI_CONFIG, digest_of(config), len(config)),
            "layers": described,
        }
    )
    return Image(manifest, blobs=[config, *layers, manifest])


def entry(made: Image, *tags: str) -> dict[str, Any]:
    config, *layers, _ = made.blobs
    return {
        "Config": place(config),
        "RepoTags": list(tags) or None,
        "Layers": [place(each) for each in layers],
    }


def save(entries: Sequence[dict[str, Any]], listed: Sequence[dict[str, Any]] | None, *made: Image) -> Files:
    """As Docker writes it since version 25."""
    return {
        "oci-layout": b'{"imageLayoutVersion": "1.0.0"}',
        "index.json": packed({"schemaVersion": 2, "manifests": listed}),
        "manifest.json": packed(entries),
        **{place(blob): blob for each in made for blob in each.blobs},
    }


def named(made: Image, name: str) -> dict[str, Any]:
    return made.descriptor(**{IMAGE_NAME: f"docker.io/library/{name}", REF_NAME: name.rpartition(":")[2]})


async def layers_of(site: Site, reference: str, repository: str = NAME) -> list[str]:
    parsed = Digest(reference) if ":" in reference else Tag(reference)
    found = await site.parts.namespaces.get_manifest(repository, parsed)
    return [each["digest"] for each in json.loads(found.content)["layers"]]


async def test_what_both_list_alike_is_imported_as_it_is(site: Site) -> None:
    made = built(LAYERS)
    done = await site.take(save([entry(made, "alpine:3")], [named(made, "alpine:3")], made))
    assert [(each.repository, each.tag, each.digest) for each in done.references] == [
        (NAME, "3", made.digest)
    ]
    assert done.notes == []


@pytest.mark.parametrize(
    "listed", [[LAYERS[1], LAYERS[0], LAYERS[2]], LAYERS[:2], [], [*LAYERS, LAYERS[0]]], ids=len
)
async def test_layers_that_only_manifest_json_lists_rightly(site: Site, listed: list[bytes]) -> None:
    wrong = built(LAYERS, listed)
    tags = ("alpine:3", "alpine:latest")
    done = await site.take(save([entry(wrong, *tags)], [named(wrong, each) for each in tags], wrong))
    for tag in ("3", "latest"):
        assert await layers_of(site, tag) == [digest_of(each) for each in LAYERS]
    assert len({each.digest for each in done.references}) == 1
    (note,) = done.notes
    assert wrong.digest in note and "alpine:3, alpine:latest" in note


async def test_layers_that_neither_lists_rightly(site: Site) -> None:
    wrong = built(LAYERS, LAYERS[:1])
    entries = [{**entry(wrong, "alpine:3"), "Layers": [place(each) for each in LAYERS[::-1]]}]
    with pytest.raises(
        ArchiveInvalid, match=r"list different layers for alpine:3, and those of manifest\.json"
    ):
        await site.take(save(entries, [named(wrong, "alpine:3")], wrong))
    assert site.empty


async def test_layers_that_only_index_json_lists_rightly(site: Site) -> None:
    made = built(LAYERS)
    entries = [{**entry(made, "alpine:3"), "Layers": []}]
    with pytest.raises(ArchiveInvalid, match="list different layers"):
        await site.take(save(entries, [named(made, "alpine:3")], made))
    assert site.empty


async def test_wrong_layers_of_a_part_of_an_index(site: Site) -> None:
    wrong = built(LAYERS, LAYERS[:1])
    whole = index({"linux/amd64": wrong})
    with pytest.raises(ArchiveInvalid, match=f"which is part of {whole.digest}"):
        await site.take(save([entry(wrong, "alpine:3")], [named(whole, "alpine:3")], whole))


@pytest.mark.parametrize(
    ("listed", "says"),
    [
        (LAYERS[::-1], "where its config has"),
        (LAYERS[:2], "has 2 layers, but its config 3"),
        ([], "has 0 layers, but its config 3"),
    ],
)
@pytest.mark.parametrize("nested", [True, False])
async def test_a_layout_whose_layers_are_not_those_of_its_config(
    site: Site, listed: list[bytes], says: str, nested: bool
) -> None:
    wrong = built(LAYERS, listed)
    if nested:
        wrong = index({"linux/amd64": wrong, "linux/arm64": built(LAYERS[:1])})
    files = save([], [named(wrong, "alpine:3")], wrong)
    del files["manifest.json"]
    with pytest.raises(ArchiveInvalid, match=says):
        await site.take(files)
    assert site.empty


async def test_what_is_no_image_is_not_held_against_its_config(site: Site) -> None:
    made = built(LAYERS, [LAYERS[0]], kind="application/vnd.in-toto+json")
    await site.take(save([], [named(made, "alpine:3")], made))
    bare = built([], [LAYERS[0]], rootfs=None)
    bare.blobs.append(LAYERS[0])
    await site.take(save([], [named(bare, "alpine:bare")], bare))
    assert await layers_of(site, "bare") == [digest_of(LAYERS[0])]


@pytest.mark.parametrize("listed", [None, []])
async def test_an_image_saved_by_digest(site: Site, listed: list[Any] | None) -> None:
    made = built(LAYERS)
    files = save([entry(made)], listed, made)
    with pytest.raises(ArchiveInvalid, match="has no name for"):
        await site.take(files)
    done = await site.take(files, name="alpine:3")
    assert await layers_of(site, "3") == [digest_of(each) for each in LAYERS]
    assert len(done.notes) == 1 and "does not list" in done.notes[0]


async def test_several_images_saved_by_digest(site: Site) -> None:
    one, two = built(LAYERS[:1]), built(LAYERS[1:])
    for listed in (None, [one.descriptor()]):
        files = save([entry(one), entry(two)], listed, one, two)
        with pytest.raises(ArchiveInvalid, match=r"two images named .*: give --as"):
            await site.take(files, name="alpine:3")
        with pytest.raises(ArchiveInvalid, match="has no name for"):
            await site.take(files)
        assert site.empty
    done = await site.take(files, name="alpine")
    assert [each.tag for each in done.references] == [None, None]
    for each, layers in zip(done.references, (LAYERS[:1], LAYERS[1:]), strict=True):
        assert each.repository == NAME
        assert await layers_of(site, each.digest) == [digest_of(layer) for layer in layers]


async def test_one_image_that_is_saved_twice_by_digest_has_the_tag(site: Site) -> None:
    made = built(LAYERS)
    done = await site.take(save([entry(made), entry(made)], None, made), name="alpine")
    assert {each.tag for each in done.references} == {"latest"}


async def test_an_image_saved_by_digest_beside_one_with_a_tag(site: Site) -> None:
    one, two = built(LAYERS[:1]), built(LAYERS[1:])
    files = save([entry(one, "alpine:1"), entry(two)], [named(one, "alpine:1")], one, two)
    with pytest.raises(ArchiveInvalid, match="has no name for"):
        await site.take(files)
    await site.take(files, name="alpine:2")
    assert await layers_of(site, "1") == [digest_of(LAYERS[0])]
    assert await layers_of(site, "2") == [digest_of(each) for each in LAYERS[1:]]


async def test_a_tag_that_only_manifest_json_has(site: Site) -> None:
    made = built(LAYERS)
    files = save([entry(made, "alpine:3", "ghcr.io/team/app:1")], [named(made, "alpine:3")], made)
    await site.take(files)
    for repository, tag in ((NAME, "3"), ("ghcr.io/team/app", "1")):
        assert await layers_of(site, tag, repository) == [digest_of(each) for each in LAYERS]


async def test_a_tag_that_only_manifest_json_has_and_layers_that_only_it_has(site: Site) -> None:
    wrong = built(LAYERS, [])
    tags = ("alpine:3", "ghcr.io/team/app:1")
    await site.take(save([entry(wrong, *tags)], [named(wrong, "alpine:3")], wrong))
    assert await layers_of(site, "1", "ghcr.io/team/app") == [digest_of(each) for each in LAYERS]


async def test_a_tag_of_two_images(site: Site) -> None:
    one, two = built(LAYERS[:1]), built(LAYERS[1:])
    entries = [entry(one, "alpine:2"), entry(two, "alpine:1")]
    with pytest.raises(ArchiveInvalid, match=r"alpine:2 is another image in manifest\.json than"):
        await site.take(save(entries, [named(one, "alpine:1"), named(two, "alpine:2")], one, two))
    assert site.empty


async def test_what_containerd_exports_for_docker(site: Site) -> None:
    """An index, of which manifest.json lists the image for its own platform."""
    amd, arm = built(LAYERS[:1]), built(LAYERS[1:])
    whole = index({"linux/amd64": amd, "linux/arm64": arm})
    done = await site.take(
        save([entry(amd, "docker.io/library/alpine:3")], [named(whole, "alpine:3")], whole)
    )
    assert [(each.tag, each.digest) for each in done.references] == [("3", whole.digest)]
    assert done.notes == []


@pytest.mark.parametrize("compress", [gzip.compress, zstd.compress])
async def test_a_compressed_archive(site: Site, compress: Any) -> None:
    made = built(LAYERS)
    files = save([entry(made, "alpine:3")], [named(made, "alpine:3")], made)
    await site.take(compress(tar(files)))
    assert await layers_of(site, "3") == [digest_of(each) for each in LAYERS]


async def test_layers_compressed_by_zstd(site: Site) -> None:
    files = saved(LAYERS, ["alpine:3"])
    files = {n: zstd.compress(each) if n.endswith("layer.tar") else each for n, each in files.items()}
    await site.take(files)
    found = json.loads((await site.parts.namespaces.get_manifest(NAME, Tag("3"))).content)
    assert {each["mediaType"] for each in found["layers"]} == {f"{TAR}+zstd"}
    assert await site.blob(NAME, found["layers"][0]["digest"]) == zstd.compress(LAYERS[0])


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("docker.io/library/alpine:3", "alpine:3"),
        ("docker.io/team/app", "team/app:latest"),
        ("alpine", "alpine:latest"),
        ("localhost:5000/app", "localhost:5000/app:latest"),
    ],
)
def test_names_as_docker_shows_them(name: str, short: str) -> None:
    assert short_name(name) == short
