"""The blobs of a store that are no files, as candidates for eviction: its records say which there are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from storage.disk.kept import KeptParts
from storage.disk.tree import StoredBlob
from storage.errors import DigestInvalid
from storage.oci import Digest
from storage.records import Batch
from storage.store import Store


class RecordedBlobs:
    """The blobs of one store: see BlobCandidates (blob_tree.py)."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def size(self) -> int:
        return sum(each.size for each in self)

    def __iter__(self) -> Iterator[StoredBlob]:
        for portion in self._store.files.portions():
            yield from portion

    def find(self, digest: str) -> StoredBlob | None:
        with suppress(DigestInvalid):
            return self._store.files.find(Digest.parse(digest))
        return None

    def remove(self, found: StoredBlob) -> bool:
        def work(batch: Batch) -> int | None:
            return self._store.files.remove_old(found.digest, lambda used_at: used_at == found.used_at, batch)

        return self._store.records.transaction(work, shared=True) is not None

    def parts(self) -> list[KeptParts]:
        return []
