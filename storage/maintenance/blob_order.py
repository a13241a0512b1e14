"""The stored blobs in the order of their last use.

The last use of a blob is the mtime of its file, so that a hit writes no record.  The record of the blob says
when it was used as far as is known, which is then or earlier.  So the records are in order if those at their
beginning are right: these are compared with their files, and corrected if they are not.
"""

from __future__ import annotations

from collections.abc import Iterator

from storage.disk.tree import StoredBlob
from storage.keys import BLOB
from storage.maintenance.blob_tree import BlobCandidates
from storage.oci import Digest
from storage.records import BATCH, Batch
from storage.store import Store
from storage.values import BlobUse


class BlobOrder:
    """The committed blobs of a cache, least recently used first.  Blocks, and may raise StorageFailed.

    Blobs may be used and removed while it is read.
    """

    def __init__(self, store: Store, tree: BlobCandidates) -> None:
        self._store = store
        self._tree = tree

    def __iter__(self) -> Iterator[StoredBlob]:
        after = "", b""
        while rows := self._store.records.oldest(after, BATCH):
            found = [self._tree.find(BLOB.parse(key)[0]) for key, _ in rows]
            wrong = [
                Digest(BLOB.parse(key)[0])
                for (key, value), blob in zip(rows, found, strict=True)
                if blob is None or BlobUse.at(blob.used_at, blob.size) != BlobUse.parse(value)
            ]
            if wrong:
                self._correct(wrong)  # then others may be the next ones
            else:
                yield from (blob for blob in found if blob is not None)
                after = rows[-1]

    def _correct(self, wrong: list[Digest]) -> None:
        def work(batch: Batch) -> None:
            for digest in wrong:
                forget_blob(self._store, batch, digest)

        self._store.records.transaction(work)


def record_blob(store: Store, batch: Batch, digest: Digest) -> bool:
    """Record whether the blob is stored, and when it was last used, as part of a transaction.

    Returns whether it is stored.
    """
    found = store.files.find(digest)
    if found is None:
        batch.delete(BLOB.key(digest))
        return False
    batch.put(BLOB.key(digest), BlobUse.at(found.used_at, found.size).encode())
    return True


def forget_blob(store: Store, batch: Batch, digest: Digest) -> int:
    """Record that a cache has removed the blob, as part of a transaction; the number of links it had.

    Does nothing if the blob is stored: it was fetched again.
    """
    if record_blob(store, batch, digest):
        return 0
    return sum([batch.delete(key) for key in store.records.linking(digest)])
