"""The terms of the OCI distribution and image specifications as values: no I/O, no policy.

Text from outside is parsed here and nowhere else; the rest of the code relies on the values.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Literal, TypeAlias

import msgspec

from storage.errors import DigestInvalid, ManifestInvalid, NameInvalid, TagInvalid

# image-spec, descriptor.md, "Digests"; no other algorithm is registered whose digests can be verified.
ALGORITHMS = ("sha256", "sha512")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
_DIGEST_BYTES = re.compile(_DIGEST.pattern.encode())
_ANY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?:/[A-Za-z0-9][A-Za-z0-9._-]*)*")
# distribution-spec, "Pulling manifests": <name> and <reference> as a tag.
_NAME = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
PLATFORM = re.compile(r"[a-z0-9]+/[a-z0-9_]+(?:/[a-z0-9.]+)?")  # os/architecture[/variant]
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")

NAME_LIMIT = 255  # characters of "host/name": recommended by the specification, and enforced by clients
# Bytes.  distribution-spec, "Pushing Manifests": registries accept 4 MiB or more; containerd no more.
MANIFEST_LIMIT = 4 << 20

OCTETS = "application/octet-stream"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_SCHEMA1 = "application/vnd.docker.distribution.manifest.v1+prettyjws"
# Of OCI 1.1's release candidates, and of ORAS before it: their content is listed in `blobs`.
OCI_ARTIFACT = "application/vnd.oci.artifact.manifest.v1+json"
ORAS_ARTIFACT = "application/vnd.cncf.oras.artifact.manifest.v1+json"
IMAGES = (OCI_MANIFEST, DOCKER_MANIFEST)
INDEXES = (OCI_INDEX, DOCKER_LIST)
ARTIFACTS = (OCI_ARTIFACT, ORAS_ARTIFACT)
# The manifests whose form is known, so that everything they name can be read.
MANIFESTS = (*IMAGES, *INDEXES, *ARTIFACTS)

Hash: TypeAlias = "hashlib._Hash"


class Digest(str):
    """A content digest, `algorithm:encoded`: equal digests mean equal content."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Parse a digest.  Raises DigestInvalid."""
        if not _DIGEST.fullmatch(text):
            raise DigestInvalid(f"{text[:150]!r} is not sha256:<64 hex digits> or sha512:<128 hex digits>")
        return cls(text)

    @classmethod
    def of(cls, content: bytes, algorithm: str = "sha256") -> Digest:
        return cls.of_hash(hashlib.new(algorithm, content))

    @classmethod
    def of_hash(cls, hash: Hash) -> Digest:
        """The digest of the bytes that were hashed."""
        return cls(f"{hash.name}:{hash.hexdigest()}")

    @property
    def algorithm(self) -> str:
        return self.partition(":")[0]

    @property
    def encoded(self) -> str:
        return self.partition(":")[2]


def digests_in(content: bytes) -> list[Digest]:
    """All digests that occur anywhere in `content`, whatever its format."""
    return [Digest(each.decode()) for each in _DIGEST_BYTES.findall(content)]


class Tag(str):
    """The name of a manifest in a repository, which can later point to another manifest."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Tag:
        """Parse a tag.  Raises TagInvalid."""
        if not _TAG.fullmatch(text):
            raise TagInvalid(f"{text[:150]!r} is not a tag: 1 to 128 of letters, digits, '_', '.', '-'")
        return cls(text)


Reference: TypeAlias = Digest | Tag
NameGrammar: TypeAlias = Literal["specification", "any"]


def parse_reference(text: str) -> Reference:
    """Parse a digest, if there is a colon in `text`, or else a tag.  Raises DigestInvalid, TagInvalid."""
    return Digest.parse(text) if ":" in text else Tag.parse(text)


def parse_name(text: str, grammar: NameGrammar = "specification") -> str:
    """Check the name of a repository and return it.  Raises NameInvalid.

    The grammar `any` also has upper case, which registries of models use: components of letters, digits, ".",
    "_" and "-" that begin with a letter or digit.
    """
    valid = _NAME if grammar == "specification" else _ANY_NAME
    if len(text) > NAME_LIMIT or not valid.fullmatch(text):
        raise NameInvalid(f"{text[:100]!r} is not a repository name")
    return text


@dataclass(frozen=True, slots=True)
class Span:
    """The bytes [start, stop) of some content; `stop` None is its end.  A negative `start` counts from it."""

    start: int
    stop: int | None = None

    def of(self, size: int) -> Span:
        """These bytes of content of `size` bytes, with a start from its beginning."""
        return self if self.start >= 0 else Span(max(0, size + self.start), size)


@dataclass(frozen=True, slots=True)
class Descriptor:
    """The description of some content: image-spec, descriptor.md.

    `size` is in bytes, or -1 if the origin does not state it.  `platform` is os/architecture[/variant], or
    None if none is stated.
    """

    media_type: str
    digest: Digest
    size: int
    artifact_type: str | None = None
    annotations: Mapping[str, str] | None = field(default=None, compare=False)
    platform: str | None = field(default=None, compare=False)

    @property
    def distributable(self) -> bool:
        """Whether registries may store it: image-spec, layer.md, "Non-Distributable Layers".

        The media type alone decides: `urls` only list further places from which content may be downloaded.
        """
        return not self.media_type.startswith(_NONDISTRIBUTABLE)

    def to_json(self) -> dict[str, Any]:
        """The descriptor as plain JSON values."""
        digest = str(self.digest)  # msgspec does not encode subclasses of str
        members: dict[str, Any] = {"mediaType": self.media_type, "digest": digest, "size": self.size}
        if self.artifact_type:
            members["artifactType"] = self.artifact_type
        if self.annotations:
            members["annotations"] = dict(self.annotations)
        return members

    @classmethod
    def from_json(cls, value: Any) -> Descriptor:
        """Parse plain JSON values.  Raises ManifestInvalid."""
        try:
            return _descriptor(msgspec.convert(value, _JSONDescriptor))
        except (msgspec.ValidationError, DigestInvalid) as error:
            raise ManifestInvalid(f"not a descriptor: {error}") from None


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest: its exact bytes, which its digest covers, and their media type."""

    media_type: str
    content: bytes
    digest: Digest

    @classmethod
    def of(cls, media_type: str, content: bytes, algorithm: str = "sha256") -> Manifest:
        return cls(media_type, content, Digest.of(content, algorithm))

    @property
    def descriptor(self) -> Descriptor:
        return Descriptor(self.media_type, self.digest, len(self.content))


