"""The interface of what holds the content of a store's blobs: BlobFiles, or a bucket.

Uploads and fills are written to partial files on the disk, whatever holds the blobs: so a blob appears all at
once, after its digest was verified.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import BinaryIO, Protocol

from storage.disk.blobs import BlobFiles
from storage.disk.health import DiskHealth
from storage.disk.sparse import SparseUpload
from storage.disk.tree import StoredBlob
from storage.oci import Descriptor, Digest
from storage.records import Batch
from storage.registry import Blob, Upload


class BlobContent(Protocol):
    """The blobs of a store, and the uploads that become blobs.

    Methods raise StorageFailed if the disk fails, Unavailable if a network does.  Those that do not say that
    they block do so no longer than a look at the disk.  A `batch` is the transaction of the store's records
    in which the method is called: what it finds and does there holds if the transaction does.
    """

    root: Path  # the directory of partial files and locks
    disk: DiskHealth  # its state
    remote: bool  # whether another server has the blobs

    # Blobs

    def path(self, digest: Digest) -> Path | None:
        """The path that a blob's file has; None if blobs are not files."""

    def holds(self, digest: Digest) -> bool:
        """Whether the blob is stored."""

    def find(self, digest: Digest) -> StoredBlob | None:
        """The blob's size and its last use; None if it is not stored."""

    def portions(self) -> Iterator[list[StoredBlob]]:
        """All stored blobs, in lists of those whose digests have the same first byte.  Blocks."""

    def open(self, digest: Digest, size: int | None = None, sure: bool = True) -> Blob:
        """Open the blob.  Raises BlobUnknown, also if it has not `size` bytes; it is then removed.

        Unless it is `sure` that the records say so now, content that is missing is BlobUncertain.
        """

    def reader(self, digest: Digest) -> BinaryIO:
        """The blob's bytes, without recording a use.  Blocks.  Close it.  Raises BlobUnknown."""

    def verify(self, digest: Digest) -> None:
        """Read the whole blob.  Blocks.  Raises BlobUnknown, also if it is damaged; it is then removed."""

    def touch(self, digest: Digest, at: float) -> None:
        """Record a use of a blob that was not opened; does nothing if the blob is not stored."""

    def renew(self, digest: Digest, batch: Batch | None = None) -> None:
        """Set the time of last use to the present time.  Raises BlobUnknown."""

    def remove_old(self, digest: Digest, old: Callable[[float], bool], batch: Batch) -> int | None:
        """Remove the blob if its last use is `old`; returns its size, or None if it stays."""

    # Uploads

    def room(self) -> int:
        """Bytes that are free for uploads."""

    def create(self, owner: str = "", algorithm: str = "sha256") -> Upload:
        """Start an upload that can be suspended, and resumed by its id and `owner`."""

    async def reopen(self, id: str, owner: str = "") -> Upload:
        """Resume a suspended upload.  Raises BlobUploadUnknown; Unavailable while another one writes it."""

    async def resume(self, digest: Digest) -> SparseUpload:
        """Start or resume the upload of this digest; it is not `ours` while another process writes it."""

    def exclusive(self, name: str) -> AbstractAsyncContextManager[bool]:
        """A lock between all processes, one for each `name`; yields whether it had to wait."""

    # Upkeep

    def end(self) -> None:
        """End what waits for another server, for good.  Thread-safe."""

    def check(self) -> None:
        """See whether it can be written to."""

    def reap(self, age: float) -> int:
        """Remove what writers left that did not go on for `age` seconds; returns how much.  Blocks."""


def files_of(content: BlobContent) -> BlobFiles:
    """The content as files, for what works on nothing else.  Raises TypeError if it is none."""
    if not isinstance(content, BlobFiles):
        raise TypeError(f"the blobs of {content.root} are not files")
    return content


class LinkedUpload(Upload):
    """An upload whose blob is linked in a repository, by `link`, when it is committed."""

    def __init__(self, upload: Upload, link: Callable[[Descriptor], Awaitable[None]]) -> None:
        self._upload, self._link = upload, link
        self.id = upload.id
        self.write, self.cancel = upload.write, upload.cancel  # type: ignore[method-assign]
        self.suspend = upload.suspend  # type: ignore[method-assign]

    @property
    def offset(self) -> int:  # type: ignore[override]
        return self._upload.offset

    async def commit(self, digest: Digest) -> Descriptor:
        blob = await self._upload.commit(digest)
        await self._link(blob)
        return blob
