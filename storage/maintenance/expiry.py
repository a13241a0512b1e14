"""What has expired: blobs and records of a cache that were not used for as long as they are kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field

from storage.disk.kept import KeptParts
from storage.disk.tree import StoredBlob
from storage.graph import Walk, named_digests
from storage.keys import LINK, LISTING, MANIFEST, MOVES, REFERRER, TAG, TOTAL, USE
from storage.maintenance.blob_tree import BlobCandidates
from storage.maintenance.pins import PinnedContent
from storage.maintenance.usage import Usage
from storage.records import Batch
from storage.store import Store
from storage.totals import Total, Totals
from storage.values import Pointer, StoredManifest


@dataclass(slots=True)
class ExpiredRecords:
    """The keys of the expired records of a repository, and how many tags, manifests and links they are.

    `oldest` is the time of the first of the others, on which what they keep depends.
    """

    oldest: float
    keys: list[str] = field(default_factory=list)
    tags: int = 0
    manifests: int = 0
    links: int = 0

    def stays(self, at: float) -> None:
        """A record with this time has not expired."""
        self.oldest = min(self.oldest, at)


class Expiry:
    """Finds the blobs and records that have expired, and are not `pinned`.

    `keep_for` returns for how many seconds content of a repository is kept after its last use;
    `default_keep_for` applies to blobs that no repository links.  Methods block, and may raise StorageFailed.
    """

    def __init__(
        self,
        store: Store,
        keep_for: Callable[[str], float],
        default_keep_for: float,
        pinned: PinnedContent,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._records = store.records
        self._keep_for = keep_for
        self._default_keep_for = default_keep_for
        self._pinned = pinned
        self._clock = clock
        self._totals = Totals(store.records)
        self._usage = Usage(store.records, clock)

    def _expired(self, used_at: float, keep: float) -> bool:
        return self._clock() - used_at > keep

    def blobs(self, order: Iterable[StoredBlob]) -> Iterator[StoredBlob]:
        """The expired ones among the blobs in `order`, which begins with the least recently used."""
        shortest = min([self._default_keep_for, *(keep for _, keep in self._repositories())])
        for each in order:
            if not self._expired(each.used_at, shortest):
                return
            if each.digest not in self._pinned.digests and self._expired(each.used_at, self._longest(each)):
                yield each

    def parts(self, found: Iterable[KeptParts]) -> Iterator[StoredBlob]:
        """The expired ones among blobs of which only parts are kept."""
        for blob, _, repositories in found:
            keep = max(self._keep_for(each) for each in repositories)
            if blob.digest not in self._pinned.digests and self._expired(blob.used_at, keep):
                yield blob

    def _longest(self, blob: StoredBlob) -> float:
        links = self._records.linking(blob.digest)
        keeps = [self._keep_for(LINK.parse(key)[0]) for key in links]
        return max(keeps, default=self._default_keep_for)

    def records(self, tree: BlobCandidates, removed: Collection[str]) -> Iterator[ExpiredRecords]:
        """The expired records of each repository; `removed` are digests of blobs that count as removed.

        Only repositories are read in which something may have expired.  Where nothing has, the time is
        recorded before which nothing will.
        """
        for repository, keep in self._repositories():
            before = self._records.get(TOTAL.key(repository))
            total = Total.parse(before) or Total()
            if math.isinf(keep) or not self._due(total, keep):
                continue
            found = self._records_of(repository, keep, tree, removed)
            if found.keys:
                yield found
            elif before is not None and total.counted is not None:
                total.counted.oldest = found.oldest
                self._record(TOTAL.key(repository), before, total.encode())

    def _due(self, total: Total, keep: float) -> bool:
        oldest = 0.0 if total.counted is None else total.counted.oldest
        return oldest is not None and self._expired(oldest, keep)

    def _record(self, key: str, before: bytes, after: bytes) -> None:
        def work(batch: Batch) -> None:
            if batch.get(key) == before:
                batch.put(key, after)

        if before != after:
            self._records.transaction(work)

    def _repositories(self) -> Iterator[tuple[str, float]]:
        for repository, total in self._totals.repositories():
            # In the same records, uses of the private registries are counted.
            if total.counted is None or total.counted.numbers.keys() != {USE.name}:
                yield repository, self._keep_for(repository)

    def _records_of(
        self, repository: str, keep: float, tree: BlobCandidates, removed: Collection[str]
    ) -> ExpiredRecords:
        expired = ExpiredRecords(oldest=self._clock())
        live, tags = self._tags(repository, keep, expired)
        manifests = self._manifests(repository, keep, live, expired)
        expired.tags, expired.manifests = len(tags), len(manifests)
        for tag in tags:
            expired.keys += (TAG.key(repository, tag), MOVES.key(repository, tag), USE.key(repository, tag))
        for digest in manifests:
            expired.keys += (MANIFEST.key(repository, digest), USE.key(repository, digest))
        for key, _ in self._records.scan(REFERRER.prefix(repository)):
            if not manifests.isdisjoint(REFERRER.parse(key)[1:]):
                expired.keys.append(key)
        for key, value in self._records.scan(LISTING.prefix(repository)):
            at = _time(value.partition(b"\n")[0])
            if self._expired(at, keep):
                expired.keys.append(key)
            else:
                expired.stays(at)
        self._links(repository, keep, tree, removed, expired)
        return expired

    def _links(
        self,
        repository: str,
        keep: float,
        tree: BlobCandidates,
        removed: Collection[str],
        expired: ExpiredRecords,
    ) -> None:
        for key, value in self._records.scan(LINK.prefix(repository)):
            digest = LINK.parse(key)[1]
            if digest in removed:
                continue
            found = tree.find(digest)
            used_at = max(found.used_at, _time(value)) if found else 0.0
            if found is None or (self._expired(used_at, keep) and digest not in self._pinned.digests):
                expired.links += 1
                expired.keys.append(key)
            else:
                expired.stays(used_at)

    def _tags(self, repository: str, keep: float, found: ExpiredRecords) -> tuple[set[str], list[str]]:
        """The digests of the tags that are kept, and the names of the expired tags."""
        live: set[str] = set()
        expired: list[str] = []
        for key, value in self._records.scan(TAG.prefix(repository)):
            tag = TAG.parse(key)[1]
            pointer = Pointer.parse(value)
            used_at = self._last_use(repository, tag, pointer.validated_at if pointer else 0.0)
            if (repository, tag) in self._pinned.references or not self._expired(used_at, keep):
                live.update([pointer.digest] if pointer else [])
                found.stays(used_at)
            else:
                expired.append(tag)
        return live, expired

    def _manifests(self, repository: str, keep: float, live: set[str], found: ExpiredRecords) -> set[str]:
        """The digests of the expired manifests; those that are `live` keep what they name."""
        stored: dict[str, bytes] = {}
        kept: list[str] = []
        for key, value in self._records.scan(MANIFEST.prefix(repository)):
            digest = MANIFEST.parse(key)[1]
            manifest = StoredManifest.parse(value)
            stored[digest] = manifest.content if manifest else b""
            used_at = self._last_use(repository, digest, manifest.stored_at if manifest else 0.0)
            alone = digest in self._pinned.digests or not self._expired(used_at, keep)
            if alone:
                found.stays(used_at)
            if alone or digest in live:
                kept.append(digest)
        steps = Walk(kept)
        for digest in steps:
            steps.add(named_digests(stored.get(digest, b""))[0])
        return stored.keys() - steps.reached

    def _last_use(self, repository: str, reference: str, stored_at: float) -> float:
        use = self._usage.use(repository, reference)
        return max(stored_at, use.last) if use else stored_at


def _time(record: bytes) -> float:
    """The last number of a record; 0 if it is damaged, so that it counts as very old."""
    try:
        return float(record.rpartition(b" ")[2])
    except ValueError:
        return 0.0
