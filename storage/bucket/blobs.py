"""Blobs as the objects of a bucket, with a record for each.

    <prefix>/<algorithm>/<ab>/<encoded>.<token>    a blob; each upload has a token of its own

and in the records of the store:

    object <digest>       its size, its last use, and the key of its object
    leftover <key>        since when an object may be there that is no blob; 0 if it is to be deleted now

A blob exists if and only if its record does.  So whether it does is known without asking the bucket, and what
happens to it is part of the transaction of the records in which it happens:

1. An upload is written to a partial file, and its digest is verified.
2. A leftover is recorded, and the file becomes an object.
3. In one transaction the leftover becomes the blob; or, if another upload of it was first, is to be deleted.

An upload that fails leaves its leftover, and so does a removal, which never deletes the object of a later
upload of the same content: that has another key.  reap() deletes them; what was being written, after a day.

A look at a blob that finds no object, or one of another size, removes nothing: it may be another bucket, by
mistake.  The next push of the content replaces it.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

from storage.bucket.blob import BucketBlob, ObjectReader
from storage.bucket.objects import CHUNK, Bucket, ObjectUnknown
from storage.bucket.owner import BucketOwner, ForeignBucket
from storage.bucket.sessions import KEPT, PARTS, Session, SharedUpload
from storage.concurrency import run_in_thread, uninterrupted
from storage.disk.blobs import TOUCH
from storage.disk.directory import UploadFiles
from storage.disk.health import DiskHealth
from storage.disk.reaper import uptime
from storage.disk.tree import StoredBlob
from storage.disk.uploads import FileUpload
from storage.errors import BlobUnknown, BlobUploadUnknown, RegistryError, StorageFailed, Unavailable
from storage.keys import LEFTOVER, OBJECT, UPLOAD
from storage.oci import ALGORITHMS, OCTETS, Descriptor, Digest
from storage.records import Batch, Records
from storage.registry import Upload
from storage.values import StoredObject

DUE = b"0"
CLAIM = 60.0  # seconds for which an upload keeps other servers from uploading the same blob, unless renewed
PUBLISHED = 0o400  # the mode of a partial file that has become an object


def keep_nothing(source: Path, digest: Digest) -> bool:
    """Leave the file of a blob where it is, to be removed."""
    return False


class BucketBlobs(UploadFiles):
    """The blobs in a bucket, recorded in `records`, and the uploads below the directory `root`.

    keep: moves the file of an upload elsewhere once it is a blob; returns whether it did
    """

    remote = True

    def __init__(
        self,
        bucket: Bucket,
        records: Records,
        root: Path,
        clock: Callable[[], float] = time.time,
        disk: DiskHealth | None = None,
        ticks: Callable[[], float] = uptime,
        keep: Callable[[Path, Digest], bool] = keep_nothing,
    ) -> None:
        super().__init__(root, clock, disk, ticks)
        self._keep = keep
        self._bucket = bucket
        self._records = records
        self._owner = BucketOwner(bucket, records)

    def end(self) -> None:
        self._bucket.end()

    def path(self, digest: Digest) -> None:
        return None

    def _object(self, digest: Digest, batch: Batch | None = None) -> StoredObject | None:
        return StoredObject.parse((batch or self._records).get(OBJECT.key(digest)))

    def _known(self, digest: Digest, batch: Batch | None = None) -> StoredObject:
        if (found := self._object(digest, batch)) is None:
            raise BlobUnknown(f"{digest} is not stored here")
        return found

    def holds(self, digest: Digest) -> bool:
        return self._object(digest) is not None

    def find(self, digest: Digest) -> StoredBlob | None:
        found = self._object(digest)
        return None if found is None else StoredBlob(found.used_at, found.size, digest)

    def portions(self) -> Iterator[list[StoredBlob]]:
        for algorithm in ALGORITHMS:
            for byte in range(256):
                portion = []
                for key, value in self._records.scan(OBJECT.start(f"{algorithm}:{byte:02x}")):
                    if (found := StoredObject.parse(value)) is not None:
                        digest = Digest(OBJECT.parse(key)[0])
                        portion.append(StoredBlob(found.used_at, found.size, digest))
                if portion:
                    yield portion

    def open(self, digest: Digest, size: int | None = None, sure: bool = True) -> BucketBlob:
        found = self._known(digest)
        if size not in (None, found.size):
            raise BlobUnknown(f"{digest} was damaged: {found.size} bytes were stored, not {size}")
        return BucketBlob(
            self._bucket, found.key, Descriptor(OCTETS, digest, found.size), found.used_at, sure
        )

    def reader(self, digest: Digest) -> BinaryIO:
        raw = ObjectReader(self._bucket.chunks(self._known(digest).key))
        return io.BufferedReader(raw, CHUNK)

    def verify(self, digest: Digest) -> None:
        known, hashed = self._known(digest), hashlib.new(digest.algorithm)
        try:
            for chunk in self._bucket.chunks(known.key):
                hashed.update(chunk)
        except ObjectUnknown as error:
            raise BlobUnknown(f"{digest} was damaged: {error}") from None
        if (found := Digest.of_hash(hashed)) != digest:
            self._records.transaction(partial(self._drop, digest, known))
            raise BlobUnknown(f"{digest} was damaged: its content is {found}")

    def _drop(self, digest: Digest, known: StoredObject, batch: Batch) -> None:
        if self._is_at(digest, known, batch):
            batch.delete(OBJECT.key(digest))
            batch.put(LEFTOVER.key(known.key), DUE)

    def _is_at(self, digest: Digest, known: StoredObject, batch: Batch) -> bool:
        """Whether the blob's object still has the key of `known`."""
        found = self._object(digest, batch)
        return found is not None and found.key == known.key

    def touch(self, digest: Digest, at: float) -> None:
        def work(batch: Batch) -> None:
            found = self._object(digest, batch)
            if found is not None and at - found.used_at >= TOUCH:
                batch.put(OBJECT.key(digest), found._replace(used_at=at).encode())

        self._records.transaction(work, shared=True)

    def renew(self, digest: Digest, batch: Batch | None = None) -> None:
        if batch is None:
            self._records.transaction(lambda batch: self.renew(digest, batch), shared=True)
        else:
            found = self._known(digest, batch)
            batch.put(OBJECT.key(digest), found._replace(used_at=self.clock()).encode())

    def remove_old(self, digest: Digest, old: Callable[[float], bool], batch: Batch) -> int | None:
        found = self._object(digest, batch)
        if found is None or not old(found.used_at):
            return None
        batch.delete(OBJECT.key(digest))
        batch.put(LEFTOVER.key(found.key), DUE)
        return found.size

    # Uploads

    @property
    def bucket(self) -> Bucket:
        return self._bucket

    @property
    def records(self) -> Records:
        return self._records

    def create(self, owner: str = "", algorithm: str = "sha256") -> Upload:  # type: ignore[override]
        file = super().create(owner, algorithm)
        return SharedUpload(self, file.id, None, file) if self._records.remote else file

    async def reopen(self, id: str, owner: str = "") -> Upload:  # type: ignore[override]
        if not self._records.remote:
            return await super().reopen(id, owner)
        self.check_id(id, owner)
        session = Session.parse(await run_in_thread(self._records.get, UPLOAD.key(id)))
        if session is None and self.path_of(id).exists():  # it began before the content was moved
            return SharedUpload(self, id, None, await super().reopen(id, owner))
        if session is None:
            raise BlobUploadUnknown(f"there is no upload {id!r}: it ended, or was abandoned")
        return SharedUpload(self, id, session, None)

    def begin(self) -> FileUpload:
        """A partial file for the bytes of one request, or of a whole upload."""
        file = super().create()
        assert isinstance(file, FileUpload)
        return file

    def digest_of(self, file: FileUpload) -> Digest | None:
        """The digest of a suspended partial file, if all of it was hashed while it was written."""
        hash, hashed = self._hashes.pop(file.id, (None, 0))
        return Digest.of_hash(hash) if hash is not None and hashed == file.offset else None

    async def promote(self, id: str, key: str, size: int, digest: Digest) -> None:
        """End the upload, and make a blob of its only part, a leftover with this content."""
        known = await run_in_thread(self._object, digest)
        kept = known is not None and await self._is_kept(digest, known)

        def work(batch: Batch) -> bool:
            batch.delete(UPLOAD.key(id))
            return self._record(digest, key, size, None if kept else known, batch)

        if not await run_in_thread(partial(self._records.transaction, work, shared=True)):
            raise BlobUploadUnknown(f"the upload of {digest} has just ended")

    def forget_session(self, id: str, parts: Sequence[tuple[str, int]]) -> None:
        """Remove the record of an upload, and have its parts deleted."""

        def work(batch: Batch) -> None:
            batch.delete(UPLOAD.key(id))
            for key, _ in parts:
                if batch.get(LEFTOVER.key(key)) is not None:  # else another request has made a blob of it
                    batch.put(LEFTOVER.key(key), DUE)

        self._records.transaction(work, shared=True)

    async def put_object(self, key: str, source: Path, size: int, digest: Digest | None) -> None:
        """Make an object of a file of `size` bytes, with this digest.  Raises ForeignBucket."""
        await run_in_thread(self._owner.check)
        await self._bucket.put(key, source, size, digest)

    async def publish(self, source: Path, file: int, digest: Digest) -> None:
        await uninterrupted(self._publish(source, file, digest))

    async def _publish(self, source: Path, file: int, digest: Digest) -> None:
        known = await run_in_thread(self._object, digest)
        if known is None or not await self._is_kept(digest, known):
            await self._put(source, digest, os.fstat(file).st_size, known)
        # The name first: if we are killed in between, who follows the file sees that it is gone.
        if not self._keep(source, digest):
            source.unlink(missing_ok=True)
        os.fchmod(file, PUBLISHED)

    async def _is_kept(self, digest: Digest, known: StoredObject) -> bool:
        """Whether the bucket has the object of a blob that is pushed again; then it is used now."""
        if await self._bucket.size(known.key) != known.size:
            return False

        def work(batch: Batch) -> bool:
            if not self._is_at(digest, known, batch):
                return False
            self.renew(digest, batch)
            return True

        return await run_in_thread(partial(self._records.transaction, work, shared=True))

    async def adopt(self, file: int, digest: Digest, alone: bool = True) -> None:
        """Make a blob of an open file, which stays, and whose digest was verified.

        If it is to be the only one that does, raises Unavailable while another server does.
        """
        known = await run_in_thread(self._object, digest)
        if known is None or not await self._is_kept(digest, known):
            source, size = Path(f"/proc/self/fd/{file}"), os.fstat(file).st_size  # its name may be gone
            await uninterrupted(self._put(source, digest, size, known, alone))

    async def _put(
        self, source: Path, digest: Digest, size: int, damaged: StoredObject | None, alone: bool = False
    ) -> None:
        """Make an object of the file, and a blob of it, which replaces one whose object is `damaged`.

        If it is to be the only one that does, raises Unavailable while another one does.
        """
        key = f"{_name(digest)}{secrets.token_hex(8)}"
        if not alone:
            await run_in_thread(self._records.put, LEFTOVER.key(key), str(self.clock()).encode())
            await self.put_object(key, source, size, digest)
        elif not await self._put_alone(source, digest, size, damaged, key):
            return
        made = partial(self._record, digest, key, size, damaged)
        if not await run_in_thread(partial(self._records.transaction, made, shared=True)):
            raise Unavailable(f"the upload of {digest} to {self._bucket.name} took too long", retry_after=1.0)

    def _record(
        self, digest: Digest, key: str, size: int, damaged: StoredObject | None, batch: Batch
    ) -> bool:
        """Make a blob of the leftover `key`, which replaces one whose object is `damaged`."""
        if batch.get(LEFTOVER.key(key)) in (None, DUE):
            return False
        if damaged is not None:
            self._drop(digest, damaged, batch)
        if self._object(digest, batch) is not None:  # another upload was first
            self.renew(digest, batch)
            batch.put(LEFTOVER.key(key), DUE)
        else:
            batch.put(OBJECT.key(digest), StoredObject(size, self.clock(), key).encode())
            batch.delete(LEFTOVER.key(key))
        return True

    async def _put_alone(
        self, source: Path, digest: Digest, size: int, damaged: StoredObject | None, key: str
    ) -> bool:
        """Make the object, unless another server has just done so.  Raises Unavailable while one does."""

        def claim(batch: Batch) -> bool:
            found = self._object(digest, batch)
            if found is not None and (damaged is None or found.key != damaged.key):
                return False
            for other, since in self._records.scan(LEFTOVER.start(_name(digest))):
                if since != DUE and not self._is_left(since, CLAIM):
                    raise Unavailable(f"{other} is being uploaded by another server", retry_after=CLAIM)
            batch.put(LEFTOVER.key(key), str(self.clock()).encode())
            return True

        if not await run_in_thread(partial(self._records.transaction, claim, shared=True)):
            return False
        renewing = asyncio.create_task(self._renew_claim(key))
        try:
            await self.put_object(key, source, size, digest)
        except RegistryError:
            with suppress(StorageFailed):  # others need not wait for it
                await run_in_thread(self._claim_since, key, self.clock() - CLAIM - 1)
            raise
        finally:
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)
        return True

    async def _renew_claim(self, key: str) -> None:
        while True:
            await asyncio.sleep(CLAIM / 3)
            with suppress(StorageFailed):
                await run_in_thread(self._claim_since, key, self.clock())

    def _claim_since(self, key: str, at: float) -> None:
        def work(batch: Batch) -> None:
            if batch.get(LEFTOVER.key(key)) not in (None, DUE):
                batch.put(LEFTOVER.key(key), str(at).encode())

        self._records.transaction(work, shared=True)

    def is_published(self, file: int, digest: Digest) -> bool:
        return stat.S_IMODE(os.fstat(file).st_mode) == PUBLISHED

    def reap(self, age: float) -> int:
        reaped = super().reap(age)
        with suppress(Unavailable):  # it is reported, and so is the other
            try:
                self._owner.check()
            except ForeignBucket:
                return reaped
        with suppress(Unavailable):  # it is reported
            for key, value in self._records.scan(UPLOAD.prefix()):
                found = Session.parse(value)
                if found is None or self.clock() - found.at > age:
                    self.forget_session(UPLOAD.parse(key)[0], [] if found is None else found.parts)
            for key, value in self._records.scan(LEFTOVER.prefix()):
                name = LEFTOVER.parse(key)[0]
                if not self._is_left(value, age + KEPT * name.startswith(PARTS)):
                    continue
                if value != DUE:  # its writer has died, or could not tell the bucket
                    self._bucket.abort(name)
                if self._records.transaction(partial(_condemn, key)):
                    self._bucket.delete(name)
                    self._records.delete(key)
                    reaped += value != DUE
            if self._bucket.health.ill():
                self._bucket.probe()
        return reaped

    def _is_left(self, since: bytes, age: float) -> bool:
        try:
            return self.clock() - float(since) > age
        except ValueError:
            return False


def _name(digest: Digest) -> str:
    """The start of the keys of the objects with this content."""
    return f"{digest.algorithm}/{digest.encoded[:2]}/{digest.encoded}."


def _condemn(key: str, batch: Batch) -> bool:
    """Keep an upload from making a blob of what will be deleted; False if it just has."""
    if batch.get(key) is None:
        return False
    batch.put(key, DUE)
    return True
