"""The format of bundles: an OCI image layout that other tools can read, with one more document.

    oci-layout          image-spec, image-layout.md
    index.json          a descriptor for each reference, with its full name: `docker.io/library/alpine:3`
    entrepot.json       BundleContents: what it contains, what is left out, what earlier bundles contain
    entrepot.json.sig   64 bytes: the Ed25519 signature (RFC 8032) of entrepot.json, if the bundle is signed
    blobs/<algorithm>/<encoded>

entrepot.json states the digests of index.json and of every manifest: its signature covers the whole bundle.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from storage.archives.archive import DOCUMENT_LIMIT, Archive, read
from storage.errors import ArchiveInvalid
from storage.names import written
from storage.oci import OCI_INDEX, Digest

if TYPE_CHECKING:
    from collections.abc import Callable

LAYOUT, INDEX, CONTENTS, SIGNATURE = "oci-layout", "index.json", "entrepot.json", "entrepot.json.sig"
LAYOUT_CONTENT = b'{"imageLayoutVersion":"1.0.0"}'
FORMAT = 1
# image-spec, annotations.md; skopeo selects an image by it, and accepts a full name.
REF_NAME = "org.opencontainers.image.ref.name"
# containerd and dockerd: the full name, if ref.name is only the tag.
IMAGE_NAME = "io.containerd.image.name"


class BundledManifest(msgspec.Struct, frozen=True, kw_only=True):
    """A manifest in a bundle.  `repository` is a full name."""

    repository: str
    digest: str
    media_type: str
    size: int


class BundledReference(BundledManifest, frozen=True, kw_only=True):
    """A reference in a bundle: a tag, or, without one, a digest.

    `validated` is when an origin last confirmed the tag, in seconds since the epoch.  Of an index the bundle
    contains the children for `platforms` but not those in `left_out`; it is `complete` if there are none.
    """

    tag: str | None = None
    validated: float | None = None
    platforms: list[str] = []
    complete: bool = True
    left_out: list[str] = []

    @property
    def name(self) -> str:
        return written(self.repository, self.tag or self.digest)


class BundledReferrer(BundledManifest, frozen=True, kw_only=True):
    """A referrer of something in the bundle: a signature, an SBOM."""

    subject: str


class BaseBundle(msgspec.Struct, frozen=True):
    """An earlier bundle: the digest of its entrepot.json, and when it was created."""

    digest: str
    created: float


class BundleContents(msgspec.Struct, frozen=True, kw_only=True):
    """The document entrepot.json.

    `created` is in seconds since the epoch, `index` the digest of index.json.  `blobs` are the digests of
    all content of the bundle, including manifests, by the namespaces that need it; `elsewhere` is what it
    needs and what the earlier bundles in `base` contain.
    """

    bundle: int = FORMAT
    created: float
    index: str
    base: list[BaseBundle] = []
    platforms: list[str] = []
    references: list[BundledReference] = []
    referrers: list[BundledReferrer] = []
    blobs: dict[str, list[str]] = {}
    elsewhere: dict[str, list[str]] = {}


def descriptor(named: BundledManifest) -> dict[str, Any]:
    """The descriptor of a manifest in index.json."""
    found: dict[str, Any] = {"mediaType": named.media_type, "digest": named.digest, "size": named.size}
    if isinstance(named, BundledReference):
        found["annotations"] = {REF_NAME: named.name, IMAGE_NAME: named.name}
    return found


def index_of(named: list[BundledManifest]) -> bytes:
    manifests = [descriptor(each) for each in named]
    return msgspec.json.encode({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests})


def blob_name(digest: Digest) -> str:
    """The path of a blob in an image layout."""
    return f"blobs/{digest.algorithm}/{digest.encoded}"


def read_contents(archive: Archive, check: Callable[[bytes, bytes | None], None]) -> BundleContents | None:
    """Read entrepot.json, after `check` has accepted it and its signature; None if it is not a bundle.

    Raises ArchiveInvalid, and what `check` raises.
    """
    if archive.size(CONTENTS) is None:
        return None
    content = read(archive, CONTENTS)
    check(content, None if archive.size(SIGNATURE) is None else read(archive, SIGNATURE, 64))
    found = decode(content, archive.what)
    if found.index != Digest.of(read(archive, INDEX)):
        raise ArchiveInvalid(f"{archive.what}: {INDEX} does not have the digest that {CONTENTS} states")
    return found


def decode(content: bytes, what: str) -> BundleContents:
    """Raises ArchiveInvalid."""
    try:
        found = msgspec.json.decode(content, type=BundleContents)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ArchiveInvalid(f"{what}: {CONTENTS} cannot be read: {error}") from None
    if found.bundle != FORMAT:
        raise ArchiveInvalid(
            f"{what} is a bundle of format {found.bundle}; this version reads format {FORMAT}"
        )
    return found


def encode(contents: BundleContents) -> bytes:
    """Raises ArchiveInvalid if it is larger than what is read."""
    content = msgspec.json.encode(contents)
    if len(content) > DOCUMENT_LIMIT:
        raise ArchiveInvalid(
            f"{CONTENTS} would have {len(content)} bytes, more than {DOCUMENT_LIMIT}: export two bundles"
        )
    return content


def sign(content: bytes, key: Path) -> bytes:
    """`key` is a private key in PEM.  Raises ValueError, OSError."""
    # Imported here: it takes long, and is rarely needed.
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        found = load_pem_private_key(key.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ValueError(f"{key} is not a private key in PEM without a passphrase: {error}") from None
    if not isinstance(found, Ed25519PrivateKey):
        raise ValueError(f"{key} is not an Ed25519 key: create one with openssl genpkey -algorithm ed25519")
    return found.sign(content)


def verify(content: bytes, signature: bytes, key: Path) -> bool:
    """`key` is a public key in PEM.  Raises ValueError, OSError."""
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        found = load_pem_public_key(key.read_bytes())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ValueError(f"{key} is not a public key in PEM: {error}") from None
    if not isinstance(found, Ed25519PublicKey):
        raise ValueError(
            f"{key} is not an Ed25519 key: derive it from the private key with openssl pkey -pubout"
        )
    try:
        found.verify(signature, content)
    except InvalidSignature:
        return False
    return True
