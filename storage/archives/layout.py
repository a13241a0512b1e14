"""The content of an archive, by digest: bundles, OCI image layouts, and archives written by `docker save`.

Recent versions of `docker save` write an OCI layout and the older manifest.json; the layout is read, since it
says more.  The older form contains no manifests, so they are generated: see _saved().
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from storage.archives.archive import GZIP, Archive, ArchivePart, digest_of, inflated, read
from storage.archives.bundle import (
    IMAGE_NAME,
    INDEX,
    LAYOUT,
    REF_NAME,
    BundleContents,
    BundledManifest,
    blob_name,
    read_contents,
)
from storage.errors import ArchiveInvalid, DigestInvalid, ManifestInvalid
from storage.names import written
from storage.oci import MANIFEST_LIMIT, OCI_MANIFEST, Descriptor, Digest, parse_manifest

if TYPE_CHECKING:
    from collections.abc import Callable

SAVED = "manifest.json"
CONFIG, LAYER = "application/vnd.oci.image.config.v1+json", "application/vnd.oci.image.layer.v1.tar"


@dataclass(frozen=True, slots=True)
class Root:
    """A manifest that an archive lists.

    `name` is the name that it has there, in any form, or None.  `left_out` are the manifests below it that
    the archive omits on purpose, None if the archive does not say.  `validated` is when an origin last
    confirmed the tag, in seconds since the epoch.
    """

    descriptor: Descriptor
    name: str | None
    left_out: frozenset[str] | None = None
    validated: float | None = None


@dataclass(slots=True)
class Layout:
    """The content of an archive by digest.  Methods block, and raise ArchiveInvalid.

    `contents` is the document entrepot.json of a bundle, None for other archives.
    """

    archive: Archive
    contents: BundleContents | None = None
    roots: list[Root] = field(default_factory=list)
    _generated: dict[Digest, bytes] = field(default_factory=dict)
    _parts: dict[Digest, str] = field(default_factory=dict)

    @property
    def what(self) -> str:
        return self.archive.what

    def size(self, digest: Digest) -> int | None:
        """The size of a manifest or blob in bytes; None if the archive does not contain it."""
        generated = self._generated.get(digest)
        return self.archive.size(self._part(digest)) if generated is None else len(generated)

    def position(self, digest: Digest) -> int:
        return self.archive.position(self._part(digest))

    @contextmanager
    def opened(self, digest: Digest) -> Iterator[ArchivePart]:
        """Open a blob, whose content the caller verifies."""
        with self.archive.opened(self._part(digest)) as part:
            yield part

    def manifest(self, digest: Digest) -> bytes:
        """Read a manifest and verify its digest."""
        content = self._generated.get(digest)
        if content is None:
            content = read(self.archive, self._part(digest), MANIFEST_LIMIT)
        if (found := Digest.of(content, digest.algorithm)) != digest:
            raise ArchiveInvalid(f"{self.what}: {self._part(digest)} is damaged: its content is {found}")
        return content

    def _part(self, digest: Digest) -> str:
        return self._parts.get(digest) or blob_name(digest)


def read_layout(archive: Archive, check: Callable[[bytes | None, bytes | None], None]) -> Layout:
    """Read what an archive lists.

    `check` is called with entrepot.json and its signature, or with None if the archive is not a bundle.
    Raises ArchiveInvalid, and what `check` raises.
    """
    contents = read_contents(archive, check)
    if contents is not None:
        return Layout(archive, contents, _roots_of_bundle(archive, contents))
    check(None, None)
    if archive.size(INDEX) is not None:
        return Layout(archive, roots=_roots_of_index(archive))
    if archive.size(SAVED) is not None:
        return _saved(archive)
    raise ArchiveInvalid(
        f"{archive.what} is not an archive of images: it contains neither {INDEX} nor {SAVED}"
    )


def _roots_of_bundle(archive: Archive, contents: BundleContents) -> list[Root]:
    roots = [
        Root(_descriptor(archive, held), held.name, frozenset(held.left_out), held.validated)
        for held in contents.references
    ]
    for each in contents.referrers:
        roots.append(Root(_descriptor(archive, each), written(each.repository, each.digest), frozenset()))
    return roots


def _descriptor(archive: Archive, named: BundledManifest) -> Descriptor:
    try:
        return Descriptor(named.media_type, Digest.parse(named.digest), named.size)
    except DigestInvalid as error:
        raise ArchiveInvalid(f"{archive.what}: {named.repository}: {error}") from None


def _roots_of_index(archive: Archive) -> list[Root]:
    if archive.size(LAYOUT) is not None and b'"1.' not in read(archive, LAYOUT, MANIFEST_LIMIT):
        raise ArchiveInvalid(f"{archive.what}: {LAYOUT} states an unsupported version")
    try:
        found = parse_manifest(read(archive, INDEX))
    except ManifestInvalid as error:
        raise ArchiveInvalid(f"{archive.what}: {INDEX}: {error}") from None
    roots = []
    for each in found.listed:
        annotations = each.annotations or {}
        roots.append(Root(each, annotations.get(IMAGE_NAME) or annotations.get(REF_NAME)))
    return roots


# Archives written by docker save


class _Saved(msgspec.Struct, rename="pascal"):
    config: str
    repo_tags: list[str] | None = None
    layers: list[str] = []


class _Filesystem(msgspec.Struct):
    diff_ids: list[str] = []


class _Config(msgspec.Struct):
    rootfs: _Filesystem = msgspec.field(default_factory=_Filesystem)


def _saved(archive: Archive) -> Layout:
    """Generate an OCI manifest for each image, always the same for the same image, with unchanged layers.

    Its digest is not the one that the image was pulled with, since docker does not keep that manifest.
    """
    layout = Layout(archive)
    for each in _decoded(archive, SAVED, list[_Saved]):
        content = read(archive, each.config, MANIFEST_LIMIT)
        config = Descriptor(CONFIG, Digest.of(content), len(content))
        layers = _layers(layout, each)
        layout._parts[config.digest] = each.config
        document: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": config.to_json(),
            "layers": [layer.to_json() for layer in layers],
        }
        manifest = msgspec.json.encode(document)
        descriptor = Descriptor(OCI_MANIFEST, Digest.of(manifest), len(manifest))
        layout._generated[descriptor.digest] = manifest
        layout.roots += [Root(descriptor, name) for name in each.repo_tags or [None]]
    return layout


def _layers(layout: Layout, saved: _Saved) -> list[Descriptor]:
    archive = layout.archive
    diff_ids = _decoded(archive, saved.config, _Config).rootfs.diff_ids
    if len(diff_ids) != len(saved.layers):
        raise ArchiveInvalid(
            f"{archive.what}: {saved.config} names {len(diff_ids)} layers, {SAVED} {len(saved.layers)}"
        )
    layers = []
    for diff_id, name in zip(diff_ids, saved.layers, strict=True):
        layer = _layer(archive, diff_id, name)
        layout._parts[layer.digest] = name
        layers.append(layer)
    return layers


def _layer(archive: Archive, diff_id: str, name: str) -> Descriptor:
    """The descriptor of a layer.  The import verifies an uncompressed layer: its digest is its diff_id."""
    try:
        unpacked = Digest.parse(diff_id)
    except DigestInvalid as error:
        raise ArchiveInvalid(f"{archive.what}: a layer's diff_id: {error}") from None
    with archive.opened(name) as part:
        if part.at(0, len(GZIP)) != GZIP:
            return Descriptor(LAYER, unpacked, part.size)
        found = digest_of(inflated(part, f"{archive.what}: {name}"), unpacked.algorithm)
        if found != unpacked:
            raise ArchiveInvalid(
                f"{archive.what}: {name} is damaged: its uncompressed digest is {found}, not {unpacked}"
            )
        return Descriptor(f"{LAYER}+gzip", digest_of(part.chunks()), part.size)


def _decoded(archive: Archive, name: str, type: Any) -> Any:
    try:
        return msgspec.json.decode(read(archive, name, MANIFEST_LIMIT), type=type)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ArchiveInvalid(f"{archive.what}: {name} cannot be read: {error}") from None
