"""Blobs as regular files: the directory tree is the index.

    <root>/blobs/<algorithm>/<ab>/<encoded>     committed, verified, immutable
    <root>/damaged/<algorithm>-<encoded>        content that does not match its digest, kept for inspection

A blob exists if and only if its file does.  A file gets there only by a rename after verification; its mtime
is the time of last use.  A crash leaves nothing to repair but partial/, where a fill is found by its digest
and resumed (storage/disk/directory.py), and the records of blobs, which a scrub compares with the files.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import structlog

from storage.concurrency import run_in_thread
from storage.disk.directory import UploadFiles
from storage.disk.health import DiskHealth, sync, translated
from storage.disk.locks import leads_to
from storage.disk.modes import make_directory, restrict
from storage.disk.reaper import uptime
from storage.disk.tree import StoredBlob, directories, read_directory
from storage.disk.uploads import FileBlob
from storage.errors import BlobUncertain, BlobUnknown
from storage.oci import OCTETS, Descriptor, Digest
from storage.records import Batch

log = structlog.get_logger()

TOUCH = 60.0  # seconds; the precision of the last use, so that most hits write nothing
_ASIDE = "collected-"


class BlobFiles(UploadFiles):
    """The files of blobs and uploads below one directory; missing directories are created.

    The blobs of a `private` store cannot be fetched again: a damaged one is logged and set aside, and only
    renew() updates the time of last use.  `clock` returns seconds since the epoch, `ticks` seconds of a clock
    that nobody sets.
    """

    def __init__(
        self,
        root: Path,
        clock: Callable[[], float] = time.time,
        disk: DiskHealth | None = None,
        private: bool = False,
        ticks: Callable[[], float] = uptime,
    ) -> None:
        super().__init__(root, clock, disk, ticks)
        self.private = private
        self._blobs = str(root / "blobs")
        restrict(root)  # a former version created directories that others could read

    def _directories(self) -> tuple[Path, ...]:
        return *super()._directories(), self.root / "blobs"

    def end(self) -> None:
        pass

    def path(self, digest: Digest) -> Path:
        encoded = digest.encoded
        return Path(f"{self._blobs}/{digest.algorithm}/{encoded[:2]}/{encoded}")  # quicker than by /

    def holds(self, digest: Digest) -> bool:
        """Whether the blob is stored."""
        path = self.path(digest)
        with translated(path):
            return path.exists()

    def find(self, digest: Digest) -> StoredBlob | None:
        """The blob's size and its last use; None if it is not stored.  Raises StorageFailed."""
        path = self.path(digest)
        with translated(path), suppress(FileNotFoundError):
            status = path.stat()
            return StoredBlob(status.st_mtime, status.st_size, digest)
        return None

    def portions(self) -> Iterator[list[StoredBlob]]:
        """All stored blobs, in lists of those whose digests have the same first byte.  Blocks."""
        root = self.root / "blobs"
        with self.guard(root):
            names, _ = directories(root)
        for name in names:
            with self.guard(root):
                blobs = read_directory(root, name).blobs
            yield blobs

    def open(self, digest: Digest, size: int | None = None, sure: bool = True) -> FileBlob:
        """See BlobContent.open()."""
        path = self.path(digest)
        with translated(path):
            try:
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                if sure:
                    raise BlobUnknown(f"{digest} is not stored here") from None
                raise BlobUncertain(f"{digest} is not here, and the records cannot be read") from None
            status = os.fstat(file)
            if size is not None and status.st_size != size:
                os.close(file)
                self._drop(digest, status, size)
                raise BlobUnknown(f"{digest} was damaged: {status.st_size} of {size} bytes were left")
        now = self.clock()
        if not self.private and not 0 <= now - status.st_mtime < TOUCH:
            with suppress(OSError):  # a read-only disk can serve it nevertheless
                os.utime(file, (now, now))
        return FileBlob(file, Descriptor(OCTETS, digest, status.st_size), used_at=status.st_mtime)

    def _drop(self, digest: Digest, found: os.stat_result, size: int) -> None:
        path = self.path(digest)
        if not self.private:
            path.unlink(missing_ok=True)
        elif (aside := self.set_aside(digest, found)) is not None:
            sizes = f"{found.st_size} of {size} bytes"
            log.error("blob.damaged", digest=str(digest), found=sizes, path=str(aside), action="set aside")

    def touch(self, digest: Digest, at: float) -> None:
        """Record a use of a blob that was not opened; does nothing if the blob is not stored."""
        path = self.path(digest)
        with suppress(OSError):  # removed, or on a read-only disk
            if at - path.stat().st_mtime >= TOUCH:
                os.utime(path, (at, at))

    def renew(self, digest: Digest, batch: Batch | None = None) -> None:
        """Set the time of last use to the present time.  Raises BlobUnknown."""
        now = self.clock()
        path = self.path(digest)
        with translated(path):
            try:
                os.utime(path, (now, now))
            except FileNotFoundError:
                raise BlobUnknown(f"{digest} is not stored here") from None

    def verify(self, digest: Digest) -> None:
        """Read the whole blob.  Blocks.  Raises BlobUnknown, also if it is damaged; it is then removed."""
        path = self.path(digest)
        with translated(path):
            try:
                with path.open("rb") as file:
                    found = Digest.of_hash(hashlib.file_digest(file, digest.algorithm))
            except FileNotFoundError:
                raise BlobUnknown(f"{digest} is not stored here") from None
            if found != digest:
                path.unlink(missing_ok=True)
                raise BlobUnknown(f"{digest} was damaged: its content is {found}")

    def reader(self, digest: Digest) -> BinaryIO:
        """The blob's bytes, without recording a use.  Close it.  Raises BlobUnknown."""
        path = self.path(digest)
        with translated(path):
            try:
                return path.open("rb", buffering=0)
            except FileNotFoundError:
                raise BlobUnknown(f"{digest} is not stored here") from None

    def remove_old(self, digest: Digest, old: Callable[[float], bool], batch: Batch) -> int | None:
        """Remove the blob if its last use is `old`; returns its size, or None if it stays.

        In a transaction, so that it is not linked meanwhile.
        1. The file is found old  2. the same content is uploaded and committed over it, to be linked after
        this transaction  3. the new file is moved aside, recognised by its mtime, and moved back before it
        can be linked.  A process that is killed in between loses only content that no client relies on.
        """
        path, aside = self.path(digest), self._partial / f"{_ASIDE}{digest.algorithm}-{digest.encoded}"
        with self.guard(path), suppress(FileNotFoundError):
            if not old(path.lstat().st_mtime):
                return None
            path.rename(aside)
            status = aside.lstat()
            if old(status.st_mtime):
                aside.unlink()
                return status.st_size
            aside.rename(path)
        return None

    def set_aside(self, digest: Digest, found: os.stat_result) -> Path | None:
        """Move a damaged file, which has the status `found`, out of the tree; returns its new path.

        Returns None if the name no longer leads to that file.  The mtime becomes the time of the move.
        """
        path = self.path(digest)
        aside = self.root / "damaged" / f"{digest.algorithm}-{digest.encoded}"
        with self.guard(aside), suppress(FileNotFoundError):
            if not os.path.samestat(path.lstat(), found):
                return None
            make_directory(aside.parent)
            path.rename(aside)
            # 1. we check  2. it is evicted and filled again  3. we rename the good file: move it back.
            if not os.path.samestat(aside.lstat(), found):
                aside.rename(path)
                return None
            now = self.clock()
            with suppress(OSError):  # a file of another user
                os.utime(aside, (now, now))
            return aside
        return None

    async def publish(self, source: Path, file: int, digest: Digest) -> None:
        await run_in_thread(self._publish, source, file, digest)

    def _publish(self, source: Path, file: int, digest: Digest) -> None:
        for directory in self.place(source, file, self.path(digest)):
            sync(directory)

    def is_published(self, file: int, digest: Digest) -> bool:
        return leads_to(self.path(digest), file)

    def place(self, partial: Path, file: int, path: Path) -> list[Path]:
        """Move a partial file, open as `file`, to `path`; returns the directories that must be synced then.

        Blocks.  Raises OSError.
        """
        made = not path.parent.exists()
        make_directory(path.parent)
        now = self.clock()
        os.utime(file, (now, now))  # the time of last use, by our clock
        # Data before name: after a power failure, a name implies all of its bytes.
        os.fdatasync(file)
        partial.replace(path)
        # A new directory is itself a name in a directory that may be new, too.
        return [path.parent, *(path.parents[1:4] if made else ())]
