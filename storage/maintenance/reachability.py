"""What of a repository reaches what: its tags, its manifests, and what these name.

What a manifest *names*, it keeps the blobs of: every digest that stands anywhere in it.  That is more than
config and layers, and on purpose: of a type that is not known here, nothing may go that its client will ask
for.  What keeps other manifests is told more exactly: an index its children, and a subject what refers to
it, while a referrer does not keep its subject.

A manifest's digest says all of it, so each is read once, however often the marks are refreshed.
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
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    Digest,
    Manifest,
    Tag,
    digests_in,
    parse_manifest,
)
from storage.store import Store

_KNOWN = {OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST}


class Damaged(Exception):
    """The record of this `key` cannot be read, so that what it kept is not known."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


@dataclass(frozen=True, slots=True)
class KeepTags:
    """Of the tags that match only the `last` that were pushed."""

    match: re.Pattern[str]
    last: int


@dataclass(frozen=True, slots=True)
class RetentionRules:
    """`keep_untagged_for` is in seconds.  For a tag the first of `keep_tags` that matches counts.

    Tags that match one of `immutable` neither go nor count.
    """

    keep_untagged_for: float = math.inf
    keep_tags: tuple[KeepTags, ...] = ()
    immutable: tuple[re.Pattern[str], ...] = ()


class Pointing(NamedTuple):
    """Where a tag points, and when it was pushed."""

    digest: str
    at: float


class Node(NamedTuple):
    """A manifest; `names` holds the start_of() each digest that it names."""

    children: tuple[str, ...]
    names: array[int]


class Group(NamedTuple):
    """What goes at once or not at all, so that nothing that is left lacks what it names."""

    tags: tuple[str, ...]
    manifests: tuple[str, ...]


def start_of(digest: str) -> int:
    """64 bits of it: that another digest begins in the same way keeps what could go, and no more."""
    return int(digest.partition(":")[2][:16], 16)


def node(manifest: Manifest) -> Node:
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
        if manifest.media_type in _KNOWN:
            children = listed
        elif content.subject is not None:
            children = found - {str(content.subject.digest)}
    return Node(tuple(children), array("Q", sorted(map(start_of, found))))


