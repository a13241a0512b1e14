"""Copies: the blobs that a private registry has in a bucket, kept as files among those of the caches.

    Hosted ── BlobCopies           each server's own: files, bounded and evicted as cached content is
      └────── Store                records, and blobs that are objects

Whether a blob is there, and who may have it, the records of the store say, each time; a copy has only the
bytes of a digest.  It comes from the bucket, by a fill that all who ask for the blob follow, and which
verifies it; or from a push, whose file stays here.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from proxy.cache.fills import Fills
from proxy.cache.readers import BlobSource
from storage.concurrency import run_in_thread
from storage.content import files_of
from storage.errors import BlobUnknown, StorageFailed
from storage.keys import COPIES
from storage.oci import OCTETS, Descriptor, Digest, Span
from storage.records import Batch
from storage.registry import Blob, Registry
from storage.store import Store

AT_ONCE = 50  # pushed blobs that become copies in one transaction
CHECKED = 64 << 20  # bytes of such copies after which limits are looked at


class _Objects(Registry):
    """The blobs of `store`, whatever repository has them: its records have said who may have them.

    One fill of a blob is for all of its repositories, so it outlives the link in the one that it is for.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    async def get_blob(self, repository: str, digest: Digest, span: Span | None = None) -> Blob:
        blob = await self._store.read(self._store.files.open, digest)
        await blob.begin(span)
        return blob

    async def resolve_blob(self, repository: str, digest: Digest) -> Descriptor:
        blob = await self._store.read(self._store.files.open, digest)
        return blob.descriptor


class BlobCopies:
    """The copies among the blobs of `cache`, which `fills` fetch."""

    def __init__(self, cache: Store, fills: Fills) -> None:
        self._cache = cache
        self._files = files_of(cache.files)
        self._fills = fills
        self._fresh: list[tuple[Path, Digest]] = []  # files of what was pushed
        self._unchecked = 0  # bytes
        self._taking: asyncio.Task[None] | None = None

    async def get_blob(
        self, namespace: str, store: Store, repository: str, digest: Digest, span: Span | None = None
    ) -> tuple[Blob, float]:
        """A blob of `store`, and when that was last used; `span` is as in Registry.get_blob.

        Raises what store.get_blob() does.
        """
        stored, _ = await store.read(store.blob, f"{namespace}/{repository}", digest)
        failed = False
        try:
            return self._files.open(digest, stored.descriptor.size), stored.used_at
        except BlobUnknown:
            pass
        except StorageFailed:
            failed = True
        # Ranges are read as ranges; containerd begins a pull of the whole blob with `bytes=0-`.
        whole = span in (None, Span(0)) or self._fills.filling(digest)
        if whole and not failed and stored.descriptor.size:
            source = BlobSource(namespace, _Objects(store), repository, linked=COPIES)
            with suppress(StorageFailed):
                return (await self._fills.join(source, digest, span)).value, stored.used_at
        await stored.begin(span)
        return stored, stored.used_at

    def keep(self, source: Path, digest: Digest) -> bool:
        """Take over the file of a verified blob, soon; returns whether the file was moved."""
        fresh = self._files.path_of(secrets.token_urlsafe(16))
        try:
            source.rename(fresh)
        except OSError:  # another file system, or the disk fails
            return False
        self._fresh.append((fresh, digest))
        if self._taking is None:
            self._taking = asyncio.get_running_loop().create_task(self._take())
        return True

    async def _take(self) -> None:
        """Make copies of the fresh files, of many in one transaction.  Nobody waits for it."""
        try:
            while self._fresh:
                some, self._fresh = self._fresh[:AT_ONCE], self._fresh[AT_ONCE:]
                with suppress(StorageFailed):  # then a scrub counts them
                    self._unchecked += await run_in_thread(self._copy, some)
                if self._unchecked >= CHECKED:
                    self._unchecked = 0
                    self._fills.make_room_later(0)
        finally:
            self._taking = None

    def _copy(self, some: Sequence[tuple[Path, Digest]]) -> int:
        """Returns how many bytes there are more."""
        placed = [blob for fresh, digest in some if (blob := self._place(fresh, digest)) is not None]

        def link(batch: Batch) -> None:
            for each in placed:
                with suppress(BlobUnknown):  # it has just been evicted
                    self._cache.put_link(batch, COPIES, each)

        if placed:
            self._cache.records.transaction(link, shared=True)
        return sum(each.size for each in placed)

    def _place(self, fresh: Path, digest: Digest) -> Descriptor | None:
        """Give a file the name of its blob; None if the disk fails."""
        try:
            with fresh.open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                self._files.place(fresh, file.fileno(), self._files.path(digest))
                return Descriptor(OCTETS, digest, size)
        except OSError:
            return None
        finally:
            with suppress(OSError):
                fresh.unlink(missing_ok=True)

    async def settled(self) -> None:
        """Wait until there is a copy of all that was kept."""
        while self._taking is not None:
            await asyncio.wait([self._taking])

    async def close(self) -> None:
        await self.settled()
