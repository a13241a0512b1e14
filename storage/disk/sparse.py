"""The upload of a blob of known digest, which can be written in any order, by several transfers.

As long as it is written from the beginning on, its file is an upload's like any other.  Before the first
write elsewhere it gets a list of its extents (storage/disk/extents.py), by which other processes follow it,
and the next one resumes it.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from storage.concurrency import run_in_thread
from storage.disk.extents import SUFFIX, ExtentList, Extents
from storage.disk.hashing import PIECE, HashedFromFile, hash_later, held_if_free, next_hasher, pieces_for
from storage.disk.health import write_all
from storage.disk.locks import leads_to
from storage.disk.uploads import BACKLOG, Bytes, FileBlob, FileUpload
from storage.disk.wanted import Wanted
from storage.disk.writer_note import WriterNote
from storage.errors import BlobUnknown, StorageFailed, Unavailable
from storage.oci import Descriptor, Digest, Span
from storage.registry import ReadInto

SYNC = 256 << 20  # bytes written after which they are synchronized, so that they outlast a power failure


class PartBlob(FileBlob):
    """A reader of parts of a growing file: it gets all bytes that are there, though no digest is verified."""

    def __init__(self, file: int, descriptor: Descriptor, upload: SparseUpload) -> None:
        super().__init__(file, descriptor)
        self._growing = upload

    async def readable(self, offset: int, stop: int | None = None) -> int:
        return await self._growing.wait_for(offset, self.descriptor.size)

    def has_beginning(self, stop: int) -> bool:
        return self._growing.extents.end(0) >= stop


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
        self.note = WriterNote(self._path, self._file)
        self._stored = Extents()  # those of `extents`, and what threads have written since
        self._listing = threading.Lock()  # for `_stored` and the list
        self._hashing = threading.Lock()
        self._from_file: HashedFromFile | None = None  # once there is anything for a hasher
        self._copying = 0  # threads
        self._list: ExtentList | None = None
        self._unlisted: list[tuple[int, int]] = []  # what is written, and not yet in the list
        self._unsynced = 0  # bytes
        self._syncing = False
        self._boot = ""  # of the list, while another process writes it

    @property
    def listed_size(self) -> int:
        """The size of the blob as a former writer knew it; -1 if it wrote from the beginning on."""
        return self._list.size if self._list is not None else -1

    @property
    def refused(self) -> list[tuple[int, int]]:
        """What the process that writes it could not get, in the order of the failures."""
        return self._list.refused if self._list is not None else []

    @property
    def clients(self) -> frozenset[str]:
        """Clients that have read parts of it which were not there."""
        return frozenset(self._list.clients if self._list is not None else ())

    def has(self, offset: int) -> bool:
        """Whether the byte is written."""
        return self.extents.end(offset) > offset

    def missing(self, spans: Iterable[Span]) -> list[tuple[int, int]]:
        """What of the spans is not written, in their order."""
        return [gap for each in spans for gap in self.extents.gaps(each.start, each.stop or 0)]

    async def keep(self, size: int, clients: Iterable[str]) -> None:
        """The blob has `size` bytes.  Keep those that are written, although the rest may not come.

        No write may be pending.  Raises StorageFailed.
        """
        self._size = size
        with self._directory.guard(self._path):
            if self._list is None:
                self._list = await run_in_thread(self._make_list)
            for client in clients:
                self._list.add_client(client)
            await run_in_thread(self.touch)

    def add_client(self, client: str) -> None:
        """A client that reads parts has asked for bytes that were not there."""
        if self._list is not None:
            with suppress(OSError):  # then it is forgotten when this process ends
                self._list.add_client(client)

    def refuse(self, start: int, stop: int) -> None:
        """Tell the readers in other processes that [start, stop) cannot be got now."""
        if self._list is not None:
            with suppress(OSError):
                self._list.refuse(start, stop)

    def touch(self) -> None:
        """Record that it is used."""
        now = self._directory.clock()
        os.utime(self._file, (now, now))

    def follow_parts(self, descriptor: Descriptor) -> PartBlob:
        """A reader of parts; the rest is as in follow()."""
        if self._file < 0:
            raise BlobUnknown(f"the upload of {descriptor.digest} has ended")
        return PartBlob(os.dup(self._file), descriptor, self)

    async def wait_for(self, offset: int, size: int) -> int:
        """Wait for bytes past `offset`, verified or not; return where they end for now.

        `size` is the size that the reader expects.  Raises the error of the upload, and Unavailable if the
        process that writes it could not get them.
        """
        known = len(self.refused)
        if offset >= size:
            return size

        def refused() -> bool:
            return any(start <= offset < stop for start, stop in self.refused[known:])

        await self._waiters.until(lambda: self._stopped or self.has(offset) or refused())
        if not (self._stopped or self.has(offset)):
            raise Unavailable(f"the process that transfers {self._path.name} could not get byte {offset}")
        if self._complete:
            return await self.wait_past(offset, size)
        if (end := self.extents.end(offset)) <= offset and self._error is not None:
            raise self._error
        return min(end, size)

    async def write_at(self, position: int, chunk: bytes) -> None:
        """Write bytes that are not there.  The rest is as in write()."""
        await self._accept(position, chunk)

    async def write_from(self, readinto: ReadInto, position: int, most: int) -> int:
        """Write what `readinto` reads, at most `most` bytes that are not there; returns how many.

        A thread reads and writes, until all is written that has come.  Several may write at the same time.
        Raises StorageFailed.
        """
        if self._error is not None:
            raise self._error
        copied: list[int] = []
        self._copying += 1
        try:
            with self._directory.guard(self._path, max(self._written + most, self._size)):
                await run_in_thread(self._copy, readinto, position, most, copied)
        except StorageFailed as error:
            self._fail(error)
            raise
        finally:  # a cancellation, too, comes after they are written
            number = sum(copied)
            self._copying -= 1
            self.offset += number
            self._written += number
            there = self.extents.total
            self.extents.add(position, position + number)
            self.repeated += there + number - self.extents.total
            self._move(self._readable)
        return number

    def _copy(self, readinto: ReadInto, position: int, most: int, copied: list[int]) -> None:
        start = position
        self._begin_list(position)
        # With a list, what is next to be hashed may be in the file.
        hasher, hash_next = (
            (self._behind().hasher, self._hash_next) if self._list is None else (None, hash_later)
        )
        with held_if_free(self._hashing) as free:
            behind = not free or self._hashed < position
        try:
            with pieces_for(hasher, hash_next, behind=behind) as pieces:
                while most:
                    # The kernel keeps a file in larger pages, and sends it faster, if writes are aligned.
                    wanted = pieces.memory()[: min(most, PIECE - position % PIECE)]
                    number = readinto(wanted)
                    write_all(self._file, wanted[:number], position)
                    pieces.add(position, number)
                    copied.append(number)
                    position, most = position + number, most - number
                    if number < len(wanted):
                        return
        finally:
            if position > start:
                self._record(Extents([(start, position)]))

    async def _flushed(self) -> None:
        await super()._flushed()
        await self._waiters.until(lambda: not self._copying)
        if self._from_file is not None:
            await self._from_file.finish()

    async def commit(self, digest: Digest) -> Descriptor:
        await self._flushed()
        if self._from_file is not None:
            await self._from_file.hasher.finish()
        return await super().commit(digest)

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
        self._stored = Extents(self.extents)
        self.offset = self._written = self.extents.total
        self.wanted.remove()  # those who still wait tell it again
        self.note.remove()  # of the former writer

    def _load(self) -> bool:
        """Read the list, and continue it; False if it does not have what could be read, or is damaged."""
        path = ExtentList.path(self._path, self._file)
        size = os.fstat(self._file).st_size
        found = ExtentList.find(path, os.O_RDWR | os.O_APPEND) if size else None
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
            damaged = found.size < 0 or extents.gap(size, sys.maxsize) != (size, sys.maxsize)
            if not (damaged or found.sound):
                found.close()
                found = ExtentList.create(path, found.size, extents, found)
            self._list, self._unsynced = found, extents.total
            if damaged:
                return False
        if not extents.has(self.extents):
            return False
        self.extents = extents
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
            refused = len(self.refused)
            self._list.read(self.extents)
            if len(self.refused) > refused:
                self._move(self._readable)
            self._boot = self._boot or self._list.boot
            if self._list.boot != self._boot:  # not all that could be read is there any more
                raise Unavailable(f"{self._path.name}: another machine has begun again")
        elif size and leads_to(self._path, self._file):  # else the list was removed after the name
            self.extents.add(0, size)
        if self.extents.total > self.offset:
            self.offset = self.extents.total
            self._move(self._readable)

    def _append(self, batch: Sequence[tuple[int, Bytes]]) -> None:
        written = Extents((position, position + len(chunk)) for position, chunk in batch)
        for start, _ in written:
            self._begin_list(start)
        super()._append(batch)
        self._record(written)

    def _begin_list(self, position: int) -> None:
        """Make the list if something is to be written elsewhere than at the end of what is there."""
        with self._listing:
            if self._list is None and position > self._stored.end(0):
                self._list = self._make_list()

    def _record(self, written: Extents) -> None:
        with self._listing:
            for start, stop in written:
                self._stored.add(start, stop)
            if self._list is None:
                return
            self._unlisted += written
            self._unsynced += written.total
            if not self._syncing:
                self._enlist(self._list)
            sync = not self._syncing and self._unsynced >= SYNC
            self._syncing = self._syncing or sync
            there = self._stored.end(0)
        if sync:
            self._sync()
        if there > self._hashed:
            self._behind().hash_on()

    def _behind(self) -> HashedFromFile:
        with self._listing:
            if self._from_file is None:
                self._from_file = HashedFromFile(next_hasher(), self._hash_step)
            return self._from_file

    def _hash_step(self) -> bool:
        """Hash some of what is there, while it may be in memory; whether there is more."""
        with self._listing:
            there = self._stored.end(0)
        with self._hashing:
            if self._error is not None:
                return False
            self._catch_up(min(there, self._hashed + BACKLOG))
            return self._hashed < there

    def _hash_next(self, position: int, chunk: Bytes) -> None:
        with held_if_free(self._hashing) as ours:  # what is left out is hashed from the file
            if ours:
                super()._hash_next(position, chunk)

    def _enlist(self, list_: ExtentList) -> None:
        list_.append(self._unlisted)
        self._unlisted.clear()

    def _make_list(self) -> ExtentList:
        return ExtentList.create(ExtentList.path(self._path, self._file), self._size, self._stored)

    def _sync(self) -> None:
        """Let the list tell that all that is in it will outlast a power failure."""
        if self._list is not None and self._unsynced:
            self._unsynced = 0
            os.fdatasync(self._file)
            with self._listing:  # what others have written meanwhile comes after the mark
                self._list.sync()
                self._enlist(self._list)
                self._syncing = False

    def _advance(self, batch: Sequence[tuple[int, bytes]]) -> None:
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
                if self.clients:
                    self.touch()
        await super().suspend(error, keep_empty=keep_empty)

    def _discard(self) -> None:
        super()._discard()
        if self.ours:
            self.wanted.remove()
            self.note.remove()
        if self.ours and self._list is not None:
            with suppress(OSError):
                self._list.remove()

    def close(self) -> None:
        if self._list is not None and self._file >= 0:
            self._list.close()
        super().close()