class Reachability:
    """Of one repository.  Blocks.  Every method may raise StorageFailed."""

    def __init__(self, store: Store, leases: Leases, repository: str) -> None:
        self.repository = repository
        self.tags: dict[str, Pointing] = {}
        self.manifests: dict[str, Node] = {}
        self._store = store
        self._records = store.records
        self._leases = leases
        self._used: dict[str, float] = {}
        self._subjects: dict[str, list[str]] = {}  # of a referrer
        self._referrers: dict[str, list[str]] = {}  # of a subject
        self._version: bytes | None = None

    # Reading

    def refresh(self, rest: Callable[[], None] = lambda: None) -> None:
        """Read what has changed.  Of what is pushed meanwhile it may see a part: then it is outdated().

        `rest` is called in between.  Raises Damaged.
        """
        self._version = self._records.get(self._counter)
        self.tags = {tag: found for (tag,) in self._listed(TAG, rest) if (found := self._pointing(tag))}
        known, self.manifests = self.manifests, {}
        for (digest,) in self._listed(MANIFEST, rest):
            if (each := known.get(digest) or self._node(digest)) is not None:
                self.manifests[digest] = each
        for (digest,) in self._listed(LEASE, rest):
            self._used[digest] = max(self._leases.of(self.repository, digest), self._used.get(digest, 0.0))
        self._subjects, self._referrers = {}, {}
        for subject, referrer in self._listed(REFERRER, rest):
            self._subjects.setdefault(referrer, []).append(subject)
            self._referrers.setdefault(subject, []).append(referrer)

    @property
    def _counter(self) -> str:
        return CHANGES.key(self.repository)

    def _listed(self, kind: RecordKind, rest: Callable[[], None]) -> Iterator[list[str]]:
        for key in self._records.keys(kind.prefix(self.repository)):
            yield kind.parse(key)[1:]
            rest()

    def _pointing(self, tag: str) -> Pointing | None:
        found = self._store.pointer(self.repository, Tag(tag))
        if found is None:
            self._check_gone(TAG.key(self.repository, tag))
            return None
        return Pointing(str(found.digest), found.validated_at)

    def _node(self, digest: str) -> Node | None:
        try:
            manifest, stored_at = self._store.manifest(self.repository, Digest.parse(digest))
        except (ManifestUnknown, DigestInvalid):
            self._check_gone(MANIFEST.key(self.repository, digest))
            return None
        self._used[digest] = max(stored_at, self._used.get(digest, 0.0))
        return node(manifest)

    def _check_gone(self, key: str) -> None:
        """It was listed, and now it cannot be read: it was deleted meanwhile, or it is damaged."""
        if self._records.holds(key):
            raise Damaged(key)

    def outdated(self, batch: Batch) -> bool:
        """Whether anything was pushed or deleted since it was read."""
        return batch.get(self._counter) != self._version

    def names(self) -> set[int]:
        """The start_of() each digest that a manifest names."""
        return {start for each in self.manifests.values() for start in each.names}

    # Telling what goes

    def going(self, rules: RetentionRules, now: float) -> tuple[list[Group], int]:
        """What goes by the rules, in this order; and how much stays just since it is young.

        What tags that go by a rule have held alone goes with them, whatever `keep_untagged_for` says.
        """
        too_many = self._too_many(rules)
        tags = [tag for tag in too_many if not self._leases.young(self.tags[tag].at)]
        released = self._reach(self._only_held_by(tags))
        young = {each for each in self.manifests if self._leases.young(self._used_at(each))}
        ruled = {each for each in self.manifests if now - self._used_at(each) <= rules.keep_untagged_for}
        lasting = self._reach({*self._held_but_by(tags), *(ruled - released)})
        # A tag stays with what is young of it: else that would lack its tag for as long as untagged is kept.
        holding = self._holding(young & released - lasting)
        tags = [tag for tag in tags if self.tags[tag].digest not in holding]
        live = self._reach({*self._held_but_by(tags), *(ruled - released), *young})
        dead = self.manifests.keys() - live
        spared = len(too_many) - len(tags) + len(live - lasting)
        return self._groups(tags, released & dead, dead), spared

    def _used_at(self, digest: str) -> float:
        return self._used.get(digest, math.inf)

    def _too_many(self, rules: RetentionRules) -> list[str]:
        """Tags that go by a rule; of each the newest last."""
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

    def _held_but_by(self, tags: Collection[str]) -> set[str]:
        """What the other tags point at."""
        going = set(tags)
        return {each.digest for tag, each in self.tags.items() if tag not in going}

    def _only_held_by(self, tags: Collection[str]) -> set[str]:
        return {self.tags[tag].digest for tag in tags} - self._held_but_by(tags)

    def _reach(self, roots: Iterable[str]) -> set[str]:
        """Those of the manifests that `roots` keep, with themselves."""
        found: set[str] = set()
        self._walk(roots, found)
        return found

    def _walk(self, roots: Iterable[str], found: set[str]) -> list[str]:
        """The same, but for those that were `found` before; they are now."""
        new, steps = [], Walk(roots)
        for digest in steps:
            if digest not in found and (each := self.manifests.get(digest)) is not None:
                found.add(digest)
                new.append(digest)
                steps.add((*each.children, *self._referrers.get(digest, ())))
        return new

    def _holding(self, kept: set[str]) -> set[str]:
        """What keeps these, with themselves."""
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

    def _groups(self, tags: list[str], released: set[str], dead: set[str]) -> list[Group]:
        """Parents before their children; what several tags or manifests keep goes with the last of them."""
        tags_of: dict[str, list[str]] = {}
        for tag in tags:
            tags_of.setdefault(self.tags[tag].digest, []).append(tag)
        roots = [*tags_of, *sorted(dead - released)]
        # Backwards, so that what was passed before belongs to a later one.
        passed = self.manifests.keys() - dead
        groups = []
        for root in reversed(roots):
            group = Group(tuple(tags_of.get(root, ())), tuple(self._walk([root], passed)))
            if group.tags or group.manifests:
                groups.append(group)
        return groups[::-1]

    # Having it go

    def remove(self, groups: Collection[Group], batch: Batch) -> bool:
        """False: of one something is young by now, and nothing was removed."""
        digests = [digest for group in groups for digest in group.manifests]
        # Who was pushed again was read before, and is not read again.
        self._used |= {digest: self._used_last(digest) for digest in digests}
        if any(self._leases.young(self._used[digest]) for digest in digests):
            return False
        for tag in (tag for group in groups for tag in group.tags):
            batch.delete(TAG.key(self.repository, tag))
        for digest in digests:
            for subject in self._subjects.get(digest, ()):
                batch.delete(REFERRER.key(self.repository, subject, digest))
            self._leases.drop(batch, self.repository, digest)
            batch.delete(MANIFEST.key(self.repository, digest))
        self._store.changed(batch, self.repository)
        return True

    def _used_last(self, digest: str) -> float:
        """As it is known just now."""
        leased_at = self._leases.of(self.repository, digest)
        try:
            return max(leased_at, self._store.manifest(self.repository, Digest(digest))[1])
        except ManifestUnknown:
            return leased_at

    def settle(self, batch: Batch) -> None:
        """What was recorded as the last change is ours."""
        self._version = batch.get(self._counter)

    def forget(self, groups: Iterable[Group]) -> None:
        """They have gone."""
        for group in groups:
            for tag in group.tags:
                self.tags.pop(tag, None)
            for digest in group.manifests:
                self.manifests.pop(digest, None)
