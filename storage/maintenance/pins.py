"""Pins: what is kept whatever its age and however little room there is.

A pin's pattern is a glob over `<namespace>/<repository>:<tag>` or `<namespace>/<repository>@<digest>`; one
that says neither tag nor digest means every tag of the repository.  `*` and `?` match slashes too, as in
fnmatch.  Pins come from the configuration, or by command, and then they are records:

    pin <pattern>                             JSON: keep_fresh, platforms, since

A pinned reference keeps its manifest, all that the manifest names, and what refers to any of that
(signatures, SBOMs), as far as it is stored.  With `platforms`, of an index only the children for these are
kept, and those that tell no platform, since they may be for any; BuildKit's attestations tell
unknown/unknown, which is none of them.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import msgspec

from storage.errors import DigestInvalid, NameInvalid, TagInvalid
from storage.graph import ManifestTree, Walk, referring, walk
from storage.keys import MANIFEST, PIN, TAG, parse_reference_key
from storage.names import is_glob, literal_prefix
from storage.oci import (
    Digest,
    Reference,
    Tag,
    parse_name,
)
from storage.store import Store

_PLATFORM = re.compile(r"[^/\s]+/[^/\s]+(?:/[^/\s]+)?")


@dataclass(frozen=True, slots=True)
class Pin:
    """`keep_fresh` is the time between two refreshings, `since` when it was made by command; seconds.

    `platforms` are os/architecture or os/architecture/variant; without a variant it is any of them.

    Raises ValueError.
    """

    pattern: str
    keep_fresh: float | None = None
    platforms: tuple[str, ...] = ()
    since: float | None = None

    def __post_init__(self) -> None:
        if not self.pattern or re.search(r"\s", self.pattern):
            raise ValueError(
                f"{self.pattern!r} is no pattern of a pin: it must hold no space, and not be empty"
            )
        if self.keep_fresh is not None and not 0 < self.keep_fresh < math.inf:
            raise ValueError(f"keep_fresh of {self.pattern} must be more than 0 seconds, and not for ever")
        for platform in self.platforms:
            if not _PLATFORM.fullmatch(platform):
                raise ValueError(f"{platform!r} is no platform such as linux/amd64 or linux/arm64/v8")

    @property
    def parts(self) -> tuple[str, str, str]:
        """The repository's pattern, `:` for a tag or `@` for a digest, and the pattern of that."""
        start = self.pattern.rfind("/") + 1
        found = re.search("[:@]", self.pattern[start:])
        if found is None:
            return self.pattern, ":", "*"
        at = start + found.start()
        return self.pattern[:at], found[0], self.pattern[at + 1 :]

    def matches(self, repository: str, reference: str) -> bool:
        """`repository` is a full name; what holds a colon is a digest, else it is a tag."""
        named, kind, referred = self.parts
        if (kind == "@") != (":" in reference):
            return False
        return fnmatchcase(repository, named) and fnmatchcase(reference, referred)

    @property
    def exact(self) -> tuple[str, Reference] | None:
        """The one thing that it can match, where there is no wildcard in it.

        Raises NameInvalid, TagInvalid, DigestInvalid where it can match nothing at all.
        """
        repository, kind, reference = self.parts
        if is_glob(repository + reference):
            return None
        # The namespace is none of the name, and may hold a port.
        parse_name(repository.partition("/")[2])
        return repository, Digest.parse(reference) if kind == "@" else Tag.parse(reference)

    @property
    def prefix(self) -> str:
        """What the key of every record that it matches begins with, and is longer than."""
        repository, kind, reference = self.parts
        name = literal_prefix(repository)
        records = MANIFEST if kind == "@" else TAG
        if name != repository:
            return records.prefix() + name
        return records.prefix(name) + literal_prefix(reference)[:-1]


@dataclass(frozen=True, slots=True)
class PinnedContent:
    """`references` are tags and manifests by repository, `digests` manifests and blobs."""

    references: frozenset[tuple[str, str]]
    digests: frozenset[Digest]


