"""Reading one blob that is an object."""

from __future__ import annotations

import io
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import structlog

from storage.bucket.objects import CHUNK, Bucket, ObjectUnknown, Opened
from storage.errors import BlobUnknown
from storage.oci import Descriptor, Span
from storage.registry import NOTHING, Blob, Incoming, ReadInto

log = structlog.get_logger()

PIECE = 2 << 20  # bytes that come at once of a blob which a thread reads: more cost memory, fewer time


class BucketBlob(Blob):
    """A blob that is the object `key`.  Nothing is asked of the bucket before begin() or chunks()."""

    def __init__(self, bucket: Bucket, key: str, descriptor: Descriptor, used_at: float) -> None:
        self.descriptor = descriptor
        self.used_at = used_at
        self._bucket = bucket
        self._key = key
        self._begun: tuple[int, int, Opened] | None = None  # where it starts and stops
        self._incoming: _IncomingObject | None = None

    async def begin(self, span: Span | None = None) -> None:
        size = self.descriptor.size
        if span == NOTHING or size == 0:
            self._check(await self._bucket.size(self._key))
            return
        part = Span(0) if span is None else span.of(size)
        stop = size if part.stop is None else min(size, part.stop)
        if part.start < stop:
            self.position = part.start
            self._begun = part.start, stop, await self._open(part.start, stop)

    async def _open(self, start: int, stop: int) -> Opened:
        whole = (start, stop) == (0, self.descriptor.size)
        try:
            found = await self._bucket.get(self._key, start, None if whole else stop)
        except ObjectUnknown:
            self._check(None)
            raise
        self._check(found.size)
        return found

    async def locate(self) -> str | None:
        url = await self._bucket.locate(self._key, self.descriptor.size)
        if url is not None:
            await self.begin(NOTHING)  # else only the client would learn that it is not there
        return url

    def _check(self, found: int | None) -> None:
        """Raises BlobUnknown if the object has not the size of the blob: who pushes it again replaces it."""
        size, digest = self.descriptor.size, self.descriptor.digest
        if found == size:
            return
        what = "no object" if found is None else f"{found} of {size} bytes"
        where = f"{self._bucket.name}: {self._key}"
        log.error("blob.damaged", digest=str(digest), found=what, path=where, action="left in its place")
        raise BlobUnknown(f"{digest} was damaged: the bucket has {what}")

    def incoming(self) -> Incoming | None:
        if self._begun is None:
            return None
        self._incoming = _IncomingObject(self._pieces(*self._begun[:2], PIECE))
        return self._incoming

    async def chunks(self, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        stop = self.descriptor.size if stop is None else min(stop, self.descriptor.size)
        async for piece in self._pieces(start, stop, CHUNK):
            yield bytes(piece)

    async def _pieces(self, start: int, stop: int, size: int) -> AsyncGenerator[memoryview]:
        """The bytes of [start, stop), in pieces of `size` or more.  The last one may be smaller."""
        begun, self._begun = self._begun, None
        opened = begun[2] if begun is not None and begun[0] == start and begun[1] >= stop else None
        while start < stop:
            before = start
            opened = opened or await self._open(start, stop)
            try:
                async for chunk in opened.stream(size):
                    taken = memoryview(chunk)[: stop - start]
                    start += len(taken)
                    if taken:
                        yield taken
                    if start >= stop:
                        return
                error: Exception = EOFError(f"{self._key} ends at byte {start} of {stop}")
            except Exception as broken:  # whatever obstore raises
                error = broken
            if start == before:  # else it goes on from where it broke off
                raise self._bucket.broken(error, self._key) from error
            opened = None

    async def close(self) -> None:
        self._begun = None
        if self._incoming is not None:
            await self._incoming.close()


class _IncomingObject:
    """The bytes of an object, of `pieces`, for a thread to copy (see Incoming)."""

    def __init__(self, pieces: AsyncGenerator[memoryview]) -> None:
        self._pieces = pieces
        self._left = memoryview(b"")

    async def pass_on(self, write: Callable[[ReadInto], Awaitable[int]]) -> bool:
        if not self._left:
            self._left = await anext(self._pieces, memoryview(b""))
            if not self._left:
                return False
        await write(self._readinto)
        return True

    async def close(self) -> None:
        await self._pieces.aclose()

    def _readinto(self, buffer: memoryview) -> int:
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size


class ObjectReader(io.RawIOBase):
    """The bytes of an object, of `chunks`, as a file.  Reading raises BlobUnknown, Unavailable."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            while not self._left:
                self._left = memoryview(next(self._chunks))
        except StopIteration:
            return 0
        except ObjectUnknown as error:
            raise BlobUnknown(str(error)) from None
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size
