"""Blobs of which only parts are here, and are kept: content of a cache until it is evicted.

They lie beside the fills in progress, as files whose lists name repositories (storage/disk/extents.py).  All
functions block, and raise OSError; `root` is the directory of the store.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from storage.disk.extents import SUFFIX, ExtentList, Extents
from storage.disk.locks import leads_to, try_lock
from storage.disk.tree import StoredBlob
from storage.errors import DigestInvalid
from storage.oci import OCTETS, Descriptor, Digest


class KeptParts(NamedTuple):
    """The parts of a blob that are here: what they occupy on the disk, and when they were last used.

    `size` are the bytes of the whole blob; `repositories` those that show it.
    """

    blob: StoredBlob
    size: int
    repositories: frozenset[str]


def find_parts(root: Path, digest: str) -> KeptParts | None:
    """What is kept of the blob."""
    with suppress(DigestInvalid, FileNotFoundError):
        path = _path(root, Digest.parse(digest))
        status = path.stat()
        found = _open(path, status.st_ino)
        found.close()
        if found.repositories:
            blob = StoredBlob(status.st_mtime, status.st_blocks * 512, Digest(digest))
            return KeptParts(blob, found.size, frozenset(found.repositories))
    return None


def shown_parts(root: Path, repository: str, digest: Digest) -> Descriptor | None:
    """The blob, if parts of it are kept, and `repository` shows them.  Raises nothing."""
    with suppress(OSError):
        found = find_parts(root, digest)
        if found is not None and repository in found.repositories:
            return Descriptor(OCTETS, digest, found.size)
    return None


def all_parts(root: Path) -> Iterator[KeptParts]:
    """All that are kept."""
    for path in (root / "partial").glob(f"*{SUFFIX}"):
        if (found := find_parts(root, _digest(path))) is not None:
            yield found


def extents_of(root: Path, digest: Digest) -> Extents:
    """Which bytes of the blob are here."""
    extents = Extents()
    with suppress(FileNotFoundError):
        path = _path(root, digest)
        _open(path, path.stat().st_ino, extents=extents).close()
    return extents


def is_kept(path: Path) -> bool:
    """Whether this is such a file."""
    return find_parts(path.parent.parent, _digest(path)) is not None


def show_parts(root: Path, digest: Digest, repository: str) -> None:
    """Show what is there of the blob in `repository`, and keep it."""
    path = _path(root, digest)
    found = _open(path, path.stat().st_ino, os.O_RDWR | os.O_APPEND)
    try:
        found.show(repository)
    finally:
        found.close()


def remove_parts(root: Path, found: StoredBlob) -> bool:
    """Remove what is kept, unless it was used since it was `found`, or is in use; whether it was removed."""
    path = _path(root, found.digest)
    with suppress(FileNotFoundError):
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # 1. we open  2. its writer completes and renames it  3. we get the lock, of a stored blob
            if not try_lock(file) or not leads_to(path, file) or os.fstat(file).st_mtime != found.used_at:
                return False
            path.unlink()
            for each in path.parent.glob(f"{path.name}.*"):
                each.unlink(missing_ok=True)
            return True
        finally:
            os.close(file)
    return False


def _path(root: Path, digest: Digest) -> Path:
    return root / "partial" / f"{digest.algorithm}-{digest.encoded}"


def _digest(path: Path) -> str:
    """What a partial file, or one beside it, is named after."""
    algorithm, _, encoded = path.name.split(".", 1)[0].partition("-")
    return f"{algorithm}:{encoded}"


def _open(path: Path, number: int, flags: int = os.O_RDONLY, extents: Extents | None = None) -> ExtentList:
    """The list of the file with this number, read as far as it was written.  Raises FileNotFoundError."""
    found = ExtentList.find(path.with_name(f"{path.name}.{number}{SUFFIX}"), flags)
    if found is None:
        raise FileNotFoundError(path)
    found.read(Extents() if extents is None else extents)
    return found
