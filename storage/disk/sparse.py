"""The upload of a blob of known digest, which can be written in any order, by several transfers.

As long as it is written from the beginning on, its file is an upload's like any other.  Before the first
write elsewhere it gets a list of its extents (storage/disk/extents.py), by which other processes follow it,
and the next one resumes it.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from storage.concurrency import run_in_thread
from storage.disk.extents import SUFFIX, ExtentList, Extents
from storage.disk.locks import leads_to
from storage.disk.uploads import BACKLOG, FileUpload
from storage.disk.wanted import Wanted
from storage.errors import Unavailable

SYNC = 256 << 20  # bytes written after which they are synchronized, so that they outlast a power failure


class SparseUpload(FileUpload):
    """An upload with one writer, which can write in any order once expect() has told the size.

    `extents` are the bytes that are written; `offset` is the number of those that are written or accepted.
    `repeated` counts bytes that were written although they were there.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.extents = Extents()
        self.repeated = 0
        self.wanted = Wanted(self._path, self._file)
        self._list: ExtentList | None = None
        self._unsynced = 0  # bytes
        self._boot = ""  # of the list, while another process writes it

    @property
    def listed_size(self) -> int:
        """The size of the blob as a former writer knew it; -1 if it wrote from the beginning on."""
        return self._list.size if self._list is not None else -1

    async def write_at(self, position: int, chunk: bytes) -> None:
        """Write bytes that are not there.  The rest is as in write()."""
        await self._accept(position, chunk)

    def rehash(self) -> None:
        """Continue after the writes of a former writer.  Blocks.  Call it before any write.

        Raises Unavailable if it is not known what is there.  The file is removed then: who has read from it
        must not get the rest from another one.
        """
        self.ours = True
        if not self._load():
            self._path.unlink(missing_ok=True)
            self._unlist()
            raise Unavailable(f"{self._path.name}: the list of its bytes is damaged")
        if self._list is None:
            self._catch_up()  # else commit() does it
        self.offset = self._written = self.extents.total
        self.wanted.remove()  # those who still wait tell it again

    def _load(self) -> bool:
        """Read the list, and continue it; False if it does not have what could be read, or is damaged."""
        path = ExtentList.path(self._path, self._file)
        size = os.fstat(self._file).st_size
        found = ExtentList.find(path) if size else None
        if self._list is not None:
            self._list.close()
            self._list = None
        if found is None and size and self._lists():
            return False  # the file is a copy, and has another number than the one that is listed
        if found is None:
            self._unlist()  # former files had this name
            extents = Extents([(0, size)])
        else:
            extents = found.load()
            found.close()
            if found.size < 0 or extents.gap(size, sys.maxsize) != (size, sys.maxsize):
                return False
        if not extents.has(self.extents):
            return False
        self.extents = extents
        if found is not None:
            self._list = ExtentList.create(path, found.size, extents)
        return True

    def _lists(self) -> list[Path]:
        """The lists of all files that have, or had, this name."""
        return list(self._path.parent.glob(f"{self._path.name}.*{SUFFIX}"))

    def _unlist(self) -> None:
        for each in self._lists():
            each.unlink(missing_ok=True)

    def _look(self) -> None:
        # The size first: 1. the list is created  2. bytes are written beyond a hole
        size = os.fstat(self._file).st_size
        if self._list is None or not self._list.current:
            path = ExtentList.path(self._path, self._file)
            # An empty file may have the number, and so the list, of a former one, until its writer looks.
            former, self._list = self._list, ExtentList.find(path) if size else None
            if former is not None:
                former.close()
        if self._list is not None:
            self._list.read(self.extents)
            self._boot = self._boot or self._list.boot
            if self._list.boot != self._boot:  # not all that could be read is there any more
                raise Unavailable(f"{self._path.name}: another machine has begun again")
        elif size and leads_to(self._path, self._file):  # else the list was removed after the name
            self.extents.add(0, size)
        if self.extents.total > self.offset:
            self.offset = self.extents.total
            self._move(self._readable)

    def _append(self, batch: list[tuple[int, bytes]]) -> None:
        written = Extents((position, position + len(chunk)) for position, chunk in batch)
        if self._list is None and any(start > self.extents.end(0) for start, _ in written):
            path = ExtentList.path(self._path, self._file)
            self._list = ExtentList.create(path, self._size, self.extents)
        super()._append(batch)
        if self._list is None:
            return
        self._list.append(written)
        self._unsynced += written.total
        if self._unsynced >= SYNC:
            self._sync()
        # Gaps are closed before what is already there: hash that, while it may be in memory.
        self._catch_up(min(self.extents.end(0), self._hashed + 2 * BACKLOG))

    def _sync(self) -> None:
        if self._list is not None and self._unsynced:
            os.fdatasync(self._file)
            self._list.sync()
            self._unsynced = 0

    def _advance(self, batch: list[tuple[int, bytes]]) -> None:
        there = self.extents.total
        for position, chunk in batch:
            self.extents.add(position, position + len(chunk))
        self.repeated += there + sum(len(chunk) for _, chunk in batch) - self.extents.total
        self._move(self._readable)

    def _end_of(self, offset: int) -> int:
        end, size = self.extents.end(offset), max(self._size, self.listed_size)
        return min(end, size - 1) if size > 0 else end - 1

    async def suspend(self, error: BaseException | None = None, *, keep_empty: bool = False) -> None:
        if self.ours and self._file >= 0:
            await self._flushed()
            with suppress(OSError):  # less is kept if the machine fails
                await run_in_thread(self._sync)
        await super().suspend(error, keep_empty=keep_empty)

    def _discard(self) -> None:
        super()._discard()
        if self.ours:
            self.wanted.remove()
        if self.ours and self._list is not None:
            with suppress(OSError):
                self._list.remove()

    def close(self) -> None:
        if self._list is not None and self._file >= 0:
            self._list.close()
        super().close()
