"""Committed blobs that no link names.

All links are looked at once, and of each digest so much remembered as tells it from almost any other: one
that looks alike keeps a file, and no more.  What is linked afterwards is told by its file's mtime, which
whoever makes a link sets to the present time, in the transaction in which he makes it.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from itertools import islice

import structlog

from storage.disk.records import Batch
from storage.disk.tree import directories, read_directory
from storage.keys import LINK
from storage.maintenance.reachability import start_of
from storage.oci import Digest
from storage.store import Store

log = structlog.get_logger()

PACK = 100  # files
_ASIDE = "collected-"

Found = tuple[Digest, int]  # and its size


class Unlinked:
    """`begun` is a time before which nothing was looked at.  `rest` is called in between.  Blocks.

    Every method may raise StorageFailed.
    """

    def __init__(
        self, store: Store, young: Callable[[float], bool], begun: float, rest: Callable[[], None]
    ) -> None:
        self.young = 0  # how many stay for no other reason than that
        self._files = store.files
        self._records = store.records
        self._is_young = young
        self._begun = begun
        self._rest = rest

    def found(self, but: Collection[str] = ()) -> Iterator[list[Found]]:
        """By the hundred; the links with the keys `but` count as none."""
        each = self._each(but)
        while pack := list(islice(each, PACK)):
            yield pack

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
                if start_of(each.digest) not in kept and not self._stays(each.digest):
                    yield each.digest, each.size
            self._rest()

    def _linked(self, but: Collection[str]) -> list[array[int]]:
        """The start_of() each digest that is linked, by the first byte: eight bytes for a link."""
        linked = [array("Q") for _ in range(256)]
        for key in self._records.keys(LINK.prefix()):
            if key not in but:
                start = start_of(LINK.parse(key)[1])
                linked[start >> 56].append(start)
            self._rest()
        return linked

    def _stays(self, digest: Digest) -> bool:
        with self._files.guard(self._files.path(digest)), suppress(FileNotFoundError):
            if self._old(self._files.path(digest).stat().st_mtime):
                return False
        self.young += 1
        return True

    def _old(self, used_at: float) -> bool:
        # Not by its age alone: the looking takes its time, in which what was linked after it began gets old.
        return used_at < self._begun and not self._is_young(used_at)

    def remove(self, found: list[Found], batch: Batch) -> list[int]:
        """The sizes of those that went.  In a transaction, so that none is being linked.

        1. We find it old  2. the same content is uploaded, and committed over it, to be linked when we are
        done  3. we move what is new aside: its mtime tells, and it goes back before anybody can link it.
        Who is killed in between has lost what nobody was told is here.
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
