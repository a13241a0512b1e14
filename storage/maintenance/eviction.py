"""Eviction from a cache: by age, by the limits of the cache and its namespaces, and by free disk space.

A blob is evicted by unlinking its file: transfers in flight have it open.  A blob that was used since it was
chosen is kept.  Records of a cache may vanish at any time; the origin is then asked again.

It costs what it evicts: the bytes that are stored are known from totals, and blobs have an order.  While a
former version's directory is being counted, the whole tree is read instead.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from heapq import merge

import structlog

from storage.disk.blobs import BlobFiles
from storage.disk.kept import KeptParts, find_parts
from storage.disk.tree import StoredBlob
from storage.keys import LINK
from storage.maintenance.blob_order import BlobOrder, forget_blob
from storage.maintenance.blob_tree import BlobCandidates, BlobTree, oldest
from storage.maintenance.counting import Counting
from storage.maintenance.expiry import Expiry
from storage.maintenance.pace import DutyCycle
from storage.maintenance.pins import PinnedContent
from storage.maintenance.recorded_blobs import RecordedBlobs
from storage.records import Batch, batches
from storage.store import Store
from storage.totals import Totals

log = structlog.get_logger()

PACK = 100  # blobs that are removed at once


@dataclass(frozen=True, slots=True)
class EvictionRules:
    """How long content is kept, and how much of it.

    `keep_for` returns for how many seconds content of a repository, given by its full name, is kept after
    its last use; `default_keep_for` applies to blobs that no repository links.  `limit`, and `limits` by
    namespace, are in bytes; eviction continues until `evict_to` of them is left.  `min_free` maps the size of
    the disk to the bytes of it that must be free.  Content of the namespaces in `kept` is never evicted.
    `limits` and `kept` have a namespace by its `key_of`; only `shared` keys are those of several namespaces,
    which then have one limit together.
    """

    keep_for: Callable[[str], float]
    default_keep_for: float = math.inf
    limit: int | None = None
    evict_to: float = 0.9
    min_free: Callable[[int], int] = lambda size: 0
    limits: Mapping[str, int] = field(default_factory=dict)
    kept: frozenset[str] = frozenset()
    key_of: Callable[[str], str] = str
    shared: frozenset[str] = frozenset()

    def covers(self, key: str, repository: str) -> bool:
        """Whether a key of `limits` or `kept` is that of the namespace of a repository."""
        return self.key_of(repository.partition("/")[0]) == key


@dataclass(frozen=True, slots=True)
class EvictionReport:
    """What was evicted, or would be in a dry run; `short` is how many bytes too many are left."""

    blobs: int = 0
    bytes: int = 0
    manifests: int = 0
    tags: int = 0
    links: int = 0
    seconds: float = 0.0
    short: int = 0


class Eviction:
    """Evicts blobs and records from a cache.  Methods block, and may raise StorageFailed.

    Several processes may use the store meanwhile.  `pinned` returns what is never evicted.  `pause` is called
    with a number of seconds to wait, during work that is not urgent, and `done` with every report, except
    those of dry runs, and its reason: limit, asked or ttl.
    """

    def __init__(
        self,
        store: Store,
        rules: EvictionRules,
        pinned: Callable[[], PinnedContent] = lambda: PinnedContent(frozenset(), frozenset()),
        clock: Callable[[], float] = time.time,
        pause: Callable[[float], None] = time.sleep,
        counting: Counting | None = None,
        done: Callable[[EvictionReport, str], None] = lambda report, reason: None,
    ) -> None:
        self._done = done
        self._store = store
        self._blobs = _candidates(store)
        self._totals = Totals(store.records)
        self._counting = counting or Counting(store, pause)
        self._rules = rules
        self._pinned = pinned
        self._clock = clock
        self._pause = pause

    def stored(self) -> int:
        """Bytes of blobs, and of parts of blobs.  The tree is read only while they are not counted yet."""
        counted = self._totals.stored()
        parts = sum(each.blob.size for each in self._blobs.parts())
        return (self._blobs.size() if counted is None else counted) + parts

    def parts(self) -> list[KeptParts]:
        """The blobs of which only parts are kept, least recently used first."""
        return self._blobs.parts()

    def expiring(self) -> list[tuple[KeptParts, float]]:
        """The parts(), and when each expires unless it is used again: infinite if it never does."""
        pinned, found = self._pinned().digests, self.parts()
        keeps = (
            max(
                math.inf if each.blob.digest in pinned else self._keep_for(name) for name in each.repositories
            )
            for each in found
        )
        return [(each, each.blob.used_at + keep) for each, keep in zip(found, keeps, strict=True)]

    def over(self, coming: int = 0) -> int:
        """By how many bytes limits are exceeded once `coming` more bytes are stored."""
        over = self._needed(coming)
        if not over:
            limits = self._rules.limits.items()
            over = max((_bytes(self._too_much(name)) - limit for name, limit in limits), default=0)
        return max(0, over)

    def upcoming(self) -> Iterator[tuple[StoredBlob, list[str], float]]:
        """What limits of the cache evict, in this order: each blob, the repositories that show it, and when
        its age alone evicts it, infinite if it never does.
        """
        for blob in self._oldest(self.stored()):
            found = sorted({LINK.parse(key)[0] for key in self._store.records.linking(blob.digest)})
            if not found and (parts := find_parts(self._store.files.root, blob.digest)) is not None:
                found = sorted(parts.repositories)
            keep = max(map(self._keep_for, found), default=self._rules.default_keep_for)
            yield blob, found, blob.used_at + keep

    # By size

    def shrink(self, coming: int = 0, to: int | None = None, dry_run: bool = False) -> EvictionReport:
        """Evict the least recently used content that exceeds a limit, or until `to` bytes are left."""
        run = self._run(dry_run, urgent=coming > 0)
        excess = self._excess(coming, to)
        needed = self._needed(coming) if coming else 0
        if needed and sum(each.size for each in self._oldest(needed)) < needed:
            # It would not fit even then: emptying the cache for it would gain nothing.
            coming, excess = 0, self._excess(0, to)
        run.evict(self._oldest(excess))
        if to is None:
            for name, limit in self._rules.limits.items():
                self._shrink_namespace(name, limit, run)
        short = max(0, excess - run.bytes) if self._excess(coming, to) > 0 or dry_run else 0
        if short:
            log.warning("evict.short", bytes=short, reason="what may be evicted does not suffice")
        return self._report(run, "limit" if to is None else "asked", short)

    def _report(self, run: EvictionRun, reason: str, short: int = 0) -> EvictionReport:
        report = run.report(reason, short)
        if not run.dry_run:
            self._done(report, reason)
        return report

    def _run(self, dry_run: bool, urgent: bool) -> EvictionRun:
        pause = (lambda seconds: None) if urgent else self._pause
        return EvictionRun(self._store, self._blobs, pause, dry_run)

    def _oldest(self, enough: int) -> Iterator[StoredBlob]:
        """The least recently used blobs that have `enough` bytes together, and no more than are needed."""
        pinned = self._pinned().digests if enough > 0 else frozenset()
        order: Iterable[StoredBlob] = BlobOrder(self._store, self._blobs)
        if self._totals.stored() is None:
            order = oldest((each for each in self._blobs if not self._keeps(each, pinned)), enough)
        for each in merge(order, (parts.blob for parts in self._blobs.parts())):
            if enough <= 0:
                return
            if not self._keeps(each, pinned):
                enough -= each.size
                yield each

    def _keeps(self, blob: StoredBlob, pinned: Collection[str]) -> bool:
        """Whether it is kept however little space there is."""
        if blob.digest in pinned or not self._rules.kept:
            return blob.digest in pinned
        repositories = [LINK.parse(key)[0] for key in self._store.records.linking(blob.digest)]
        if not repositories and (parts := find_parts(self._store.files.root, blob.digest)) is not None:
            repositories = [*parts.repositories]
        return any(self._rules.covers(key, each) for key in self._rules.kept for each in repositories)

    def _needed(self, coming: int) -> int:
        """Bytes that must be evicted so that no limit of the cache is exceeded."""
        limit = self._rules.limit
        over = self.stored() + coming - limit if limit is not None else 0
        return max(0, over, self._missing_space(coming))

    def _missing_space(self, coming: int) -> int:
        status = os.statvfs(self._store.files.root)
        free = status.f_bavail * status.f_frsize
        return self._rules.min_free(status.f_blocks * status.f_frsize) + coming - free

    def _excess(self, coming: int, to: int | None) -> int:
        if to is not None:
            return self.stored() - to
        excess = self._missing_space(coming)
        if self._rules.limit is not None and (stored := self.stored()) + coming > self._rules.limit:
            excess = max(excess, stored + coming - int(self._rules.limit * self._rules.evict_to))
        return excess

    def _too_much(self, name: str) -> list[StoredBlob]:
        """The blobs and parts that namespaces with this key show; none if by totals they fit the limit.

        A blob counts once.  In the totals it counts for each repository.
        """
        parts, limit = self._parts_in(name), self._rules.limits[name]
        used = _bytes(parts)
        for repository, total in self._totals.repositories(self._prefix(name)):
            if total.counted is None:
                used = limit + 1
            elif self._rules.covers(name, repository):
                used += total.counted.bytes.get(LINK.name, 0)
        if used <= limit and self._totals.listed:
            return []
        return [*self._linked_in(name).values(), *parts]

    def _parts_in(self, name: str) -> list[StoredBlob]:
        """The parts that repositories of the namespace, or of those with this key, show."""
        return [
            parts.blob
            for parts in self._blobs.parts()
            if any(self._rules.covers(name, each) for each in parts.repositories)
        ]

    def _shrink_namespace(self, name: str, limit: int, run: EvictionRun) -> None:
        found = self._too_much(name)
        if (used := _bytes(found)) <= limit:
            return
        pinned = self._pinned().digests
        candidates = (each for each in found if not self._keeps(each, pinned))
        for each in oldest(candidates, used - int(limit * self._rules.evict_to)):
            links = self._store.records.linking(each.digest)
            here = [key for key in links if self._rules.covers(name, LINK.parse(key)[0])]
            if len(here) == len(links):
                run.evict([each])
            else:
                run.remove_links(here)

    def _linked_in(self, name: str) -> dict[str, StoredBlob]:
        """The blobs that repositories of the namespace, or of those with this key, link."""
        linked: dict[str, StoredBlob] = {}
        for digest in self._links_in(name):
            if digest not in linked and (found := self._blobs.find(digest)) is not None:
                linked[digest] = found
        return linked

    def _links_in(self, name: str) -> Iterator[str]:
        for key in self._store.records.keys(LINK.prefix() + self._prefix(name)):
            repository, digest = LINK.parse(key)
            if self._rules.covers(name, repository):
                yield digest

    def _prefix(self, name: str) -> str:
        """The start of the names of all repositories of the namespaces with this key."""
        return "" if name in self._rules.shared else f"{name}/"

    # By age

    def expire(self, dry_run: bool = False) -> EvictionReport:
        """Evict what was not used for as long as the rules keep it."""
        self._counting.run()
        run = self._run(dry_run, urgent=False)
        default = self._rules.default_keep_for
        expiry = Expiry(self._store, self._keep_for, default, self._pinned(), self._clock)
        run.evict(expiry.blobs(BlobOrder(self._store, self._blobs)))
        run.evict(expiry.parts(self._blobs.parts()))
        for expired in expiry.records(self._blobs, run.evicted):
            run.tags += expired.tags
            run.manifests += expired.manifests
            run.links += expired.links
            run.remove(expired.keys)
        return self._report(run, "ttl")

    def _keep_for(self, repository: str) -> float:
        if self._rules.key_of(repository.partition("/")[0]) in self._rules.kept:
            return math.inf
        return self._rules.keep_for(repository)


def _bytes(blobs: Iterable[StoredBlob]) -> int:
    return sum(each.size for each in blobs)


def _candidates(store: Store) -> BlobCandidates:
    return BlobTree(store.files) if isinstance(store.files, BlobFiles) else RecordedBlobs(store)


class EvictionRun:
    """What one pass evicts, and how much that is.

    `evicted` are the digests, in a dry run only: a million of them take 150 MB.
    """

    def __init__(
        self, store: Store, blobs: BlobCandidates, pause: Callable[[float], None], dry_run: bool
    ) -> None:
        self._store = store
        self._blobs = blobs
        self.pause = DutyCycle(pause).pause
        self.dry_run = dry_run
        self._begun = time.monotonic()
        self.evicted: set[str] = set()
        self.blobs = self.bytes = self.manifests = self.tags = self.links = 0

    def evict(self, blobs: Iterable[StoredBlob]) -> None:
        """Evict the blobs and their links."""
        for some in batches(blobs, PACK):
            self._evict([each for each in some if self._removed(each)])
            self.pause()

    def _removed(self, blob: StoredBlob) -> bool:
        if self.dry_run:
            return blob.digest not in self.evicted
        return self._blobs.remove(blob)

    def _evict(self, blobs: list[StoredBlob]) -> None:
        """Count and forget the blobs, which are removed."""
        self.blobs += len(blobs)
        self.bytes += sum(each.size for each in blobs)
        if self.dry_run:
            self.evicted.update(each.digest for each in blobs)
            self.links += sum(len(self._store.records.linking(each.digest)) for each in blobs)
            return

        def work(batch: Batch) -> int:
            return sum([forget_blob(self._store, batch, each.digest) for each in blobs])

        for each in blobs:
            log.debug("blob.evicted", digest=each.digest, bytes=each.size, used_at=each.used_at)
        self.links += self._store.records.transaction(work) if blobs else 0

    def remove_links(self, keys: list[str]) -> None:
        """Remove links to a blob that is kept."""
        self.links += len(keys)
        self.remove(keys)

    def remove(self, keys: Iterable[str]) -> None:
        for batch in batches(keys):
            if not self.dry_run:
                self._remove_records(batch)
            self.pause()

    def _remove_records(self, keys: list[str]) -> None:
        def work(batch: Batch) -> None:
            for key in keys:
                batch.delete(key)

        self._store.records.transaction(work)

    def report(self, reason: str, short: int = 0) -> EvictionReport:
        report = EvictionReport(
            blobs=self.blobs,
            bytes=self.bytes,
            manifests=self.manifests,
            tags=self.tags,
            links=self.links,
            seconds=round(time.monotonic() - self._begun, 3),
            short=short,
        )
        if not self.dry_run and (report.blobs or report.manifests or report.tags or report.links):
            log.info(
                "evict.done",
                reason=reason,
                blobs=report.blobs,
                bytes=report.bytes,
                manifests=report.manifests,
                tags=report.tags,
                seconds=report.seconds,
            )
        return report
