"""Reachability within a repository: from its tags to its manifests, and to what these name.

A manifest keeps the blobs that it *names*: every digest that stands anywhere in it.  That is more than its
config and layers, on purpose: nothing may be removed that a client of an unknown type of manifest will ask
for.  Manifests are kept more precisely: an index keeps its children, and a subject its referrers, while a
referrer does not keep its subject.

The content of a digest never changes, so each manifest is read once, however often the marks are refreshed.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain
from operator import and_
from typing import NamedTuple

from storage.errors import DigestInvalid, ManifestUnknown
from storage.graph import signed_by
from storage.keys import CHANGES, LEASE, MANIFEST, MOVES, PULLED, REFERRER, TAG, RecordKind
from storage.maintenance.leases import Leases
from storage.maintenance.nodes import node
from storage.maintenance.numbering import DigestNumbers, Edges, Prefixes, above, below, both, members, without
from storage.maintenance.pulls import RENEWED, last_pull
from storage.maintenance.retention import ExpiredTag, KeepTags, RetentionRules, TagTimes, released
from storage.maintenance.watched_time import WatchedTime
from storage.oci import Digest, Tag
from storage.records import Batch
from storage.store import Store

GONE = -1  # the target of a tag that was removed


class Damaged(Exception):
    """The record `key` cannot be read, so it is unknown what it keeps."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


class TagTarget(NamedTuple):
    """The digest that a tag points to, and when it was pushed."""

    digest: Digest
    at: float


class Removal(NamedTuple):
    """What one transaction removes: numbers of tags and manifests in the graph.

    After each of them nothing that is left names what was removed.
    """

    tags: array[int]
    manifests: array[int]


