"""What a store holds, to be served again: see Held in storage/registry.py.

Each time the records are read again if any has changed, and the file of a blob is looked for.  A blob that is
no file is not held.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from storage.disk.remembered import Remembered
from storage.errors import BlobUnknown, StorageFailed
from storage.keys import LINK
from storage.oci import OCTETS, Descriptor, Digest, Manifest
from storage.registry import Held, Validity
from storage.store import Store
from storage.values import Link

SMALL = 64 << 10  # bytes of a blob that are held; larger ones are sent from their file


def held_blob(
    store: Store, repository: str, digest: Digest, validity: Callable[[float, float], Validity | None]
) -> Held | None:
    """A stored blob; None if it is no file.  `validity` is asked with the times of its linking and last use.

    Raises BlobUnknown and StorageFailed.
    """

    def read() -> Link | None:
        return Link.parse(store.records.get(LINK.key(repository, digest)))

    def valid() -> Validity | None:
        if (found := link()) is None:
            return None
        try:
            status = os.stat(path)  # noqa: PTH116  # twice as fast
        except OSError:
            return None
        return validity(found.linked_at, status.st_mtime) if status.st_size == found.size else None

    if (file := store.files.path(digest)) is None:
        return None
    link, path = Remembered(store.records, read), str(file)
    if (found := link()) is None:
        raise BlobUnknown(f"{repository} has no blob {digest}")
    content = _content(path, digest, found.size) if found.size <= SMALL else None
    return Held(Descriptor(OCTETS, digest, found.size), content, valid)


def _content(path: str, digest: Digest, size: int) -> bytes:
    """The bytes of a small blob, verified.  Raises StorageFailed."""
    try:
        with open(path, "rb", buffering=0) as file:
            content = file.read(size)
    except OSError as error:
        raise StorageFailed(f"{digest} cannot be read: {error.strerror}") from error
    if Digest.of(content, digest.algorithm) != digest:
        raise StorageFailed(f"{digest} is damaged")
    return content


def held_manifest(
    store: Store, read: Callable[[], tuple[Manifest, float]], validity: Callable[[float], Validity | None]
) -> Held:
    """The manifest that `read` reads from records.  `validity` is asked with the time that it reads.

    Raises what `read` raises.
    """

    def unchanged() -> float | None:
        now, since = read()
        return since if (now.digest, now.media_type) == (manifest.digest, manifest.media_type) else None

    def valid() -> Validity | None:
        since = found()
        return None if since is None else validity(since)

    manifest, _ = read()
    found = Remembered(store.records, unchanged)  # not the content: it is held once
    return Held(manifest.descriptor, manifest.content, valid)
