"""The archives of docker save: manifest.json, and how it agrees with index.json.

Until version 24 Docker wrote no manifests, and docker-archives of skopeo and podman have none: they are
generated.  Docker 25 and later, and containerd, write index.json as well, which says more.  But releases of
Docker 25 wrote index.json without images that were saved by digest, with layers in a wrong order, or without
layers (moby 47065, 47150, 47210): what manifest.json says of these is imported, if the config confirms it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import msgspec

from storage.archives.archive import Archive, compression, digest_of, inflated, read
from storage.archives.bundle import INDEX
from storage.archives.layout import Layout, Root
from storage.errors import ArchiveInvalid, DigestInvalid
from storage.graph import Walk, contents
from storage.oci import ALGORITHMS, MANIFEST_LIMIT, OCI_MANIFEST, Descriptor, Digest, ManifestContent

SAVED = "manifest.json"
CONFIG, LAYER = "application/vnd.oci.image.config.v1+json", "application/vnd.oci.image.layer.v1.tar"
_CONFIGS = (CONFIG, "application/vnd.docker.container.image.v1+json")
_LAYERS = ("application/vnd.oci.image.layer.", "application/vnd.docker.image.rootfs.")
_BLOB = re.compile(rf"blobs/({'|'.join(ALGORITHMS)})/([0-9a-f]+)")
# The prefixes that docker leaves out of names.
_DEFAULT = ("docker.io/library/", "docker.io/")


class _Saved(msgspec.Struct, rename="pascal"):
    config: str
    repo_tags: list[str] | None = None
    layers: list[str] | None = None


class _Filesystem(msgspec.Struct):
    diff_ids: list[str] | None = None


class _Config(msgspec.Struct):
    rootfs: _Filesystem | None = None


class _Listed(NamedTuple):
    """An image of index.json, below a root."""

    root: Root
    manifest: Digest
    content: ManifestContent


def add_saved(layout: Layout) -> None:
    """Add what only manifest.json lists to the roots, and check what index.json lists as well.

    Raises ArchiveInvalid.
    """
    listed = list(_listed(layout))
    named = {
        short_name(each.root.name): each.content.config.digest
        for each in listed
        if each.root.name and each.content.config
    }
    for saved in _decoded(layout.archive, SAVED, list[_Saved]):
        config = Digest.of(read(layout.archive, saved.config, MANIFEST_LIMIT))
        for name in saved.repo_tags or ():
            if named.get(short_name(name), config) != config:
                raise ArchiveInvalid(f"{layout.what}: {name} is another image in {SAVED} than in {INDEX}")
        found = [each for each in listed if each.content.config and each.content.config.digest == config]
        if found:
            _check_listed(layout, saved, found)
            continue
        generated = generate(layout, saved)
        layout.roots += [Root(generated, name) for name in saved.repo_tags or [None]]
        if layout.archive.size(INDEX) is not None:
            layout.notes.append(
                f"{INDEX} does not list {_name(saved)}: it is imported as {SAVED} describes it,"
                f" as {generated.digest}"
            )


def _listed(layout: Layout) -> Iterator[_Listed]:
    """The images of index.json that the archive contains."""
    for root in layout.roots:
        steps = Walk([root.descriptor.digest])
        for digest in steps:
            content = contents(layout.manifest(digest)) if layout.size(digest) is not None else None
            if content is not None:
                steps.add(child.digest for child in content.children)
                yield _Listed(root, digest, content)


def _check_listed(layout: Layout, saved: _Saved, found: list[_Listed]) -> None:
    """Check an image that both documents list; take the layers of manifest.json where only they are right."""
    layers = _stated_layers(layout, saved)
    wrong = {each.manifest for each in found if [layer.digest for layer in each.content.layers] != layers}
    digests = {each.root.descriptor.digest for each in found}
    if wrong:
        both = f"{layout.what}: {INDEX} and {SAVED} list different layers for {_name(saved)}"
        if indexes := digests - wrong:
            raise ArchiveInvalid(f"{both}, which is part of {', '.join(sorted(indexes))}")
        try:
            generated = generate(layout, saved)
        except ArchiveInvalid as error:
            raise ArchiveInvalid(f"{both}, and those of {SAVED} are wrong: {error}") from None
        layout.roots = [
            replace(root, descriptor=generated) if root.descriptor.digest in wrong else root
            for root in layout.roots
        ]
        layout.notes.append(
            f"{INDEX} lists wrong layers for {_name(saved)} ({', '.join(sorted(wrong))}): it is imported as"
            f" {SAVED} describes it, as {generated.digest}"
        )
        digests = {generated.digest}
    names = {short_name(each.root.name) for each in found if each.root.name}
    roots = {root.descriptor.digest: root for root in layout.roots if root.descriptor.digest in digests}
    for name in saved.repo_tags or ():
        if short_name(name) not in names and len(roots) == 1:
            layout.roots.append(replace(*roots.values(), name=name))


def _stated_layers(layout: Layout, saved: _Saved) -> list[Digest]:
    """The digests of the layers in manifest.json: from their names, as Docker 25 writes them, or computed."""
    stated = [_BLOB.fullmatch(name) for name in saved.layers or ()]
    if all(stated):
        return [Digest(f"{each[1]}:{each[2]}") for each in stated if each]
    return [layer.digest for layer in _layers(layout, saved)]


def _name(saved: _Saved) -> str:
    return ", ".join(saved.repo_tags or [f"the image of the config {saved.config}"])


def short_name(name: str) -> str:
    """A name as docker displays it, with its tag."""
    for each in _DEFAULT:
        name = name.removeprefix(each)
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


# Manifests that the archive does not contain


def generate(layout: Layout, saved: _Saved) -> Descriptor:
    """Generate an OCI manifest, always the same for the same image, with unchanged layers.

    Its digest is not the one that the image was pulled with, since docker does not keep that manifest.
    """
    content = read(layout.archive, saved.config, MANIFEST_LIMIT)
    config = Descriptor(CONFIG, Digest.of(content), len(content))
    layers = _layers(layout, saved)
    layout.place(config.digest, saved.config)
    document: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": config.to_json(),
        "layers": [layer.to_json() for layer in layers],
    }
    return layout.generate(OCI_MANIFEST, msgspec.json.encode(document))


def _layers(layout: Layout, saved: _Saved) -> list[Descriptor]:
    archive, names = layout.archive, saved.layers or []
    rootfs = _decoded(archive, saved.config, _Config).rootfs
    diff_ids = (rootfs.diff_ids if rootfs else None) or []
    if len(diff_ids) != len(names):
        raise ArchiveInvalid(
            f"{archive.what}: {saved.config} names {len(diff_ids)} layers, {SAVED} {len(names)}"
        )
    layers = []
    for diff_id, name in zip(diff_ids, names, strict=True):
        layer = _layer(archive, diff_id, name)
        layout.place(layer.digest, name)
        layers.append(layer)
    return layers


def _layer(archive: Archive, diff_id: str, name: str) -> Descriptor:
    """The descriptor of a layer.  The import verifies an uncompressed layer: its digest is its diff_id."""
    unpacked = _diff_id(archive, diff_id)
    with archive.opened(name) as part:
        kind = compression(part.at(0, 8))
        if kind is None:
            stated = _BLOB.fullmatch(name)
            if stated is not None and stated[1] == unpacked.algorithm and stated[2] != unpacked.encoded:
                raise ArchiveInvalid(f"{archive.what}: {name} is listed as the layer {unpacked}")
            return Descriptor(LAYER, unpacked, part.size)
        found = digest_of(inflated(part, kind, f"{archive.what}: {name}"), unpacked.algorithm)
        if found != unpacked:
            raise ArchiveInvalid(
                f"{archive.what}: {name} is damaged: its uncompressed digest is {found}, not {unpacked}"
            )
        return Descriptor(f"{LAYER}+{kind}", digest_of(part.chunks()), part.size)


def _diff_id(archive: Archive, text: str) -> Digest:
    try:
        return Digest.parse(text)
    except DigestInvalid as error:
        raise ArchiveInvalid(f"{archive.what}: a layer's diff_id: {error}") from None


def _decoded(archive: Archive, name: str, type: Any) -> Any:
    try:
        return msgspec.json.decode(read(archive, name, MANIFEST_LIMIT), type=type)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ArchiveInvalid(f"{archive.what}: {name} cannot be read: {error}") from None


# image-spec, config.md: rootfs.diff_ids are the digests of the uncompressed layers, in their order.


def check_layers(layout: Layout, digest: Digest, content: ManifestContent) -> None:
    """Check the layers of an image against its config, as far as nothing must be decompressed.

    Raises ArchiveInvalid.  Other artifacts, and images without diff_ids, are not checked.
    """
    config, layers = content.config, content.layers
    if config is None or config.media_type not in _CONFIGS or layout.size(config.digest) is None:
        return
    try:
        rootfs = msgspec.json.decode(layout.manifest(config.digest), type=_Config).rootfs
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return
    if rootfs is None or rootfs.diff_ids is None or not all(_of_image(each) for each in layers):
        return
    if len(rootfs.diff_ids) != len(layers):
        raise ArchiveInvalid(
            f"{layout.what}: {digest} has {len(layers)} layers, but its config {len(rootfs.diff_ids)}"
        )
    for layer, diff_id in zip(layers, rootfs.diff_ids, strict=True):
        unpacked = _diff_id(layout.archive, diff_id)
        if (
            layer.media_type.endswith("tar")
            and layer.digest.algorithm == unpacked.algorithm
            and layer.digest != unpacked
        ):
            raise ArchiveInvalid(
                f"{layout.what}: {digest} has the layer {layer.digest}, where its config has {unpacked}"
            )


def _of_image(layer: Descriptor) -> bool:
    return layer.media_type.startswith(_LAYERS)