class Reachability:
    """The graph of one repository's tags and manifests.  Methods block, and may raise StorageFailed.

    Tags and digests are numbers here, so that a hundred thousand images take a few tens of MiB.
    """

    def __init__(self, store: Store, leases: Leases, repository: str) -> None:
        self.repository = repository
        self._store = store
        self._records = store.records
        self._leases = leases
        self._tags: list[str] = []
        self._targets = array("i")  # of the tags: the number of the digest, or GONE
        self._pushed_at, self._pulled_at = array("d"), array("d")  # of the tags
        self._released: dict[int, tuple[KeepTags, ...]] = {}  # the tags that no rule keeps, with their rules
        self._digests = DigestNumbers()
        self._stored = bytearray()  # the manifests
        self._read = bytearray()  # those whose children and names are known
        self._used = array("d")  # when a digest was pushed or leased last, as far as is known
        self._children = Edges()
        self._names = array("Q")
        self._names_of = array("I")  # where the names of each begin in `_names`, and how many they are
        self._subjects, self._referrers = Edges(), Edges()
        self._version: bytes | None = None

    # Reading

    def refresh(self, pause: Callable[[], None] = lambda: None) -> None:
        """Read what has changed.  A concurrent push may be seen in part; then the graph is outdated().

        `pause` is called in between.  Raises Damaged.
        """
        self._version = self._records.get(self._counter)
        self._refresh_tags(pause)
        self._stored = bytearray(len(self._digests))
        for (digest,) in self._listed(MANIFEST, pause):
            self._refresh_manifest(digest)
        for (digest,) in self._listed(LEASE, pause):
            with suppress(DigestInvalid):
                number = self._number(digest)
                self._used[number] = max(self._leases.of(self.repository, digest), self._used[number])
        self._subjects, self._referrers = Edges(), Edges()
        for subject, referrer in self._listed(REFERRER, pause):
            with suppress(DigestInvalid):
                numbers = self._number(subject), self._number(referrer)
                self._referrers.add(*numbers)
                self._subjects.add(*numbers[::-1])

    @property
    def _counter(self) -> str:
        return CHANGES.key(self.repository)

    def _listed(self, kind: RecordKind, pause: Callable[[], None]) -> Iterator[list[str]]:
        for key in self._records.keys(kind.prefix(self.repository)):
            yield kind.parse(key)[1:]
            pause()

    def _number(self, digest: str) -> int:
        """The number of a digest.  Raises DigestInvalid."""
        number = self._digests.number(digest)
        if number == len(self._stored):  # it is new
            self._stored.append(0)
            self._read.append(0)
            self._used.append(0.0)
            self._names_of.extend((0, 0))
        return number

    def _refresh_tags(self, pause: Callable[[], None]) -> None:
        self._tags, self._targets = [], array("i")
        self._pushed_at, self._pulled_at = array("d"), array("d")
        for (tag,) in self._listed(TAG, pause):
            found = self._store.pointer(self.repository, Tag(tag))
            if found is None:
                self._check_gone(TAG.key(self.repository, tag))
            else:
                self._tags.append(tag)
                self._targets.append(self._number(found.digest))
                self._pushed_at.append(found.validated_at)
                self._pulled_at.append(last_pull(self._records, self.repository, tag))

    def _refresh_manifest(self, digest: str) -> None:
        try:
            number = self._number(digest)
            if not self._read[number]:
                self._read_manifest(number)
            self._stored[number] = 1
        except (ManifestUnknown, DigestInvalid):
            self._check_gone(MANIFEST.key(self.repository, digest))

    def _read_manifest(self, number: int) -> None:
        manifest, stored_at = self._store.manifest(self.repository, self._digests.digest(number))
        self._used[number] = max(stored_at, self._used[number])
        found = node(manifest)
        for child in found.children:
            self._children.add(number, self._number(child))
        self._names_of[2 * number : 2 * number + 2] = array("I", (len(self._names), len(found.names)))
        self._names.extend(found.names)
        self._read[number] = 1

    def _check_gone(self, key: str) -> None:
        """Raise Damaged unless the record, which was listed but cannot be read, was deleted meanwhile."""
        if self._records.holds(key):
            raise Damaged(key)

    def outdated(self, batch: Batch) -> bool:
        """Whether anything was pushed or deleted since the last refresh."""
        return batch.get(self._counter) != self._version

    def tags(self) -> dict[str, TagTarget]:
        """The tags, in the order of their names."""
        return {
            tag: TagTarget(self._digests.digest(target), pushed_at)
            for tag, target, pushed_at in zip(self._tags, self._targets, self._pushed_at, strict=True)
            if target != GONE
        }

    def manifests(self) -> set[str]:
        """The digests of the stored manifests."""
        return {self._digests.digest(number) for number in members(self._stored)}

    def named(self, removal: Removal) -> tuple[list[str], list[Digest]]:
        """The tags and the digests of what is removed."""
        return [self._tags[tag] for tag in removal.tags], [*map(self._digests.digest, removal.manifests)]

    def expired(self, tags: Iterable[int]) -> list[ExpiredTag]:
        """The tags that removable() chose, and why."""
        found = []
        for tag in tags:
            digest, reason = (
                self._digests.digest(self._targets[tag]),
                "; ".join(map(str, self._released[tag])),
            )
            pulled_at = max(self._pulled_at[tag], self._leases.of(self.repository, digest))
            found.append(ExpiredTag(self._tags[tag], str(digest), self._pushed_at[tag], pulled_at, reason))
        return found

    def names(self) -> Prefixes:
        """The prefix_of() each digest that a manifest names."""
        found = Prefixes()
        for number in members(self._stored):
            start, count = self._names_of[2 * number : 2 * number + 2]
            found.update(self._names[start : start + count])
        return found

    # Choosing

    def removable(self, rules: RetentionRules, time: WatchedTime, size: int) -> tuple[list[Removal], int]:
        """What the rules remove, in this order, and how much is kept only because it is young.

        What only the removed tags have kept is removed with them, whatever `keep_untagged_for` says.  A
        removal has about `size` records, as what belongs together is not divided.
        """
        too_many = self._too_many(rules, time)
        tags = [tag for tag in too_many if not self._leases.young(self._pushed_at[tag])]
        released = self._reach(members(without(self._targets_of(tags), self._held_except_by(tags))))
        young = self._where(self._leases.young)
        ruled = without(self._where(lambda used_at: time.now - used_at <= rules.keep_untagged_for), released)
        for number in members(self._stored) if rules.pins else ():
            ruled[number] |= rules.pinned(self.repository, self._digests.digest(number))
        lasting = self._reach(members(self._held_except_by(tags)), members(ruled))
        # A tag is kept with young content of it, which would otherwise be untagged while it is young.
        needed = without(both(young, released), lasting)
        holding = above(needed, members(self._stored), self._children, self._referrers)
        tags = [tag for tag in tags if not holding[self._targets[tag]]]
        live = self._reach(members(self._held_except_by(tags)), members(ruled), members(young))
        dead = without(self._stored, live)
        spared = len(too_many) - len(tags) + without(live, lasting).count(1)
        return self._removals(tags, both(released, dead), dead, size), spared

    def deletable(self, tags: Iterable[str], digests: Iterable[str]) -> list[Removal]:
        """What goes if these tags and manifests are deleted: them, and what nothing else keeps.

        Of `digests`, those stay that another tag or manifest keeps.
        """
        chosen = self._numbers_of(tags)
        held = self._held_except_by(chosen)
        untagged = self._reach(members(without(self._targets_of(chosen), held)))
        released = bytearray(untagged)
        self._walk(array("i", map(self._number, digests)), released)
        dead = without(released, self._reach(members(held), members(without(self._stored, released))))
        return self._removals(chosen, both(untagged, dead), dead, 1)

    def kept_by(self, tags: Iterable[str]) -> set[str]:
        """The manifests that these tags keep."""
        found = self._reach(members(self._targets_of(self._numbers_of(tags))))
        return {self._digests.digest(number) for number in members(found)}

    def _numbers_of(self, tags: Iterable[str]) -> list[int]:
        numbers = {tag: number for number, tag in enumerate(self._tags) if self._targets[number] != GONE}
        return [numbers[tag] for tag in tags]

    def _where(self, holds: Callable[[float], bool]) -> bytearray:
        """The manifests for whose last use this holds."""
        return bytearray(map(int, map(and_, self._stored, map(holds, self._used))))

    def _too_many(self, rules: RetentionRules, time: WatchedTime) -> list[int]:
        """The tags that no rule keeps, the newest last."""
        slack = max(RENEWED, self._leases.renewed_after)
        times = TagTimes(self._pushed_at, self._last_use, time, slack)
        self._released = released(rules.keep_tags, self._ruled(rules), times)
        return [*self._released]

    def _ruled(self, rules: RetentionRules) -> Iterator[tuple[int, str]]:
        """The tags to which the rules apply.  The tag of a signature does not outlive or leave its image."""
        for number, tag in enumerate(self._tags):
            target, signed = self._targets[number], signed_by(tag)
            if target == GONE or (signed is not None and self._stored[self._number(signed)]):
                continue
            if not rules.fixed(self.repository, tag, self._digests.digest(target)):
                yield number, tag

    def _last_use(self, tag: int) -> float:
        """When a tag, or by digest what it points to, was last pulled."""
        images = below(self._targets[tag], self._children)
        return max(self._pulled_at[tag], *(self._used[number] for number in images))

    def _targets_of(self, tags: Iterable[int]) -> bytearray:
        """The digests that these tags point to."""
        found = bytearray(len(self._digests))
        for tag in tags:
            if self._targets[tag] != GONE:
                found[self._targets[tag]] = 1
        return found

    def _held_except_by(self, tags: Iterable[int]) -> bytearray:
        """The digests that all other tags point to."""
        others = bytearray(b"\1") * len(self._tags)
        for tag in tags:
            others[tag] = 0
        return self._targets_of(members(others))

    def _reach(self, *roots: Iterable[int]) -> bytearray:
        """The manifests that `roots` keep, including themselves."""
        found = bytearray(len(self._digests))
        self._walk(array("i", chain(*roots)), found)
        return found

    def _walk(self, steps: array[int], found: bytearray) -> array[int]:
        """Add what the manifests in `steps` keep to `found`; the manifests that are new there."""
        new = array("i")
        while steps:
            number = steps.pop()
            if self._stored[number] and not found[number]:
                found[number] = 1
                new.append(number)
                steps.extend(self._children.of(number))
                steps.extend(self._referrers.of(number))
        return new

    def _removals(self, tags: list[int], released: bytearray, dead: bytearray, size: int) -> list[Removal]:
        """Parents before their children; what several of them keep goes with the last one."""
        tags_of, roots = Edges(), array("i")
        for tag in tags:
            target = self._targets[tag]
            if next(tags_of.of(target), None) is None:
                roots.append(target)
            tags_of.add(target, tag)
        roots.extend(sorted(members(without(dead, released)), key=self._digests.digest))
        # Backwards, so that what was passed before goes later.
        passed = without(self._stored, dead)
        removals, held = list[Removal](), size
        for root in reversed(roots):
            manifests, its_tags = self._walk(array("i", (root,)), passed), array("i", tags_of.of(root))[::-1]
            if not manifests and not its_tags:
                continue
            if held >= size:
                removals.append(Removal(array("i"), array("i")))
                held = 0
            removals[-1].tags.extend(its_tags)
            removals[-1].manifests.extend(manifests)
            held += len(its_tags) + len(manifests)
        return removals[::-1]

    # Removing

    def remove(self, removal: Removal, batch: Batch) -> bool:
        """Remove it, or nothing if something in it is young by now; whether it was removed."""
        if any(map(self._used_since, removal.tags)):
            return False
        digests = [self._digests.digest(number) for number in removal.manifests]
        # What was pushed again is not read again by refresh(), so the last use is read here.
        for number, digest in zip(removal.manifests, digests, strict=True):
            self._used[number] = self._used_last(digest)
        if any(self._leases.young(self._used[number]) for number in removal.manifests):
            return False
        self.discard([removal], batch)
        return True

    def _used_since(self, tag: int) -> bool:
        """Whether a tag that was not pulled for too long was pulled since the last refresh()."""
        if all(rule.pulled_within is None for rule in self._released.get(tag, ())):
            return False
        if last_pull(self._records, self.repository, self._tags[tag]) != self._pulled_at[tag]:
            return True
        digests = (
            (number, self._digests.digest(number)) for number in below(self._targets[tag], self._children)
        )
        return any(
            self._leases.of(self.repository, digest) > self._used[number] for number, digest in digests
        )

    def discard(self, removals: Iterable[Removal], batch: Batch) -> None:
        """Remove them, however young they are."""
        for tags, manifests in map(self.named, removals):
            for tag in tags:
                batch.delete(TAG.key(self.repository, tag))
                batch.delete(PULLED.key(self.repository, tag))
                batch.delete(MOVES.key(self.repository, tag))
            for digest in manifests:
                for subject in self._subjects.of(self._number(digest)):
                    batch.delete(REFERRER.key(self.repository, self._digests.digest(subject), digest))
                self._leases.drop(batch, self.repository, digest)
                batch.delete(MANIFEST.key(self.repository, digest))
        self._store.changed(batch, self.repository)

    def _used_last(self, digest: Digest) -> float:
        """When the manifest was last pushed or leased, as recorded now."""
        leased_at = self._leases.of(self.repository, digest)
        try:
            return max(leased_at, self._store.manifest(self.repository, digest)[1])
        except ManifestUnknown:
            return leased_at

    def settle(self, batch: Batch) -> None:
        """Take the last recorded change as our own."""
        self._version = batch.get(self._counter)

    def forget(self, removals: Iterable[Removal]) -> None:
        """Drop what was removed from the graph."""
        for tags, manifests in removals:
            for tag in tags:
                self._targets[tag] = GONE
            for number in manifests:
                self._stored[number] = 0
