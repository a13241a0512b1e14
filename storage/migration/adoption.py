"""Existing files that become blobs: verified, and hard-linked if possible, else copied.

A linked file has two names, and its mtime becomes the present time, as for every new blob.  Only its owner
can change that later, so its owner becomes the owner of the store.  It is copied if the change of owner is
not permitted, or would make it unreadable where it was.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
import threading
from contextlib import suppress
from pathlib import Path

from storage.disk.blobs import BlobFiles
from storage.disk.health import sync
from storage.disk.locks import try_lock
from storage.disk.modes import FILE_MODE
from storage.disk.uploads import CHUNK
from storage.errors import DigestInvalid
from storage.oci import Digest, Hash


class Adoption:
    """Adopts files as blobs, in any number of threads.  They are durable after settle()."""

    def __init__(self, files: BlobFiles) -> None:
        self._files = files
        self._owner = files.root.stat().st_uid
        self._unsettled: set[Path] = set()  # directories
        self._lock = threading.Lock()
        self.linked = 0

    def adopt(self, digest: Digest, source: Path) -> int:
        """Adopt a file, and return its size in bytes.  Blocks.

        Raises DigestInvalid if its content does not match, OSError if it cannot be read, StorageFailed.
        """
        original = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        partial = self._files.root / "partial" / secrets.token_urlsafe(16)
        try:
            status = os.fstat(original)
            if not self._linkable(status):
                self._copy(digest, original, partial, status.st_size)
            else:
                with open(original, "rb", closefd=False) as file:
                    _compare(digest, hashlib.file_digest(file, digest.algorithm))
                if not self._link(digest, source, original, partial):
                    os.lseek(original, 0, os.SEEK_SET)
                    self._copy(digest, original, partial, status.st_size)
            return status.st_size
        finally:
            os.close(original)
            with suppress(FileNotFoundError):
                partial.unlink()

    def _linkable(self, status: os.stat_result) -> bool:
        permitted = os.geteuid() in (0, self._owner)
        readable = status.st_mode & stat.S_IROTH or status.st_uid == self._owner
        owned = status.st_uid == self._owner or os.geteuid() == 0
        return bool(permitted and readable and owned and status.st_dev == self._files.root.stat().st_dev)

    def _link(self, digest: Digest, source: Path, original: int, partial: Path) -> bool:
        """Link the file; False if it must be copied."""
        try:
            os.link(source, partial)
        except OSError:
            return False  # a file system without links, a file with too many names, …
        if not os.path.samestat(partial.stat(), os.fstat(original)):
            partial.unlink()
            return False  # the source was replaced meanwhile
        with self._files.guard(partial):
            if os.fstat(original).st_uid != self._owner:
                os.chown(original, self._owner, -1)
            self._place(digest, original, partial)
        with self._lock:
            self.linked += 1
        return True

    def _copy(self, digest: Digest, original: int, partial: Path, size: int) -> None:
        hashed = hashlib.new(digest.algorithm)
        with self._files.guard(partial, size):
            file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
            try_lock(file)  # so that BlobFiles.reap() sees that it is in use
        try:
            while chunk := os.read(original, CHUNK):
                hashed.update(chunk)
                with self._files.guard(partial, size):
                    view = memoryview(chunk)
                    while view:
                        view = view[os.write(file, view) :]
            _compare(digest, hashed)
            with self._files.guard(partial, size):
                if os.geteuid() != self._owner:
                    os.chown(file, self._owner, -1)
                self._place(digest, file, partial)
        finally:
            os.close(file)

    def _place(self, digest: Digest, file: int, partial: Path) -> None:
        directories = self._files.place(partial, file, self._files.path(digest))
        with self._lock:
            for each in directories:
                if os.geteuid() != self._owner and each.stat().st_uid != self._owner:
                    os.chown(each, self._owner, -1)
            self._unsettled.update(directories)

    def settle(self) -> None:
        """Make all adopted blobs durable.  Raises StorageFailed."""
        with self._lock:
            unsettled, self._unsettled = self._unsettled, set()
        for directory in unsettled:
            with self._files.guard(directory):
                sync(directory)


def _compare(digest: Digest, hashed: Hash) -> None:
    if (found := Digest.of_hash(hashed)) != digest:
        raise DigestInvalid(f"it is damaged: its content is {found}")