class _Record(msgspec.Struct):
    keep_fresh: float | None = None
    platforms: tuple[str, ...] = ()
    since: float | None = None


class Pins:
    """Every method may raise StorageFailed, and blocks.  Configured pins come first."""

    def __init__(
        self, store: Store, configured: Sequence[Pin] = (), clock: Callable[[], float] = time.time
    ) -> None:
        self._store = store
        self._configured = tuple(configured)
        self._clock = clock

    def list(self) -> Sequence[Pin]:
        """A configured pin and one by command may have the same pattern."""
        return [*self._configured, *self._commanded()]

    def _commanded(self) -> Iterator[Pin]:
        for key, value in self._store.records.scan(PIN.prefix()):
            try:
                found = msgspec.json.decode(value, type=_Record)
                yield Pin(PIN.parse(key)[0], found.keep_fresh, found.platforms, found.since)
            except (msgspec.DecodeError, UnicodeDecodeError, ValueError):
                continue  # damaged: as none

    def add(self, pin: Pin) -> None:
        """In place of what was commanded with this pattern before.

        Raises ValueError where it could match nothing.
        """
        try:
            _ = pin.exact
        except (NameInvalid, TagInvalid, DigestInvalid) as error:
            raise ValueError(f"{pin.pattern} can match nothing: {error}") from None
        since = self._clock() if pin.since is None else pin.since
        record = msgspec.json.encode(_Record(pin.keep_fresh, pin.platforms, since))
        self._store.records.put(PIN.key(pin.pattern), record)

    def remove(self, pattern: str) -> bool:
        """Whether it was there.  A configured pin stays."""
        return self._store.records.delete(PIN.key(pattern))

    def of(self, repository: str, reference: str) -> Pin | None:
        """The first that matches; `repository` is a full name."""
        return next((pin for pin in self.list() if pin.matches(repository, reference)), None)

    def matching(self, pin: Pin) -> Iterator[tuple[str, Reference]]:
        """The tags, or manifests by digest, that are known here."""
        yield from matching(self._store, pin)

    def pinned(self) -> PinnedContent:
        """What is to be kept now, as far as it is stored."""
        references: set[tuple[str, str]] = set()
        digests: set[Digest] = set()
        seen: set[tuple[str, Digest, tuple[str, ...]]] = set()
        for pin in self.list():
            for repository, reference in self.matching(pin):
                references.add((repository, reference))
                digest = self._digest(repository, reference)
                if digest is None or (repository, digest, pin.platforms) in seen:
                    continue
                seen.add((repository, digest, pin.platforms))
                found = self._kept(repository, digest, pin.platforms)
                references.update((repository, each) for each in (*found.manifests, *found.tags))
                digests |= found.manifests | set(found.blobs)
        return PinnedContent(frozenset(references), frozenset(digests))

    def _digest(self, repository: str, reference: Reference) -> Digest | None:
        if isinstance(reference, Digest):
            return reference
        pointer = self._store.pointer(repository, reference)
        return None if pointer is None else pointer.digest

    def _kept(self, repository: str, digest: Digest, platforms: Sequence[str]) -> ManifestTree:
        """The manifest, what refers to it, what refers to that, …, and all that these name."""
        found = walk(self._store, repository, digest, platforms)
        subjects = Walk(found.manifests)
        for subject in subjects:
            for referrer, tag in referring(self._store, repository, subject):
                found.tags |= set() if tag is None else {tag}
                if referrer not in found.manifests:
                    # What refers is for no platform: all of it.
                    more = walk(self._store, repository, referrer)
                    subjects.add(more.manifests)
                    found.manifests |= more.manifests
                    found.blobs.update(more.blobs)
        return found


def matching(store: Store, pin: Pin, after: str = "") -> Iterator[tuple[str, Reference]]:
    """The stored tags, or manifests by digest, that match.

    Only those whose key is greater than `pin.prefix` followed by `after`.
    """
    for key, _ in store.records.scan(pin.prefix, after):
        repository, reference = parse_reference_key(key)
        if pin.matches(repository, reference):
            yield repository, reference
