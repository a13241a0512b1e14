"""What nobody uses goes, and what is too much goes: time to live, watermarks, limits of namespaces.

A blob's last use is its file's mtime, so that to find the oldest takes one look at the tree and no database.
A blob goes by being unlinked: who reads it has it open.  Where it was used since it was looked at, it stays.
Records of a cache may vanish at any time; what they said is asked of the origin again.
"""

from __future__ import annotations

import heapq
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import structlog

from storage.disk.records import Batch
from storage.disk.tree import StoredBlob, directories, read_directory
from storage.errors import DigestInvalid
from storage.graph import Walk, contents
from storage.keys import LINK, LISTING, MANIFEST, MOVES, REFERRER, TAG, USE
from storage.maintenance.pins import Kept
from storage.maintenance.usage import Usage
from storage.oci import Digest
from storage.store import Store

log = structlog.get_logger()

SETTLED = 2.0  # seconds after which a directory's mtime tells that nothing changed in it since
BATCH = 500  # records removed in one transaction
PACE = 1.0  # seconds of rest for each second of work that is not urgent


@dataclass(frozen=True, slots=True)
class EvictionRules:
    """`keep_for` maps a full name to seconds, `default_keep_for` is for what no repository shows.

    `limit` and `limits`, of namespaces, are in bytes; eviction goes on until `evict_to` of them is left.
    `min_free` maps the size of the disk to the bytes of it that are to stay free.  Nothing of the namespaces
    in `kept` goes.
    """

    keep_for: Callable[[str], float]
    default_keep_for: float = math.inf
    limit: int | None = None
    evict_to: float = 0.9
    min_free: Callable[[int], int] = lambda size: 0
    limits: Mapping[str, int] = field(default_factory=dict)
    kept: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class EvictionReport:
    """What went, or would go; `short` is how many bytes are still too many."""

    blobs: int = 0
    bytes: int = 0
    manifests: int = 0
    tags: int = 0
    links: int = 0
    seconds: float = 0.0
    short: int = 0


def oldest(found: Iterable[StoredBlob], enough: int) -> list[StoredBlob]:
    """The least recently used of them that have `enough` bytes together, and no more than it takes."""
    heap: list[tuple[float, int, Digest]] = []  # of those so far the youngest is on top
    held = 0
    for each in found:
        if held >= enough and heap and each.used_at >= -heap[0][0]:
            continue
        heapq.heappush(heap, (-each.used_at, each.size, each.digest))
        held += each.size
        while heap and held - heap[0][1] >= enough:
            held -= heapq.heappop(heap)[1]
    return sorted(StoredBlob(-age, size, digest) for age, size, digest in heap)


