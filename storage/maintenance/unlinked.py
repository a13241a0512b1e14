"""Committed blobs that no link names.

All links are read once, and a prefix of each digest is remembered: two digests with one prefix keep one file
more than necessary.  A blob that is linked afterwards is recognised by its last use, which is set to the
present time in the transaction that makes the link.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterator

import structlog

from storage.keys import LINK
from storage.maintenance.blob_order import record_blob
from storage.maintenance.nodes import prefix_of
from storage.oci import Digest
from storage.records import Batch, batches
from storage.store import Store

log = structlog.get_logger()

PACK = 100  # blobs in a batch

Found = tuple[Digest, int]  # a blob and its size in bytes


class Unlinked:
    """Finds and removes the blobs of a store that no link names.  Methods block, and may raise StorageFailed.

    `young` decides by the time of last use whether a blob is kept.  `begun` is a time before anything was
    read.  `pause` is called in between.
    """

    def __init__(
        self, store: Store, young: Callable[[float], bool], begun: float, pause: Callable[[], None]
    ) -> None:
        self.young = 0  # how many blobs are kept only because they are young
        self._store = store
        self._files = store.files
        self._records = store.records
        self._is_young = young
        self._begun = begun
        self._pause = pause

    def batches(self, but: Collection[str] = ()) -> Iterator[list[Found]]:
        """The unlinked blobs in batches; links whose keys are in `but` are ignored."""
        return batches(self._each(but), PACK)

    def _each(self, but: Collection[str]) -> Iterator[Found]:
        linked = self._linked(but)
        for blobs in self._files.portions():
            kept = set(linked[prefix_of(blobs[0].digest) >> 56]) if blobs else ()
            for each in blobs:
                if prefix_of(each.digest) not in kept and not self._stays(each.digest):
                    yield each.digest, each.size
            self._pause()

    def _linked(self, but: Collection[str]) -> list[array[int]]:
        """The prefix_of() each linked digest by its first byte, with eight bytes for a link."""
        linked = [array("Q") for _ in range(256)]
        for key in self._records.keys(LINK.prefix()):
            if key not in but:
                prefix = prefix_of(LINK.parse(key)[1])
                linked[prefix >> 56].append(prefix)
            self._pause()
        return linked

    def _stays(self, digest: Digest) -> bool:
        found = self._files.find(digest)
        if found is not None and self._old(found.used_at):
            return False
        self.young += 1
        return True

    def _old(self, used_at: float) -> bool:
        # Not by age alone: what was linked after the scan began may be old by the time the scan ends.
        return used_at < self._begun and not self._is_young(used_at)

    def remove(self, found: list[Found], batch: Batch) -> list[int]:
        """Remove those that are still old, in a transaction, so that none is linked; returns their sizes."""
        sizes = []
        for digest, _ in found:
            size = self._files.remove_old(digest, self._old, batch)
            if size is not None:
                record_blob(self._store, batch, digest)
                sizes.append(size)
                log.debug("blob.collected", digest=str(digest), bytes=size)
        return sizes
