"""Eviction from a cache: by age, by the limits of the cache and its namespaces, and by free disk space.

A blob is evicted by unlinking its file: transfers in flight have it open.  A blob that was used since it was
chosen is kept.  Records of a cache may vanish at any time; the origin is then asked again.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import structlog

from storage.content import files_of
from storage.disk.tree import StoredBlob
from storage.keys import LINK
from storage.maintenance.blob_tree import BlobTree, oldest
from storage.maintenance.expiry import Expiry
from storage.maintenance.pace import DutyCycle
from storage.maintenance.pins import PinnedContent
from storage.records import Batch, batches
from storage.store import Store

log = structlog.get_logger()


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
    with a number of seconds to wait, during work that is not urgent.
    """

    def __init__(
        self,
        store: Store,
        rules: EvictionRules,
        pinned: Callable[[], PinnedContent] = lambda: PinnedContent(frozenset(), frozenset()),
        clock: Callable[[], float] = time.time,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store = store
        self._blobs = BlobTree(files_of(store.files))
        self._rules = rules
        self._pinned = pinned
        self._clock = clock
        self._pause = pause

    def stored(self) -> int:
        """Bytes of committed blobs.  Only directories that have changed since the last call are read."""
        return self._blobs.size()

    def over(self, coming: int = 0) -> int:
        """By how many bytes limits are exceeded once `coming` more bytes are stored."""
        over = self._needed(coming)
        if not over and self._rules.limits:
            over = max(
                sum(each.size for each in self._linked_in(name).values()) - limit
                for name, limit in self._rules.limits.items()
            )
        return max(0, over)

    # By size

    def shrink(self, coming: int = 0, to: int | None = None, dry_run: bool = False) -> EvictionReport:
        """Evict the least recently used content that exceeds a limit, or until `to` bytes are left."""
        run = self._run(dry_run, urgent=coming > 0)
        excess = self._excess(coming, to)
        if excess > 0:
            kept = self._kept()
            chosen = self._oldest(excess, kept)
            if coming and sum(each.size for each in chosen) < self._needed(coming):
                # It would not fit even then: emptying the cache for it would gain nothing.
                coming, excess = 0, self._excess(0, to)
                chosen = self._oldest(excess, kept) if excess > 0 else []
            run.evict(chosen)
        if to is None:
            for name, limit in self._rules.limits.items():
                self._shrink_namespace(name, limit, run)
        run.remove_links()
        short = max(0, excess - run.bytes) if self._excess(coming, to) > 0 or dry_run else 0
        if short:
            log.warning("evict.short", bytes=short, reason="what may be evicted does not suffice")
        return run.report("limit" if to is None else "asked", short)

    def _run(self, dry_run: bool, urgent: bool) -> EvictionRun:
        pause = (lambda seconds: None) if urgent else self._pause
        return EvictionRun(self._store, self._blobs, pause, dry_run)

    def _oldest(self, enough: int, kept: set[str]) -> list[StoredBlob]:
        return oldest((each for each in self._blobs if each.digest not in kept), enough)

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

    def _shrink_namespace(self, name: str, limit: int, run: EvictionRun) -> None:
        linked = self._linked_in(name)
        if (used := sum(each.size for each in linked.values())) <= limit:
            return
        kept = self._kept()
        candidates = (each for each in linked.values() if each.digest not in kept)
        chosen = {each.digest: each for each in oldest(candidates, used - int(limit * self._rules.evict_to))}
        elsewhere = set()
        for key, _ in self._store.records.scan(LINK.prefix()):
            repository, digest = LINK.parse(key)
            if digest in chosen:
                if self._rules.covers(name, repository):
                    run.links.add(key)
                else:
                    elsewhere.add(digest)
        run.evict(each for digest, each in chosen.items() if digest not in elsewhere)

    def _linked_in(self, name: str) -> dict[str, StoredBlob]:
        """The blobs that repositories of the namespace, or of those with this key, link."""
        linked: dict[str, StoredBlob] = {}
        for digest in self._links_in(name):
            if digest not in linked and (found := self._blobs.find(digest)) is not None:
                linked[digest] = found
        return linked

    def _kept(self) -> set[str]:
        """Digests of blobs that are kept however little space there is."""
        kept: set[str] = set(self._pinned().digests)
        for name in self._rules.kept:
            kept.update(self._links_in(name))
        return kept

    def _links_in(self, name: str) -> Iterator[str]:
        alone = name not in self._rules.shared
        for key, _ in self._store.records.scan(LINK.within(name) if alone else LINK.prefix()):
            repository, digest = LINK.parse(key)
            if alone or self._rules.covers(name, repository):
                yield digest

    # By age

    def expire(self, dry_run: bool = False) -> EvictionReport:
        """Evict what was not used for as long as the rules keep it."""
        run = self._run(dry_run, urgent=False)
        default = self._rules.default_keep_for
        expiry = Expiry(self._store, self._keep_for, default, self._pinned(), self._clock)
        run.evict(expiry.blobs(self._blobs))
        run.remove(self._expired_keys(expiry, run))
        return run.report("ttl")

    def _expired_keys(self, expiry: Expiry, run: EvictionRun) -> Iterator[str]:
        for expired in expiry.records(self._blobs, run.evicted):
            run.tags += expired.tags
            run.manifests += expired.manifests
            run.removed_links += expired.links
            yield from expired.keys
            run.pause()

    def _keep_for(self, repository: str) -> float:
        if self._rules.key_of(repository.partition("/")[0]) in self._rules.kept:
            return math.inf
        return self._rules.keep_for(repository)


class EvictionRun:
    """What one pass evicts, and how much that is."""

    def __init__(self, store: Store, blobs: BlobTree, pause: Callable[[float], None], dry_run: bool) -> None:
        self._records = store.records
        self._blobs = blobs
        self.pause = DutyCycle(pause).pause
        self._dry_run = dry_run
        self._begun = time.monotonic()
        self.evicted: set[str] = set()  # digests
        self.links: set[str] = set()  # keys of links to remove although their blobs are kept
        self.bytes = self.manifests = self.tags = self.removed_links = 0

    def evict(self, blobs: Iterable[StoredBlob]) -> None:
        for each in blobs:
            if each.digest not in self.evicted and (self._dry_run or self._blobs.remove(each)):
                self.evicted.add(each.digest)
                self.bytes += each.size
                if not self._dry_run:
                    log.debug("blob.evicted", digest=each.digest, bytes=each.size, used_at=each.used_at)
            self.pause()

    def remove_links(self) -> None:
        """Remove the links of evicted blobs, and `links`."""
        links = set(self.links)
        if self.evicted:
            keys = (key for key, _ in self._records.scan(LINK.prefix()))
            links.update(key for key in keys if LINK.parse(key)[1] in self.evicted)
        self.removed_links += len(links)
        self.remove(links)

    def remove(self, keys: Iterable[str]) -> None:
        for batch in batches(keys):
            if not self._dry_run:
                self._remove_records(batch)
            self.pause()

    def _remove_records(self, keys: list[str]) -> None:
        def work(batch: Batch) -> None:
            for key in keys:
                batch.delete(key)

        self._records.transaction(work)

    def report(self, reason: str, short: int = 0) -> EvictionReport:
        report = EvictionReport(
            blobs=len(self.evicted),
            bytes=self.bytes,
            manifests=self.manifests,
            tags=self.tags,
            links=self.removed_links,
            seconds=round(time.monotonic() - self._begun, 3),
            short=short,
        )
        if not self._dry_run and (report.blobs or report.manifests or report.tags or report.links):
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
