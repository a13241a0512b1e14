"""What a manifest must be that is pushed or imported, beyond what is needed to read it.

Of what comes from an upstream this is not demanded, since clients may pull it there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, TypeAlias

import msgspec

from storage.errors import ManifestInvalid
from storage.oci import ARTIFACTS, Digest

# image-spec, descriptor.md: an int64, which must not be negative.
_Size: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class _PushedPlatform(msgspec.Struct):
    os: str | None = None
    architecture: str | None = None
    variant: str | None = None
    os_version: str | None = msgspec.field(default=None, name="os.version")
    os_features: list[str] | None = msgspec.field(default=None, name="os.features")
    features: list[str] | None = None  # of Docker


class _PushedDescriptor(msgspec.Struct):
    digest: str
    size: _Size
    urls: list[str] | None = None
    data: bytes | None = None
    platform: _PushedPlatform | None = None


class _PushedManifest(msgspec.Struct):
    schema_version: int | None = msgspec.field(default=None, name="schemaVersion")
    config: _PushedDescriptor | None = None
    layers: list[_PushedDescriptor] | None = None
    manifests: list[_PushedDescriptor] | None = None
    subject: _PushedDescriptor | None = None

    def descriptors(self) -> Iterator[_PushedDescriptor]:
        yield from filter(None, (self.config, self.subject))
        for several in filter(None, (self.layers, self.manifests)):
            yield from several


class _PushedArtifact(_PushedManifest):
    blobs: list[_PushedDescriptor] | None = None

    def descriptors(self) -> Iterator[_PushedDescriptor]:
        yield from super().descriptors()
        yield from self.blobs or ()


_decode = msgspec.json.Decoder(_PushedManifest).decode
_decode_artifact = msgspec.json.Decoder(_PushedArtifact).decode


def validate(media_type: str, content: bytes) -> None:
    """Check the descriptors of a manifest of a known type, which parse_manifest() can read.

    What clients in Go cannot decode is refused, as a size that is no int64, and so is what no content can
    be: fewer than no bytes, or `data` that is other content than the digest says.  Raises ManifestInvalid,
    which names the member that is wrong.
    """
    found: _PushedManifest
    try:
        found = (_decode_artifact if media_type in ARTIFACTS else _decode)(content)
    except (ValueError, RecursionError) as error:
        raise ManifestInvalid(f"not a manifest: {error}") from None
    for each in found.descriptors():
        if each.data is not None and not _describes(each, each.data):
            raise ManifestInvalid(f"the data in its descriptor of {each.digest} is other content")


def _describes(descriptor: _PushedDescriptor, data: bytes) -> bool:
    digest = Digest.parse(descriptor.digest)
    return len(data) == descriptor.size and Digest.of(data, digest.algorithm) == digest
