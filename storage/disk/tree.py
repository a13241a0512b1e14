"""The tree of committed blobs as it lies on disk: listing it, and verifying the files in it.

A path in the tree that is not a blob is foreign: a name that is no digest, a digest in another digest's
directory, anything but a regular file.  Foreign paths are never followed, opened or removed.

All functions block, and raise OSError where the disk fails.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from storage.disk.uploads import CHUNK
from storage.errors import DigestInvalid
from storage.oci import ALGORITHMS, Digest

ASIDE_BYTES = 1 << 30  # the most that damaged files which are kept may have together, without the newest
_FAN_OUT = {f"{number:02x}" for number in range(256)}
# Errors of one file; any other may be an error of this process or of the whole disk.
_FILE_ERRORS = {errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.EACCES}


class StoredBlob(NamedTuple):
    """A committed blob as it was found; the least recently used sorts first.

    `used_at` is in seconds since the epoch, `size` in bytes.
    """

    used_at: float
    size: int
    digest: Digest


@dataclass(slots=True)
class Directory:
    """The content of a fan-out directory; `blobs` are in the order of their digests."""

    blobs: list[StoredBlob] = field(default_factory=list)
    foreign: list[Path] = field(default_factory=list)


class BlobHasher:
    """Reads and hashes the file of a committed blob, step by step.

    The file stays open until close(), so that no other file gets its identity in the meantime.
    """

    def __init__(self, path: Path, digest: Digest) -> None:
        self.path = path
        self.ended = False
        self.status: os.stat_result | None = None
        self.size = 0
        self.error: str | None = None  # why the file cannot be read
        self._digest = digest
        self._hash = hashlib.new(digest.algorithm)
        self._file = -1

    def step(self) -> int:
        """Read and hash the next chunk, and return its size; sets `ended` at the end of the file."""
        before = self.size
        try:
            if self._file < 0:
                self._open()
            while not self.ended and self.size - before < CHUNK:
                chunk = os.read(self._file, CHUNK)
                self._hash.update(chunk)
                self.size += len(chunk)
                self.ended = not chunk
        except OSError as error:
            self.ended = True
            if error.errno in _FILE_ERRORS:
                self.error = error.strerror or str(error)
            elif error.errno in (errno.ENOENT, errno.ELOOP):
                self.status = None  # evicted, or replaced by a symbolic link
            else:
                raise
        return self.size - before

    def _open(self) -> None:
        self.status = self.path.lstat()
        # Something else may have the name since it was listed: neither follow a link nor wait for a pipe.
        self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        self.status = os.fstat(self._file)
        if not stat.S_ISREG(self.status.st_mode):
            self.status, self.ended = None, True
        with suppress(OSError):
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            # What is read once must not push out of the page cache what clients share.  DONTNEED afterwards
            # would push out just that, where a client reads the same blob.
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_NOREUSE)

    @property
    def gone(self) -> bool:
        """Whether the blob no longer exists."""
        return self.ended and self.status is None and self.error is None

    @property
    def found(self) -> str:
        """The digest of the content, or the error that kept it from being read."""
        return self.error or Digest.of_hash(self._hash)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def directories(root: Path) -> tuple[list[str], list[Path]]:
    """List the fan-out directories, as `<algorithm>/<ab>`, and the foreign paths beside them."""
    names, foreign = [], []
    for algorithm in _entries(root):
        if algorithm.name not in ALGORITHMS or not algorithm.is_dir(follow_symlinks=False):
            foreign.append(Path(algorithm.path))
            continue
        for entry in _entries(Path(algorithm.path)):
            if entry.name in _FAN_OUT and entry.is_dir(follow_symlinks=False):
                names.append(f"{algorithm.name}/{entry.name}")
            else:
                foreign.append(Path(entry.path))
    return names, foreign


def read_directory(root: Path, name: str, after: str = "", until: str | None = None) -> Directory:
    """List the files in the fan-out directory `name` that come after `after`, up to and including `until`."""
    found = Directory()
    for entry in _entries(root / name):
        if entry.name <= after or (until is not None and entry.name > until):
            continue
        digest = _digest(name, entry.name)
        if digest is None or not entry.is_file(follow_symlinks=False):
            found.foreign.append(Path(entry.path))
            continue
        with suppress(FileNotFoundError):  # evicted in the meantime
            status = entry.stat(follow_symlinks=False)
            found.blobs.append(StoredBlob(status.st_mtime, status.st_size, digest))
    return found


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    """The entries in the order of their names; none if the directory was removed in the meantime."""
    with suppress(FileNotFoundError), os.scandir(directory) as found:
        return sorted(found, key=lambda entry: entry.name)
    return []


def _digest(directory: str, name: str) -> Digest | None:
    """The digest that a file of this name has by its place; None if the name does not belong there."""
    algorithm, _, start = directory.partition("/")
    with suppress(DigestInvalid):
        digest = Digest.parse(f"{algorithm}:{name}")
        return digest if name.startswith(start) else None
    return None


def remove_damaged(newest: Path, kept: int) -> None:
    """Remove the oldest damaged files beside `newest`, so that `kept` of them stay.

    Fewer stay if those that are older than `newest` have more than ASIDE_BYTES together.
    """
    found = []
    for algorithm in ALGORITHMS:
        for path in newest.parent.glob(f"{algorithm}-*"):
            with suppress(OSError):
                status = path.lstat()
                found.append((path == newest, status.st_mtime, status.st_size, path))
    total = 0
    for number, (_, _, size, path) in enumerate(sorted(found, reverse=True)):
        total += size if number else 0  # the newest may have any size
        if number and (number >= kept or total > ASIDE_BYTES):
            with suppress(OSError):
                path.unlink()
