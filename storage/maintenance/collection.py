"""What was pushed and nothing reaches any more goes, while pushes go on.

Only for a store of our own, where nothing is evicted.  Repository by repository, what is reachable is marked;
then tags and manifests go by the rules, and the links of blobs that no manifest names.  In the end the files
go that no link names.  Nothing goes that is young: see Leases.

Whatever is removed is removed in a write transaction, in which no process pushes:

1. Where anything was pushed to the repository since it was marked, or deleted, it is marked anew: the counter
   `pushed <repository>` tells.  After some tries that is done within the transaction.
2. What was leased, linked or pushed again since then is young, and stays.
3. So a push of a manifest comes before, and keeps what it names; or after, and then what it names and is not
   here any more is told to its client as unknown.  The client had no lease of it.

A record that is there and cannot be read may have kept anything: its repository is left as it is.  So is all,
while a damaged database lies beside the records.

    collected                                 Report as JSON, of the last collection
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias, TypeVar

import msgspec
import structlog

from storage.disk.records import Batch
from storage.keys import COLLECTED, LEASE, LINK, MANIFEST, REFERRER, TAG
from storage.maintenance.leases import Leases
from storage.maintenance.reachability import Damaged, Group, Reachability, RetentionRules, start_of
from storage.maintenance.unlinked import Unlinked
from storage.oci import Digest
from storage.store import Store

log = structlog.get_logger()
T = TypeVar("T")
Rest: TypeAlias = Callable[[], None]

BATCH = 500  # records removed in one transaction
TRIES = 3  # to mark a repository without keeping pushes waiting
SLICE = 0.05  # seconds of work without rest
PACE = 1.0  # seconds of rest for each second of work
ROWS = 1000  # of a report at most
REMEDY = "push it anew, or delete it"
KINDS = (MANIFEST, TAG, LINK, REFERRER, LEASE)

_COUNTS = ("repositories", "tags", "manifests", "links", "blobs", "bytes", "young")


class Row(msgspec.Struct, kw_only=True):
    """What went of a repository, or would go; `refused` is why nothing did.

    `young` is how much stays for no other reason than that.
    """

    repository: str
    tags: int = 0
    manifests: int = 0
    links: int = 0
    young: int = 0
    refused: str = ""


class CollectionReport(msgspec.Struct, kw_only=True):
    """Of all repositories, and then of blobs and their bytes; `rows` are of those that there is something to
    say of.  `begun` is seconds since the epoch, 0 for never.
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
    rows: list[Row] = []


class Collection:
    """`rules` are those of a repository, by its full name.  Blocks; raises StorageFailed.

    `pause` is called with how many seconds to rest, `done` with every report but of dry runs.  Several may
    run at once, in one process or many.
    """

    def __init__(
        self,
        store: Store,
        rules: Callable[[str], RetentionRules],
        leases: Leases,
        clock: Callable[[], float] = time.time,
        pause: Callable[[float], None] = time.sleep,
        done: Callable[[CollectionReport], None] = lambda report: None,
    ) -> None:
        self.store = store
        self.rules = rules
        self.leases = leases
        self.clock = clock
        self.pause = pause
        self.done = done

    def run(self, dry_run: bool = False) -> CollectionReport:
        return _CollectionRun(self, dry_run).run()

    def last(self) -> CollectionReport:
        """Of the last one that was no dry run."""
        try:
            return msgspec.json.decode(
                self.store.records.get(COLLECTED.key()) or b"{}", type=CollectionReport
            )
        except (msgspec.DecodeError, UnicodeDecodeError):
            return CollectionReport()

    def damaged(self) -> Path | None:
        """A damaged database that lies beside the records."""
        return next(self.store.files.root.glob("records.damaged-*"), None)


class _Refused(Exception):
    pass


