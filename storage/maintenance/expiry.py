"""What has expired: blobs and records of a cache that were not used for as long as they are kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

from storage.disk.tree import StoredBlob
from storage.graph import Walk, named_digests
from storage.keys import LINK, LISTING, MANIFEST, MOVES, REFERRER, TAG, USE
from storage.maintenance.blob_tree import BlobTree
from storage.maintenance.pins import PinnedContent
from storage.maintenance.usage import Usage
from storage.store import Store
from storage.values import Pointer, StoredManifest


@dataclass(slots=True)
class ExpiredRecords:
    """The keys of the expired records of a repository, and how many tags, manifests and links they are."""

    keys: list[str] = field(default_factory=list)
    tags: int = 0
    manifests: int = 0
    links: int = 0


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
        self._usage = Usage(store.records, clock)

    def _expired(self, used_at: float, keep: float) -> bool:
        return self._clock() - used_at > keep

    def blobs(self, tree: BlobTree) -> list[StoredBlob]:
        keeps = dict(self._repositories())
        shortest = min([self._default_keep_for, *keeps.values()])
        found = {
            each.digest: each
            for each in tree
            if self._expired(each.used_at, shortest) and each.digest not in self._pinned.digests
        }
        longest: dict[str, float] = {}
        for key, _ in self._records.scan(LINK.prefix()):
            repository, digest = LINK.parse(key)
            if digest in found:
                keep = keeps[repository] if repository in keeps else self._keep_for(repository)
                longest[digest] = max(keep, longest.get(digest, 0.0))
        return [
            each
            for digest, each in found.items()
            if self._expired(each.used_at, longest.get(digest, self._default_keep_for))
        ]

    def records(self, tree: BlobTree, removed: Collection[str]) -> Iterator[ExpiredRecords]:
        """The expired records of each repository; `removed` are digests of blobs that count as removed."""
        for repository, keep in self._repositories():
            if not math.isinf(keep):
                yield self._records_of(repository, keep, tree, removed)

    def _repositories(self) -> list[tuple[str, float]]:
        found: set[str] = set()
        for kind in (MANIFEST, TAG, LINK, REFERRER, LISTING):
            found.update(self._records.groups(kind.prefix()))
        return [(repository, self._keep_for(repository)) for repository in sorted(found)]

    def _records_of(
        self, repository: str, keep: float, tree: BlobTree, removed: Collection[str]
    ) -> ExpiredRecords:
        live, tags = self._tags(repository, keep)
        manifests = self._manifests(repository, keep, live)
        expired = ExpiredRecords(tags=len(tags), manifests=len(manifests))
        for tag in tags:
            expired.keys += (TAG.key(repository, tag), MOVES.key(repository, tag), USE.key(repository, tag))
        for digest in manifests:
            expired.keys += (MANIFEST.key(repository, digest), USE.key(repository, digest))
        for key, _ in self._records.scan(REFERRER.prefix(repository)):
            if not manifests.isdisjoint(REFERRER.parse(key)[1:]):
                expired.keys.append(key)
        for key, value in self._records.scan(LISTING.prefix(repository)):
            if self._expired(_time(value.partition(b"\n")[0]), keep):
                expired.keys.append(key)
        for key, value in self._records.scan(LINK.prefix(repository)):
            digest = LINK.parse(key)[1]
            found = None if digest in removed else tree.find(digest)
            if found is None or (
                self._expired(max(found.used_at, _time(value)), keep) and digest not in self._pinned.digests
            ):
                expired.links += 1
                expired.keys.append(key)
        return expired

    def _tags(self, repository: str, keep: float) -> tuple[set[str], list[str]]:
        """The digests of the tags that are kept, and the names of the expired tags."""
        live: set[str] = set()
        expired: list[str] = []
        for key, value in self._records.scan(TAG.prefix(repository)):
            tag = TAG.parse(key)[1]
            pointer = Pointer.parse(value)
            used_at = self._last_use(repository, tag, pointer.validated_at if pointer else 0.0)
            if (repository, tag) in self._pinned.references or not self._expired(used_at, keep):
                live.update([pointer.digest] if pointer else [])
            else:
                expired.append(tag)
        return live, expired

    def _manifests(self, repository: str, keep: float, live: set[str]) -> set[str]:
        """The digests of the expired manifests; those that are `live` keep what they name."""
        stored: dict[str, bytes] = {}
        kept: list[str] = []
        for key, value in self._records.scan(MANIFEST.prefix(repository)):
            digest = MANIFEST.parse(key)[1]
            manifest = StoredManifest.parse(value)
            stored[digest] = manifest.content if manifest else b""
            used_at = self._last_use(repository, digest, manifest.stored_at if manifest else 0.0)
            if digest in live or digest in self._pinned.digests or not self._expired(used_at, keep):
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
