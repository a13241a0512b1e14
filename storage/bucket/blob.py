"""Reading one blob that is an object."""

from __future__ import annotations

import io
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any

import structlog

from storage.bucket.objects import CHUNK, Bucket, ObjectUnknown, Opened
from storage.errors import BlobUncertain, BlobUnknown, OriginFailed, OriginTimeout
from storage.oci import Descriptor, Span
from storage.registry import NOTHING, Blob, Incoming, ReadInto

log = structlog.get_logger()

PIECE = 2 << 20  # bytes that come at once of a blob which a thread reads: more cost memory, fewer time


class BucketBlob(Blob):
    """A blob that is the object `key`.  Nothing is asked of the bucket before begin() or chunks().

    `sure` is whether the records say now that it is: see BlobContent.open().
    """

    def __init__(
        self, bucket: Bucket, key: str, descriptor: Descriptor, used_at: float, sure: bool = True
    ) -> None:
        self.descriptor = descriptor
        self.used_at = used_at
        self._bucket = bucket
        self._key = key
        self._sure = sure
        self._begun: tuple[int, int, Opened | None] | None = None  # where it starts and stops
        self._signed: Blob | None = None  # has these bytes, if they come by a signed URL
        self._incoming: _IncomingObject | None = None

    async def begin(self, span: Span | None = None) -> None:
        size = self.descriptor.size
        if span == NOTHING or size == 0:
            self._check(await self._bucket.size(self._key))
            return
        part = Span(0) if span is None else span.of(size)
        stop = size if part.stop is None else min(size, part.stop)
        if part.start < stop:
            start = self.position = part.start
            self._signed = await self._bucket.read_signed(self._key, self.descriptor, start, stop)
            opened = None if self._signed is not None else await self._open(start, stop)
            self._begun = start, stop, opened

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
        if not self._sure:  # it may have been removed, or replaced, since the records said so
            raise BlobUncertain(f"{digest}: the bucket has {what}, and the records cannot be read")
        where = f"{self._bucket.name}: {self._key}"
        log.error("blob.damaged", digest=str(digest), found=what, path=where, action="left in its place")
        raise BlobUnknown(f"{digest} was damaged: the bucket has {what}")

    def incoming(self) -> Incoming | None:
        if self._begun is None:
            return None
        start, stop, _ = self._begun
        fast = None if self._signed is None else self._signed.incoming()
        self._incoming = _IncomingObject(start, fast, lambda position: self._pieces(position, stop, PIECE))
        return self._incoming

    async def chunks(self, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        stop = self.descriptor.size if stop is None else min(stop, self.descriptor.size)
        async for piece in self._pieces(start, stop, CHUNK):
            yield bytes(piece)

    async def _pieces(self, start: int, stop: int, size: int) -> AsyncGenerator[memoryview]:
        """The bytes of [start, stop), in pieces of `size` or more.  The last one may be smaller."""
        begun, self._begun = self._begun, None
        ours = begun is not None and begun[0] == start and begun[1] >= stop
        if ours and self._signed is not None:
            with suppress(OriginFailed, OriginTimeout):  # then it continues from where it broke off
                async for piece in _gathered(self._signed.chunks(start, stop), size):
                    start += len(piece)
                    yield piece
        opened = begun[2] if begun is not None and ours else None
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
        if self._signed is not None:
            await self._signed.close()


async def _gathered(chunks: AsyncIterator[bytes], size: int) -> AsyncIterator[memoryview]:
    """The same bytes in pieces of `size` or more, but the last."""
    some, number = list[bytes](), 0
    async for chunk in chunks:
        some.append(chunk)
        number += len(chunk)
        if number >= size:
            yield memoryview(b"".join(some))
            some, number = [], 0
    if some:
        yield memoryview(b"".join(some))


class _IncomingObject:
    """The bytes of an object, from `position` on, for a thread to copy (see Incoming).

    They come from `fast` if it is there, and are the `pieces` from where that breaks off.
    """

    def __init__(
        self,
        position: int,
        fast: Incoming | None,
        pieces: Callable[[int], AsyncGenerator[memoryview]],
    ) -> None:
        self._position = position
        self._fast = fast
        self._open = pieces
        self._pieces: AsyncGenerator[memoryview] | None = None
        self._left = memoryview(b"")

    async def pass_on(self, write: Callable[[ReadInto], Awaitable[int]]) -> bool:
        if self._fast is not None:

            async def count(readinto: ReadInto) -> int:
                number = await write(readinto)
                self._position += number
                return number

            try:
                return await self._fast.pass_on(count)
            except (OriginFailed, OriginTimeout):
                self._fast = None
        if not self._left:
            self._pieces = self._pieces or self._open(self._position)
            self._left = await anext(self._pieces, memoryview(b""))
            if not self._left:
                return False
        await write(self._readinto)
        return True

    async def close(self) -> None:
        if self._pieces is not None:
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
