"""The directory in which uploads are written: partial files, and locks between processes.

    <root>/partial/<algorithm>-<encoded>        a fill in progress, locked by its writer
    <root>/partial/<fill>.<inode>.extents       which bytes of a fill with holes are there
    <root>/partial/<fill>.<inode>.wanted        which bytes of it other processes wait for
    <root>/partial/<fill>.<inode>.writer        what its writer says of itself: the trace of the fill
    <root>/partial/<id>                         any other upload, locked while it is written
    <root>/locks/<hash of the name>             held by a process while it does what only one may do

What becomes of a partial file whose digest is verified is up to the subclass: see publish().
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import re
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
from pathlib import Path

from storage.concurrency import run_in_thread
from storage.disk.extents import is_about_a_file, is_beside
from storage.disk.health import DiskHealth, translated
from storage.disk.kept import is_kept
from storage.disk.locks import POLL, leads_to, try_lock
from storage.disk.modes import create_file, make_directory
from storage.disk.reaper import Reaper, uptime
from storage.disk.sparse import SparseUpload
from storage.disk.uploads import FileUpload
from storage.errors import BlobUploadUnknown, RegistryError, StorageFailed, Unavailable
from storage.oci import Digest, Hash

KIND = "blobs"  # the kind of these files in DiskHealth
HASHES = 1000  # suspended uploads whose hash is remembered; others are read again at their end
IN_USE = 10.0  # seconds that a resumed upload waits for its former writer, which was probably cut off
_ID = re.compile(r"[A-Za-z0-9_-]{22}\.[0-9a-f]{16}")


class UploadFiles(ABC):
    """The partial files and locks below one directory; missing directories are created.

    `clock` returns seconds since the epoch, `ticks` seconds of a clock that nobody sets.
    """

    remote = False

    def __init__(
        self,
        root: Path,
        clock: Callable[[], float] = time.time,
        disk: DiskHealth | None = None,
        ticks: Callable[[], float] = uptime,
    ) -> None:
        self.root = root
        self.disk = disk or DiskHealth(root, clock)
        self.clock = clock
        self.growing: set[FileUpload] = set()  # uploads of a known size
        self._partial = root / "partial"
        self._locks = root / "locks"
        self._reaper = Reaper(clock, ticks)
        self._hashes: dict[str, tuple[Hash, int]] = {}
        with translated(root):
            self._make()

    @abstractmethod
    async def publish(self, source: Path, file: int, digest: Digest) -> None:
        """Make the blob of a partial file, open as `file`, whose content is verified; removes the file.

        Raises OSError, and Unavailable if it may succeed later: the file is then still there.
        """

    @abstractmethod
    def is_published(self, file: int, digest: Digest) -> bool:
        """Whether `file` was a partial file that is now the blob.  Raises OSError."""

    def _make(self) -> None:
        for directory in self._directories():
            make_directory(directory)

    def _directories(self) -> tuple[Path, ...]:
        return self._partial, self._locks

    def _create(self, path: Path, flags: int = 0) -> int:
        flags |= os.O_RDWR
        try:
            return create_file(path, flags)
        except FileNotFoundError:
            self._make()
            return create_file(path, flags)

    def guard(self, path: Path, size: int = 0) -> AbstractContextManager[None]:
        """Report the failure of a write: see DiskHealth.guard()."""
        return self.disk.guard(KIND, path, size)

    def worked(self, size: int = 0) -> None:
        """Report a successful write of `size` bytes: see DiskHealth.worked()."""
        self.disk.worked(KIND, size)

    def check_room(self, upload: FileUpload) -> None:
        """Reserve the room that `upload` still needs; raises StorageFailed if there is not enough."""
        remaining = sum(each.remaining for each in self.growing | {upload})
        with self.guard(self.root, remaining):
            if self.disk.room() < remaining:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.growing.add(upload)

    def room(self) -> int:
        """Bytes that are free and not reserved for uploads."""
        return self.disk.room() - sum(each.remaining for each in self.growing)

    def create(self, owner: str = "", algorithm: str = "sha256") -> FileUpload:
        """Start an upload that can be suspended, and resumed by its id and `owner`."""
        path = self._partial / f"{secrets.token_urlsafe(16)}.{_mark(owner)}"
        with self.guard(path):
            file = self._create(path, os.O_EXCL)
            try_lock(file)
        return FileUpload(self, path, file, algorithm)

    async def reopen(self, id: str, owner: str = "") -> FileUpload:
        """Resume an upload that this or another process suspended.

        Raises BlobUploadUnknown; Unavailable while another request writes it.
        """
        self.check_id(id, owner)
        path = self._partial / id
        with translated(path):
            try:
                file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                raise BlobUploadUnknown(f"there is no upload {id!r}: it ended, or was abandoned") from None
        upload = FileUpload(self, path, file, "sha256", ours=False)
        try:
            await self._lock_upload(path, file)
            upload.take_over()
        except BaseException:
            upload.close()
            raise
        if (known := self._hashes.pop(id, None)) is not None:
            upload.adopt(*known)
        return upload

    def check_id(self, id: str, owner: str) -> None:
        """Raise BlobUploadUnknown unless it may be the id of an upload of `owner`."""
        if not _ID.fullmatch(id) or not id.endswith(f".{_mark(owner)}"):
            raise BlobUploadUnknown(f"there is no upload {id[:80]!r} of this repository")

    def path_of(self, id: str) -> Path:
        """The partial file of an upload."""
        return self._partial / id

    async def _lock_upload(self, path: Path, file: int) -> None:
        for _ in range(int(IN_USE / POLL)):
            if try_lock(file):
                if not leads_to(path, file):
                    raise BlobUploadUnknown(f"there is no upload {path.name!r}: it has just ended")
                return
            await asyncio.sleep(POLL)
        raise Unavailable(f"upload {path.name!r} is being written by another request", retry_after=1.0)

    def remember(self, id: str, hash: Hash, hashed: int) -> None:
        """Keep the hash of a suspended upload, so that reopen() need not read the bytes again."""
        self._hashes[id] = hash, hashed
        if len(self._hashes) > HASHES:
            del self._hashes[next(iter(self._hashes))]

    async def resume(self, digest: Digest) -> SparseUpload:
        """Start or resume the upload of this digest.

        If another process writes it, the upload is not `ours`: see FileUpload.watch().
        """
        path = self._partial / f"{digest.algorithm}-{digest.encoded}"
        while True:
            file, locked = self._open_locked(path)
            upload = SparseUpload(self, path, file, digest.algorithm, resumable=True, ours=locked)
            if not locked:
                return upload
            try:
                with translated(path):
                    await run_in_thread(upload.rehash)
                return upload
            except Unavailable:  # it has removed its file
                upload.close()
            except (RegistryError, asyncio.CancelledError):
                await upload.suspend()
                raise

    def _open_locked(self, path: Path) -> tuple[int, bool]:
        """Open the file, which is created if necessary; also returns whether we got its lock."""
        while True:
            with self.guard(path):
                file = self._create(path)
                try:
                    locked = try_lock(file)
                    # 1. we open  2. its writer renames it into blobs/ and releases the lock  3. we get the
                    # lock, of a committed blob.  So the name must still lead to the file that we opened.
                    if leads_to(path, file):
                        return file, locked
                except BaseException:
                    os.close(file)
                    raise
                os.close(file)

    @asynccontextmanager
    async def exclusive(self, name: str) -> AsyncIterator[bool]:
        """A lock between all processes on this directory, one for each `name`; yields whether it had to wait.

        If the disk fails, all enter without a lock: this saves duplicate work and protects nothing.
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
                    path.unlink()  # under the lock: a process that has it open sees it removed
                os.close(file)

    @contextmanager
    def turn(self, seconds: float) -> Iterator[bool]:
        """Yields whether it is the turn of this process to do housekeeping.

        It is if no process does so, and no other process that still runs did in the last `seconds`.
        """
        path = self.root.parent / "keeper.lock"
        with self.guard(path):
            file = self._create(path)
        try:
            locked = try_lock(file)
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

    def check(self) -> None:
        """Write a file to see whether the disk works.  Raises StorageFailed."""
        path = self._partial / f"check-{os.getpid()}"
        with self.guard(path):
            file = self._create(path)
            try:
                os.write(file, b"\n")
            finally:
                os.close(file)
                path.unlink(missing_ok=True)
        self.worked()

    def reap(self, age: float) -> int:
        """Remove partial files and locks that nobody went on with for `age` seconds; returns how many.

        Those that are kept (storage/disk/kept.py) are evicted like other content.
        """
        with translated(self._partial):
            files = sorted((*self._partial.iterdir(), *self._locks.iterdir()), key=is_beside)
            others = (path for path in files if not is_about_a_file(path) and not is_kept(path))
            return self._reaper.reap(others, age)


def _mark(owner: str) -> str:
    """The part of an upload's id that makes it valid for its owner only."""
    return hashlib.sha256(owner.encode()).hexdigest()[:16]


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return pid != os.getpid()
