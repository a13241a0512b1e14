"""Blobs as plain files: the tree is the index.

    <root>/blobs/<algorithm>/<ab>/<encoded>     committed, verified, immutable
    <root>/partial/<algorithm>-<encoded>        a fill on its way, locked by whoever writes it
    <root>/partial/<id>                         any other upload, locked while somebody writes it
    <root>/locks/<name's hash>                  held by a process while it does what only one may do
    <root>/damaged/<algorithm>-<encoded>        found to be something else; of no use but to be looked at

A blob exists if and only if its file does, and a file gets there only by rename after verification; its
mtime is the time of last use.  So eviction needs no database, and a crash leaves nothing to repair but
partial/, where a fill is found by its digest and gone on with.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import os
import re
import secrets
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TypeAlias, TypeVar

import structlog

from storage.disk import Disk
from storage.errors import (
    BlobUnknown,
    BlobUploadUnknown,
    DigestInvalid,
    RegistryError,
    StorageFailed,
    Unavailable,
)
from storage.oci import OCTETS, Descriptor, Digest
from storage.registry import Blob, Upload

log = structlog.get_logger()

KIND = "blobs"  # what the disk calls what fails here
T = TypeVar("T")
HASH: TypeAlias = "hashlib._Hash"

CHUNK = 1 << 20  # bytes read or hashed at a time
BACKLOG = 4 << 20  # bytes that may wait for the disk before the writer has to
POLL = 0.02  # seconds between looks at what another process writes
TOUCH = 60.0  # seconds; a last use is noted no finer, so that most hits write nothing
HASHES = 1000  # suspended uploads whose hash is remembered; the others are read again at their end
IN_USE = 10.0  # seconds that an upload waits for whoever writes it: most likely he was cut off


_ID = re.compile(r"[A-Za-z0-9_-]{22}\.[0-9a-f]{16}")


@contextmanager
def _translated(what: Path | Digest) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageFailed(f"{what}: {error.strerror or error}") from error


class FileBlob(Blob):
    """A committed blob, or one that still grows under an upload.

    `used_at` is when a committed one was used last, before it was opened.
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

    async def readable(self, offset: int) -> int:
        """Wait for bytes past `offset`; return where they end for now.

        Raises what the upload failed with.
        """
        if self._upload is None:
            return self.descriptor.size
        return await self._upload.wait_past(offset, self.descriptor.size)

    async def chunks(self, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        while stop is None or start < stop:
            end = await self.readable(start)
            if end <= start:
                return
            end = min(end, start + CHUNK, end if stop is None else stop)
            with _translated(self.descriptor.digest):
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
    """One writer appends; any number of readers follow through `follow()`.

    Of what was written all but the last byte is readable, until commit() has found the digest right:
    so no reader ever holds a complete but wrong blob.

    An upload that is not `ours` is written by another process; it can be followed, and watch() waits for
    its end.
    """

    def __init__(
        self,
        files: Files,
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
        self._files = files
        self._path = path
        self._file = file
        self._hash = hashlib.new(algorithm)
        self._hashed = 0  # what it has seen: the first so many bytes
        self._resumable = resumable
        self._waiting: list[bytes] = []  # accepted, not yet written
        self._written = 0
        self._size = 0  # in the end, as far as is known
        self._readable = 0
        self._complete = False
        self._error: BaseException | None = None
        self._moved = asyncio.Event()
        self._flusher: asyncio.Task[None] | None = None

    def rehash(self) -> None:
        """Take in what a former writer left.  Blocks; before anybody writes."""
        self._catch_up()
        self.take_over()

    def take_over(self) -> None:
        """The same, but for the hash: that is caught up with at the end."""
        self.offset = self._written = os.lseek(self._file, 0, os.SEEK_END)
        self._readable = max(self._readable, self.offset - 1)

    def _catch_up(self) -> None:
        while chunk := os.pread(self._file, CHUNK, self._hashed):
            self._hash.update(chunk)
            self._hashed += len(chunk)

    async def watch(self, digest: Digest) -> bool:
        """Follow what another process writes, to its end.

        True: it has committed it.  False: it is gone, and the upload is ours to go on with.

        Raises Unavailable where it gave up and left nothing.
        """
        final = self._files.path(digest)
        while True:
            # 1. it renames and lets go  2. we get the lock: so the name is looked at after the lock.
            with _translated(self._path):
                free = _try_lock(self._file)
                if _leads_to(final, self._file):
                    self._complete = True
                    self.offset = os.fstat(self._file).st_size
                    self._move(self.offset)
                    self.close()
                    return True
                if free and not _leads_to(self._path, self._file):
                    raise Unavailable("the process that was transferring it gave up")
                if free:
                    self.ours = True
                    await finished(self.rehash)
                    return False
                self.offset = os.fstat(self._file).st_size
            if self.offset - 1 > self._readable:
                self._move(self.offset - 1)
            await asyncio.sleep(POLL)  # flock and appending tell nobody

    @property
    def complete(self) -> bool:
        """Whether all is there and right; it may not be in its place yet."""
        return self._complete

    def matches(self, digest: Digest) -> bool:
        """Whether what was written so far is all of it.  Nothing may be waiting for the disk."""
        return digest == f"{self._hash.name}:{self._hash.hexdigest()}"

    def fits(self, size: int) -> bool:
        """Whether there is room for it, were it to have `size` bytes in the end."""
        return self._files.room() >= max(0, size - self._written)

    def expect(self, size: int) -> None:
        """Say how many bytes it will have in the end.

        Raises StorageFailed where there is no room for them, seeing what others are to have.
        """
        self._size = size
        self._files.check_room(self)

    @property
    def lacks(self) -> int:
        """How many of the bytes that it will have are not on the disk yet."""
        return max(0, self._size - self._written)

    async def write(self, chunk: bytes) -> None:
        if self._error is not None:
            raise self._error
        self._waiting.append(chunk)
        self.offset += len(chunk)
        if self._flusher is None:
            self._flusher = asyncio.create_task(self._flush())
        while self.offset - self._written > BACKLOG and self._error is None:
            await self._moved.wait()

    async def _flush(self) -> None:
        # The disk works on one batch while the next one gathers: slow disks get large writes, and the
        # network is read in the meantime.
        try:
            while self._waiting and self._error is None:
                batch, self._waiting = self._waiting, []
                end = self._written + sum(map(len, batch))
                with self._files.guard(self._path, max(end, self._size)):
                    await asyncio.to_thread(self._append, batch)
                self._written = end
                self._move(max(self._readable, self._written - 1))
        except StorageFailed as error:
            self._fail(error)
        finally:
            self._flusher = None

    def _append(self, batch: list[bytes]) -> None:
        end = self._written
        for chunk in batch:
            view = memoryview(chunk)
            while view:
                view = view[os.write(self._file, view) :]
            if self._hashed == end:
                self._hash.update(chunk)
                self._hashed += len(chunk)
            end += len(chunk)

    async def _flushed(self) -> None:
        # shield: whoever waits may be cancelled, but the file must not be closed under a thread's write.
        while self._flusher is not None:
            await asyncio.shield(self._flusher)

    async def commit(self, digest: Digest) -> Descriptor:
        await self._flushed()
        if self._error is not None:
            raise self._error
        if digest.algorithm != self._hash.name:
            self._hash, self._hashed = hashlib.new(digest.algorithm), 0
        if self._hashed != self._written:
            with _translated(self._path):
                await finished(self._catch_up)
        if not self.matches(digest):
            error = DigestInvalid(f"content is {self._hash.name}:{self._hash.hexdigest()}, not {digest}")
            await self.cancel(error)
            raise error
        # Readers get their last byte now; that the disk keeps it may take its time.
        self._complete = True
        self._move(self.offset)
        try:
            with self._files.guard(self._path, self.offset):
                await finished(self._publish, self._files.path(digest))
        finally:
            self._discard()  # where it did not get into its place
            self.close()
        self._files.disk.worked(KIND, self.offset)
        return Descriptor(OCTETS, digest, self.offset)

    def _publish(self, path: Path) -> None:
        for directory in self._files.place(self._path, self._file, path):
            sync(directory)

    async def cancel(self, error: BaseException | None = None) -> None:
        await self._end(error)
        self._discard()
        self.close()

    async def suspend(self, error: BaseException | None = None) -> None:
        """Stop, but keep the bytes where the next upload of this digest, or whoever reopens it, finds them.

        Without `error` that is all that was written; raises StorageFailed where it could not be.
        """
        if error is None:
            await self._flushed()
        failed = self._error
        await self._end(error)
        if not self._resumable:
            self._files.remember(self.id, self._hash, self._hashed)
        elif not self._written:
            self._discard()
        self.close()
        if failed is not None and error is None:
            raise failed

    def adopt(self, hash: HASH, hashed: int) -> None:
        """Go on with a hash of what is there already, as far as it has come."""
        self._hash, self._hashed = hash, hashed

    async def _end(self, error: BaseException | None) -> None:
        self._fail(error or BlobUnknown("the upload was cancelled"))
        await self._flushed()

    def follow(self, descriptor: Descriptor) -> FileBlob:
        """A reader of the growing file; `descriptor` is what the origin says of it.

        Raises BlobUnknown when the upload has ended: what came of it is in its place then.
        """
        if self._file < 0:
            raise BlobUnknown(f"the upload of {descriptor.digest} has ended")
        # Reads are by position, so that a duplicate serves: no path that could vanish in between.
        return FileBlob(os.dup(self._file), descriptor, self)

    async def wait_past(self, offset: int, size: int = -1) -> int:
        """See FileBlob.readable(); `size` is what the reader was promised, if anything.

        Of that, too, the last byte is withheld: a promise may be wrong.
        """
        withheld = size - 1 if size >= 0 else sys.maxsize
        while min(self._readable, withheld) <= offset and self._error is None and not self._complete:
            await self._moved.wait()
        if self._complete:
            if size not in (-1, self.offset):
                raise Unavailable(f"{size} bytes were promised, but there are {self.offset}")
            return self._readable
        if min(self._readable, withheld) <= offset and self._error is not None:
            raise self._error
        return min(self._readable, withheld)

    def _move(self, readable: int) -> None:
        self._readable = readable
        self._moved.set()
        self._moved = asyncio.Event()

    def _fail(self, error: BaseException) -> None:
        if self._error is None and not self._complete:
            self._error = error
        self._move(self._readable)

    def _discard(self) -> None:
        # Once ours was renamed, the next upload of the digest has the name: that file is not ours to remove.
        with suppress(OSError):
            if self.ours and self._file >= 0 and _leads_to(self._path, self._file):
                self._path.unlink()

    def close(self) -> None:
        """Let go of the file, whatever becomes of it."""
        if self._file >= 0:
            # Not by closing alone: the readers' duplicates would go on holding the lock.
            fcntl.flock(self._file, fcntl.LOCK_UN)
            os.close(self._file)
            self._file = -1
            self._files.growing.discard(self)


class Files:
    """`clock` tells the time of last use, in seconds since the epoch.

    Where its directories are removed, it makes them again.

    What lies in a `private` one can be fetched from nowhere: what is damaged of it is told of and set aside.
    Its use is noted by renew() only.
    """

    def __init__(
        self,
        root: Path,
        clock: Callable[[], float] = time.time,
        disk: Disk | None = None,
        private: bool = False,
    ) -> None:
        self.root = root
        self.private = private
        self.disk = disk or Disk(root, clock)
        self.clock = clock
        self._partial = root / "partial"
        self._locks = root / "locks"
        self.growing: set[FileUpload] = set()  # those whose size is known
        self._hashes: dict[str, tuple[HASH, int]] = {}
        with _translated(root):
            self._make()

    def _make(self) -> None:
        for directory in (self._partial, self._locks, self.root / "blobs"):
            directory.mkdir(parents=True, exist_ok=True)

    def _create(self, path: Path, flags: int = 0) -> int:
        flags |= os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        try:
            return os.open(path, flags, 0o644)
        except FileNotFoundError:
            self._make()
            return os.open(path, flags, 0o644)

    def guard(self, path: Path, size: int = 0) -> AbstractContextManager[None]:
        """Around what writes: see Disk.guard()."""
        return self.disk.guard(KIND, path, size)

    def check_room(self, upload: FileUpload) -> None:
        """See FileUpload.expect()."""
        lacking = sum(each.lacks for each in self.growing | {upload})
        with self.guard(self.root, lacking):
            if self.disk.room() < lacking:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.growing.add(upload)

    def room(self) -> int:
        """Bytes that nobody has or is to have yet."""
        return self.disk.room() - sum(each.lacks for each in self.growing)

    def path(self, digest: Digest) -> Path:
        return self.root / "blobs" / digest.algorithm / digest.encoded[:2] / digest.encoded

    def holds(self, digest: Digest) -> bool:
        path = self.path(digest)
        with _translated(path):
            return path.exists()

    def open(self, digest: Digest, size: int | None = None) -> FileBlob:
        """Raises BlobUnknown; also where the file is not `size` bytes long, and then it does not stay."""
        path = self.path(digest)
        with _translated(path):
            try:
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                raise BlobUnknown(f"{digest} is not stored here") from None
            status = os.fstat(file)
            if size is not None and status.st_size != size:
                os.close(file)
                self._drop(digest, status, size)
                raise BlobUnknown(f"{digest} was damaged: {status.st_size} of {size} bytes were left")
        now = self.clock()
        if not self.private and not 0 <= now - status.st_mtime < TOUCH:
            with suppress(OSError):  # a read-only disk serves all the same
                os.utime(file, (now, now))
        return FileBlob(file, Descriptor(OCTETS, digest, status.st_size), used_at=status.st_mtime)

    def _drop(self, digest: Digest, found: os.stat_result, size: int) -> None:
        path = self.path(digest)
        if not self.private:
            path.unlink(missing_ok=True)
        elif (aside := self.set_aside(digest, found)) is not None:
            told = f"{found.st_size} of {size} bytes"
            log.error("blob.damaged", digest=str(digest), found=told, path=str(aside), action="set aside")

    def touch(self, digest: Digest, at: float) -> None:
        """It was used at `at`, though nobody opened it.  What is not here is passed by."""
        path = self.path(digest)
        with suppress(OSError):  # vanished, or on a read-only disk
            if at - path.stat().st_mtime >= TOUCH:
                os.utime(path, (at, at))

    def renew(self, digest: Digest) -> None:
        """It is used now.  Raises BlobUnknown where it is not here."""
        now = self.clock()
        path = self.path(digest)
        with _translated(path):
            try:
                os.utime(path, (now, now))
            except FileNotFoundError:
                raise BlobUnknown(f"{digest} is not stored here") from None

    def verify(self, digest: Digest) -> None:
        """Read all of it.  Blocks.  Raises BlobUnknown, also where it is damaged, and then it is removed."""
        path = self.path(digest)
        with _translated(path):
            try:
                with path.open("rb") as file:
                    found = hashlib.file_digest(file, digest.algorithm).hexdigest()
            except FileNotFoundError:
                raise BlobUnknown(f"{digest} is not stored here") from None
            if found != digest.encoded:
                path.unlink(missing_ok=True)
                raise BlobUnknown(f"{digest} was damaged: its content is {found}")

    def set_aside(self, digest: Digest, found: os.stat_result) -> Path | None:
        """Move the file that `found` tells of, and that is damaged, out of the tree; where it lies then.

        None: the name leads to another file by now, or to none.  Its mtime tells when it was moved.
        """
        path = self.path(digest)
        aside = self.root / "damaged" / f"{digest.algorithm}-{digest.encoded}"
        with self.guard(aside), suppress(FileNotFoundError):
            if not os.path.samestat(path.lstat(), found):
                return None
            aside.parent.mkdir(exist_ok=True)
            path.rename(aside)
            # 1. we look  2. it is evicted, and filled again  3. we rename what is good: it goes back.
            if not os.path.samestat(aside.lstat(), found):
                aside.rename(path)
                return None
            now = self.clock()
            with suppress(OSError):  # a file of another user's
                os.utime(aside, (now, now))
            return aside
        return None

    def create(self, owner: str = "", algorithm: str = "sha256") -> FileUpload:
        """An upload that can be suspended, and gone on with by whoever names its id and `owner`."""
        path = self._partial / f"{secrets.token_urlsafe(16)}.{_mark(owner)}"
        with self.guard(path):
            file = self._create(path, os.O_EXCL)
            _try_lock(file)
        return FileUpload(self, path, file, algorithm)

    async def reopen(self, id: str, owner: str = "") -> FileUpload:
        """The upload of this id, by whichever process it was suspended.

        Raises BlobUploadUnknown, and Unavailable while somebody else goes on writing it.
        """
        if not _ID.fullmatch(id) or not id.endswith(f".{_mark(owner)}"):
            raise BlobUploadUnknown(f"there is no upload {id[:80]!r} of this repository")
        path = self._partial / id
        with _translated(path):
            try:
                file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                raise BlobUploadUnknown(f"there is no upload {id!r}: it has ended, or was given up") from None
        upload = FileUpload(self, path, file, "sha256", ours=False)
        try:
            await self._lock_upload(path, file)
            upload.ours = True
            upload.take_over()
        except BaseException:
            upload.close()
            raise
        if (known := self._hashes.pop(id, None)) is not None:
            upload.adopt(*known)
        return upload

    async def _lock_upload(self, path: Path, file: int) -> None:
        for _ in range(int(IN_USE / POLL)):
            if _try_lock(file):
                if not _leads_to(path, file):
                    raise BlobUploadUnknown(f"there is no upload {path.name!r}: it has just ended")
                return
            await asyncio.sleep(POLL)
        raise Unavailable(f"upload {path.name!r} is being written by another request", retry_after=1.0)

    def remember(self, id: str, hash: HASH, hashed: int) -> None:
        """Spare whoever goes on with a suspended upload here to read it again."""
        self._hashes[id] = hash, hashed
        if len(self._hashes) > HASHES:
            del self._hashes[next(iter(self._hashes))]

    async def resume(self, digest: Digest) -> FileUpload:
        """The upload of this very digest, with what a former one has left.

        Where another process is at it, its upload: see FileUpload.watch().
        """
        path = self._partial / f"{digest.algorithm}-{digest.encoded}"
        file, locked = self._open_locked(path)
        upload = FileUpload(self, path, file, digest.algorithm, resumable=True, ours=locked)
        if locked:
            try:
                with _translated(path):
                    await finished(upload.rehash)
            except (RegistryError, asyncio.CancelledError):
                await upload.suspend()
                raise
        return upload

    def _open_locked(self, path: Path) -> tuple[int, bool]:
        """The file, created if need be, and whether the lock of it is ours."""
        while True:
            with self.guard(path):
                file = self._create(path)
                try:
                    locked = _try_lock(file)
                    # 1. we open  2. its writer renames it into blobs/ and lets go  3. we get the lock:
                    # of a committed blob.  So the name must still lead to the file that we opened.
                    if _leads_to(path, file):
                        return file, locked
                except BaseException:
                    os.close(file)
                    raise
                os.close(file)

    @asynccontextmanager
    async def exclusive(self, name: str) -> AsyncIterator[bool]:
        """Of all processes on this directory one is inside at a time, for each `name`; whether it waited.

        Where no lock can be had since the disk fails, all go on: this spares work, it guards nothing.
        """
        path = self._locks / hashlib.sha256(name.encode()).hexdigest()[:32]
        file: int | None = None
        waited = False
        with suppress(StorageFailed):
            while True:
                file, locked = self._open_locked(path)
                if locked:
                    break
                os.close(file)
                file, waited = None, True
                await asyncio.sleep(POLL)
        try:
            yield waited
        finally:
            if file is not None:
                with suppress(OSError):
                    path.unlink()  # while it is locked: who opened it meanwhile sees that its name is gone
                os.close(file)

    @contextmanager
    def turn(self, seconds: float) -> Iterator[bool]:
        """Whether this process is to keep house: none does, and none that still runs did so for `seconds`."""
        path = self.root.parent / "keeper.lock"
        with self.guard(path):
            file = self._create(path)
        try:
            locked = _try_lock(file)
            pid, _, text = os.pread(file, 100, 0).partition(b" ")
            recent = text != b"" and 0 <= self.clock() - float(text) < seconds
            ours = locked and not (recent and _runs(int(pid)))
            yield ours
            if ours:
                with self.guard(path):
                    os.ftruncate(file, 0)
                    os.pwrite(file, f"{os.getpid()} {self.clock()}".encode(), 0)
        finally:
            os.close(file)

    def place(self, partial: Path, file: int, path: Path) -> list[Path]:
        """Move a partial file, open as `file`, to its place; the directories that are still to be synced.

        Blocks.  Raises OSError.
        """
        made = not path.parent.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        now = self.clock()
        os.utime(file, (now, now))  # the time of last use is of our clock
        # Data before name: after a power cut a name stands for all of its bytes.
        os.fdatasync(file)
        partial.replace(path)
        # A new directory is itself a name, in one that may be as new.
        return [path.parent, *(path.parents[1:4] if made else ())]

    def check(self) -> None:
        """Raises StorageFailed where nothing can be written."""
        path = self._partial / f"check-{os.getpid()}"
        with self.guard(path):
            file = self._create(path)
            try:
                os.write(file, b"\n")
            finally:
                os.close(file)
                path.unlink(missing_ok=True)
        self.disk.worked(KIND)

    def reap(self, age: float) -> int:
        """Remove what the dead left: partial files and locks that nobody touched for `age` seconds.

        How many they were.
        """
        reaped = 0
        with _translated(self._partial):
            for path in (*self._partial.iterdir(), *self._locks.iterdir()):
                with suppress(FileNotFoundError):
                    if self.clock() - path.stat().st_mtime > age:
                        path.unlink()
                        reaped += 1
        return reaped


async def finished(function: Callable[..., T], *arguments: object) -> T:
    """Run in a thread; even who is cancelled meanwhile, however often, waits for its end.

    Else its caller would close the file under it, and the thread work on whatever gets its number next.
    """
    return await undisturbed(asyncio.get_running_loop().run_in_executor(None, function, *arguments))


async def undisturbed(work: Awaitable[T]) -> T:
    """The same of what goes on in this thread: it comes to its end before a cancellation counts."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        task.exception()  # seen
        raise cancelled
    return task.result()


def _mark(owner: str) -> str:
    """What an upload's id carries, so that it is of use for its owner only."""
    return hashlib.sha256(owner.encode()).hexdigest()[:16]


def sync(directory: Path) -> None:
    """Have the disk keep the names in it."""
    file = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return pid != os.getpid()


def _try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _leads_to(path: Path, file: int) -> bool:
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(found, os.fstat(file))
