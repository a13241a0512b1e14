"""Leases keep what a push in progress relies on: stored content that its client therefore does not send.

    lease <repository> <digest>               when a manifest was requested by its digest, or lost a tag

The lease of a blob is its last use.  Both are taken in a write transaction, before the client is
answered, and the collection checks them in the transaction that removes.  So one of the two comes first:
either the content is kept, or the answer is that it is unknown, and the client sends it.

If a lease cannot be written, as while the database is away, the client is answered all the same: it may be
one that pulls.  A collection by another server may then come before the manifest, which is refused, unless
the namespace is sparse: its client pushes again.

A lease is renewed when it is older than half the grace period, so that most answers write nothing; hence it
holds for one and a half times that period, which is at least the period after every answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from storage.errors import BlobUnknown, ManifestUnknown, StorageFailed
from storage.keys import LEASE, LINK, MANIFEST
from storage.oci import Digest
from storage.records import Batch
from storage.store import Store

RENEWED, HELD = 0.5, 1.5  # times the grace period


class Leases:
    """The leases of a private store.  `grace` is the grace period in seconds."""

    def __init__(self, store: Store, grace: float, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._grace = grace
        self._clock = clock

    def young(self, at: float) -> bool:
        """Whether content that was last used `at` this time must not be collected."""
        return self._clock() - at <= self._grace * HELD

    @property
    def renewed_after(self) -> float:
        """The seconds for which further uses may not be recorded."""
        return self._grace * RENEWED

    def of(self, repository: str, digest: str) -> float:
        """When the manifest was last leased, 0 for never."""
        return _time(self._store.records.get(LEASE.key(repository, digest)))

    async def blob(self, repository: str, digest: Digest, used_at: float) -> None:
        """Lease a blob that was last used at `used_at`.  Raises BlobUnknown if it is no longer stored."""
        if self.due(used_at) and not self._store.cut_off:
            with suppress(StorageFailed):  # what can still be read is served
                await self._store.run(self._blob, repository, digest)

    def _blob(self, repository: str, digest: Digest) -> None:
        def work(batch: Batch) -> None:
            if batch.get(LINK.key(repository, digest)) is None:
                raise BlobUnknown(f"{repository} has no blob {digest}")
            self._store.files.renew(digest, batch)

        self._store.records.transaction(work, shared=True)

    async def manifest(self, repository: str, digest: Digest, stored_at: float) -> None:
        """Lease a manifest `stored_at` this time.  Raises ManifestUnknown if it is no longer stored."""
        if self.due(stored_at) and not self._store.cut_off:
            with suppress(StorageFailed):
                if self.due(await self._store.read(self.of, repository, digest)):
                    await self._store.run(self._manifest, repository, digest)

    def _manifest(self, repository: str, digest: Digest) -> None:
        def work(batch: Batch) -> None:
            if batch.get(MANIFEST.key(repository, digest)) is None:
                raise ManifestUnknown(f"{repository} has no manifest {digest}")
            self._take(batch, repository, digest)

        self._store.records.transaction(work, shared=True)

    def untagged(self, batch: Batch, repository: str, digest: str) -> None:
        """Lease a manifest that loses a tag: it counts as untagged from now on, not since its push."""
        self._take(batch, repository, digest)

    def _take(self, batch: Batch, repository: str, digest: str) -> None:
        batch.put(LEASE.key(repository, digest), str(self._clock()).encode())

    def drop(self, batch: Batch, repository: str, digest: str) -> None:
        batch.delete(LEASE.key(repository, digest))

    def due(self, at: float) -> bool:
        """Whether a lease that was taken `at` this time has to be renewed."""
        return not 0 <= self._clock() - at <= self._grace * RENEWED


def _time(record: bytes | None) -> float:
    try:
        return float(record or 0)
    except ValueError:
        return 0.0
