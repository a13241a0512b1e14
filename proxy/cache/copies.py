"""Copies: the blobs that a private registry has in a bucket, kept as files among those of the caches.

    Hosted ── BlobCopies           each server's own: files, bounded and evicted as cached content is
      └────── Store                records, and blobs that are objects

Whether a blob is there, and who may have it, the records of the store say, each time; a copy has only the
bytes of a digest.  It comes from the bucket, by a fill that all who ask for the blob follow, and which
verifies it; or from a push, whose file stays here.  A small blob is read whole and verified before its first
byte is sent, which costs less than a fill: each process reads it once, into a file that gets its name later.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from proxy.cache.fills import Fills
from proxy.cache.readers import BlobSource
from storage.concurrency import SingleFlight, run_in_thread
from storage.content import files_of
from storage.disk.hashing import PIECE, thread_memory
from storage.disk.health import write_all
from storage.disk.modes import create_file
from storage.disk.uploads import FileBlob
from storage.errors import BlobUnknown, StorageFailed
from storage.keys import COPIES
from storage.oci import OCTETS, Descriptor, Digest, Span
from storage.records import Batch
from storage.registry import Blob, ReadInto, Registry
from storage.store import Store

AT_ONCE = 50  # pushed blobs that become copies in one transaction
CHECKED = 64 << 20  # bytes of such copies after which limits are looked at
SMALL = 2 << 20  # bytes of a blob that is read whole: it comes in one piece
SMALL_AT_ONCE = 16  # of them are read; others are filled


class _Objects(Registry):
    """The blobs of `store`, whatever repository has them: its records have said who may have them.

    One fill of a blob is for all of its repositories, so it outlives the link in the one that it is for.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    async def get_blob(self, repository: str, digest: Digest, span: Span | None = None) -> Blob:
        blob = await self._store.open(digest)
        await blob.begin(span)
        return blob

    async def resolve_blob(self, repository: str, digest: Digest) -> Descriptor:
        blob = await self._store.open(digest)
        return blob.descriptor


