"""Pins: content that is kept whatever its age, and however little space there is.

The pattern of a pin is a glob over `<namespace>/<repository>:<tag>` or `<namespace>/<repository>@<digest>`;
without a tag or digest it matches every tag of the repository.  `*` and `?` match slashes too, as in fnmatch.
Pins are configured, or set by command, and then they are records:

    pin <pattern>                             JSON: keep_fresh, platforms, since

A pinned reference keeps its manifest, everything that the manifest names, and the referrers of these
(signatures, SBOMs), as far as they are stored.  Of a manifest that cannot be read, all digests in its text
are kept.  With `platforms`, only those children of an index are kept
that are for one of them or state no platform, since these may be for any.  BuildKit's attestations state
unknown/unknown, which is none of them.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

import msgspec

from storage.errors import DigestInvalid, NameInvalid, StorageUnavailable, TagInvalid
from storage.graph import ManifestTree, Walk, referring, walk
from storage.keys import MANIFEST, PIN, TAG, parse_reference_key
from storage.names import glob_matcher, is_glob, literal_prefix
from storage.oci import (
    PLATFORM,
    Digest,
    Reference,
    Tag,
    parse_name,
)
from storage.records import Records
from storage.store import Store


@dataclass(frozen=True, slots=True)
class Pin:
    """A pin.  Raises ValueError if a field is invalid.

    `keep_fresh` is the number of seconds between two refreshes, `since` when the pin was set by command, in
    seconds since the epoch.  `platforms` are os/architecture or os/architecture/variant; without a variant,
    any variant matches.
    """

    pattern: str
    keep_fresh: float | None = None
    platforms: tuple[str, ...] = ()
    since: float | None = None

    def __post_init__(self) -> None:
        if not self.pattern or re.search(r"\s", self.pattern):
            raise ValueError(
                f"{self.pattern!r} is not a pattern: it must not be empty, and must not contain spaces"
            )
        if self.keep_fresh is not None and not 0 < self.keep_fresh < math.inf:
            raise ValueError(f"keep_fresh of {self.pattern} must be more than 0 seconds, and finite")
        for platform in self.platforms:
            if not PLATFORM.fullmatch(platform):
                raise ValueError(f"{platform!r} is not a platform such as linux/amd64 or linux/arm64/v8")

    @property
    def parts(self) -> tuple[str, str, str]:
        """The pattern of the repository, `:` for a tag or `@` for a digest, and the pattern of that."""
        start = self.pattern.rfind("/") + 1
        found = re.search("[:@]", self.pattern[start:])
        if found is None:
            return self.pattern, ":", "*"
        at = start + found.start()
        return self.pattern[:at], found[0], self.pattern[at + 1 :]

    def matches(self, repository: str, reference: str) -> bool:
        """Whether a tag or digest of the repository, given by its full name, matches."""
        return self.matcher(repository, reference)

    @property
    def matcher(self) -> Callable[[str, str], bool]:
        """matches() for many names: it is found once."""
        return _matcher(self.pattern)

    @property
    def exact(self) -> tuple[str, Reference] | None:
        """The one reference that a pattern without wildcards matches, None for a pattern with wildcards.

        Raises NameInvalid, TagInvalid, DigestInvalid if no reference can match.
        """
        repository, kind, reference = self.parts
        if is_glob(repository + reference):
            return None
        # The namespace is not part of the name, and may contain a port.
        parse_name(repository.partition("/")[2], "any")
        return repository, Digest.parse(reference) if kind == "@" else Tag.parse(reference)

    @property
    def prefix(self) -> str:
        """A prefix of the keys of all matching records, shorter than any of these keys."""
        repository, kind, reference = self.parts
        name = literal_prefix(repository)
        records = MANIFEST if kind == "@" else TAG
        if name != repository:
            return records.prefix() + name
        return records.prefix(name) + literal_prefix(reference)[:-1]


@lru_cache(maxsize=256)
def _matcher(pattern: str) -> Callable[[str, str], bool]:
    named, kind, referred = Pin(pattern).parts
    names, references, digests = glob_matcher(named), glob_matcher(referred), kind == "@"
    return lambda name, reference: (":" in reference) == digests and names(name) and references(reference)


@dataclass(frozen=True, slots=True)
class PinnedContent:
    """What pins keep: tags and manifests by repository, and the digests of manifests and blobs."""

    references: frozenset[tuple[str, str]]
    digests: frozenset[Digest]


class _Record(msgspec.Struct):
    keep_fresh: float | None = None
    platforms: tuple[str, ...] = ()
    since: float | None = None


class Pins:
    """The pins of a store, `configured` ones first.  Methods block, and may raise StorageFailed.

    What is pinned by command is pinned in the `shared` records as well, if other servers share some.
    """

    def __init__(
        self,
        store: Store,
        configured: Sequence[Pin] = (),
        clock: Callable[[], float] = time.time,
        shared: Records | None = None,
    ) -> None:
        self._store = store
        self._configured = tuple(configured)
        self._clock = clock
        self._shared = shared
        self._records = [store.records] if shared is None else [shared, store.records]

    def list(self) -> Sequence[Pin]:
        """All pins.  A configured pin and one that was set by command may have the same pattern."""
        found = {pin.pattern: pin for records in self._records for pin in _commanded(records)}
        return [*self._configured, *(pin for _, pin in sorted(found.items()))]

    def known(self) -> Sequence[Pin]:
        """All pins but those of other servers that cannot be asked now."""
        with suppress(StorageUnavailable):
            return self.list()
        return [*self._configured, *_commanded(self._store.records)]

    def add(self, pin: Pin) -> None:
        """Set a pin, in place of one that was set with the same pattern.

        Raises ValueError if nothing can match it.
        """
        try:
            _ = pin.exact
        except (NameInvalid, TagInvalid, DigestInvalid) as error:
            raise ValueError(f"nothing can match {pin.pattern}: {error}") from None
        since = self._clock() if pin.since is None else pin.since
        record = msgspec.json.encode(_Record(pin.keep_fresh, pin.platforms, since))
        for records in self._records:
            records.put(PIN.key(pin.pattern), record)

    def remove(self, pattern: str) -> bool:
        """Remove a pin that was set by command; whether there was one."""
        removed = [records.delete(PIN.key(pattern)) for records in self._records]
        return any(removed)

    def of(self, repository: str, reference: str) -> Pin | None:
        """The first pin that matches a reference of the repository, given by its full name."""
        return next((pin for pin in self.list() if pin.matches(repository, reference)), None)

    def matching(self, pin: Pin) -> Iterator[tuple[str, Reference]]:
        """The stored tags, or manifests by digest, that match."""
        yield from matching(self._store, pin)

    def pinned(self) -> PinnedContent:
        """What the pins keep now, as far as it is stored."""
        references: set[tuple[str, str]] = set()
        digests: set[Digest] = set()
        seen: set[tuple[str, Digest, tuple[str, ...]]] = set()
        for pin in self.known():
            for repository, reference in self.matching(pin):
                references.add((repository, reference))
                digest = self._digest(repository, reference)
                if digest is None or (repository, digest, pin.platforms) in seen:
                    continue
                seen.add((repository, digest, pin.platforms))
                found = self._kept(repository, digest, pin.platforms)
                references.update((repository, each) for each in (*found.manifests, *found.tags))
                digests |= found.manifests | set(found.blobs) | found.named
        return PinnedContent(frozenset(references), frozenset(digests))

    def _digest(self, repository: str, reference: Reference) -> Digest | None:
        if isinstance(reference, Digest):
            return reference
        pointer = self._store.pointer(repository, reference)
        return None if pointer is None else pointer.digest

    def _kept(self, repository: str, digest: Digest, platforms: Sequence[str]) -> ManifestTree:
        """The manifest, its referrers, the referrers of these, and everything that they name."""
        found = walk(self._store, repository, digest, platforms)
        subjects = Walk(found.manifests | found.named)
        for subject in subjects:
            wanted = [subject]
            for referrer, tag in referring(self._store, repository, subject):
                found.tags |= set() if tag is None else {tag}
                wanted.append(referrer)
            for each in wanted:
                if each not in found.manifests:
                    # A referrer is for no platform, what cannot be read may be for any: all of it is kept.
                    more = walk(self._store, repository, each)
                    subjects.add(more.manifests | more.named)
                    found.manifests |= more.manifests
                    found.named |= more.named
                    found.blobs.update(more.blobs)
        return found


def _commanded(records: Records) -> Iterator[Pin]:
    for key, value in records.scan(PIN.prefix()):
        try:
            found = msgspec.json.decode(value, type=_Record)
            yield Pin(PIN.parse(key)[0], found.keep_fresh, found.platforms, found.since)
        except (msgspec.DecodeError, UnicodeDecodeError, ValueError):
            continue  # a damaged record counts as none


def matching(store: Store, pin: Pin, after: str = "") -> Iterator[tuple[str, Reference]]:
    """The stored tags, or manifests by digest, that match.

    Only those whose key is greater than `pin.prefix` followed by `after`.
    """
    matches = pin.matcher
    for key, _ in store.records.scan(pin.prefix, after):
        repository, reference = parse_reference_key(key)
        if matches(repository, reference):
            yield repository, reference
