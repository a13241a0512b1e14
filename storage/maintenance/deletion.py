"""Deletion from a private store: an operator deletes images, beside pushes.

The tags and manifests that are named are deleted, and the manifests that nothing else keeps: not another tag,
and not a manifest that stays.  Each repository is marked as for a collection, and a transaction removes only
if nothing was pushed to it since.  What is young is deleted too: a push in progress that relies on it is
refused at its end.  Blobs stay until the next collection, which knows whether a push relies on them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from storage.errors import ManifestUnknown, StorageFailed
from storage.graph import named_digests
from storage.keys import LINK, MANIFEST, TAG
from storage.maintenance.leases import Leases
from storage.maintenance.nodes import prefix_of
from storage.maintenance.pins import Pin
from storage.maintenance.reachability import Damaged, Reachability, Removal, TagTarget
from storage.names import is_glob, matches_glob, written
from storage.oci import Digest
from storage.records import Batch
from storage.store import Store

TRIES = 3  # attempts to mark a repository without blocking pushes
GROUPS = 100  # that one transaction removes


@dataclass(frozen=True, slots=True)
class DeletionRequest:
    """What to delete: all that matches `pattern`; without tag and digest that is all of a repository.

    older_than: only tags that were pushed before so many seconds
    keep: how many of the matching tags of each repository stay, the last pushed ones
    """

    pattern: Pin
    older_than: float | None = None
    keep: int | None = None

    @property
    def whole(self) -> bool:
        """Whether untagged manifests are meant too."""
        alone = self.pattern.pattern == self.pattern.parts[0]
        return alone and self.older_than is None and self.keep is None


@dataclass(slots=True)
class DeletionReport:
    """What was deleted, or would be.

    references: the tags, and the manifests without one
    kept: why a matching reference was kept
    blobs, bytes: what the next collection can remove because of it
    """

    references: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    manifests: int = 0
    blobs: int = 0
    bytes: int = 0


@dataclass(slots=True)
class _Choice:
    """What is still to be deleted of a repository; `digests` are those that were named themselves."""

    groups: list[Removal]
    digests: set[str]
    kept: dict[str, str]


class Deletion:
    """Deletes from a private store.  Methods block, and may raise StorageFailed.

    `deleted` is called with the references of the report, in the transactions that delete them.

    `immutable` returns the patterns of immutable tags of a repository, given by its full name.
    """

    def __init__(
        self,
        store: Store,
        leases: Leases,
        immutable: Callable[[str], tuple[re.Pattern[str], ...]],
        clock: Callable[[], float],
        deleted: Callable[[Batch, Sequence[str]], None] = lambda batch, references: None,
    ) -> None:
        self._store = store
        self._records = store.records
        self._leases = leases
        self._immutable = immutable
        self._clock = clock
        self._deleted = deleted

    def run(self, request: DeletionRequest, dry_run: bool = False) -> DeletionReport:
        report = DeletionReport()
        released: set[tuple[str, Digest]] = set()  # links that nothing needs any more
        for repository in self._repositories(request.pattern.parts[0]):
            try:
                released |= self._delete(repository, request, dry_run, report)
            except Damaged as error:
                raise StorageFailed(f"the record {error.key!r} is damaged: push it again") from error
        report.blobs, report.bytes = self._freed(released)
        return report

    def _repositories(self, glob: str) -> list[str]:
        if not is_glob(glob):
            return [glob]
        found = {name for kind in (TAG, MANIFEST) for name in self._records.groups(kind.prefix())}
        return sorted(name for name in found if matches_glob(name, glob))

    def _delete(
        self, repository: str, request: DeletionRequest, dry_run: bool, report: DeletionReport
    ) -> set[tuple[str, Digest]]:
        """Delete from one repository; returns the links to blobs that no manifest of it names any more."""
        marks = Reachability(self._store, self._leases, repository)
        marks.refresh()
        choice, tries = self._choose(marks, request), 0
        named: set[Digest] = set()

        def work(batch: Batch) -> list[Removal]:
            nonlocal choice
            if tries >= TRIES:
                marks.refresh()
                choice = self._choose(marks, request)
            if marks.outdated(batch):
                return []
            groups = choice.groups[:GROUPS]
            named.update(self._blobs(marks, groups))
            self._deleted(batch, _references(marks, groups, choice.digests))
            marks.discard(groups, batch)
            marks.settle(batch)
            return groups

        while choice.groups:
            if dry_run:
                removed = choice.groups
                named.update(self._blobs(marks, removed))
            else:
                removed = self._records.transaction(work)
            marks.forget(removed)
            choice.groups = choice.groups[len(removed) :]
            self._report(marks, removed, choice.digests, report)
            if not removed and choice.groups:
                tries += 1
                marks.refresh()
                choice = self._choose(marks, request)
        report.kept |= {written(repository, each): why for each, why in choice.kept.items()}
        left = marks.names()
        return {(repository, each) for each in named if prefix_of(each) not in left}

    def _report(
        self, marks: Reachability, removed: list[Removal], named: set[str], report: DeletionReport
    ) -> None:
        report.references += _references(marks, removed, named)
        report.manifests += sum(len(manifests) for _, manifests in map(marks.named, removed))

    def _choose(self, marks: Reachability, request: DeletionRequest) -> _Choice:
        repository, pattern = marks.repository, request.pattern
        immutable, targets, stored = self._immutable(repository), marks.tags(), marks.manifests()
        fixed = {tag for tag in targets if any(each.fullmatch(tag) for each in immutable)}
        matching = {tag for tag in targets if request.whole or pattern.matches(repository, tag)}
        kept = dict.fromkeys(sorted(matching & fixed), "immutable")
        tags = self._old(targets, matching - fixed, request)
        held = marks.kept_by(fixed)
        named = {each for each in stored if pattern.matches(repository, each)}
        digests = (stored if request.whole else named) - held
        kept |= dict.fromkeys(sorted(named & held), "part of an image whose tag is immutable")
        tags |= {tag for tag, each in targets.items() if each.digest in digests} - fixed
        groups = marks.deletable(sorted(tags), digests)
        gone = {digest for group in groups for digest in marks.named(group)[1]}
        kept |= dict.fromkeys(sorted(named - held - gone), "part of another image")
        return _Choice(groups, named, kept)

    def _old(self, targets: dict[str, TagTarget], tags: set[str], request: DeletionRequest) -> set[str]:
        """The tags that the request does not spare because of their age."""
        newest_first = sorted(tags, key=lambda tag: (targets[tag].at, tag), reverse=True)
        now, age = self._clock(), request.older_than
        return {
            tag for tag in newest_first[request.keep or 0 :] if age is None or now - targets[tag].at > age
        }

    # What it frees

    def _blobs(self, marks: Reachability, groups: list[Removal]) -> set[Digest]:
        """The blobs that the manifests of these groups name."""
        found: set[Digest] = set()
        for digest in (digest for group in groups for digest in marks.named(group)[1]):
            with suppress(ManifestUnknown):  # deleted meanwhile
                manifest, _ = self._store.manifest(marks.repository, digest)
                found |= named_digests(manifest.content)[1]
        return found

    def _freed(self, links: set[tuple[str, Digest]]) -> tuple[int, int]:
        """How many blobs no other link names, and their bytes."""
        freed: dict[str, int] = {}
        for repository, digest in links:
            found = self._store.linked(repository, digest)
            linked = ((LINK.parse(key)[0], digest) for key in self._records.linking(digest))
            if found is not None and links.issuperset(linked):
                freed[digest] = found.size
        return len(freed), sum(freed.values())


def _references(marks: Reachability, groups: Sequence[Removal], named: set[str]) -> list[str]:
    """The tags, and the manifests that were named or that no tag and no deleted manifest kept."""
    found = []
    for tags, manifests in map(marks.named, groups):
        shown = [*tags, *(each for each in manifests if each in named)]
        found += [written(marks.repository, each) for each in shown or manifests[:1]]
    return found
