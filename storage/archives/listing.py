"""What an archive lists: the documents of bundles, of OCI image layouts, and of docker save.

Recent versions of `docker save`, and containerd, write an OCI layout and the older manifest.json.  Both are
read, since released versions of Docker wrote layouts that are wrong or incomplete: see saved.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from storage.archives.archive import Archive, read
from storage.archives.bundle import (
    IMAGE_NAME,
    INDEX,
    LAYOUT,
    REF_NAME,
    BundleContents,
    BundledManifest,
    read_contents,
)
from storage.archives.layout import Layout, Root
from storage.archives.saved import SAVED, add_saved
from storage.errors import ArchiveInvalid, DigestInvalid, ManifestInvalid
from storage.names import written
from storage.oci import MANIFEST_LIMIT, Descriptor, Digest, parse_manifest

if TYPE_CHECKING:
    from collections.abc import Callable


def read_layout(archive: Archive, check: Callable[[bytes | None, bytes | None], None]) -> Layout:
    """Read what an archive lists.

    `check` is called with entrepot.json and its signature, or with None if the archive is not a bundle.
    Raises ArchiveInvalid, and what `check` raises.
    """
    contents = read_contents(archive, check)
    if contents is not None:
        return Layout(archive, contents, _roots_of_bundle(archive, contents))
    check(None, None)
    layout = Layout(archive)
    if archive.size(INDEX) is not None:
        layout.roots = _roots_of_index(archive)
    elif archive.size(SAVED) is None:
        raise ArchiveInvalid(
            f"{archive.what} is not an archive of images: it contains neither {INDEX} nor {SAVED}"
        )
    if archive.size(SAVED) is not None:
        add_saved(layout)
    return layout


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