class Eviction:
    """Every method may raise StorageFailed, and blocks.  Several processes may use the store.

    `pinned` tells what is to stay.  `pause` is called with how many seconds to rest where there is no hurry.
    """

    def __init__(
        self,
        store: Store,
        rules: EvictionRules,
        pinned: Callable[[], Kept] = lambda: Kept(frozenset(), frozenset()),
        clock: Callable[[], float] = time.time,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store = store
        self._root = store.files.root / "blobs"
        self._rules = rules
        self._usage = Usage(store.records, clock)
        self._pinned = pinned
        self._clock = clock
        self.pause = pause
        self._directories: dict[str, tuple[int, int]] = {}  # mtime in ns, and the bytes in it

    # What is there

    def stored(self) -> int:
        """Bytes of committed blobs.  Only directories in which something changed are read."""
        found: dict[str, tuple[int, int]] = {}
        for directory in self._fan_out():
            with suppress(FileNotFoundError):
                changed_at = (self._root / directory).stat().st_mtime_ns
                known = self._directories.get(directory)
                if known is None or known[0] != changed_at:
                    known = changed_at, sum(each.size for each in self._blobs_in(directory))
                # Within the clock's grain something may come that leaves the same time.
                settled = time.time() - changed_at / 1e9 > SETTLED
                found[directory] = known if settled else (-1, known[1])
        self._directories = found
        return sum(size for _, size in found.values())

    def over(self, coming: int = 0) -> int:
        """How many bytes there are too many, if `coming` more come; 0: none."""
        found = self._needed(coming)
        if not found and self._rules.limits:
            found = max(used - self._rules.limits[name] for name, used in self._used_by_namespace().items())
        return max(0, found)

    def _lacking(self, coming: int) -> int:
        status = os.statvfs(self._store.files.root)
        free = status.f_bavail * status.f_frsize
        return self._rules.min_free(status.f_blocks * status.f_frsize) + coming - free

    # Too much

    def shrink(self, coming: int = 0, to: int | None = None, dry_run: bool = False) -> EvictionReport:
        """Let the least recently used go, where there is too much, or until `to` bytes are left."""
        work = _Work(self, dry_run, urgent=coming > 0)
        excess = self._excess(coming, to)
        if excess > 0:
            kept = self._kept()
            taken = self._oldest(excess, kept)
            if coming and sum(each.size for each in taken) < self._needed(coming):
                # It would not fit even so: nothing is gained by emptying the cache for it.
                coming, excess = 0, self._excess(0, to)
                taken = self._oldest(excess, kept) if excess > 0 else []
            work.take(taken)
        if to is None:
            for name, limit in self._rules.limits.items():
                self._shrink_namespace(name, limit, work)
        work.unlink_links()
        short = max(0, excess - work.bytes) if self._excess(coming, to) > 0 or dry_run else 0
        if short:
            log.warning("evict.short", bytes=short, reason="what may go does not suffice")
        return work.report("limit" if to is None else "asked", short)

    def _oldest(self, enough: int, kept: set[str]) -> list[StoredBlob]:
        return oldest((each for each in self._blobs() if each.digest not in kept), enough)

    def _needed(self, coming: int) -> int:
        """Bytes that have to go, lest there be too much."""
        limit = self._rules.limit
        found = self.stored() + coming - limit if limit is not None else 0
        return max(0, found, self._lacking(coming))

    def _excess(self, coming: int, to: int | None) -> int:
        if to is not None:
            return self.stored() - to
        found = self._lacking(coming)
        if self._rules.limit is not None and (stored := self.stored()) + coming > self._rules.limit:
            found = max(found, stored + coming - int(self._rules.limit * self._rules.evict_to))
        return found

    def _shrink_namespace(self, name: str, limit: int, work: _Work) -> None:
        shown = self._shown_by(name)
        if (used := sum(each.size for each in shown.values())) <= limit:
            return
        kept = self._kept()
        may_go = (each for each in shown.values() if each.digest not in kept)
        gone = {each.digest: each for each in oldest(may_go, used - int(limit * self._rules.evict_to))}
        elsewhere = set()
        for key, _ in self._store.records.scan(LINK.prefix()):
            repository, digest = LINK.parse(key)
            if digest in gone:
                if repository.startswith(f"{name}/"):
                    work.links.append(key)
                else:
                    elsewhere.add(digest)
        work.take(each for digest, each in gone.items() if digest not in elsewhere)

    def _shown_by(self, name: str) -> dict[str, StoredBlob]:
        shown: dict[str, StoredBlob] = {}
        for key, _ in self._store.records.scan(LINK.within(name)):
            digest = LINK.parse(key)[1]
            if digest not in shown and (found := self._look(digest)) is not None:
                shown[digest] = found
        return shown

    def _used_by_namespace(self) -> dict[str, int]:
        return {name: sum(each.size for each in self._shown_by(name).values()) for name in self._rules.limits}

    def _kept(self) -> set[str]:
        """Digests of blobs that stay however little room there is."""
        kept: set[str] = set(self._pinned().digests)
        for name in self._rules.kept:
            kept.update(LINK.parse(key)[1] for key, _ in self._store.records.scan(LINK.within(name)))
        return kept

    # Too old

    def expire(self, dry_run: bool = False) -> EvictionReport:
        """Let go what was not used for as long as the rules keep it, as they are now."""
        work = _Work(self, dry_run, urgent=False)
        pinned = self._pinned()
        work.take(self._expired_blobs(pinned))
        for repository in self._repositories():
            keep = self._keep_for(repository)
            if not math.isinf(keep):
                self._expire_in(repository, keep, pinned, work)
                work.rest()
        return work.report("ttl")

    def _keep_for(self, repository: str) -> float:
        if repository.partition("/")[0] in self._rules.kept:
            return math.inf
        return self._rules.keep_for(repository)

    def _old(self, used_at: float, keep: float) -> bool:
        return self._clock() - used_at > keep

    def _expired_blobs(self, pinned: Kept) -> list[StoredBlob]:
        keeps = {repository: self._keep_for(repository) for repository in self._repositories()}
        shortest = min([self._rules.default_keep_for, *keeps.values()])
        found = {
            each.digest: each
            for each in self._blobs()
            if self._old(each.used_at, shortest) and each.digest not in pinned.digests
        }
        longest: dict[str, float] = {}
        for key, _ in self._store.records.scan(LINK.prefix()):
            repository, digest = LINK.parse(key)
            if digest in found:
                keep = keeps[repository] if repository in keeps else self._keep_for(repository)
                longest[digest] = max(keep, longest.get(digest, 0.0))
        default = self._rules.default_keep_for
        return [
            each for digest, each in found.items() if self._old(each.used_at, longest.get(digest, default))
        ]

    def _repositories(self) -> list[str]:
        found: set[str] = set()
        for kind in (MANIFEST, TAG, LINK, REFERRER, LISTING):
            found.update(self._store.records.groups(kind.prefix()))
        return sorted(found)

    def _expire_in(self, repository: str, keep: float, pinned: Kept, work: _Work) -> None:
        live, gone = self._tags(repository, keep, pinned)
        for tag in gone:
            work.tags += 1
            work.remove(TAG.key(repository, tag), MOVES.key(repository, tag), USE.key(repository, tag))
        dead = self._dead_manifests(repository, keep, pinned, live)
        for digest in dead:
            work.manifests += 1
            work.remove(MANIFEST.key(repository, digest), USE.key(repository, digest))
        for key, _ in self._store.records.scan(REFERRER.prefix(repository)):
            _, subject, referrer = REFERRER.parse(key)
            if subject in dead or referrer in dead:
                work.remove(key)
        for key, value in self._store.records.scan(LISTING.prefix(repository)):
            if self._old(_time(value.partition(b"\n")[0]), keep):
                work.remove(key)
        for key, value in self._store.records.scan(LINK.prefix(repository)):
            digest = LINK.parse(key)[1]
            found = None if digest in work.gone else self._look(digest)
            used_at = found.used_at if found else 0.0
            if found is None or (
                self._old(max(used_at, _time(value)), keep) and digest not in pinned.digests
            ):
                work.removed_links += 1
                work.remove(key)

    def _tags(self, repository: str, keep: float, pinned: Kept) -> tuple[set[str], list[str]]:
        """The digests of those that stay, and the names of those that go."""
        live, gone = set(), []
        for key, value in self._store.records.scan(TAG.prefix(repository)):
            tag = TAG.parse(key)[1]
            digest, _, at = value.partition(b" ")
            if (repository, tag) in pinned.references or not self._old(
                self._last_use(repository, tag, _time(at)), keep
            ):
                live.add(digest.decode("ascii", "replace"))
            else:
                gone.append(tag)
        return live, gone

    def _dead_manifests(self, repository: str, keep: float, pinned: Kept, live: set[str]) -> set[str]:
        stored: dict[str, bytes] = {}
        alive: list[str] = []
        for key, value in self._store.records.scan(MANIFEST.prefix(repository)):
            digest = MANIFEST.parse(key)[1]
            head, _, content = value.partition(b"\n")
            stored[digest] = content
            used_at = self._last_use(repository, digest, _time(head))
            if digest in live or digest in pinned.digests or not self._old(used_at, keep):
                alive.append(digest)
        steps = Walk(alive)
        for digest in steps:
            if (named := contents(stored.get(digest, b""))) is not None:
                steps.add(child.digest for child in named.listed)
        return stored.keys() - steps.reached

    def _last_use(self, repository: str, reference: str, stored_at: float) -> float:
        use = self._usage.use(repository, reference)
        return max(stored_at, use.last) if use else stored_at

    # The tree

    def _fan_out(self) -> list[str]:
        with self._store.files.guard(self._root):
            return directories(self._root)[0]

    def _blobs(self) -> Iterator[StoredBlob]:
        for directory in self._fan_out():
            yield from self._blobs_in(directory)

    def _blobs_in(self, directory: str) -> Sequence[StoredBlob]:
        with suppress(OSError):  # of one directory: the others can still make room
            return read_directory(self._root, directory).blobs
        return ()

    def _look(self, digest: str) -> StoredBlob | None:
        with suppress(OSError, DigestInvalid):
            parsed = Digest.parse(digest)
            found = self._store.files.path(parsed).stat()
            return StoredBlob(found.st_mtime, found.st_size, parsed)
        return None

    def unlink(self, found: StoredBlob) -> bool:
        """Whether it went; it does not where it was used since it was `found`."""
        path = self._store.files.path(found.digest)
        with suppress(OSError):
            if path.stat().st_mtime == found.used_at:
                path.unlink()
                return True
        return False

    def forget(self, keys: list[str]) -> None:
        def work(batch: Batch) -> None:
            for key in keys:
                batch.delete(key)

        self._store.records.transaction(work)

    def links_of(self, digests: set[str]) -> list[str]:
        return [key for key, _ in self._store.records.scan(LINK.prefix()) if LINK.parse(key)[1] in digests]


class _Work:
    """What goes in one pass; rests in between where there is no hurry."""

    def __init__(self, eviction: Eviction, dry_run: bool, urgent: bool) -> None:
        self._eviction = eviction
        self._dry_run = dry_run
        self._urgent = urgent
        self._begun = self._rested = time.monotonic()
        self._keys: list[str] = []
        self.gone: set[str] = set()
        self.links: list[str] = []
        self.bytes = self.manifests = self.tags = self.removed_links = 0

    def take(self, found: Iterable[StoredBlob]) -> None:
        for each in found:
            if each.digest not in self.gone and (self._dry_run or self._eviction.unlink(each)):
                self.gone.add(each.digest)
                self.bytes += each.size
                if not self._dry_run:
                    log.debug("blob.evicted", digest=each.digest, bytes=each.size, used_at=each.used_at)
            self.rest()

    def unlink_links(self) -> None:
        """Remove those of what has gone, and those that are to go anyhow."""
        links = set(self.links)
        if self.gone:
            links.update(self._eviction.links_of(self.gone))
        self.removed_links += len(links)
        self.remove(*links)

    def remove(self, *keys: str) -> None:
        self._keys += keys
        if len(self._keys) >= BATCH:
            self._flush()

    def _flush(self) -> None:
        keys, self._keys = self._keys, []
        for start in range(0, 0 if self._dry_run else len(keys), BATCH):
            self._eviction.forget(keys[start : start + BATCH])
            self.rest()

    def rest(self) -> None:
        worked = time.monotonic() - self._rested
        if not self._urgent and worked > 0.05:
            self._eviction.pause(worked * PACE)
            self._rested = time.monotonic()

    def report(self, reason: str, short: int = 0) -> EvictionReport:
        self._flush()
        seconds = round(time.monotonic() - self._begun, 3)
        report = EvictionReport(
            len(self.gone), self.bytes, self.manifests, self.tags, self.removed_links, seconds, short
        )
        if not self._dry_run and (self.gone or self.manifests or self.tags or self.removed_links):
            log.info(
                "evict.done",
                reason=reason,
                blobs=report.blobs,
                bytes=report.bytes,
                manifests=report.manifests,
                tags=report.tags,
                seconds=seconds,
            )
        return report


def _time(record: bytes) -> float:
    """The last of its numbers; 0 where it is damaged: as if it were very old."""
    try:
        return float(record.rpartition(b" ")[2])
    except ValueError:
        return 0.0
