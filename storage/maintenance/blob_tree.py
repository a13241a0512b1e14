"""The committed blobs of a store as candidates for eviction, found by a look at the tree on disk.

The last use of a blob is the mtime of its file.  The whole tree is read only until it is counted: see
storage/totals.py and blob_order.py.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Protocol

from storage.disk.blobs import BlobFiles
from storage.disk.kept import KeptParts, all_parts, remove_parts
from storage.disk.tree import StoredBlob, directories, read_directory
from storage.errors import DigestInvalid
from storage.oci import Digest

SETTLED = 2.0  # seconds after which an unchanged mtime of a directory proves that nothing in it changed


class BlobCandidates(Protocol):
    """The blobs of one store, as candidates for eviction.  Methods block, and may raise StorageFailed."""

    def size(self) -> int:
        """Bytes of all blobs."""

    def __iter__(self) -> Iterator[StoredBlob]: ...

    def find(self, digest: str) -> StoredBlob | None:
        """The blob, if it is stored."""

    def remove(self, found: StoredBlob) -> bool:
        """Remove a blob, or its parts, unless it was used since it was `found`; whether it was removed."""

    def parts(self) -> list[KeptParts]:
        """The blobs of which only parts are kept, least recently used first."""


class BlobTree:
    """The committed blobs of one store.  Methods block, and may raise StorageFailed."""

    def __init__(self, files: BlobFiles) -> None:
        self._files = files
        self._root = files.root / "blobs"
        self._sizes: dict[str, tuple[int, int]] = {}  # by directory: its mtime in ns, and the bytes in it

    def size(self) -> int:
        """Bytes of all blobs.  Only directories that have changed since the last call are read."""
        sizes: dict[str, tuple[int, int]] = {}
        for directory in self._directories():
            with suppress(FileNotFoundError):
                changed_at = (self._root / directory).stat().st_mtime_ns
                known = self._sizes.get(directory)
                if known is None or known[0] != changed_at:
                    known = changed_at, sum(each.size for each in self._read(directory))
                # A later change within the clock's resolution leaves the mtime as it is.
                settled = time.time() - changed_at / 1e9 > SETTLED
                sizes[directory] = known if settled else (-1, known[1])
        self._sizes = sizes
        return sum(size for _, size in sizes.values())

    def __iter__(self) -> Iterator[StoredBlob]:
        for directory in self._directories():
            yield from self._read(directory)

    def _directories(self) -> list[str]:
        with self._files.guard(self._root):
            return directories(self._root)[0]

    def _read(self, directory: str) -> Sequence[StoredBlob]:
        with suppress(OSError):  # of one directory: the others can still make room
            return read_directory(self._root, directory).blobs
        return ()

    def find(self, digest: str) -> StoredBlob | None:
        with suppress(OSError, DigestInvalid):
            parsed = Digest.parse(digest)
            found = self._files.path(parsed).stat()
            return StoredBlob(found.st_mtime, found.st_size, parsed)
        return None

    def remove(self, found: StoredBlob) -> bool:
        """Remove a blob, or its parts, unless it was used since it was `found`; whether it was removed."""
        path = self._files.path(found.digest)
        with suppress(OSError):
            if path.stat().st_mtime == found.used_at:
                path.unlink()
                return True
        with suppress(OSError):
            return remove_parts(self._files.root, found)
        return False

    def parts(self) -> list[KeptParts]:
        """The blobs of which only parts are kept, least recently used first."""
        with self._files.guard(self._root):
            found = [each for each in all_parts(self._files.root) if not self._files.holds(each.blob.digest)]
        return sorted(found)


def oldest(blobs: Iterable[StoredBlob], enough: int) -> list[StoredBlob]:
    """The least recently used blobs that have `enough` bytes together, and no more than are needed."""
    heap: list[tuple[float, int, Digest]] = []  # the most recently used of the chosen ones is on top
    chosen = 0
    for each in blobs:
        if chosen >= enough and heap and each.used_at >= -heap[0][0]:
            continue
        heapq.heappush(heap, (-each.used_at, each.size, each.digest))
        chosen += each.size
        while heap and chosen - heap[0][1] >= enough:
            chosen -= heapq.heappop(heap)[1]
    return sorted(StoredBlob(-age, size, digest) for age, size, digest in heap)