class BlobCopies:
    """The copies among the blobs of `cache`, which `fills` fetch."""

    def __init__(self, cache: Store, fills: Fills) -> None:
        self._cache = cache
        self._files = files_of(cache.files)
        self._fills = fills
        self._fresh: list[tuple[Path, Digest]] = []  # files of what was pushed
        self._ready: dict[Digest, int] = {}  # small blobs whose files are fresh: the open file
        self._reading = SingleFlight()
        self._unchecked = 0  # bytes
        self._taking: asyncio.Task[None] | None = None

    async def get_blob(
        self, namespace: str, store: Store, repository: str, digest: Digest, span: Span | None = None
    ) -> tuple[Blob, float]:
        """A blob of `store`, and when that was last used; `span` is as in Registry.get_blob.

        Raises what store.get_blob() does.
        """
        stored, _ = await store.read(store.blob, f"{namespace}/{repository}", digest)
        failed = False
        try:
            return self._files.open(digest, stored.descriptor.size), stored.used_at
        except BlobUnknown:
            pass
        except StorageFailed:
            failed = True
        # Ranges are read as ranges; containerd begins a pull of the whole blob with `bytes=0-`.
        filling = self._fills.filling(digest)
        whole = span in (None, Span(0)) or filling
        if whole and not failed and stored.descriptor.size:
            if not filling and (small := await self._small(stored)) is not None:
                return small, stored.used_at
            source = BlobSource(namespace, _Objects(store), repository, linked=COPIES)
            with suppress(StorageFailed):
                return (await self._fills.join(source, digest, span)).value, stored.used_at
        await stored.begin(span)
        return stored, stored.used_at

    async def _small(self, stored: Blob) -> Blob | None:
        """A small blob, verified; None if it is large, or is to be filled.  Raises what the bucket does."""
        digest, size = stored.descriptor.digest, stored.descriptor.size
        if (found := self._opened(digest, size)) is not None:
            return found
        if size > SMALL or not (self._reading.has(digest) or self._reading.count < SMALL_AT_ONCE):
            return None
        with suppress(StorageFailed):
            await self._reading.join(digest, lambda: self._read(stored))
            if (found := self._opened(digest, size)) is not None:
                return found
            with suppress(BlobUnknown):  # its file could not get its name, or has just been evicted
                return self._files.open(digest, size)
        return None

    def _opened(self, digest: Digest, size: int) -> Blob | None:
        if (file := self._ready.get(digest)) is None:
            return None
        return FileBlob(os.dup(file), Descriptor(OCTETS, digest, size))

    async def _read(self, stored: Blob) -> None:
        """Read a blob into a fresh file.  Raises StorageFailed without one, or if it is another blob."""
        digest, size = stored.descriptor.digest, stored.descriptor.size
        fresh = self._files.path_of(secrets.token_urlsafe(16))
        await stored.begin()
        incoming = stored.incoming()
        if incoming is None:
            raise StorageFailed(f"{digest} does not come from afar")
        arrival = _Arrival(fresh, digest, size)
        try:
            with self._files.guard(fresh, size):
                if self._files.room() < size:
                    raise StorageFailed(f"there is no room for {digest}: a fill makes some")
                while await incoming.pass_on(arrival.take):
                    pass
            if not arrival.right:
                raise StorageFailed(f"{digest}: the bucket has other content")
        except BaseException:
            arrival.discard()
            raise
        finally:
            await stored.close()
        self._files.worked(size)
        self._ready[digest] = arrival.file
        self._keep(fresh, digest)

    def keep(self, source: Path, digest: Digest) -> bool:
        """Take over the file of a verified blob, soon; returns whether the file was moved."""
        fresh = self._files.path_of(secrets.token_urlsafe(16))
        try:
            source.rename(fresh)
        except OSError:  # another file system, or the disk fails
            return False
        self._keep(fresh, digest)
        return True

    def _keep(self, fresh: Path, digest: Digest) -> None:
        self._fresh.append((fresh, digest))
        if self._taking is None:
            self._taking = asyncio.get_running_loop().create_task(self._take())

    async def _take(self) -> None:
        """Make copies of the fresh files, of many in one transaction.  Nobody waits for it."""
        try:
            while self._fresh:
                some, self._fresh = self._fresh[:AT_ONCE], self._fresh[AT_ONCE:]
                with suppress(StorageFailed):  # then a scrub counts them
                    self._unchecked += await run_in_thread(self._copy, some)
                for _, digest in some:  # which is found by its name now
                    if (file := self._ready.pop(digest, None)) is not None:
                        os.close(file)
                if self._unchecked >= CHECKED:
                    self._unchecked = 0
                    self._fills.make_room_later(0)
        finally:
            self._taking = None

    def _copy(self, some: Sequence[tuple[Path, Digest]]) -> int:
        """Returns how many bytes there are more."""
        placed = [blob for fresh, digest in some if (blob := self._place(fresh, digest)) is not None]

        def link(batch: Batch) -> None:
            for each in placed:
                with suppress(BlobUnknown):  # it has just been evicted
                    self._cache.put_link(batch, COPIES, each)

        if placed:
            self._cache.records.transaction(link, shared=True)
        return sum(each.size for each in placed)

    def _place(self, fresh: Path, digest: Digest) -> Descriptor | None:
        """Give a file the name of its blob; None if the disk fails."""
        try:
            with fresh.open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                self._files.place(fresh, file.fileno(), self._files.path(digest))
                return Descriptor(OCTETS, digest, size)
        except OSError:
            return None
        finally:
            with suppress(OSError):
                fresh.unlink(missing_ok=True)

    @property
    def held(self) -> int:
        """How many files are held open until they have their names."""
        return len(self._ready)

    async def settled(self) -> None:
        """Wait until there is a copy of all that was kept."""
        while self._taking is not None:
            await asyncio.wait([self._taking])

    async def close(self) -> None:
        await self._reading.close()
        await self.settled()


class _Arrival:
    """A blob of `size` bytes that is written to the file `path`, open as `file`, and hashed."""

    def __init__(self, path: Path, digest: Digest, size: int) -> None:
        self.file = -1
        self._path = path
        self._digest = digest
        self._size = size
        self._came = 0
        self._hash = hashlib.new(digest.algorithm)

    async def take(self, readinto: ReadInto) -> int:
        """Take the next bytes.  Raises OSError."""
        return await run_in_thread(self._take, readinto)

    def _take(self, readinto: ReadInto) -> int:
        if self.file < 0:
            self.file = create_file(self._path, os.O_RDWR | os.O_EXCL)
        memory, before = thread_memory(PIECE), self._came
        while number := readinto(memory[: self._size - self._came]):  # more comes while this is hashed
            self._hash.update(memory[:number])
            write_all(self.file, memory[:number], self._came)
            self._came += number
        return self._came - before

    @property
    def right(self) -> bool:
        """Whether the bytes that came are those of the blob."""
        return self._came == self._size and Digest.of_hash(self._hash) == self._digest

    def discard(self) -> None:
        if self.file >= 0:
            os.close(self.file)
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
