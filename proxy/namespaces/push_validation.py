"""What a pushed manifest must be, whatever is stored: its type and its form."""

from __future__ import annotations

import re

from storage.errors import ManifestInvalid
from storage.oci import (
    ARTIFACTS,
    IMAGES,
    INDEXES,
    MANIFESTS,
    OCI_INDEX,
    OCI_MANIFEST,
    Manifest,
    ManifestContent,
    declared_type,
    key_collision,
    parse_manifest,
)
from storage.validation import validate

# RFC 6838, section 4.2.
_MEDIA_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}")
# Types that clients set by default or by mistake, and types of files: no manifest has one of them.
_GENERAL = re.compile(
    r"(?:text|image|audio|video|font|model|message|multipart)/.*"
    r"|application/(?:octet-stream|json|x-www-form-urlencoded|(?:x-)?javascript|ecmascript|(?:[a-z.]*\+)?xml"
    r"|pdf|x-sh|x-tar|gzip|x-gzip|zip|zstd|x-binary|binary|wasm|x-shockwave-flash)",
    re.IGNORECASE,
)


def _collides(content: bytes) -> bool:
    try:
        return key_collision(content) is not None
    except (ValueError, RecursionError):
        return False  # it is no JSON


def parse_pushed(manifest: Manifest) -> ManifestContent | None:
    """Parse a pushed manifest.  None if its type and its form are unknown.  Raises ManifestInvalid."""
    media_type, declared = manifest.media_type, declared_type(manifest.content)
    if not media_type:
        raise ManifestInvalid("it was sent without a Content-Type, and has no mediaType")
    if declared not in (None, media_type):
        raise ManifestInvalid(
            f"its mediaType is {declared[:200]}, but its Content-Type is {media_type[:200]}"
        )
    if not _MEDIA_TYPE.fullmatch(media_type) or _GENERAL.fullmatch(media_type):
        raise ManifestInvalid(
            f"its Content-Type is {media_type[:200]}, which is no manifest's: send for example {OCI_MANIFEST}"
        )
    known = media_type in MANIFESTS
    try:
        content = parse_manifest(manifest.content)
    except ManifestInvalid:
        if known or _collides(manifest.content):
            raise
        return None
    if known:
        validate(media_type, manifest.content)
    # What has the forms of an image and of an index is read differently by different clients.
    if media_type in IMAGES and (content.listed or content.media_type == OCI_INDEX):
        raise ManifestInvalid(f"it lists manifests, as an index does, but its Content-Type is {media_type}")
    if media_type in INDEXES and (content.config or content.layers):
        raise ManifestInvalid(
            f"it has a config or layers, as an image does, but its Content-Type is {media_type}"
        )
    if media_type in ARTIFACTS and content.media_type not in ARTIFACTS and (content.blobs or content.listed):
        raise ManifestInvalid(f"it has the form of an image or index, but its Content-Type is {media_type}")
    return content