class _JSONDescriptor(msgspec.Struct, rename="camel", omit_defaults=True):
    media_type: str
    digest: str
    size: int
    artifact_type: str | None = None
    annotations: dict[str, str] | None = None
    platform: Any = None  # of any form: a strange platform does not make a manifest invalid


class _JSONManifest(msgspec.Struct, rename="camel", omit_defaults=True):
    schema_version: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET  # never looked at
    media_type: str | None = None
    artifact_type: str | None = None
    config: _JSONDescriptor | None = None
    layers: list[_JSONDescriptor] | None = None
    manifests: list[_JSONDescriptor] | None = None
    blobs: Any = None  # of any form: only artifact manifests have the field
    subject: _JSONDescriptor | None = None
    annotations: dict[str, str] | None = None


class _JSONType(msgspec.Struct, rename="camel"):
    media_type: Any = None


_decode = msgspec.json.Decoder(_JSONManifest).decode
_encode = msgspec.json.Encoder().encode
_decode_type = msgspec.json.Decoder(_JSONType).decode
# The members that clients read, of manifests, of their descriptors, and of the platforms of these.
_MEMBERS = (
    frozenset(_JSONManifest.__struct_encode_fields__),
    frozenset((*_JSONDescriptor.__struct_encode_fields__, "urls", "data")),
    frozenset(("os", "architecture", "variant", "os.version", "os.features", "features")),
)
_NESTED = (
    frozenset(("config", "layers", "manifests", "blobs", "subject")),
    frozenset(("platform",)),
    frozenset[str](),
)
_FOLDED = tuple({member.casefold() for member in members} for members in _MEMBERS)
_MANIFEST = re.compile(r".*\.(?:manifest|index)\..*\+(?:json|prettyjws)")
_NONDISTRIBUTABLE = (
    "application/vnd.oci.image.layer.nondistributable.",
    "application/vnd.docker.image.rootfs.foreign.",
)


@dataclass(frozen=True, slots=True)
class ManifestContent:
    """The content of a manifest or index, as far as a registry uses it.

    `media_type` is the one that is `declared` in it, or else follows from its form.  `layers` are also what
    artifact manifests list as blobs.  `listed` are the entries of an index: `children`, which are manifests,
    and blobs, as in the caches of BuildKit.  `unread` are digests that occur elsewhere in a manifest of an
    unknown type, which may be content that it names.
    """

    media_type: str
    declared: str | None
    artifact_type: str | None
    config: Descriptor | None
    layers: tuple[Descriptor, ...]
    listed: tuple[Descriptor, ...]
    subject: Descriptor | None
    annotations: Mapping[str, str]
    unread: frozenset[Digest] = frozenset()

    @property
    def children(self) -> tuple[Descriptor, ...]:
        return tuple(each for each in self.listed if _MANIFEST.fullmatch(each.media_type))

    @property
    def blobs(self) -> tuple[Descriptor, ...]:
        """The config, then the layers, then the entries of an index that are not manifests."""
        listed = (each for each in self.listed if not _MANIFEST.fullmatch(each.media_type))
        return (*([self.config] if self.config else []), *self.layers, *listed)

    @property
    def distributable(self) -> tuple[Descriptor, ...]:
        """The blobs that registries may store."""
        return tuple(each for each in self.blobs if each.distributable)


