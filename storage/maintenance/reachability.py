"""Reachability within a repository: from its tags to its manifests, and to what these name.

A manifest keeps the blobs that it *names*: every digest that stands anywhere in it.  That is more than its
config and layers, on purpose: nothing may be removed that a client of an unknown type of manifest will ask
for.  Manifests are kept more precisely: an index keeps its children, and a subject its referrers, while a
referrer does not keep its subject.

The content of a digest never changes, so each manifest is read once, however often the marks are refreshed.
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from storage.disk.records import Batch
from storage.errors import DigestInvalid, ManifestInvalid, ManifestUnknown
from storage.graph import Walk
from storage.keys import CHANGES, LEASE, MANIFEST, REFERRER, TAG, RecordKind
from storage.maintenance.leases import Leases
from storage.oci import (
    IMAGES,
    INDEXES,
    Digest,
    Manifest,
    Tag,
    digests_in,
    parse_manifest,
)
from storage.store import Store


class Damaged(Exception):
    """The record `key` cannot be read, so it is unknown what it keeps."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


@dataclass(frozen=True, slots=True)
class KeepTags:
    """A rule that keeps the `last` pushed of the tags that match."""

    match: re.Pattern[str]
    last: int


@dataclass(frozen=True, slots=True)
class RetentionRules:
    """Which tags and manifests of a repository are kept.

    `keep_untagged_for` is in seconds.  The first of `keep_tags` that matches a tag applies to it.  Tags that
    match one of `immutable` are kept, and not counted.
    """

    keep_untagged_for: float = math.inf
    keep_tags: tuple[KeepTags, ...] = ()
    immutable: tuple[re.Pattern[str], ...] = ()


class TagTarget(NamedTuple):
    """The digest that a tag points to, and when it was pushed."""

    digest: str
    at: float


class ManifestNode(NamedTuple):
    """A manifest in the graph; `names` are the prefix_of() the digests that it names."""

    children: tuple[str, ...]
    names: array[int]


class RemovalGroup(NamedTuple):
    """What must be removed together, so that nothing that is left names what was removed."""

    tags: tuple[str, ...]
    manifests: tuple[str, ...]


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


