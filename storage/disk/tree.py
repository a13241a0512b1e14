"""The tree of committed blobs as it lies on disk, whatever it is: for who looks at all of it.

What is in it and is no blob is foreign: a name that is no digest, a digest in another's directory, anything
but a plain file.  Foreign things are never followed, opened or removed.  All of it blocks.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from storage.disk.uploads import CHUNK
from storage.errors import DigestInvalid
from storage.oci import Digest

ASIDE_BYTES = 1 << 30  # that what was set aside has together, but for the newest

_ALGORITHMS = ("sha256", "sha512")  # see oci.Digest
_FAN_OUT = {f"{number:02x}" for number in range(256)}
# What of a failure is the file's own; any other may be ours, or all the disk's.
_ITS_OWN = {errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.EACCES}


@dataclass(slots=True)
class Directory:
    """`blobs` are in order, with their sizes."""

    blobs: list[tuple[Digest, int]] = field(default_factory=list)
    foreign: list[Path] = field(default_factory=list)


class TreeReader:
    """A committed blob's file, being hashed.

    It stays open until close(), so that nothing else gets its identity meanwhile.
    """

    def __init__(self, path: Path, digest: Digest) -> None:
        self.path = path
        self.ended = False
        self.status: os.stat_result | None = None
        self.size = 0
        self.error: str | None = None  # why it cannot be read
        self._digest = digest
        self._hash = hashlib.new(digest.algorithm)
        self._file = -1

    def step(self) -> int:
        """Take in some of it, or find that it has `ended`; how many bytes."""
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
            if error.errno in _ITS_OWN:
                self.error = error.strerror or str(error)
            elif error.errno in (errno.ENOENT, errno.ELOOP):
                self.status = None  # evicted, or a link now
            else:
                raise
        return self.size - before

    def _open(self) -> None:
        self.status = self.path.lstat()
        # Whatever took the name since it was listed: neither follow it nor wait for it.
        self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        self.status = os.fstat(self._file)
        if not stat.S_ISREG(self.status.st_mode):
            self.status, self.ended = None, True
        with suppress(OSError):
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            # What is read once is not to push out what clients share.  DONTNEED afterwards would push out
            # just that, where both are the same blob.
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_NOREUSE)

    @property
    def gone(self) -> bool:
        """There is no such file any more."""
        return self.ended and self.status is None and self.error is None

    @property
    def found(self) -> str:
        """The digest of what is there, or why none could be told."""
        return self.error or f"{self._digest.algorithm}:{self._hash.hexdigest()}"

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def directories(root: Path) -> tuple[list[str], list[Path]]:
    """The fan-out directories, as `<algorithm>/<ab>`, and what is foreign beside them."""
    names, foreign = [], []
    for algorithm in _entries(root):
        if algorithm.name not in _ALGORITHMS or not algorithm.is_dir(follow_symlinks=False):
            foreign.append(Path(algorithm.path))
            continue
        for entry in _entries(Path(algorithm.path)):
            if entry.name in _FAN_OUT and entry.is_dir(follow_symlinks=False):
                names.append(f"{algorithm.name}/{entry.name}")
            else:
                foreign.append(Path(entry.path))
    return names, foreign


def read_tree(root: Path, name: str, after: str = "", until: str | None = None) -> Directory:
    """What the fan-out directory `name` holds after one name, up to another."""
    found = Directory()
    for entry in sorted(_entries(root / name), key=lambda each: each.name):
        if entry.name <= after or (until is not None and entry.name > until):
            continue
        digest = _digest(name, entry.name)
        if digest is None or not entry.is_file(follow_symlinks=False):
            found.foreign.append(Path(entry.path))
            continue
        with suppress(FileNotFoundError):  # evicted meanwhile
            found.blobs.append((digest, entry.stat(follow_symlinks=False).st_size))
    return found


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    """None where it was removed meanwhile."""
    with suppress(FileNotFoundError), os.scandir(directory) as found:
        return list(found)
    return []


def _digest(directory: str, name: str) -> Digest | None:
    """Whose content a file of that name holds; None where it does not belong there."""
    algorithm, _, start = directory.partition("/")
    with suppress(DigestInvalid):
        digest = Digest.parse(f"{algorithm}:{name}")
        return digest if name.startswith(start) else None
    return None


def thin(newest: Path, kept: int) -> None:
    """Remove what was set aside before `newest`, but for the last of it: `kept` files with that."""
    found = []
    for algorithm in _ALGORITHMS:
        for path in newest.parent.glob(f"{algorithm}-*"):
            with suppress(OSError):
                status = path.lstat()
                found.append((path == newest, status.st_mtime, status.st_size, path))
    held = 0
    for number, (_, _, size, path) in enumerate(sorted(found, reverse=True)):
        held += size if number else 0  # the newest may have any size
        if number and (number >= kept or held > ASIDE_BYTES):
            with suppress(OSError):
                path.unlink()


def sorted_entries(directory: str) -> list[os.DirEntry[str]]:
    with suppress(OSError), os.scandir(directory) as found:
        return sorted(found, key=lambda each: each.name)
    return []


def files_in(directory: str) -> Iterator[tuple[str, int, float]]:
    """Name, size and last use of each file in it."""
    with suppress(OSError), os.scandir(directory) as found:
        for each in found:
            with suppress(OSError):  # it went meanwhile
                if each.is_file(follow_symlinks=False):
                    status = each.stat(follow_symlinks=False)
                    yield each.name, status.st_size, status.st_mtime