def parse_manifest(content: bytes) -> ManifestContent:
    """Parse a manifest or an index.  Raises ManifestInvalid, also if clients may read it differently.

    image-spec, manifest.md and image-index.md; Docker's manifest v2 schema 2 has the same form.
    """
    try:
        found = _decode(content)
        if not _keys_differ(content, found) and (collision := key_collision(content)) is not None:
            raise ManifestInvalid(
                f"clients read its key {collision!r} differently: keys must differ in more than case"
            )
        media_type = _media_type(found)
        blobs = msgspec.convert(found.blobs or [], list[_JSONDescriptor]) if media_type in ARTIFACTS else []
        config = _descriptor(found.config) if found.config else None
        parsed = ManifestContent(
            declared=found.media_type,
            media_type=media_type,
            # image-spec, manifest.md: without artifactType, the config's media type is the artifact's.
            artifact_type=found.artifact_type or (config.media_type if config else None),
            config=config,
            layers=tuple(_descriptor(each) for each in (*(found.layers or ()), *blobs)),
            listed=tuple(_descriptor(each) for each in found.manifests or ()),
            subject=_descriptor(found.subject) if found.subject else None,
            annotations=found.annotations or {},
        )
    except (ValueError, RecursionError, DigestInvalid) as error:
        raise ManifestInvalid(f"not a manifest: {error}") from None
    if parsed.declared in MANIFESTS or (parsed.declared is None and (parsed.blobs or parsed.listed)):
        return parsed
    read = {each.digest for each in (*parsed.blobs, *parsed.listed, *filter(None, [parsed.subject]))}
    return replace(parsed, unread=frozenset(digests_in(content)) - read)


def media_type_of(content: bytes) -> str:
    """The media type that a manifest declares, or that follows from its form.  Raises ManifestInvalid."""
    try:
        return _media_type(_decode(content))
    except (ValueError, RecursionError) as error:
        raise ManifestInvalid(f"not a manifest: {error}") from None


def _media_type(found: _JSONManifest) -> str:
    if found.media_type:
        return found.media_type
    if found.manifests is not None:
        return OCI_INDEX
    return OCI_ARTIFACT if found.blobs and not found.config and not found.layers else OCI_MANIFEST


def _keys_differ(content: bytes, found: _JSONManifest) -> bool:
    """Whether no keys can collide; False if only key_collision() can tell, which reads all of it again.

    None can if what was `found`, written as JSON, has as many colons: one follows each key, and without
    escapes those in the values that were read stand in both.  So there is no further key, none twice, and
    none in another case.
    """
    if b"\\" in content or found.blobs is not None:
        return False
    for each in chain(found.layers or (), found.manifests or (), (found.config, found.subject)):
        platform = each.platform if each is not None else None
        if platform is not None and not (isinstance(platform, dict) and platform.keys() <= _MEMBERS[2]):
            return False
    return content.count(b":") == _encode(found).count(b":")


def key_collision(content: bytes) -> str | None:
    """A key of a manifest that not all clients read alike; None if there is none.

    Clients in Go ignore the case of keys and use the last of several, so that `Layers` replaces `layers`.
    The keys of annotations are not affected.  Raises ValueError, RecursionError if it cannot be read: msgspec
    reads more, since it skips unknown members whatever bytes their texts have, and however deep they are.
    """
    # Numbers are not converted: int() refuses those of many digits.
    found = json.loads(content, object_pairs_hook=tuple, parse_int=str, parse_float=str)
    pending = [(found, 0)] if isinstance(found, tuple) else []
    while pending:
        members, level = pending.pop()
        seen = set()
        for key, value in members:
            folded = key.casefold()
            if folded in seen or (folded in _FOLDED[level] and key not in _MEMBERS[level]):
                return str(key)
            seen.add(folded)
            if key in _NESTED[level]:
                inner = value if isinstance(value, list) else [value]
                pending += [(each, level + 1) for each in inner if isinstance(each, tuple)]
    return None


def declared_type(content: bytes) -> str | None:
    """The `mediaType` that JSON of any form declares; None without one."""
    try:
        found = _decode_type(content).media_type
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return found if isinstance(found, str) and found else None


def platform_of(config: bytes) -> str | None:
    """The platform that the config of an image states, as os/architecture[/variant]; None without one."""
    try:
        return _platform(msgspec.json.decode(config))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _platform(found: Any) -> str | None:
    if not isinstance(found, dict):
        return None
    fields = [found.get(name) for name in ("os", "architecture", "variant")]
    if not isinstance(fields[0], str) or not isinstance(fields[1], str):
        return None
    return "/".join(each for each in fields if isinstance(each, str) and each)


def _descriptor(found: _JSONDescriptor) -> Descriptor:
    return Descriptor(
        found.media_type,
        Digest.parse(found.digest),
        found.size,
        found.artifact_type,
        found.annotations,
        _platform(found.platform),
    )
