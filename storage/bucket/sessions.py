"""Uploads that any of several servers goes on with: their bytes are objects, and their state is a record.

    upload <id>     the parts so far, and the digest of their bytes

A request writes to a partial file on the disk of the server that receives it.  At its end the file becomes
an object, a part, which is also a leftover until the upload ends: so nothing stays of an upload that nobody
goes on with.  An upload of a single part with the right digest becomes a blob as it is; several parts are
fetched at the end, verified, and put as one.

Two requests that write one upload at the same time have one winner: the other one finds another record.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Protocol

import msgspec

from storage.bucket.objects import Bucket, ObjectUnknown
from storage.concurrency import run_in_thread
from storage.disk.uploads import FileUpload
from storage.errors import BlobUploadUnknown, DigestInvalid, RegistryError, StorageFailed, Unavailable
from storage.keys import LEFTOVER, UPLOAD
from storage.oci import OCTETS, Descriptor, Digest
from storage.records import Batch, Records
from storage.registry import Upload

KEPT = 6 * 3600.0  # seconds after which the parts are recorded as used again: as leftovers they stay longer
PARTS = "uploads/"  # the start of the keys of parts


class Session(msgspec.Struct, frozen=True):
    """The record of an upload.

    parts: the keys of its objects and their sizes in bytes, in order
    digest: of all bytes, if they are one part
    at: when a request wrote it last
    kept_at: when its parts were recorded as used
    """

    parts: list[tuple[str, int]] = []
    digest: str = ""
    at: float = 0.0
    kept_at: float = 0.0

    @property
    def size(self) -> int:
        return sum(size for _, size in self.parts)

    @classmethod
    def parse(cls, record: bytes | None) -> Session | None:
        with suppress(msgspec.MsgspecError, UnicodeDecodeError):
            return msgspec.json.decode(record or b"", type=cls)
        return None


class SessionFiles(Protocol):
    """The blobs of a bucket, as far as an upload needs them."""

    clock: Callable[[], float]

    @property
    def bucket(self) -> Bucket: ...

    @property
    def records(self) -> Records: ...

    def begin(self) -> FileUpload:
        """A partial file for the bytes of one request, or of a whole upload."""

    def path_of(self, id: str) -> Path:
        """The path of a partial file."""

    def digest_of(self, file: FileUpload) -> Digest | None:
        """The digest of a suspended partial file, if all of it was hashed while it was written."""

    async def put_object(self, key: str, source: Path, size: int, digest: Digest | None) -> None:
        """Make an object of a file of `size` bytes, with this digest."""

    async def promote(self, id: str, key: str, size: int, digest: Digest) -> None:
        """End an upload, and make a blob of its only part, a leftover with this content."""

    def forget_session(self, id: str, parts: Sequence[tuple[str, int]]) -> None:
        """Remove the record of an upload, and have its parts deleted."""


class SharedUpload(Upload):
    """An upload whose state is a record.

    `session` is that record, None if there is none yet; `file` has the bytes that this request adds.
    """

    def __init__(
        self, blobs: SessionFiles, id: str, session: Session | None, file: FileUpload | None
    ) -> None:
        self.id = id
        self._blobs = blobs
        self._session = session
        self._file = file

    @property
    def offset(self) -> int:  # type: ignore[override]
        before = 0 if self._session is None else self._session.size
        return before if self._file is None else before + self._file.offset

    def expect(self, size: int) -> None:
        if self._file is not None:
            self._file.expect(size)

    async def write(self, chunk: bytes) -> None:
        if self._file is None:
            self._file = self._blobs.begin()
        await self._file.write(chunk)

    async def suspend(self, error: BaseException | None = None) -> None:
        file, self._file = self._file, None
        if file is None:
            return
        path = self._blobs.path_of(file.id)
        try:
            await file.suspend()
            await self._add(path, file.offset, self._blobs.digest_of(file))
        finally:
            path.unlink(missing_ok=True)

    async def _add(self, source: Path, size: int, digest: Digest | None) -> None:
        """Make a part of a file, and record it.

        Raises Unavailable, BlobUploadUnknown; then nothing of it is kept.
        """
        blobs, now, former = self._blobs, self._blobs.clock(), self._session
        parts = [] if former is None else list(former.parts)
        if size:
            key = f"{PARTS}{self.id}/{secrets.token_hex(8)}"
            await run_in_thread(blobs.records.put, LEFTOVER.key(key), str(now).encode())
            await blobs.put_object(key, source, size, digest)
            parts.append((key, size))
        elif former is not None:
            return
        kept = former.kept_at if former is not None and now - former.kept_at < KEPT else now
        session = Session(parts, str(digest or "") if len(parts) == 1 else "", now, kept)

        def work(batch: Batch) -> bool:
            found = Session.parse(batch.get(UPLOAD.key(self.id)))
            if found is None and former is not None:
                raise BlobUploadUnknown(f"there is no upload {self.id!r}: it has just ended")
            if found != former:
                return False
            batch.put(UPLOAD.key(self.id), msgspec.json.encode(session))
            for key, _ in parts if kept == now else ():
                batch.put(LEFTOVER.key(key), str(now).encode())
            return True

        if not await run_in_thread(partial(blobs.records.transaction, work, shared=True)):
            raise Unavailable(f"upload {self.id!r} is being written by another request", retry_after=1.0)
        self._session = session

    async def commit(self, digest: Digest) -> Descriptor:
        try:
            return await self._commit(digest)
        except DigestInvalid:
            await self.cancel()
            raise

    async def _commit(self, digest: Digest) -> Descriptor:
        if self._session is None or not self._session.parts:
            file, self._file = self._file or self._blobs.begin(), None
            return await self._committed(file, digest)
        if self._file is not None:
            await self.suspend()
        session = self._session
        if session.digest.startswith(f"{digest.algorithm}:"):
            if session.digest != digest:
                raise DigestInvalid(f"content is {session.digest}, not {digest}")
            key, size = session.parts[0]
            await self._blobs.promote(self.id, key, size, digest)
            return Descriptor(OCTETS, digest, size)
        file = self._blobs.begin()
        try:
            await self._fetch(file, session)
        except BaseException:
            await file.cancel()
            raise
        return await self._committed(file, digest)

    async def _committed(self, file: FileUpload, digest: Digest) -> Descriptor:
        try:
            committed = await file.commit(digest)
        except Unavailable:
            await file.cancel()  # the parts are still there
            raise
        await self._forget()
        return committed

    async def _fetch(self, file: FileUpload, session: Session) -> None:
        for key, size in session.parts:
            end = file.offset + size
            try:
                opened = await self._blobs.bucket.get(key)
                async for chunk in opened.chunks:
                    await file.write(bytes(chunk))
            except ObjectUnknown:
                raise BlobUploadUnknown(f"there is no upload {self.id!r}: it has just ended") from None
            except RegistryError:
                raise
            except Exception as error:  # whatever obstore raises
                raise self._blobs.bucket.broken(error, key) from error
            if file.offset != end:
                raise Unavailable(f"a part of upload {self.id!r} could not be read", retry_after=1.0)

    async def cancel(self, error: BaseException | None = None) -> None:
        file, self._file = self._file, None
        if file is not None:
            await file.cancel(error)
        await self._forget()

    async def _forget(self) -> None:
        """Remove the record; the parts are deleted soon."""
        session, self._session = self._session, None
        if session is not None:
            with suppress(StorageFailed):  # it is removed after a day, as one that was abandoned
                await run_in_thread(self._blobs.forget_session, self.id, session.parts)
