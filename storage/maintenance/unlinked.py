"""Committed blobs that no link names.

All links are read once, and a prefix of each digest is remembered: two digests with one prefix keep one file
more than necessary.  A blob that is linked afterwards is recognised by the mtime of its file, which is set to
the present time in the transaction that makes the link.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress

import structlog

from storage.disk.tree import directories, read_directory
from storage.keys import LINK
from storage.maintenance.nodes import prefix_of
from storage.oci import Digest
from storage.records import Batch, batches
from storage.store import Store

log = structlog.get_logger()

PACK = 100  # files in a batch
_ASIDE = "collected-"

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
        root = self._files.root / "blobs"
        with self._files.guard(root):
            names, _ = directories(root)
        for name in names:
            kept = set(linked[int(name[-2:], 16)])
            with self._files.guard(root):
                blobs = read_directory(root, name).blobs
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
        with self._files.guard(self._files.path(digest)), suppress(FileNotFoundError):
            if self._old(self._files.path(digest).stat().st_mtime):
                return False
        self.young += 1
        return True

    def _old(self, used_at: float) -> bool:
        # Not by age alone: what was linked after the scan began may be old by the time the scan ends.
        return used_at < self._begun and not self._is_young(used_at)

    def remove(self, found: list[Found], batch: Batch) -> list[int]:
        """Remove those that are still old, and return their sizes.  In a transaction, so that none is linked.

        1. The file is found old  2. the same content is uploaded and committed over it, to be linked after
        this transaction  3. the new file is moved aside, recognised by its mtime, and moved back before it
        can be linked.  A process that is killed in between loses only content that no client relies on.
        """
        sizes = []
        for digest, _ in found:
            path = self._files.path(digest)
            aside = self._files.root / "partial" / f"{_ASIDE}{digest.algorithm}-{digest.encoded}"
            with self._files.guard(path), suppress(FileNotFoundError):
                path.rename(aside)
                status = aside.lstat()
                if self._old(status.st_mtime):
                    aside.unlink()
                    sizes.append(status.st_size)
                    log.debug("blob.collected", digest=str(digest), bytes=status.st_size)
                else:
                    aside.rename(path)
        return sizes
