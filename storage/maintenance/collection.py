"""Garbage collection of a private store, concurrent with pushes.

Repository by repository, what is reachable is marked; those are left out that have not changed since a
collection in which nothing was to be removed, now or later.  Then tags and manifests are removed by the
retention rules, and the links of blobs that no manifest names.  At the end, files that no link names are
removed.  Young content is never removed: see Leases.

Everything is removed in write transactions, during which no process can push:

1. If anything in the repository was pushed or deleted since it was marked, which the counter
   `pushed <repository>` shows, it is marked again.  After several attempts this is done in the transaction.
2. What was leased, linked or pushed again since then is young, and is kept.
3. So a push of a manifest either comes before, and keeps what it names; or it comes after, and is refused
   because of what was removed.  Its client had no lease of that.

A record that exists but cannot be read may keep anything: its repository is skipped.  All repositories are
skipped while a damaged database lies beside the records.

    collected                                 CollectionReport as JSON, of the last collection
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import TypeAlias, TypeVar

import msgspec
import structlog

from storage.keys import COLLECTED, LEASE, LINK, MANIFEST, REFERRER, TAG, TOTAL
from storage.maintenance.leases import Leases
from storage.maintenance.nodes import prefix_of
from storage.maintenance.pace import DutyCycle
from storage.maintenance.reachability import Damaged, Reachability, Removal
from storage.maintenance.retention import ExpiredTag, RetentionRules
from storage.maintenance.unlinked import Unlinked
from storage.maintenance.watched_time import Watch
from storage.oci import Digest
from storage.records import BATCH, Batch, batches
from storage.store import Store
from storage.totals import Total
from storage.values import Link

log = structlog.get_logger()
T = TypeVar("T")
Pause: TypeAlias = Callable[[], None]

TRIES = 3  # attempts to mark a repository without blocking pushes
ROWS = 1000  # in a report; and so many tags
REMEDY = "push it again, or delete it"
ELSEWHERE = "another server is collecting: wait for its report"
NONE_UNTAGGED = RetentionRules(keep_untagged_for=-math.inf)
KINDS = (MANIFEST, TAG, LINK, REFERRER, LEASE)

_COUNTS = ("repositories", "tags", "manifests", "links", "blobs", "bytes", "young")


class CollectionRow(msgspec.Struct, kw_only=True):
    """What was removed from a repository, or would be in a dry run.

    `young` is how much is kept only because it is young.  `refused` is why nothing was removed.  `expired`
    are the tags, of all rows together at most a thousand.
    """

    repository: str
    tags: int = 0
    manifests: int = 0
    links: int = 0
    young: int = 0
    refused: str = ""
    expired: list[ExpiredTag] = []


class CollectionReport(msgspec.Struct, kw_only=True):
    """The result of a collection, over all repositories.

    `rows` are the repositories from which something was removed, or kept as young, or that were refused.
    `begun` is in seconds since the epoch, 0 if there was no collection yet.
    """

    begun: float = 0.0
    seconds: float = 0.0
    dry_run: bool = False
    repositories: int = 0
    tags: int = 0
    manifests: int = 0
    links: int = 0
    blobs: int = 0
    bytes: int = 0
    young: int = 0
    refused: str = ""
    rows: list[CollectionRow] = []


class RemovalListener:
    """Is called for tags that are removed; this one does nothing."""

    def record(self, batch: Batch, repository: str, tags: Sequence[str]) -> None:
        """In the transaction that removes them."""

    def removed(self) -> None:
        """After it, in the same thread."""


class Collection:
    """Garbage collection of a private store.  Methods block, and may raise StorageFailed.

    Several collections may run at once, in one or many processes.  `rules` returns the retention rules of a
    repository, given by its full name.  `pause` is called with a number of seconds to wait, `done` with every
    report except those of dry runs, and `listener` is called for the tags that are removed.
    """

    def __init__(
        self,
        store: Store,
        rules: Callable[[str], RetentionRules],
        leases: Leases,
        clock: Callable[[], float] = time.time,
        pause: Callable[[float], None] = time.sleep,
        done: Callable[[CollectionReport], None] = lambda report: None,
        listener: RemovalListener | None = None,
    ) -> None:
        self.store = store
        self.rules = rules
        self.leases = leases
        self.clock = clock
        self.pause = pause
        self.done = done
        self.listener = listener or RemovalListener()
        self.watch = Watch(store, clock)

    def run(self, dry_run: bool = False) -> CollectionReport:
        if dry_run:
            return _CollectionRun(self, dry_run).run()
        with self.store.records.turn("collect") as ours:
            if ours:
                return _CollectionRun(self, dry_run).run()
        return CollectionReport(begun=self.clock(), refused=ELSEWHERE)

    def last(self) -> CollectionReport:
        """The report of the last collection that was not a dry run."""
        try:
            return msgspec.json.decode(
                self.store.records.get(COLLECTED.key()) or b"{}", type=CollectionReport
            )
        except (msgspec.DecodeError, UnicodeDecodeError):
            return CollectionReport()

    def damaged(self) -> Path | None:
        """The path of a damaged database that was set aside, if there is one."""
        return next(self.store.files.root.glob("records.damaged-*"), None)


class _CollectionRefused(Exception):
    pass


class _CollectionRun:
    """One pass over all repositories, and then over the blobs."""

    def __init__(self, collection: Collection, dry_run: bool) -> None:
        self._collection = collection
        self._store = collection.store
        self._records = collection.store.records
        self._young = collection.leases.young
        self._dry_run = dry_run
        self._report = CollectionReport(begun=collection.clock(), dry_run=dry_run)
        self._pause = DutyCycle(collection.pause).pause
        self._begun = time.monotonic()
        self._removable: set[str] = set()  # keys of links, in a dry run
        self._left = ROWS  # how many more tags the report may have

    def run(self) -> CollectionReport:
        report = self._report
        if not self._dry_run:
            self._collection.watch.observe()
        try:
            for repository in self._repositories():
                self._collect(repository)
            self._collect_files()
        except _CollectionRefused as error:
            report.refused = str(error)
            log.error("collect.refused", reason=report.refused)
        report.seconds = round(time.monotonic() - self._begun, 3)
        if not self._dry_run:
            self._records.put(COLLECTED.key(), msgspec.json.encode(report))
            counts = {name: getattr(report, name) for name in _COUNTS}
            log.info("collect.done", **counts, seconds=report.seconds)
            self._collection.done(report)
        return report

    def _repositories(self) -> list[str]:
        found: set[str] = set()
        for kind in KINDS:
            for repository in self._records.groups(kind.prefix()):
                found.add(repository)
                self._pause()
        return sorted(found)

    def _check(self) -> None:
        if (path := self._collection.damaged()) is not None:
            raise _CollectionRefused(
                f"{path} holds records from before the disk damaged them, not all of which were salvaged: "
                "push what is missing again, then remove that directory"
            )

    def _transaction(self, work: Callable[[Batch], T]) -> T:
        def checked(batch: Batch) -> T:
            self._check()  # in the transaction, since the database may be set aside at any time
            return work(batch)

        return self._records.transaction(checked)

    # A repository

    def _collect(self, repository: str) -> None:
        self._check()
        self._report.repositories += 1
        row, before = CollectionRow(repository=repository), self._records.get(TOTAL.key(repository))
        if _is_settled(before) and not self._collection.rules(repository).keep_tags:
            return
        marks = Reachability(self._store, self._collection.leases, repository)
        try:
            marks.refresh(self._pause)
            self._remove_manifests(marks, row)
            self._remove_links(marks, row)
        except Damaged as error:
            row.refused = f"the record {error.key!r} is damaged, so it is unknown what it keeps: {REMEDY}"
            log.error("collect.refused", repository=repository, reason=row.refused)
        for name in ("tags", "manifests", "links", "young"):
            setattr(self._report, name, getattr(self._report, name) + getattr(row, name))
        if row == CollectionRow(repository=repository):
            self._settle(marks, before)
        elif len(self._report.rows) < ROWS:
            self._report.rows.append(row)

    def _settle(self, marks: Reachability, before: bytes | None) -> None:
        """Record that the repository needs no look until it changes, if that is so.

        Nothing was removed, nothing is young, and each manifest is kept by a tag: so age makes nothing
        removable, whatever the rules for what is untagged.
        """
        key, total = TOTAL.key(marks.repository), Total.parse(before)
        untagged = marks.removable(NONE_UNTAGGED, self._collection.watch.look(), BATCH)
        if self._dry_run or total is None or untagged != ([], 0):
            return
        total.settled = total.changes
        encoded = total.encode()

        def work(batch: Batch) -> None:
            if batch.get(key) == before:
                batch.put(key, encoded)

        self._records.transaction(work, shared=True)

    def _remove_manifests(self, marks: Reachability, row: CollectionRow) -> None:
        rules = self._collection.rules(marks.repository)

        def choose(pause: Pause) -> list[Removal]:
            removals, row.young = marks.removable(rules, self._collection.watch.look(), BATCH)
            return removals

        def remove(removal: Removal, batch: Batch) -> bool:
            removed = marks.remove(removal, batch)
            if removed and removal.tags:
                self._collection.listener.record(batch, marks.repository, marks.named(removal)[0])
            return removed

        for removal in self._remove_each(marks, choose, remove):
            self._tell(sorted(marks.expired(removal.tags), key=attrgetter("pushed_at", "tag")), row)
            marks.forget([removal])
            row.tags += len(removal.tags)
            row.manifests += len(removal.manifests)

    def _tell(self, tags: list[ExpiredTag], row: CollectionRow) -> None:
        row.expired += tags[: self._left]
        self._left = max(0, self._left - len(tags))
        if tags and not self._dry_run:
            for each in tags:
                log.info(
                    "tag.expired",
                    repository=row.repository,
                    tag=each.tag,
                    digest=each.digest,
                    reason=each.reason,
                )
            self._collection.listener.removed()

    def _remove_links(self, marks: Reachability, row: CollectionRow) -> None:
        repository, young, removed = marks.repository, 0, list[str]()

        def unnamed(pause: Pause) -> Iterator[str]:
            """The digests of the old links that no manifest names."""
            nonlocal young
            named, young = marks.names(), 0
            for key in self._records.keys(LINK.prefix(repository)):
                digest = LINK.parse(key)[1]
                if prefix_of(digest) not in named:
                    if self._link_young(key):
                        young += 1
                    else:
                        yield digest
                pause()

        def choose(pause: Pause) -> list[str]:
            return [" ".join(some) for some in batches(unnamed(pause), BATCH)]  # half of the memory of keys

        def keys(digests: str) -> list[str]:
            return [LINK.key(repository, digest) for digest in digests.split()]

        def remove(digests: str, batch: Batch) -> bool:
            removed[:] = [key for key in keys(digests) if not self._link_young(key)]
            for key in removed:
                batch.delete(key)
            return True

        for digests in self._remove_each(marks, choose, remove):
            row.links += len(keys(digests) if self._dry_run else removed)
            if self._dry_run:
                self._removable.update(keys(digests))
        row.young += young

    def _link_young(self, key: str) -> bool:
        link = Link.parse(self._records.get(key))
        if link is not None and self._young(link.linked_at):
            return True
        found = self._store.files.find(Digest(LINK.parse(key)[1]))
        return found is not None and self._young(found.used_at)

    def _remove_each(
        self, marks: Reachability, choose: Callable[[Pause], list[T]], remove: Callable[[T, Batch], bool]
    ) -> Iterator[T]:
        """Remove each of the chosen items.  If something changed meanwhile, mark and choose again."""
        to_do, tries = choose(self._pause), 0

        def work(batch: Batch) -> T | None:
            nonlocal to_do
            if tries >= TRIES:
                marks.refresh()
                to_do = choose(_no_pause)
            if not to_do or marks.outdated(batch) or not remove(to_do[0], batch):
                return None
            marks.settle(batch)
            return to_do[0]

        while to_do:
            removed = to_do[0] if self._dry_run else self._transaction(work)
            if removed is not None:
                del to_do[0]
                yield removed
            elif to_do:
                tries += 1
                marks.refresh(self._pause)
                to_do = choose(self._pause)
            self._pause()

    # Files

    def _collect_files(self) -> None:
        unlinked = Unlinked(self._store, self._young, self._collection.clock(), self._pause)
        for pack in unlinked.batches(self._removable):
            if self._dry_run:
                sizes = [size for digest, size in pack]
            else:
                sizes = self._transaction(functools.partial(unlinked.remove, pack))
            self._report.blobs += len(sizes)
            self._report.bytes += sum(sizes)
            self._pause()
        self._report.young += unlinked.young


def _is_settled(record: bytes | None) -> bool:
    total = Total.parse(record)
    return total is not None and total.settled == total.changes


def _no_pause() -> None:
    """Not within a transaction: others wait for it."""
