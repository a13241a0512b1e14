"""What comes of the parts of a blob is written to its upload."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

from proxy.cache.fill import LARGEST_UNSIZED
from proxy.cache.parts import Part, Parts
from storage.disk.extents import Extents
from storage.disk.sparse import SparseUpload
from storage.errors import OriginFailed
from storage.registry import Blob, ReadInto, RelayedBlob

BATCH = 2 << 20  # bytes that a thread reads and writes before readers get them
FIRST = 256 << 10  # the same, of the first ones of a transfer: clients show that something comes


class PacedBlob(RelayedBlob):
    """A transfer that goes no further than clients read."""

    def __init__(self, blob: Blob, pace: Callable[[], Any]) -> None:
        super().__init__(blob)
        self._pace = pace

    async def pass_on(self, write: Callable[[ReadInto], Awaitable[int]]) -> bool:
        if more := await super().pass_on(write):
            await self._pace()
        return more

    async def chunks(self, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        async for chunk in self._blob.chunks(start, stop):
            yield chunk
            await self._pace()


class PartStreams:
    """The streams of the parts of one blob, from the origin `name`.

    dropped: bytes that came, and were there or are brought by another transfer
    ticks: seconds of a clock that nobody sets
    """

    def __init__(self, name: str, ticks: Callable[[], float]) -> None:
        self.dropped = 0
        self._name = name
        self._ticks = ticks
        self._unclaimed = asyncio.Event()  # set, and replaced, when a thread has written a part on

    async def stream(self, blob: Blob, part: Part, size: int, upload: SparseUpload) -> None:
        """Write what comes, up to the end of the part, which may move while it comes."""
        end = size if size >= 0 else LARGEST_UNSIZED
        if (incoming := blob.incoming()) is not None:
            write = partial(self._write_from, part, upload, part.position)
            while not part.position == part.stop < end and await incoming.pass_on(write):
                pass
        else:
            async for chunk in blob.chunks(part.position, None if part.stop == end else part.stop):
                rest = part.stop - part.position
                if rest < len(chunk) and part.stop == end:
                    raise self._too_long(end)
                position = part.position
                part.advance(min(rest, len(chunk)), self._ticks())
                self.dropped += max(0, len(chunk) - rest)
                await upload.write_at(position, chunk[:rest])
                if part.position == part.stop < end:
                    return
        if part.position < part.stop and size >= 0:
            raise OriginFailed(f"{self._name} ended at byte {part.position} of {size}")

    async def _write_from(self, part: Part, upload: SparseUpload, begin: int, readinto: ReadInto) -> int:
        """Write what has come, but not so much that readers wait; returns how many bytes."""
        if part.position == part.stop:
            raise self._too_long(part.stop)
        most = min(BATCH if part.position > begin else FIRST, part.stop - part.position)
        part.claimed = part.position + most
        try:
            number = await upload.write_from(readinto, part.position, most)
        finally:
            part.claimed = 0
            self._unclaimed.set()
            self._unclaimed = asyncio.Event()
        part.advance(number, self._ticks())
        return number

    async def settled(self, position: int, parts: Parts) -> None:
        """Wait until no thread may be writing the byte at `position`."""
        while any(each.granted and each.position < position < each.claimed for each in parts):
            await self._unclaimed.wait()

    async def stream_all(
        self, blob: Blob, part: Part, size: int, upload: SparseUpload, taken: Extents
    ) -> None:
        """Write what is missing from the beginning of the part on; the origin sends the whole blob."""
        taken.remove(part.position, part.stop)
        position = part.stop = part.position
        again = position - blob.position  # what is there, and comes before what is missing
        end = size if size >= 0 else LARGEST_UNSIZED
        async for chunk in blob.chunks(position):
            start, position = position, position + len(chunk)
            if position > end:
                raise self._too_long(end)
            begin, stop = taken.gap(start, position)
            self.dropped, again = self.dropped + again + len(chunk), 0
            while begin < stop:
                taken.add(begin, stop)
                self.dropped -= stop - begin
                await upload.write_at(begin, chunk[begin - start : stop - start])
                begin, stop = taken.gap(stop, position)
        if position < size:
            raise OriginFailed(f"{self._name} ended at byte {position} of {size}")

    def _too_long(self, size: int) -> OriginFailed:
        return OriginFailed(f"{self._name} sent more than the {size} bytes it announced")