class Reachability:
    """The graph of one repository's tags and manifests.  Methods block, and may raise StorageFailed."""

    def __init__(self, store: Store, leases: Leases, repository: str) -> None:
        self.repository = repository
        self.tags: dict[str, TagTarget] = {}
        self.manifests: dict[str, ManifestNode] = {}
        self._store = store
        self._records = store.records
        self._leases = leases
        self._used: dict[str, float] = {}
        self._subjects: dict[str, list[str]] = {}  # of a referrer
        self._referrers: dict[str, list[str]] = {}  # of a subject
        self._version: bytes | None = None

    # Reading

    def refresh(self, pause: Callable[[], None] = lambda: None) -> None:
        """Read what has changed.  A concurrent push may be seen in part; then the graph is outdated().

        `pause` is called in between.  Raises Damaged.
        """
        self._version = self._records.get(self._counter)
        self.tags = {tag: found for (tag,) in self._listed(TAG, pause) if (found := self._target(tag))}
        known, self.manifests = self.manifests, {}
        for (digest,) in self._listed(MANIFEST, pause):
            if (each := known.get(digest) or self._node(digest)) is not None:
                self.manifests[digest] = each
        for (digest,) in self._listed(LEASE, pause):
            self._used[digest] = max(self._leases.of(self.repository, digest), self._used.get(digest, 0.0))
        self._subjects, self._referrers = {}, {}
        for subject, referrer in self._listed(REFERRER, pause):
            self._subjects.setdefault(referrer, []).append(subject)
            self._referrers.setdefault(subject, []).append(referrer)

    @property
    def _counter(self) -> str:
        return CHANGES.key(self.repository)

    def _listed(self, kind: RecordKind, pause: Callable[[], None]) -> Iterator[list[str]]:
        for key in self._records.keys(kind.prefix(self.repository)):
            yield kind.parse(key)[1:]
            pause()

    def _target(self, tag: str) -> TagTarget | None:
        found = self._store.pointer(self.repository, Tag(tag))
        if found is None:
            self._check_gone(TAG.key(self.repository, tag))
            return None
        return TagTarget(str(found.digest), found.validated_at)

    def _node(self, digest: str) -> ManifestNode | None:
        try:
            manifest, stored_at = self._store.manifest(self.repository, Digest.parse(digest))
        except (ManifestUnknown, DigestInvalid):
            self._check_gone(MANIFEST.key(self.repository, digest))
            return None
        self._used[digest] = max(stored_at, self._used.get(digest, 0.0))
        return node(manifest)

    def _check_gone(self, key: str) -> None:
        """Raise Damaged unless the record, which was listed but cannot be read, was deleted meanwhile."""
        if self._records.holds(key):
            raise Damaged(key)

    def outdated(self, batch: Batch) -> bool:
        """Whether anything was pushed or deleted since the last refresh."""
        return batch.get(self._counter) != self._version

    def names(self) -> set[int]:
        """The prefix_of() each digest that a manifest names."""
        return {prefix for each in self.manifests.values() for prefix in each.names}

    # Choosing

    def removable(self, rules: RetentionRules, now: float) -> tuple[list[RemovalGroup], int]:
        """What the rules remove, in this order, and how much is kept only because it is young.

        What only the removed tags have kept is removed with them, whatever `keep_untagged_for` says.
        """
        too_many = self._too_many(rules)
        tags = [tag for tag in too_many if not self._leases.young(self.tags[tag].at)]
        released = self._reach(self._only_held_by(tags))
        young = {each for each in self.manifests if self._leases.young(self._used_at(each))}
        ruled = {each for each in self.manifests if now - self._used_at(each) <= rules.keep_untagged_for}
        lasting = self._reach({*self._held_except_by(tags), *(ruled - released)})
        # A tag is kept with young content of it, which would otherwise be untagged while it is young.
        holding = self._holding(young & released - lasting)
        tags = [tag for tag in tags if self.tags[tag].digest not in holding]
        live = self._reach({*self._held_except_by(tags), *(ruled - released), *young})
        dead = self.manifests.keys() - live
        spared = len(too_many) - len(tags) + len(live - lasting)
        return self._groups(tags, released & dead, dead), spared

    def deletable(self, tags: Collection[str], digests: Collection[str]) -> list[RemovalGroup]:
        """What goes if these tags and manifests are deleted: them, and what nothing else keeps.

        Of `digests`, those stay that another tag or manifest keeps.
        """
        untagged = self._reach(self._only_held_by(tags))
        released = untagged | self._reach(digests)
        live = self._reach({*self._held_except_by(tags), *(self.manifests.keys() - released)})
        dead = released - live
        return self._groups([*tags], untagged & dead, dead)

    def kept_by(self, tags: Collection[str]) -> set[str]:
        """The manifests that these tags keep."""
        return self._reach({self.tags[tag].digest for tag in tags})

    def _used_at(self, digest: str) -> float:
        return self._used.get(digest, math.inf)

    def _too_many(self, rules: RetentionRules) -> list[str]:
        """The tags that a rule removes; for each rule, the newest last."""
        found: dict[KeepTags, list[str]] = {}
        for tag in self.tags:
            if not any(each.fullmatch(tag) for each in rules.immutable):
                rule = next((each for each in rules.keep_tags if each.match.fullmatch(tag)), None)
                if rule is not None:
                    found.setdefault(rule, []).append(tag)
        too_many: list[str] = []
        for rule, tags in found.items():
            tags.sort(key=lambda tag: (self.tags[tag].at, tag))
            too_many += tags[: -rule.last]
        return too_many

    def _held_except_by(self, tags: Collection[str]) -> set[str]:
        """The digests that all other tags point to."""
        excluded = set(tags)
        return {each.digest for tag, each in self.tags.items() if tag not in excluded}

    def _only_held_by(self, tags: Collection[str]) -> set[str]:
        return {self.tags[tag].digest for tag in tags} - self._held_except_by(tags)

    def _reach(self, roots: Iterable[str]) -> set[str]:
        """The manifests that `roots` keep, including themselves."""
        found: set[str] = set()
        self._walk(roots, found)
        return found

    def _walk(self, roots: Iterable[str], found: set[str]) -> list[str]:
        """Add what `roots` keep to `found`; the manifests that are new there."""
        new, steps = [], Walk(roots)
        for digest in steps:
            if digest not in found and (each := self.manifests.get(digest)) is not None:
                found.add(digest)
                new.append(digest)
                steps.add((*each.children, *self._referrers.get(digest, ())))
        return new

    def _holding(self, kept: set[str]) -> set[str]:
        """The manifests that keep these, including themselves."""
        if not kept:
            return kept
        parents: dict[str, list[str]] = {}
        for digest, each in self.manifests.items():
            for below in (*each.children, *self._referrers.get(digest, ())):
                parents.setdefault(below, []).append(digest)
        steps = Walk(kept)
        for digest in steps:
            steps.add(parents.get(digest, ()))
        return steps.reached

    def _groups(self, tags: list[str], released: set[str], dead: set[str]) -> list[RemovalGroup]:
        """Parents before their children; what several of them keep belongs to the last one's group."""
        tags_of: dict[str, list[str]] = {}
        for tag in tags:
            tags_of.setdefault(self.tags[tag].digest, []).append(tag)
        roots = [*tags_of, *sorted(dead - released)]
        # Backwards, so that what was passed before belongs to a later group.
        passed = self.manifests.keys() - dead
        groups = []
        for root in reversed(roots):
            group = RemovalGroup(tuple(tags_of.get(root, ())), tuple(self._walk([root], passed)))
            if group.tags or group.manifests:
                groups.append(group)
        return groups[::-1]

    # Removing

    def remove(self, groups: Collection[RemovalGroup], batch: Batch) -> bool:
        """Remove the groups, or nothing if something in them is young by now; whether they were removed."""
        digests = [digest for group in groups for digest in group.manifests]
        # What was pushed again is not read again by refresh(), so the last use is read here.
        self._used |= {digest: self._used_last(digest) for digest in digests}
        if any(self._leases.young(self._used[digest]) for digest in digests):
            return False
        self.discard(groups, batch)
        return True

    def discard(self, groups: Collection[RemovalGroup], batch: Batch) -> None:
        """Remove the groups, however young they are."""
        for tag in (tag for group in groups for tag in group.tags):
            batch.delete(TAG.key(self.repository, tag))
        for digest in (digest for group in groups for digest in group.manifests):
            for subject in self._subjects.get(digest, ()):
                batch.delete(REFERRER.key(self.repository, subject, digest))
            self._leases.drop(batch, self.repository, digest)
            batch.delete(MANIFEST.key(self.repository, digest))
        self._store.changed(batch, self.repository)

    def _used_last(self, digest: str) -> float:
        """When the manifest was last pushed or leased, as recorded now."""
        leased_at = self._leases.of(self.repository, digest)
        try:
            return max(leased_at, self._store.manifest(self.repository, Digest(digest))[1])
        except ManifestUnknown:
            return leased_at

    def settle(self, batch: Batch) -> None:
        """Take the last recorded change as our own."""
        self._version = batch.get(self._counter)

    def forget(self, groups: Iterable[RemovalGroup]) -> None:
        """Drop removed groups from the graph."""
        for group in groups:
            for tag in group.tags:
                self.tags.pop(tag, None)
            for digest in group.manifests:
                self.manifests.pop(digest, None)
