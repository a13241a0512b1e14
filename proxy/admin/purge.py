"""Purging: an operator deletes images, with all content that nothing else needs.

The tags and manifests that are named are deleted, and what they consist of, except for what another tag of
the repository names, or a manifest that is not part of them.  Then the links to blobs that the repository
no longer needs are deleted, and the blobs that no other repository links.  So other repositories do not
change.

A pinned image is deleted only if it is named exactly, or by force.  A client that pulls meanwhile may see a
link without its blob: that is a miss, and the cache fetches the blob.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from proxy.admin.reports import Purged
from storage.disk.kept import all_parts, remove_parts
from storage.disk.tree import StoredBlob
from storage.errors import RegistryError
from storage.graph import Walk, named_digests
from storage.keys import ABSENT, LINK, LISTING, MANIFEST, MOVES, REFERRER, TAG, USE
from storage.maintenance.blob_order import forget_blob
from storage.maintenance.pins import Pin, Pins
from storage.names import glob_matcher, is_glob, matches_glob, written
from storage.oci import Digest, Reference, Tag
from storage.records import Batch, batches
from storage.store import Store
from storage.values import Absence, Pointer, StoredManifest

KINDS = (TAG, MANIFEST, LINK, LISTING)  # the records that a repository has


class AllPinned(RegistryError):
    """Everything that was named is pinned."""

    code, status = "PINNED", 409


@dataclass(slots=True)
class PurgePlan:
    """What to delete of a repository.

    `references` and `kept` are names, `keys` those of records, with tags first.  `blobs` lose their link.
    `named` are all blobs that are purged, stored or not; if it is `whole`, those that no manifest names too.
    """

    repository: str
    references: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    manifests: int = 0
    blobs: set[Digest] = field(default_factory=set)
    named: set[Digest] = field(default_factory=set)
    whole: bool = False


@dataclass(slots=True)
class ManifestGraph:
    """The manifests of a repository: which ones each names, and which ones refer to it."""

    children: dict[Digest, list[Digest]]
    referrers: dict[Digest, list[Digest]]

    def below(self, tops: Iterable[Digest]) -> set[Digest]:
        """The stored manifests among `tops` and below them."""
        steps = Walk(tops)
        for digest in steps:
            if digest in self.children:
                steps.add((*self.children[digest], *self.referrers.get(digest, [])))
        return steps.reached & self.children.keys()

    def next_to(self, tops: Iterable[Digest]) -> set[Digest]:
        """The manifests that `tops` name, and those that refer to them."""
        return {each for top in tops for each in (*self.children[top], *self.referrers.get(top, []))}


class Purge:
    """Purges the content of a store.  Every method blocks, and may raise StorageFailed."""

    def __init__(self, store: Store, pins: Pins) -> None:
        self._store = store
        self._records = store.records
        self._pins = pins

    def purge(self, pattern: Pin, dry_run: bool = False, force: bool = False) -> Purged:
        """Delete what matches; a pattern without tag and digest means all of a repository.

        Raises AllPinned if everything that matches is pinned.
        """
        pins = [] if force else self._pins.list()
        plans = [self._plan(repository, pattern, pins) for repository in self._repositories(pattern)]
        kept = [each for plan in plans for each in plan.kept]
        references = [each for plan in plans for each in plan.references]
        if kept and not references:
            raise AllPinned(
                f"{kept[0]}{f' and {len(kept) - 1} more' if kept[1:] else ''}: pinned, or part of a pinned"
                " image; name the pinned image exactly, purge by force, or remove the pin"
            )
        links = {(plan.repository, digest) for plan in plans for digest in plan.blobs}
        absences = self._absences(pattern)
        if not dry_run:
            for plan in plans:
                self._delete(plan.keys)
            self._delete(absences)
        blobs, size = self._sweep(links, dry_run)
        parts = self._parts(plans)
        if not dry_run:
            parts = [each for each in parts if remove_parts(self._store.files.root, each)]
        blobs, size = blobs + len(parts), size + sum(each.size for each in parts)
        return Purged(
            references=references,
            kept=kept,
            manifests=sum(plan.manifests for plan in plans),
            links=len(links),
            blobs=blobs,
            bytes=size,
            dry_run=dry_run,
            absences=len(absences),
        )

    def _repositories(self, pattern: Pin) -> list[str]:
        glob = pattern.parts[0]
        if not is_glob(glob):
            return [glob]
        names = {name for kind in KINDS for name in self._records.groups(kind.prefix())}
        return sorted(name for name in names if matches_glob(name, glob))

    # The plan

    def _plan(self, repository: str, pattern: Pin, pins: Sequence[Pin]) -> PurgePlan:
        whole = _whole(pattern)
        tags, manifests = self._tags(repository), self._manifest_graph(repository)
        exact = None if is_glob(pattern.pattern) else pattern.parts[2]

        def pinned(reference: Reference) -> bool:
            return reference != exact and any(pin.matches(repository, reference) for pin in pins)

        def named(reference: Reference) -> bool:
            return whole or pattern.matches(repository, reference)

        pinned_tags = {tag for tag in tags if pinned(tag)}
        pinned_digests = {digest for digest in manifests.children if pinned(digest)}
        protected = manifests.below({tags[tag] for tag in pinned_tags} | pinned_digests)
        named_tags = {tag for tag in tags if named(tag)}
        named_digests = {digest for digest in manifests.children if named(digest)}
        roots = named_digests - protected
        purged_tags = (named_tags | {tag for tag, digest in tags.items() if digest in roots}) - pinned_tags
        purged_roots = {tags[tag] for tag in purged_tags}
        purged = roots
        if not whole:
            below = manifests.below(purged_roots | roots)
            others = {digest for tag, digest in tags.items() if tag not in purged_tags}
            others |= manifests.children.keys() - below
            purged = (below - manifests.below(others) | roots) - protected
        # For a whole repository, manifests that its tags name or protect are not listed one by one.
        kept = named_digests & (pinned_digests if whole else protected)
        if whole:
            roots = roots - manifests.below(purged_roots) - manifests.next_to(roots)
        plan = PurgePlan(repository)
        plan.kept = [written(repository, each) for each in (*sorted(named_tags & pinned_tags), *sorted(kept))]
        plan.references = [written(repository, each) for each in (*sorted(purged_tags), *sorted(roots))]
        plan.manifests = len(purged)
        self._list_records(plan, purged_tags, purged, whole)
        return plan

    def _tags(self, repository: str) -> dict[Tag, Digest]:
        return {
            Tag(TAG.parse(key)[1]): pointer.digest if (pointer := Pointer.parse(value)) else Digest()
            for key, value in self._records.scan(TAG.prefix(repository))
        }

    def _manifest_graph(self, repository: str) -> ManifestGraph:
        children: dict[Digest, list[Digest]] = {}
        for digest, content in self._manifests(repository):
            children[digest] = list(named_digests(content)[0])
        referrers: dict[Digest, list[Digest]] = defaultdict(list)
        for key, _ in self._records.scan(REFERRER.prefix(repository)):
            _, subject, referrer = REFERRER.parse(key)
            referrers[Digest(subject)].append(Digest(referrer))
        return ManifestGraph(children, referrers)

    def _manifests(self, repository: str) -> Iterator[tuple[Digest, bytes]]:
        for key, value in self._records.scan(MANIFEST.prefix(repository)):
            stored = StoredManifest.parse(value)
            yield Digest(MANIFEST.parse(key)[1]), stored.content if stored else b""

    def _list_records(self, plan: PurgePlan, tags: set[Tag], manifests: set[Digest], whole: bool) -> None:
        name = plan.repository
        plan.keys = [TAG.key(name, tag) for tag in sorted(tags)]
        plan.keys += [MANIFEST.key(name, digest) for digest in sorted(manifests)]
        if not whole or plan.kept:
            plan.keys += [USE.key(name, each) for each in (*tags, *manifests)]
            plan.keys += [MOVES.key(name, tag) for tag in tags]
        plan.keys += [
            key for key, _ in self._records.scan(REFERRER.prefix(name)) if REFERRER.parse(key)[2] in manifests
        ]
        named, kept = self._blobs(name, manifests)
        if whole:
            named.update(Digest(LINK.parse(key)[1]) for key, _ in self._records.scan(LINK.prefix(name)))
            # So that the origin is asked again for its tags and referrers.
            plan.keys += [key for key, _ in self._records.scan(LISTING.prefix(name))]
        if whole and not plan.kept:
            for kind in (REFERRER, USE, MOVES):
                plan.keys += [key for key, _ in self._records.scan(kind.prefix(name))]
        plan.named, plan.whole = named - kept, whole and not kept
        plan.blobs = {
            digest for digest in named - kept if self._records.get(LINK.key(name, digest)) is not None
        }
        plan.keys += [LINK.key(name, digest) for digest in sorted(plan.blobs)]
        if plan.keys and not plan.references and not plan.kept:
            plan.references = [name]  # the repository has records, but neither tags nor manifests

    def _absences(self, pattern: Pin) -> list[str]:
        """The keys of what origins did not have of the repositories that match: they are asked again."""
        matches = glob_matcher(pattern.parts[0])
        found = [(key, Absence.parse(value)) for key, value in self._records.scan(ABSENT.prefix())]
        return [key for key, absence in found if absence and matches(absence.repository)]

    def _blobs(self, repository: str, purged: set[Digest]) -> tuple[set[Digest], set[Digest]]:
        """The blobs that the purged manifests name, and those that the other manifests name."""
        named: set[Digest] = set()
        kept: set[Digest] = set()
        for digest, content in self._manifests(repository):
            (named if digest in purged else kept).update(named_digests(content)[1])
        return named, kept

    def _parts(self, plans: Sequence[PurgePlan]) -> list[StoredBlob]:
        """The blobs of which only parts are here, and that nothing but what is purged shows."""
        purged = {(plan.repository, digest) for plan in plans for digest in plan.named}
        whole = {plan.repository for plan in plans if plan.whole}
        return [
            parts.blob
            for parts in all_parts(self._store.files.root)
            if all(each in whole or (each, parts.blob.digest) in purged for each in parts.repositories)
        ]

    # The deletion

    def _delete(self, keys: list[str]) -> None:
        # In their order: after an interruption no tag points at a deleted manifest.
        for batch in batches(keys):
            self._records.transaction(_deletion(batch))

    def _sweep(self, links: set[tuple[str, Digest]], dry_run: bool) -> tuple[int, int]:
        """Delete the blobs that no other repository links; how many there are, and their bytes."""
        blobs = size = 0
        for each in {digest for _, digest in links}:
            if {(LINK.parse(key)[0], each) for key in self._records.linking(each)} - links:
                continue
            if dry_run:
                found = self._store.files.find(each)
                removed = None if found is None else found.size
            else:
                removed = self._store.records.transaction(_removal(self._store, each))
            if removed is not None:
                blobs, size = blobs + 1, size + removed
        return blobs, size


def together(purges: Sequence[Purged]) -> Purged:
    """What was purged of several stores, as one."""
    return Purged(
        references=sorted({reference for each in purges for reference in each.references}),
        kept=sorted({reference for each in purges for reference in each.kept}),
        manifests=sum(each.manifests for each in purges),
        links=sum(each.links for each in purges),
        blobs=sum(each.blobs for each in purges),
        bytes=sum(each.bytes for each in purges),
        dry_run=any(each.dry_run for each in purges),
        absences=sum(each.absences for each in purges),
    )


def _whole(pattern: Pin) -> bool:
    """Whether the pattern means all of a repository."""
    return pattern.pattern == pattern.parts[0]


def _removal(store: Store, digest: Digest) -> Callable[[Batch], int | None]:
    def work(batch: Batch) -> int | None:
        removed = store.files.remove_old(digest, lambda used_at: True, batch)
        forget_blob(store, batch, digest)
        return removed

    return work


def _deletion(keys: list[str]) -> Callable[[Batch], None]:
    def work(batch: Batch) -> None:
        for key in keys:
            batch.delete(key)

    return work
