"""Blobs of one directory in another: as hard links, or as copies that share their blocks if possible."""

from __future__ import annotations

import fcntl
import hashlib
import os
from contextlib import suppress
from pathlib import Path

from storage.disk.modes import create_file, make_directory
from storage.disk.uploads import CHUNK
from storage.errors import DigestInvalid
from storage.oci import Digest

_FICLONE = 0x40049409  # ioctl_ficlone(2)


def is_placed(source: os.stat_result, target: Path) -> bool:
    """Whether `target` is the blob whose file has this status.

    A target that is a link to another file of the same blob is not: that file was set aside as damaged, or
    has been replaced.
    """
    try:
        found = target.stat()
    except FileNotFoundError:
        return False
    if found.st_size != source.st_size:
        return False
    replaced = found.st_dev == source.st_dev and found.st_nlink > 1
    return not replaced or os.path.samestat(found, source)


def place(source: Path, target: Path, partial: Path, digest: Digest, link: bool = True) -> bool:
    """Have the blob at `target`; whether it is a hard link, if it may `link`.

    `partial` is a free name on the same file system.  A copy is durable, and keeps the time of last use.
    Raises FileNotFoundError if the source is gone, DigestInvalid if what was copied is damaged, and OSError.
    """
    partial.unlink(missing_ok=True)
    make_directory(target.parent)
    linked = link and _link(source, partial)
    if not linked:
        _copy(source, partial, digest)
    partial.replace(target)
    partial.unlink(missing_ok=True)  # rename(2) leaves it if both are the same file
    return linked


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:
        return False  # another file system, one without links, a file with too many, of another user, …
    return True


def _copy(source: Path, target: Path, digest: Digest) -> None:
    with source.open("rb") as read, os.fdopen(create_file(target, os.O_WRONLY | os.O_EXCL), "wb") as write:
        shared = False
        with suppress(OSError):
            fcntl.ioctl(write.fileno(), _FICLONE, read.fileno())
            shared = True
        hash = hashlib.new(digest.algorithm)
        while chunk := read.read(CHUNK):
            hash.update(chunk)
            if not shared:
                write.write(chunk)
        if (found := Digest.of_hash(hash)) != digest:
            raise DigestInvalid(f"{source}: its content is {found}")
        write.flush()
        status = os.fstat(read.fileno())
        os.utime(write.fileno(), (status.st_atime, status.st_mtime))
        os.fsync(write.fileno())


def verify(path: Path, digest: Digest) -> None:
    """Raises DigestInvalid unless the file has this content; OSError if it cannot be read."""
    with path.open("rb") as file:
        found = Digest.of_hash(hashlib.file_digest(file, digest.algorithm))
    if found != digest:
        raise DigestInvalid(f"{path}: its content is {found}")