class _CollectionRun:
    def __init__(self, collection: Collection, dry_run: bool) -> None:
        self._collection = collection
        self._store = collection.store
        self._records = collection.store.records
        self._young = collection.leases.young
        self._dry_run = dry_run
        self._report = CollectionReport(begun=collection.clock(), dry_run=dry_run)
        self._begun = self._rested = time.monotonic()
        self._would_go: set[str] = set()  # keys of links, in a dry run

    def run(self) -> CollectionReport:
        report = self._report
        try:
            for repository in self._repositories():
                self._collect(repository)
            self._collect_files()
        except _Refused as error:
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
                self._rest()
        return sorted(found)

    def _rest(self) -> None:
        worked = time.monotonic() - self._rested
        if worked > SLICE:
            self._collection.pause(worked * PACE)
            self._rested = time.monotonic()

    def _check(self) -> None:
        if (path := self._collection.damaged()) is not None:
            raise _Refused(
                f"{path} is what the records were before the disk damaged them, and not all of it was saved: "
                "push anew what is missing, then remove that directory"
            )

    def _transaction(self, work: Callable[[Batch], T]) -> T:
        def checked(batch: Batch) -> T:
            self._check()  # here, since it may be moved aside at any time
            return work(batch)

        return self._records.transaction(checked)

    # A repository

    def _collect(self, repository: str) -> None:
        self._check()
        row = Row(repository=repository)
        marks = Reachability(self._store, self._collection.leases, repository)
        try:
            marks.refresh(self._rest)
            self._remove_manifests(marks, row)
            self._remove_links(marks, row)
        except Damaged as error:
            row.refused = f"the record {error.key!r} is damaged, so that what it kept is not known: {REMEDY}"
            log.error("collect.refused", repository=repository, reason=row.refused)
        self._report.repositories += 1
        for name in ("tags", "manifests", "links", "young"):
            setattr(self._report, name, getattr(self._report, name) + getattr(row, name))
        if row != Row(repository=repository) and len(self._report.rows) < ROWS:
            self._report.rows.append(row)

    def _remove_manifests(self, marks: Reachability, row: Row) -> None:
        rules = self._collection.rules(marks.repository)

        def choose(rest: Rest) -> list[list[Group]]:
            groups, row.young = marks.going(rules, self._collection.clock())
            return _packs(groups)

        for groups in self._in_turns(marks, choose, marks.remove):
            marks.forget(groups)
            row.tags += sum(len(each.tags) for each in groups)
            row.manifests += sum(len(each.manifests) for each in groups)

    def _remove_links(self, marks: Reachability, row: Row) -> None:
        young = 0

        def choose(rest: Rest) -> list[list[str]]:
            nonlocal young
            named, unnamed, young = marks.names(), [], 0
            for key in self._records.keys(LINK.prefix(marks.repository)):
                if start_of(LINK.parse(key)[1]) not in named:
                    if self._link_young(key):
                        young += 1
                    else:
                        unnamed.append(key)
                rest()
            return [unnamed[start : start + BATCH] for start in range(0, len(unnamed), BATCH)]

        def remove(keys: list[str], batch: Batch) -> bool:
            keys[:] = [key for key in keys if not self._link_young(key)]
            for key in keys:
                batch.delete(key)
            return True

        for keys in self._in_turns(marks, choose, remove):
            row.links += len(keys)
            if self._dry_run:
                self._would_go.update(keys)
        row.young += young

    def _link_young(self, key: str) -> bool:
        if self._young(_time(self._records.get(key))):
            return True
        with suppress(FileNotFoundError):
            return self._young(self._store.files.path(Digest(LINK.parse(key)[1])).stat().st_mtime)
        return False

    def _in_turns(
        self, marks: Reachability, choose: Callable[[Rest], list[T]], remove: Callable[[T, Batch], bool]
    ) -> Iterator[T]:
        """Remove each of what is chosen.  Where something changed meanwhile, mark and choose anew."""
        to_do, tries = choose(self._rest), 0

        def work(batch: Batch) -> T | None:
            nonlocal to_do
            if tries >= TRIES:
                marks.refresh()
                to_do = choose(_no_rest)
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
                marks.refresh(self._rest)
                to_do = choose(self._rest)
            self._rest()

    # Files

    def _collect_files(self) -> None:
        unlinked = Unlinked(self._store, self._young, self._collection.clock(), self._rest)
        for pack in unlinked.found(self._would_go):
            if self._dry_run:
                sizes = [size for digest, size in pack]
            else:
                sizes = self._transaction(functools.partial(unlinked.remove, pack))
            self._report.blobs += len(sizes)
            self._report.bytes += sum(sizes)
            self._rest()
        self._report.young += unlinked.young


def _no_rest() -> None:
    """Within a transaction: others wait for it."""


def _packs(groups: Sequence[Group]) -> list[list[Group]]:
    """In their order; of about as much as is to be removed at once."""
    packs: list[list[Group]] = []
    size = BATCH
    for each in groups:
        if size >= BATCH:
            packs.append([])
            size = 0
        packs[-1].append(each)
        size += len(each.tags) + len(each.manifests)
    return packs


def _time(link: bytes | None) -> float:
    """When it was made; 0 where that cannot be read: no client is shown such a link."""
    try:
        return float((link or b"").split()[-1])
    except (ValueError, IndexError):
        return 0.0
