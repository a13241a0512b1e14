"""A blob's file while it grows: it has one writer, and any number of readers of the bytes that are written.

All written bytes but the last are readable, until commit() has verified the digest: so no reader ever has a
complete but wrong blob.

The writer holds the lock of the file, so that only one of all processes writes it; the others follow it until
it is committed or the writer releases the lock.  The descriptor is closed only when no thread uses it any
more, even if its task was cancelled in the meantime.

The UploadDirectory knows where the file is, what a commit makes of it, and how much room the disk has.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Protocol, TypeAlias

from storage.concurrency import Waiters, run_in_thread, shielded
from storage.disk.hashing import thread_memory
from storage.disk.health import translated, write_all
from storage.disk.locks import POLL, leads_to, try_lock, unlock
from storage.errors import BlobUnknown, DigestInvalid, StorageFailed, Unavailable
from storage.oci import OCTETS, Descriptor, Digest, Hash
from storage.registry import Blob, Upload

CHUNK = 1 << 20  # bytes read at a time
BACKLOG = 4 << 20  # bytes that may wait for the disk before the writer has to wait
Bytes: TypeAlias = bytes | memoryview


class UploadDirectory(Protocol):
    """The directory of uploads and blobs, as far as an upload needs it."""

    growing: set[FileUpload]  # uploads of a known size
    clock: Callable[[], float]  # seconds since the epoch

    async def publish(self, source: Path, file: int, digest: Digest) -> None:
        """Make the blob of a partial file: see UploadFiles.publish()."""

    def is_published(self, file: int, digest: Digest) -> bool:
        """Whether `file` was a partial file that is now the blob."""

    def guard(self, path: Path, size: int = 0) -> AbstractContextManager[None]:
        """Report the failure of a write: see DiskHealth.guard()."""

    def worked(self, size: int = 0) -> None:
        """Report a successful write of `size` bytes: see DiskHealth.worked()."""

    def room(self) -> int:
        """Bytes that are free and not reserved for uploads."""

    def check_room(self, upload: FileUpload) -> None:
        """Reserve the room that `upload` still needs; raises StorageFailed if there is not enough."""

    def remember(self, id: str, hash: Hash, hashed: int) -> None:
        """Keep the hash of a suspended upload, so that its bytes need not be read again."""


class FileBlob(Blob):
    """A committed blob, or one that is still being uploaded.

    `used_at` is when a committed blob was last used before it was opened.
    """

    def __init__(
        self, file: int, descriptor: Descriptor, upload: FileUpload | None = None, used_at: float = 0.0
    ) -> None:
        self.descriptor = descriptor
        self.used_at = used_at
        self._file = file
        self._upload = upload

    def fileno(self) -> int:
        return self._file

    async def readable(self, offset: int, stop: int | None = None) -> int:
        """Wait for bytes past `offset`; return where they end for now.  Raises the error of the upload."""
        if self._upload is None:
            return self.descriptor.size
        return await self._upload.wait_past(offset, self.descriptor.size)

    def has_beginning(self, stop: int) -> bool:
        """Whether all bytes before `stop` were readable."""
        return self._upload is None or self._upload.has_beginning(stop)

    async def chunks(self, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        while stop is None or start < stop:
            end = await self.readable(start)
            if end <= start:
                return
            end = min(end, start + CHUNK, end if stop is None else stop)
            with translated(self.descriptor.digest):
                chunk = await asyncio.to_thread(os.pread, self._file, end - start, start)
            if not chunk:
                raise StorageFailed(f"{self.descriptor.digest} ends at byte {start}: its file was truncated")
            yield chunk
            start += len(chunk)

    async def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class FileUpload(Upload):
    """An upload to a file, with one writer and any number of readers, which follow() returns.

    An upload that is not `ours` is written by another process; it can be followed, and watch() waits for
    its end.
    """

    def __init__(
        self,
        directory: UploadDirectory,
        path: Path,
        file: int,
        algorithm: str,
        *,
        resumable: bool = False,
        ours: bool = True,
    ) -> None:
        self.id = path.name
        self.offset = 0
        self.ours = ours
        self._directory = directory
        self._path = path
        self._file = file
        self._hash = hashlib.new(algorithm)
        self._hashed = 0  # bytes from the start that are hashed
        self._resumable = resumable
        self._waiting: list[tuple[int, bytes]] = []  # accepted, but not yet written; with their positions
        self._written = 0
        self._size = 0  # of the whole blob, if it is known
        self._readable = 0
        self._complete = False
        self._left = False  # by a commit that may succeed later
        self._error: BaseException | None = None
        self._waiters = Waiters()
        self._flusher: asyncio.Task[None] | None = None

    def rehash(self) -> None:
        """Continue after the bytes of a former writer, and hash them.  Blocks.  Call it before any write."""
        self._catch_up()
        self.take_over()

    def take_over(self) -> None:
        """Continue after the bytes of a former writer; commit() will hash them.  The caller has the lock."""
        self.ours = True
        self.offset = self._written = os.lseek(self._file, 0, os.SEEK_END)
        self._readable = max(self._readable, self.offset - 1)

    def _catch_up(self, stop: int = sys.maxsize) -> None:
        memory = thread_memory(CHUNK)
        while number := os.preadv(self._file, [memory[: max(0, stop - self._hashed)]], self._hashed):
            self._hash.update(memory[:number])
            self._hashed += number

    async def watch(self, digest: Digest) -> bool:
        """Follow the writes of another process until it ends.

        Returns True if it committed the blob; False if it released the lock, and the upload is now ours.

        Raises Unavailable if it gave up and removed the file.
        """
        while True:
            # 1. it commits and releases  2. we get the lock: so the name is checked after the lock.
            with translated(self._path):
                free = try_lock(self._file)
                if self._directory.is_published(self._file, digest):
                    self._complete = True
                    self.offset = os.fstat(self._file).st_size
                    self._move(self.offset)
                    self.close()
                    return True
                if free and not leads_to(self._path, self._file):
                    raise Unavailable("the process that was transferring it gave up")
                if free:
                    self.ours = True
                    await run_in_thread(self.rehash)
                    return False
                self._look()
            await asyncio.sleep(POLL)  # neither flock nor an append can be waited for

    def _look(self) -> None:
        """See how far the process is that writes it."""
        self.offset = os.fstat(self._file).st_size
        if self.offset - 1 > self._readable:
            self._move(self.offset - 1)

    @property
    def complete(self) -> bool:
        """Whether all bytes are written and verified; the file may not have its final name yet."""
        return self._complete

    @property
    def failed(self) -> bool:
        """Whether nothing more will be written."""
        return self._error is not None

    def matches(self, digest: Digest) -> bool:
        """Whether the bytes so far are the whole blob.  No write may be pending."""
        return digest == Digest.of_hash(self._hash)

    def fits(self, size: int) -> bool:
        """Whether the disk has room for a blob of `size` bytes."""
        return self._directory.room() >= max(0, size - self._written)

    def expect(self, size: int) -> None:
        """Set the size of the whole blob.

        Raises StorageFailed if the disk has no room for it besides the other uploads.
        """
        self._size = size
        self._directory.check_room(self)

    @property
    def remaining(self) -> int:
        """How many bytes of the whole blob are not on the disk yet."""
        return max(0, self._size - self._written)

    async def write(self, chunk: bytes) -> None:
        await self._accept(self.offset, chunk)

    async def _accept(self, position: int, chunk: bytes) -> None:
        if self._error is not None:
            raise self._error
        self._waiting.append((position, chunk))
        self.offset += len(chunk)
        if self._flusher is None:
            self._flusher = asyncio.create_task(self._flush())
        await self._waiters.until(lambda: self.offset - self._written <= BACKLOG or self._error is not None)

    async def _flush(self) -> None:
        # The disk writes one batch while the next one accumulates: slow disks get large writes, and the
        # network is read in the meantime.
        try:
            while self._waiting and self._error is None:
                batch, self._waiting = self._waiting, []
                size = sum(len(chunk) for _, chunk in batch)
                with self._directory.guard(self._path, max(self._written + size, self._size)):
                    await asyncio.to_thread(self._append, batch)
                self._written += size
                self._advance(batch)
        except StorageFailed as error:
            self._fail(error)
        finally:
            self._flusher = None

    def _append(self, batch: Sequence[tuple[int, Bytes]]) -> None:
        for position, chunk in batch:
            write_all(self._file, chunk, position)
            self._hash_next(position, chunk)

    def _hash_next(self, position: int, chunk: Bytes) -> None:
        """Hash bytes that are written, if they follow those that are hashed."""
        if self._hashed == position:
            self._hash.update(chunk)
            self._hashed += len(chunk)

    def _advance(self, batch: Sequence[tuple[int, bytes]]) -> None:
        """Let readers have what was written."""
        self._move(max(self._readable, self._written - 1))

    def _end_of(self, offset: int) -> int:
        """Where the bytes end that can be read from `offset` on, before all are verified."""
        return self._readable

    def has_beginning(self, stop: int) -> bool:
        """Whether all bytes before `stop` were readable, ever."""
        return self._complete or self._end_of(0) >= stop

    async def _flushed(self) -> None:
        # shielded: the caller may be cancelled, but the file must not be closed while a thread writes it.
        while self._flusher is not None:
            await shielded(self._flusher)

    async def commit(self, digest: Digest) -> Descriptor:
        await self._flushed()
        if self._error is not None:
            raise self._error
        if digest.algorithm != self._hash.name:
            self._hash, self._hashed = hashlib.new(digest.algorithm), 0
        if self._hashed != self._written:
            with translated(self._path):
                await run_in_thread(self._catch_up)
        if not self.matches(digest):
            error = DigestInvalid(f"content is {Digest.of_hash(self._hash)}, not {digest}")
            await self.cancel(error)
            raise error
        # Readers get the last byte now; making the file durable may take its time.
        self._complete = True
        self._move(self.offset)
        try:
            with self._directory.guard(self._path, self.offset):
                await self._directory.publish(self._path, self._file, digest)
        except Unavailable:
            self._directory.remember(self.id, self._hash, self._hashed)
            self._left = True
            self.close()
            raise
        except BaseException:
            self._discard()
            self.close()
            raise
        self._discard()  # what is beside it
        self.close()
        self._directory.worked(self.offset)
        return Descriptor(OCTETS, digest, self.offset)

    async def cancel(self, error: BaseException | None = None) -> None:
        if self._left:
            self._path.unlink(missing_ok=True)
        await self._end(error)
        self._discard()
        self.close()

    async def suspend(self, error: BaseException | None = None, *, keep_empty: bool = False) -> None:
        """Stop, but keep the bytes for the next upload of this digest, or for a resumption of this one.

        Without `error` all accepted bytes are kept; raises StorageFailed if they cannot be written.  With
        `keep_empty` the file stays even without bytes, and a process that follows it takes over.
        """
        if error is None:
            await self._flushed()
        failed = self._error
        await self._end(error)
        if not self._resumable:
            self._directory.remember(self.id, self._hash, self._hashed)
        elif not self._written and not keep_empty:
            self._discard()
        self.close()
        if failed is not None and error is None:
            raise failed

    def adopt(self, hash: Hash, hashed: int) -> None:
        """Continue with the hash of the first `hashed` bytes."""
        self._hash, self._hashed = hash, hashed

    async def _end(self, error: BaseException | None) -> None:
        self._fail(error or BlobUnknown("the upload was cancelled"))
        await self._flushed()

    def follow(self, descriptor: Descriptor) -> FileBlob:
        """A reader of the growing file; `descriptor` is the descriptor that the origin sent.

        Raises BlobUnknown if the upload has ended: the blob, if any, has its final name then.
        """
        if self._file < 0:
            raise BlobUnknown(f"the upload of {descriptor.digest} has ended")
        # Reads are positional, so a duplicate will do: unlike a path, it cannot disappear.
        return FileBlob(os.dup(self._file), descriptor, self)

    async def wait_past(self, offset: int, size: int = -1) -> int:
        """See FileBlob.readable(); `size` is the size that the reader expects, -1 if it is not known.

        The last of `size` bytes is withheld, too: the expectation may be wrong.
        """
        withheld = size - 1 if size >= 0 else sys.maxsize
        await self._waiters.until(lambda: self._stopped or min(self._end_of(offset), withheld) > offset)
        if self._complete:
            if size not in (-1, self.offset):
                raise Unavailable(f"{size} bytes were promised, but there are {self.offset}")
            return self._readable
        end = min(self._end_of(offset), withheld)
        if end <= offset and self._error is not None:
            raise self._error
        return end

    def _move(self, readable: int) -> None:
        self._readable = readable
        self._waiters.tell()

    @property
    def _stopped(self) -> bool:  # nothing more can be waited for
        return self._complete or self._error is not None

    def _fail(self, error: BaseException) -> None:
        if self._error is None and not self._complete:
            self._error = error
        self._move(self._readable)

    def _discard(self) -> None:
        # After our file was renamed, the next upload of the digest may have the name: do not remove its file.
        with suppress(OSError):
            if self.ours and self._file >= 0 and leads_to(self._path, self._file):
                self._path.unlink()

    def close(self) -> None:
        """Release the lock and close the file."""
        if self._file >= 0:
            unlock(self._file)  # readers have duplicates of the descriptor
            os.close(self._file)
            self._file = -1
            self._directory.growing.discard(self)
