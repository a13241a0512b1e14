"""What a bundle says of itself: an OCI image layout that other tools read, and what only we write in it.

    oci-layout          image-spec, image-layout.md
    index.json          a descriptor for each reference, named by its full name: `docker.io/library/alpine:3`
    entrepot.json       Contents: what is in it, what is left out on purpose, what an earlier bundle has
    entrepot.json.sig   64 bytes: the signature of entrepot.json by Ed25519 (RFC 8032), if it is signed
    blobs/<algorithm>/<encoded>

entrepot.json names every manifest by digest, and index.json too: so its signature covers all that is here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from storage.archives.archive import GIANT, Archive, read
from storage.errors import ArchiveInvalid
from storage.names import written
from storage.oci import OCI_INDEX, Digest

if TYPE_CHECKING:
    from collections.abc import Callable

LAYOUT, INDEX, CONTENTS, SIGNATURE = "oci-layout", "index.json", "entrepot.json", "entrepot.json.sig"
LAYOUT_CONTENT = b'{"imageLayoutVersion":"1.0.0"}'
FORMAT = 1
# image-spec, annotations.md; skopeo selects by it, and takes a full name there.
REF_NAME = "org.opencontainers.image.ref.name"
# containerd and dockerd: the full name, where ref.name is but the tag.
IMAGE_NAME = "io.containerd.image.name"


class Named(msgspec.Struct, frozen=True, kw_only=True):
    """A manifest that is in a repository; `repository` is a full name."""

    repository: str
    digest: str
    media_type: str
    size: int


class Held(Named, frozen=True, kw_only=True):
    """A tag, or without one a manifest that was asked for by its digest.

    `validated` is when an origin last said that the tag is this, in seconds since the epoch.  Of an index the
    children for `platforms` are here, and those in `left_out` are not; it is `complete` if there are none.
    """

    tag: str | None = None
    validated: float | None = None
    platforms: list[str] = []
    complete: bool = True
    left_out: list[str] = []

    @property
    def name(self) -> str:
        return written(self.repository, self.tag or self.digest)


class Referrer(Named, frozen=True, kw_only=True):
    """What refers to something that is here: a signature, an SBOM."""

    subject: str


class Base(msgspec.Struct, frozen=True):
    """An earlier bundle: the digest of its entrepot.json, and when it was made."""

    digest: str
    created: float


class Contents(msgspec.Struct, frozen=True, kw_only=True):
    """`created` is in seconds since the epoch, `index` the digest of index.json.

    `blobs` are the digests of all that is in the bundle, manifests too, by the namespaces that need them;
    `elsewhere` those that it needs and that are in the bundles that it is a delta of.
    """

    bundle: int = FORMAT
    created: float
    index: str
    base: list[Base] = []
    platforms: list[str] = []
    references: list[Held] = []
    referrers: list[Referrer] = []
    blobs: dict[str, list[str]] = {}
    elsewhere: dict[str, list[str]] = {}


def descriptor(named: Named) -> dict[str, Any]:
    """As index.json has it."""
    found: dict[str, Any] = {"mediaType": named.media_type, "digest": named.digest, "size": named.size}
    if isinstance(named, Held):
        found["annotations"] = {REF_NAME: named.name, IMAGE_NAME: named.name}
    return found


def index_of(named: list[Named]) -> bytes:
    manifests = [descriptor(each) for each in named]
    return msgspec.json.encode({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests})


def blob_name(digest: Digest) -> str:
    """Where it lies in a layout."""
    return f"blobs/{digest.algorithm}/{digest.encoded}"


def read_contents(archive: Archive, check: Callable[[bytes, bytes | None], None]) -> Contents | None:
    """What it says of itself, once `check` was given that and its signature; None where it is no bundle.

    Raises ArchiveInvalid, and what `check` raises.
    """
    if archive.size(CONTENTS) is None:
        return None
    content = read(archive, CONTENTS)
    check(content, None if archive.size(SIGNATURE) is None else read(archive, SIGNATURE, 64))
    found = decode(content, archive.what)
    if found.index != Digest.of(read(archive, INDEX)):
        raise ArchiveInvalid(f"{archive.what}: {INDEX} is not the one that {CONTENTS} says")
    return found


def decode(content: bytes, what: str) -> Contents:
    """Raises ArchiveInvalid."""
    try:
        found = msgspec.json.decode(content, type=Contents)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ArchiveInvalid(f"{what}: {CONTENTS} cannot be read: {error}") from None
    if found.bundle != FORMAT:
        raise ArchiveInvalid(f"{what} is a bundle of format {found.bundle}; this entrepot reads {FORMAT}")
    return found


def encode(contents: Contents) -> bytes:
    """Raises ArchiveInvalid where nobody would read it."""
    content = msgspec.json.encode(contents)
    if len(content) > GIANT:
        raise ArchiveInvalid(
            f"{CONTENTS} would have {len(content)} bytes, more than {GIANT}: make two bundles"
        )
    return content


def sign(content: bytes, key: Path) -> bytes:
    """`key` is a private key in PEM.  Raises ValueError, OSError."""
    # Here, since it takes a while, and few sign.
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        found = load_pem_private_key(key.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ValueError(f"{key} is no private key in PEM without a passphrase: {error}") from None
    if not isinstance(found, Ed25519PrivateKey):
        raise ValueError(f"{key} is no Ed25519 key: openssl genpkey -algorithm ed25519 makes one")
    return found.sign(content)


def verify(content: bytes, signature: bytes, key: Path) -> bool:
    """`key` is a public key in PEM.  Raises ValueError, OSError."""
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        found = load_pem_public_key(key.read_bytes())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ValueError(f"{key} is no public key in PEM: {error}") from None
    if not isinstance(found, Ed25519PublicKey):
        raise ValueError(f"{key} is no Ed25519 key: openssl pkey -pubout makes it of the private one")
    try:
        found.verify(signature, content)
    except InvalidSignature:
        return False
    return True
