"""The transfers of one blob from its origin into the store: from the beginning on, and what clients wait for.

What clients ask for beyond the reach of the transfer under way is fetched by a transfer of its own.  Each
byte comes from one of them: a transfer ends where another one has begun, and the rest is fetched after it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any

from proxy.cache.fill import LARGEST_UNSIZED, Fill
from proxy.cache.parts import SOON, Part
from proxy.cache.readers import BlobSource
from proxy.cache.streams import PartStreams
from proxy.telemetry.metrics import Metrics
from storage.disk.extents import Extents
from storage.disk.sparse import SparseUpload
from storage.errors import OriginFailed, RangeInvalid, RegistryError, Unavailable
from storage.limits import Slots
from storage.oci import Descriptor, Span
from storage.registry import Blob

LONGEST_WAIT = 30.0  # seconds, whatever Retry-After says
RETRIES = 4  # in a row without progress
WHOLE = 3  # failures after which all of a blob is asked for: the origin may refuse ranges alone
MOST = 16  # transfers beside the one from the beginning on
REST = 10.0  # seconds without further transfers after the origin has refused one


class Fetcher:
    """The transfers of one fill, which write to `upload`.

    again: makes a new upload, after the bytes of a former one turned out not to be of this blob
    ensure_room: makes room for an upload of a size
    metrics: counts the transfers under way, their extents, and what came twice
    slots: how many ranges are transferred at once, of all fills; each blob has a share
    ticks: seconds of a clock that nobody sets
    """

    def __init__(
        self,
        fill: Fill,
        upload: SparseUpload,
        again: Callable[[], Awaitable[SparseUpload]],
        ensure_room: Callable[[SparseUpload, int], Awaitable[None]],
        metrics: Metrics,
        slots: Slots,
        backoff: float,
        ticks: Callable[[], float],
    ) -> None:
        self.upload = upload
        self._fill = fill
        self._again = again
        self._ensure_room = ensure_room
        self._metrics = metrics
        self._dropped = 0  # bytes that were repeated in former uploads
        self._counted = (0, 0)  # in the metrics: extents, and repeated bytes
        self._slots = slots
        self._backoff = backoff
        self._ticks = ticks
        self._size = -1
        self._whole = False  # the next transfer is of all of the blob, whatever is there
        self._taken = Extents(upload.extents)  # what is there or is being transferred
        self._parts: list[Part] = []
        self._changed = asyncio.Event()
        self._streams = PartStreams(fill.source.namespace, ticks)
        self._most = asyncio.Semaphore(MOST)
        self._beginning = asyncio.Lock()
        self._first: asyncio.Task[None] | None = None  # of begin()
        self._refused_until = -float("inf")
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Fetch all that is missing; `upload` has all bytes then, and is not committed."""
        source, digest = self._fill.source, self._fill.digest
        whole = self.upload.listed_size == self.upload.offset or self.upload.matches(digest)
        if self.upload.offset and whole:
            # A former fill had received all of it, and was killed before it committed.
            await source.origin.resolve_blob(source.name, digest)
            self._fill.repositories.add(source.repository)
            return
        if self._first is not None:
            await self._begun(self._first)
        await self._persist()

    async def close(self) -> None:
        """End the transfers, and begin no more."""
        self._refused_until = float("inf")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._count(0)

    @property
    def coming(self) -> list[tuple[int, int]]:
        spans = ((part.position, min(part.stop, self._size)) for part in self._parts if part.requested)
        return sorted((start, stop) for start, stop in spans if start < stop)

    @property
    def repeated(self) -> int:
        return self._dropped + self._streams.dropped + self.upload.repeated

    def _count(self, extents: int) -> None:
        """Change the metrics to the present values."""
        counted, self._counted = self._counted, (extents, self.repeated)
        if counted != self._counted:
            self._metrics.extents.inc(extents - counted[0])
            label = self._metrics.label(self._fill.source.namespace)
            self._metrics.repeated.labels(label).inc(self.repeated - counted[1])

    async def _persist(self) -> None:
        failures, wait = 0, 0.0
        while True:
            before = self.upload.offset
            try:
                await self._fetch_rest()
                return
            except RangeInvalid as error:
                if self._fill.started.done():
                    raise
                # The bytes of a former fill are not the beginning of this blob: they are as many, or more.
                await self._renew(error)
            except Unavailable as error:
                failures = 0 if self.upload.offset > before else failures + 1
                if failures > RETRIES or not await self._promised():
                    raise
                self._whole = failures >= WHOLE
                self._fill.log.warning("fill.interrupted", offset=self.upload.offset, error=str(error))
                wait = min(error.retry_after or 0.0, LONGEST_WAIT)
            if failures:
                await asyncio.sleep(max(wait, self._backoff * 2 ** (failures - 1)))

    async def _promised(self) -> bool:
        """Whether clients know the size of the blob; if some of it is there, they may, and read that."""
        source, started = self._fill.source, self._fill.started
        if not started.done() and self.upload.offset:
            with suppress(Unavailable, RangeInvalid):
                descriptor = await source.origin.resolve_blob(source.name, self._fill.digest)
                await self._begin(source, descriptor, Part(0, 0, self._ticks()))
        return started.done()

    async def _renew(self, error: RangeInvalid) -> None:
        await self.upload.cancel(error)
        self._dropped += self.upload.repeated
        self.upload = self._fill.upload = await self._again()
        self._taken = Extents(self.upload.extents)

    async def _fetch_rest(self) -> None:
        """Close the gaps in order.  Those that other transfers close are waited for."""
        while True:
            self._changed.clear()
            known = self._size if self._size >= 0 else self.upload.listed_size
            end = known if known >= 0 else LARGEST_UNSIZED
            start, stop = self._gap(end)
            if start < stop:
                await self._fetch_gap(Part(start, stop, self._ticks(), True, True), end)
                if self._size < 0:
                    return
            elif self.upload.offset >= end:
                return
            else:
                await self._changed.wait()

    def _gap(self, end: int) -> tuple[int, int]:
        """The first bytes that neither are there nor are asked for."""
        taken = Extents(self._taken)
        for part in self._parts:
            if part.requested:
                taken.add(part.position, part.stop)
        return taken.gap(0, end)

    async def _fetch_gap(self, part: Part, end: int) -> None:
        source, span = self._fill.source, None
        rest = part.position > 0 or part.stop < end
        if rest and not self._whole:
            span = Span(part.position, part.stop if part.stop < end else None)
        self._take(part)
        try:
            with self._metrics.transfers.track_inprogress():
                blob, span = await self._get(source, span)
                try:
                    await self._begin(source, blob.descriptor, part)
                    if blob.position != part.position or (rest and span is None):
                        self._fill.ranges = False
                        await self._streams.stream_all(blob, part, self._size, self.upload, self._taken)
                    else:
                        await self._streams.stream(blob, part, self._size, self.upload)
                finally:
                    await self._close(blob)
        finally:
            self._release(part)

    async def _get(self, source: BlobSource, span: Span | None) -> tuple[Blob, Span | None]:
        """The transfer of `span`, or of the whole blob if the origin refuses ranges; what was asked for."""
        try:
            return await source.origin.get_blob(source.name, self._fill.digest, span), span
        except RegistryError as error:
            if span is None or isinstance(error, RangeInvalid | Unavailable):
                raise
        return await source.origin.get_blob(source.name, self._fill.digest), None

    async def _begin(self, source: BlobSource, descriptor: Descriptor, part: Part) -> None:
        fill, size = self._fill, descriptor.size
        fill.repositories.add(source.repository)
        started = fill.started.result() if fill.started.done() else None
        if started and 0 <= started[1].size != size:
            # Followers were promised the first size, and would take that many bytes for the whole blob.
            raise OriginFailed(f"{source.namespace} first stated {started[1].size} bytes, now {size}")
        if self.upload.listed_size not in (-1, size):
            raise RangeInvalid(f"the bytes of a former transfer are of {self.upload.listed_size}")
        await self._reserve(size)
        self._size = size
        if 0 <= size < part.stop:
            self._taken.remove(max(size, part.position), part.stop)
            part.stop = size
        if not fill.started.done():
            fill.started.set_result((self.upload, descriptor))

    async def _close(self, blob: Blob) -> None:
        self._dropped += blob.unread
        await blob.close()

    async def _reserve(self, size: int) -> None:
        """Make room for all of the blob."""
        await self._ensure_room(self.upload, size)
        self.upload.expect(size)

    def _take(self, part: Part) -> None:
        self._taken.add(part.position, part.stop)
        self._parts.append(part)

    def _release(self, part: Part) -> None:
        """What a part did not bring is missing again."""
        if part.granted:
            self._taken.remove(part.position, part.stop)
        self._parts.remove(part)
        self._changed.set()

    # What clients wait for

    def want(self, source: BlobSource, offset: int, stop: int | None) -> None:
        """Fetch [offset, stop), or its beginning, unless it comes soon; who waits calls this now and then."""
        now = self._ticks()
        stop = self._size if stop is None else min(stop, self._size)
        there = self.upload.extents.end(offset) > offset or self.upload.failed
        if offset >= stop or there or self._fill.ranges is False or now < self._refused_until:
            return
        coming = [part for part in self._parts if part.position <= offset < part.stop]
        if not any(part.seconds_to(offset, now) <= SOON for part in coming):
            stop = min([stop, *(each.position for each in self._parts if each.position > offset)])
            self._start(source, Part(offset, stop, now))

    async def begin(self, source: BlobSource, span: Span) -> None:
        """Start the fill by a range, while it waits for its turn, if the origin sends ranges."""
        async with self._beginning:
            if self._fill.started.done() or self._fill.ranges is False:
                return
            if span.start < 0:
                span = span.of((await source.origin.resolve_blob(source.name, self._fill.digest)).size)
            stop = LARGEST_UNSIZED if span.stop is None else span.stop
            if self._first is None or self._first.done():
                self._first = self._start(source, Part(span.start, stop, self._ticks()))
            await self._begun(self._first)

    async def _begun(self, first: asyncio.Task[None]) -> None:
        """Wait until it is known whether the range starts the fill."""
        waited: set[asyncio.Future[Any]] = {first, self._fill.started}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)

    def _start(self, source: BlobSource, part: Part) -> asyncio.Task[None]:
        self._parts.append(part)
        return self._spawn(self._fetch_part(source, part))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _fetch_part(self, source: BlobSource, part: Part) -> None:
        try:
            async with self._most, self._slots.turn(source.namespace, str(self._fill.digest)):
                with self._metrics.transfers.track_inprogress():
                    blob = await self._open(source, part)
                    if blob is not None:
                        try:
                            await self._streams.stream(blob, part, self._size, self.upload)
                        finally:
                            await self._close(blob)
        except RegistryError as error:
            self._refused(part, error)
        finally:
            self._release(part)

    def _refused(self, part: Part, error: RegistryError) -> None:
        # It may refuse a second transfer, with any status, while it goes on with the first.
        if self._size >= 0 or not isinstance(error, RangeInvalid):  # else it may be no range of the blob
            self._refused_until = self._ticks() + REST
        self._fill.ranges = self._fill.ranges and None  # only one range asks whether it is over
        self._fill.log.info("fill.range_refused", offset=part.position, error=str(error))

    async def _open(self, source: BlobSource, part: Part) -> Blob | None:
        """The transfer of a part; None if its bytes have come meanwhile, or the origin does not send it."""
        if self._fill.ranges is None:
            async with self._fill.asking:  # the first answer tells whether the origin sends ranges
                if self._fill.ranges is None:
                    return await self._request(source, part)
        return await self._request(source, part)

    async def _request(self, source: BlobSource, part: Part) -> Blob | None:
        if self._fill.ranges is False or self._ticks() < self._refused_until or not self._clip(part):
            return None
        part.requested = True
        span = Span(part.position, None if part.stop == LARGEST_UNSIZED else part.stop)
        blob = await source.origin.get_blob(source.name, self._fill.digest, span)
        size = blob.descriptor.size
        try:
            self._fill.ranges = blob.position == part.position and size >= 0
            if self._fill.ranges and self._size < 0 <= size:
                await self._begin(source, blob.descriptor, part)
            elif self._fill.ranges and size != self._size:
                raise OriginFailed(f"{source.namespace} first stated {self._size} bytes, now {size}")
            await self._streams.settled(part.position, self._parts)
            if self._fill.ranges and self._grant(part):
                return blob
        except BaseException:
            await self._close(blob)
            raise
        await self._close(blob)
        return None

    def _clip(self, part: Part) -> bool:
        """Shorten `part` by what others bring; False if they bring its beginning, and soon."""
        now, start = self._ticks(), part.position
        for other in self._parts:
            if other.requested and other.position <= start < other.stop:
                part.stop = min(part.stop, other.stop)
                return other.seconds_to(start, now) > SOON
        missing, part.stop = self._taken.gap(start, part.stop)
        return missing == start < part.stop

    def _grant(self, part: Part) -> bool:
        """Take the bytes of `part` from the transfer that would bring them; False if they have come."""
        for other in self._parts:
            if other.granted and other.position < part.position < other.stop:
                self._taken.remove(part.position, other.stop)
                other.stop = part.position
        start, stop = self._taken.gap(part.position, part.stop)
        if start > part.position or start == stop:
            return False
        part.stop = stop
        part.granted = True
        self._taken.add(start, stop)
        self._changed.set()
        return True
