"""What an archive holds, by digest: our bundles, OCI image layouts of others, and what `docker save` wrote.

The newer `docker save` writes both, and the layout is the one that says more.  Its older form (manifest.json)
names no manifest, so one is made: see _saved().
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from storage.archives.archive import Archive, Part, digest_of, inflated, read
from storage.archives.bundle import (
    IMAGE_NAME,
    INDEX,
    LAYOUT,
    REF_NAME,
    Contents,
    Named,
    blob_name,
    read_contents,
)
from storage.errors import ArchiveInvalid, DigestInvalid, ManifestInvalid
from storage.oci import MANIFEST_LIMIT, OCI_MANIFEST, Descriptor, Digest, parse_manifest

if TYPE_CHECKING:
    from collections.abc import Callable

SAVED = "manifest.json"
CONFIG, LAYER = "application/vnd.oci.image.config.v1+json", "application/vnd.oci.image.layer.v1.tar"
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class Root:
    """A manifest that an archive speaks of.

    `name` is what it is called, in whatever form, None where it is not.  Of what it names, `left_out` are not
    in the archive on purpose; None: that is not told.  `validated` is when an origin said so last.
    """

    descriptor: Descriptor
    name: str | None
    left_out: frozenset[str] | None = None
    validated: float | None = None


@dataclass(slots=True)
class Layout:
    """`contents` is what one of our bundles says of itself.  Everything blocks, and raises ArchiveInvalid."""

    archive: Archive
    contents: Contents | None = None
    roots: list[Root] = field(default_factory=list)
    _made: dict[Digest, bytes] = field(default_factory=dict)
    _names: dict[Digest, str] = field(default_factory=dict)

    @property
    def what(self) -> str:
        return self.archive.what

    def size(self, digest: Digest) -> int | None:
        """Of a manifest or blob, as the archive has it; None where it has not."""
        made = self._made.get(digest)
        return self.archive.size(self._name(digest)) if made is None else len(made)

    def place(self, digest: Digest) -> int:
        return self.archive.place(self._name(digest))

    @contextmanager
    def opened(self, digest: Digest) -> Iterator[Part]:
        """A blob; its content is to be compared with the digest yet."""
        with self.archive.opened(self._name(digest)) as part:
            yield part

    def manifest(self, digest: Digest) -> bytes:
        """Compared with its digest."""
        content = self._made.get(digest)
        if content is None:
            content = read(self.archive, self._name(digest), MANIFEST_LIMIT)
        if (found := Digest.of(content, digest.algorithm)) != digest:
            raise ArchiveInvalid(f"{self.what}: {self._name(digest)} is damaged: its content is {found}")
        return content

    def _name(self, digest: Digest) -> str:
        return self._names.get(digest) or blob_name(digest)


def read_layout(archive: Archive, check: Callable[[bytes | None, bytes | None], None]) -> Layout:
    """`check` is given what one of our bundles says of itself, and its signature; None is no bundle of ours.

    Raises ArchiveInvalid, and what `check` raises.
    """
    contents = read_contents(archive, check)
    if contents is not None:
        return Layout(archive, contents, _told(archive, contents))
    check(None, None)
    if archive.size(INDEX) is not None:
        return Layout(archive, roots=_indexed(archive))
    if archive.size(SAVED) is not None:
        return _saved(archive)
    raise ArchiveInvalid(f"{archive.what} is no archive of images: it holds neither {INDEX} nor {SAVED}")


def _told(archive: Archive, contents: Contents) -> list[Root]:
    roots = [
        Root(_descriptor(archive, held), held.name, frozenset(held.left_out), held.validated)
        for held in contents.references
    ]
    for each in contents.referrers:
        roots.append(Root(_descriptor(archive, each), f"{each.repository}@{each.digest}", frozenset()))
    return roots


def _descriptor(archive: Archive, named: Named) -> Descriptor:
    try:
        return Descriptor(named.media_type, Digest.parse(named.digest), named.size)
    except DigestInvalid as error:
        raise ArchiveInvalid(f"{archive.what}: {named.repository}: {error}") from None


def _indexed(archive: Archive) -> list[Root]:
    if archive.size(LAYOUT) is not None and b'"1.' not in read(archive, LAYOUT, MANIFEST_LIMIT):
        raise ArchiveInvalid(f"{archive.what}: {LAYOUT} is of a version that is not known here")
    try:
        found = parse_manifest(read(archive, INDEX))
    except ManifestInvalid as error:
        raise ArchiveInvalid(f"{archive.what}: {INDEX}: {error}") from None
    roots = []
    for each in found.listed:
        annotations = each.annotations or {}
        roots.append(Root(each, annotations.get(IMAGE_NAME) or annotations.get(REF_NAME)))
    return roots


# What docker save wrote


class _Saved(msgspec.Struct, rename="pascal"):
    config: str
    repo_tags: list[str] | None = None
    layers: list[str] = []


class _Filesystem(msgspec.Struct):
    diff_ids: list[str] = []


class _Config(msgspec.Struct):
    rootfs: _Filesystem = msgspec.field(default_factory=_Filesystem)


def _saved(archive: Archive) -> Layout:
    """With a manifest for each image, always the same for the same: an OCI one, with the layers as they are.

    It is not the one that the image was pulled by, which docker did not keep: so its digest is another.
    """
    layout = Layout(archive)
    for each in _decoded(archive, SAVED, list[_Saved]):
        content = read(archive, each.config, MANIFEST_LIMIT)
        config = Descriptor(CONFIG, Digest.of(content), len(content))
        layers = _layers(layout, each)
        layout._names[config.digest] = each.config
        document: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": config.to_json(),
            "layers": [layer.to_json() for layer in layers],
        }
        made = msgspec.json.encode(document)
        descriptor = Descriptor(OCI_MANIFEST, Digest.of(made), len(made))
        layout._made[descriptor.digest] = made
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
        layout._names[layer.digest] = name
        layers.append(layer)
    return layers


def _layer(archive: Archive, diff_id: str, name: str) -> Descriptor:
    """What is not compressed is compared with its digest when it is taken in, which is its diff_id."""
    try:
        unpacked = Digest.parse(diff_id)
    except DigestInvalid as error:
        raise ArchiveInvalid(f"{archive.what}: a layer's diff_id: {error}") from None
    with archive.opened(name) as part:
        if part.at(0, len(_GZIP)) != _GZIP:
            return Descriptor(LAYER, unpacked, part.size)
        found = digest_of(inflated(part, f"{archive.what}: {name}"), unpacked.algorithm)
        if found != unpacked:
            raise ArchiveInvalid(f"{archive.what}: {name} is damaged: unpacked it is {found}, not {unpacked}")
        return Descriptor(f"{LAYER}+gzip", digest_of(part.chunks()), part.size)


def _decoded(archive: Archive, name: str, type: Any) -> Any:
    try:
        return msgspec.json.decode(read(archive, name, MANIFEST_LIMIT), type=type)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ArchiveInvalid(f"{archive.what}: {name} cannot be read: {error}") from None
