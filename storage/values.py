"""What the records of a store hold, built and parsed as inverses.  storage/keys.py describes their keys.

    tag         digest, time of validation
    manifest    media type, time of storing, newline, the exact bytes
    link        size in bytes, time of linking
    referrers   the descriptor of the referrer, as JSON
    absent      time of the answer, code of the error, repository, what is absent
    object      size in bytes, time of last use, key
    blob        time of last use, in milliseconds with 14 digits, so that records sort by it; size in bytes

Fields are separated by spaces; other times are seconds since the epoch.  Parsing returns None if the record
is absent or damaged.
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import NamedTuple

import msgspec

from storage.errors import DigestInvalid, ManifestInvalid
from storage.oci import Descriptor, Digest, Manifest, parse_manifest

LATEST = 10**14 - 1  # milliseconds
_TEXT = ("utf-8", "surrogateescape")  # a media type is returned as it was sent, even if it is not UTF-8


STEP = 1e-6  # seconds between two tags that are imported at once, in the order of their times


class Pointer(NamedTuple):
    """Where a tag points, and when its origin last confirmed it."""

    digest: Digest
    validated_at: float

    def encode(self) -> bytes:
        return f"{self.digest} {self.validated_at}".encode()

    @classmethod
    def parse(cls, record: bytes | None) -> Pointer | None:
        digest, _, time = (record or b"").partition(b" ")
        with suppress(DigestInvalid):
            parsed = Digest.parse(digest.decode(*_TEXT))
            return cls(parsed, validated_at) if (validated_at := _number(time)) is not None else None
        return None


class StoredManifest(NamedTuple):
    """A manifest as it is stored; `content` is not verified."""

    media_type: str
    stored_at: float
    content: bytes

    def encode(self) -> bytes:
        return f"{self.media_type} {self.stored_at}\n".encode(*_TEXT) + self.content

    @classmethod
    def parse(cls, record: bytes | None) -> StoredManifest | None:
        head, _, content = (record or b"").partition(b"\n")
        media_type, _, time = head.rpartition(b" ")
        stored_at = _number(time)
        return None if stored_at is None else cls(media_type.decode(*_TEXT), stored_at, content)


class Absence(NamedTuple):
    """What an origin did not have when it was last asked, and with which error it said so."""

    at: float
    code: str
    repository: str
    what: str

    def encode(self) -> bytes:
        return f"{self.at} {self.code} {self.repository} {self.what}".encode(*_TEXT)

    @classmethod
    def parse(cls, record: bytes | None) -> Absence | None:
        time, *fields = (record or b"").decode(*_TEXT).split(" ", 3)
        at = _number(time.encode(*_TEXT))
        return None if at is None or len(fields) != 3 else cls(at, *fields)


class Link(NamedTuple):
    """A blob that a repository shows: its size, and since when."""

    size: int
    linked_at: float

    def encode(self) -> bytes:
        return f"{self.size} {self.linked_at}".encode()

    @classmethod
    def parse(cls, record: bytes | None) -> Link | None:
        size, _, time = (record or b"").partition(b" ")
        linked_at = _number(time)
        return cls(int(size), linked_at) if size.isdigit() and linked_at is not None else None


class StoredObject(NamedTuple):
    """A blob that is an object of a bucket: its size, its last use, and its key."""

    size: int
    used_at: float
    key: str

    def encode(self) -> bytes:
        return f"{self.size} {self.used_at} {self.key}".encode()

    @classmethod
    def parse(cls, record: bytes | None) -> StoredObject | None:
        size, _, rest = (record or b"").partition(b" ")
        time, _, key = rest.partition(b" ")
        used_at = _number(time)
        if not size.isdigit() or used_at is None or not key:
            return None
        return cls(int(size), used_at, key.decode(*_TEXT))


class BlobUse(NamedTuple):
    """A stored blob: a time at or before its last use, in milliseconds since the epoch, and its size."""

    used_at: int
    size: int

    @classmethod
    def at(cls, seconds: float, size: int) -> BlobUse:
        return cls(min(max(0, int(seconds * 1000)), LATEST), size)

    def encode(self) -> bytes:
        return f"{self.used_at:0{len(str(LATEST))}} {self.size}".encode()

    @classmethod
    def parse(cls, record: bytes | None) -> BlobUse | None:
        used_at, _, size = (record or b"").partition(b" ")
        return cls(int(used_at), int(size)) if used_at.isdigit() and size.isdigit() else None


def subject_of(manifest: bytes) -> Descriptor | None:
    """What a manifest refers to; None if that is nothing, or its type is unknown."""
    try:
        return parse_manifest(manifest).subject
    except ManifestInvalid:
        return None


def encode_referrer(manifest: Manifest) -> bytes:
    """The descriptor in the answer of the referrers API: distribution-spec, "Listing Referrers"."""
    content, size = parse_manifest(manifest.content), len(manifest.content)
    named = (manifest.media_type, manifest.digest, size, content.artifact_type, content.annotations)
    return msgspec.json.encode(Descriptor(*named).to_json())


def parse_referrer(record: bytes) -> Descriptor | None:
    # RecursionError if damaged JSON is nested too deeply; msgspec's DecodeError is a ValueError.
    with suppress(ValueError, RecursionError, ManifestInvalid):
        return Descriptor.from_json(msgspec.json.decode(record))
    return None


def _number(text: bytes) -> float | None:
    """A finite number; None if `text` is none."""
    with suppress(ValueError):
        if math.isfinite(number := float(text)):
            return number
    return None
