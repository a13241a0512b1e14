"""What a manifest keeps: manifests, and all blobs whose digest stands in it."""

from __future__ import annotations

from array import array
from typing import NamedTuple

from storage.errors import ManifestInvalid
from storage.oci import IMAGES, INDEXES, Manifest, digests_in, parse_manifest


class ManifestNode(NamedTuple):
    """What a manifest keeps; `names` are the prefix_of() the digests that it names."""

    children: tuple[str, ...]
    names: array[int]


def prefix_of(digest: str) -> int:
    """The first 64 bits of a digest.  If two digests share them, one blob more than necessary is kept."""
    return int(digest.partition(":")[2][:16], 16)


def node(manifest: Manifest) -> ManifestNode:
    found: set[str] = set(digests_in(manifest.content))
    children = found
    try:
        content = parse_manifest(manifest.content)
    except ManifestInvalid:
        pass
    else:
        listed = {str(each.digest) for each in content.listed}
        found |= listed | {
            str(each.digest) for each in content.blobs
        }  # JSON can write a character as \\u003a
        if manifest.media_type in (*IMAGES, *INDEXES):
            children = listed
        elif content.subject is not None:
            children = found - {str(content.subject.digest)}
    return ManifestNode(tuple(children), array("Q", sorted(map(prefix_of, found))))
