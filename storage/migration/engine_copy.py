"""Copying blobs between files and a bucket, each verified by its digest before it is one in the target."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, cast

from storage.concurrency import run_in_thread
from storage.content import BlobContent, files_of
from storage.disk.blobs import BlobFiles
from storage.disk.modes import create_file
from storage.disk.tree import StoredBlob
from storage.errors import BlobUnknown, DigestInvalid, StorageFailed
from storage.oci import Digest

if TYPE_CHECKING:  # one machine needs no client of object storage
    from storage.bucket.blobs import BucketBlobs
    from storage.bucket.sessions import Session


class EngineCopy:
    """Copies blobs from `source` to `target`, of which one is files and the other a bucket.

    Methods raise StorageFailed and Unavailable.  What a copy that was killed has received of a file stays,
    and the next one goes on from there.
    """

    def __init__(self, source: BlobContent, target: BlobContent) -> None:
        self._source = source
        self._target = target

    async def copy(self, blob: StoredBlob) -> None:
        """Raises BlobUnknown if the blob is no longer in the source, DigestInvalid if it is damaged there."""
        if isinstance(self._source, BlobFiles):
            await self._upload(self._source, blob.digest)
        elif not self.has(blob):
            await self._download(files_of(self._target), blob)

    def has(self, blob: StoredBlob) -> bool:
        """Whether the target has the blob, as far as is recorded there."""
        found = self._target.find(blob.digest)
        return found is not None and found.size == blob.size

    async def _upload(self, source: BlobFiles, digest: Digest) -> None:
        blob = source.open(digest)
        try:
            await run_in_thread(_check, blob.fileno(), digest)
            # Also if there is a record of it: its object may have been deleted.
            await cast("BucketBlobs", self._target).adopt(blob.fileno(), digest, alone=False)
        finally:
            await blob.close()

    async def _download(self, target: BlobFiles, blob: StoredBlob) -> None:
        upload = await target.resume(blob.digest)
        if not upload.ours:
            upload.close()
            raise StorageFailed(f"{blob.digest} is being written by another process")
        try:
            opened = self._source.open(blob.digest)
            async for chunk in opened.chunks(upload.offset):
                await upload.write(chunk)
        except BlobUnknown as error:
            await upload.cancel(error)
            raise
        except BaseException:
            await upload.suspend()
            raise
        await upload.commit(blob.digest)
        os.utime(target.path(blob.digest), (blob.used_at, blob.used_at))


def _check(file: int, digest: Digest) -> None:
    """Raises DigestInvalid."""
    with open(file, "rb", closefd=False) as opened:
        found = Digest.of_hash(hashlib.file_digest(opened, digest.algorithm))
    if found != digest:
        raise DigestInvalid(f"its content is {found}")


def continue_here(source: BucketBlobs, target: BlobFiles, id: str, session: Session) -> None:
    """Write the bytes so far of an upload to a partial file, by which it is resumed.  Blocks.

    Raises Unavailable, OSError.
    """
    file = create_file(target.path_of(id), os.O_RDWR)
    try:
        end = os.fstat(file).st_size
        if end > session.size:  # of another attempt
            end = 0
        os.ftruncate(file, end)
        at = 0
        for key, size in session.parts:
            if at + size > end:
                os.lseek(file, at, os.SEEK_SET)
                for chunk in source.bucket.chunks(key):
                    os.write(file, chunk)
            at += size
    finally:
        os.close(file)
