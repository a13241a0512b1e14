"""What a push in progress relies on is leased: a client is told that it is here, and so does not send it.

    lease <repository> <digest>               when a manifest was asked for by its digest, or lost a tag

The lease of a blob is its file's mtime.  Both are taken in a write transaction, before the client is
answered, and whoever collects looks at them in the transaction in which he removes.  So one of the two comes
first: either it stays, or the client is told that it is not here, and sends it.

A lease is renewed when it is older than half the grace, so that most answers write nothing; hence it holds
for one and a half times the grace, and every answer for the grace at least.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from storage.concurrency import run_in_thread
from storage.disk.records import Batch
from storage.errors import BlobUnknown, ManifestUnknown, StorageFailed
from storage.keys import LEASE, LINK, MANIFEST
from storage.oci import Digest
from storage.store import Store

RENEWED, HELD = 0.5, 1.5  # times the grace


class Leases:
    """`grace` is in seconds."""

    def __init__(self, store: Store, grace: float, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._grace = grace
        self._clock = clock

    def young(self, at: float) -> bool:
        """Whether what was used `at` that time is not to be collected."""
        return self._clock() - at <= self._grace * HELD

    def of(self, repository: str, digest: str) -> float:
        """When the manifest was leased last; 0: never."""
        return _time(self._store.records.get(LEASE.key(repository, digest)))

    async def blob(self, repository: str, digest: Digest, used_at: float) -> None:
        """Its file was `used_at` that time.  Raises BlobUnknown where it is not here any more."""
        if self._due(used_at):
            with suppress(StorageFailed):  # a disk that takes nothing serves all the same, and loses nothing
                await run_in_thread(self._blob, repository, digest)

    def _blob(self, repository: str, digest: Digest) -> None:
        def work(batch: Batch) -> None:
            if batch.get(LINK.key(repository, digest)) is None:
                raise BlobUnknown(f"{repository} holds no blob {digest}")
            self._store.files.renew(digest)

        self._store.records.transaction(work)

    async def manifest(self, repository: str, digest: Digest, stored_at: float) -> None:
        """It was `stored_at` that time.  Raises ManifestUnknown where it is not here any more."""
        if self._due(stored_at) and self._due(self.of(repository, digest)):
            with suppress(StorageFailed):
                await run_in_thread(self._manifest, repository, digest)

    def _manifest(self, repository: str, digest: Digest) -> None:
        def work(batch: Batch) -> None:
            if batch.get(MANIFEST.key(repository, digest)) is None:
                raise ManifestUnknown(f"{repository} holds no manifest {digest}")
            self._take(batch, repository, digest)

        self._store.records.transaction(work)

    def left(self, batch: Batch, repository: str, digest: str) -> None:
        """The manifest loses a tag: if that was its last, it is untagged from now on, not since its push."""
        self._take(batch, repository, digest)

    def _take(self, batch: Batch, repository: str, digest: str) -> None:
        batch.put(LEASE.key(repository, digest), str(self._clock()).encode())

    def drop(self, batch: Batch, repository: str, digest: str) -> None:
        batch.delete(LEASE.key(repository, digest))

    def _due(self, at: float) -> bool:
        return not 0 <= self._clock() - at <= self._grace * RENEWED


def _time(record: bytes | None) -> float:
    try:
        return float(record or 0)
    except ValueError:
        return 0.0
