"""The transfers of one blob from its origin into its upload.

What clients ask for beyond the reach of the transfer under way is fetched by a transfer of its own.  Each
byte comes from one of them: a transfer ends where another one has begun, and the rest is fetched after it.
While the rest of the blob is not due, a transfer goes no further than clients read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import Any

from proxy.cache.fill import LARGEST_UNSIZED, Fill
from proxy.cache.parts import LEAST, Part, Parts
from proxy.cache.range_requests import RangeRequests, is_range
from proxy.cache.range_turns import RangeTurns
from proxy.cache.readers import BlobSource
from proxy.cache.refusals import RangeRefusals
from proxy.cache.rest import Dropped
from proxy.cache.streams import PacedBlob, PartStreams
from proxy.cache.waiting_ranges import WaitingRanges
from proxy.telemetry.metrics import Metrics
from storage.disk.sparse import SparseUpload
from storage.errors import (
    BlobUnknown,
    NameUnknown,
    OriginFailed,
    RangeInvalid,
    RegistryError,
    StorageFailed,
    Unavailable,
)
from storage.limits import Slots
from storage.oci import Descriptor, Span
from storage.registry import Blob
from storage.shared import SharedTable


class Transfers:
    """The transfers of one fill, which write to `upload`.

    again: makes a new upload, after the bytes of a former one turned out not to be of this blob
    ensure_room: makes room for an upload of a size
    metrics: counts the transfers under way, their extents, and what came twice
    slots: how many ranges are transferred at once, of all fills; each blob has a share
    ticks: seconds of a clock that nobody sets
    known: what all processes know of upstreams
    size: of the blob, -1 if it is not known
    ranges: whether the origin sends ranges, None if that is not known
    clients: words for those who asked for bytes that were not there
    waiting: what clients wait for while no further transfer may begin
    """

    def __init__(
        self,
        fill: Fill,
        upload: SparseUpload,
        again: Callable[[], Awaitable[SparseUpload]],
        ensure_room: Callable[[SparseUpload, int], Awaitable[None]],
        metrics: Metrics,
        slots: Slots,
        ticks: Callable[[], float],
        known: SharedTable,
    ) -> None:
        self.upload = upload
        self.size = -1
        self.ranges: bool | None = None
        self.clients = set(upload.clients)
        self.parts = Parts(upload.extents, ticks)
        self.refusals = RangeRefusals(ticks, known, fill.source.namespace, fill.digest)
        self.waiting = WaitingRanges(ticks)
        self._fill = fill
        self._again = again
        self._ensure_room = ensure_room
        self._metrics = metrics
        self._turns = RangeTurns(slots, str(fill.digest), metrics)
        self._requests = RangeRequests(fill.digest)
        self._streams = PartStreams(fill.source.namespace, ticks)
        self._cut: set[int] = set()  # where ranges began that broke off
        self._dropped = 0  # bytes that were repeated in former uploads
        self._counted = (0, 0)  # in the metrics: extents, and repeated bytes
        self._asking = asyncio.Lock()  # for the first range
        self._filling = 0  # gaps that are being fetched
        self._ahead: asyncio.Task[None] | None = None  # brings what comes first, beside the fill
        self._whole: tuple[BlobSource, Blob, None] | None = None  # what came for a range, for the next gap
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """End the transfers, and begin no more."""
        self.refusals.end()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._whole is not None:
            await self._whole[1].close()
        self.count(0)

    @property
    def repeated(self) -> int:
        return self._dropped + self._requests.dropped + self._streams.dropped + self.upload.repeated

    def count(self, extents: int) -> None:
        """Change the metrics to the present values."""
        counted, self._counted = self._counted, (extents, self.repeated)
        if counted != self._counted:
            self._metrics.extents.inc(extents - counted[0])
            label = self._metrics.label(self._fill.source.namespace)
            self._metrics.repeated.labels(label).inc(self.repeated - counted[1])

    # The blob

    @property
    def end(self) -> int:
        """The size of the blob, or at most so much."""
        size = self.size if self.size >= 0 else self.upload.listed_size
        return size if size >= 0 else LARGEST_UNSIZED

    async def begin(self, source: BlobSource, descriptor: Descriptor) -> None:
        """The origin has the blob: clients may follow it.

        Raises OriginFailed if it stated another size before, RangeInvalid if a former upload is of another.
        """
        fill, size = self._fill, descriptor.size
        fill.repositories.add(source.repository)
        started = fill.started.result() if fill.started.done() else None
        if started and 0 <= started[1].size != size:
            # Followers were promised the first size, and would take that many bytes for the whole blob.
            raise OriginFailed(f"{source.namespace} first stated {started[1].size} bytes, now {size}")
        if self.upload.listed_size not in (-1, size):
            raise RangeInvalid(f"the bytes of a former transfer are of {self.upload.listed_size}")
        await self.reserve(size)
        if not fill.started.done():
            fill.started.set_result((self.upload, descriptor))

    async def reserve(self, size: int) -> None:
        """Make room for all of the blob; if its rest is not due, keep what is there."""
        if self._fill.rest.due:
            await self._ensure_room(self.upload, size)
            self.upload.expect(size)
        else:
            await self.upload.keep(size, self.clients)
        self.size = size

    async def renew(self, error: RangeInvalid) -> None:
        """Begin again with a new upload."""
        await self.upload.cancel(error)
        self._dropped += self.upload.repeated
        self.upload = self._fill.upload = await self._again()
        self.parts.restart(self.upload.extents)

    # A gap

    def reach(self, start: int, stop: int) -> int:
        """Up to where the gap is to be fetched at once: not far, while other transfers can bring the rest."""
        in_pieces = self._turns.long and self.ranges is not False
        return min(stop, start + self.parts.piece(self.end)) if in_pieces else stop

    async def fetch_gap(self, start: int, stop: int, whole: bool) -> None:
        """Transfer the gap [start, stop), or what is missing from there on of the `whole` blob."""
        source, span = self._fill.source, None
        rest = start > 0 or stop < self.end
        if rest and not whole:
            span = Span(start, stop if stop < self.end else None)
        part = self.parts.take(start, stop)
        self._filling += 1
        try:
            with self._metrics.transfers.track_inprogress():
                source, blob, span = self._whole or (source, *await self._get(source, span))
                self._whole = None
                self.refusals.reset()
                try:
                    await self._begin(source, blob, part)
                    if blob.position != part.position or (rest and span is None):
                        self.ranges = False
                        await self._streams.stream_all(blob, part, self.size, self.upload, self.parts.taken)
                    else:
                        await self._streams.stream(blob, part, self.size, self.upload)
                finally:
                    await self._close(blob)
        finally:
            self._filling -= 1
            self._end(part)

    async def _get(self, source: BlobSource, span: Span | None) -> tuple[Blob, Span | None]:
        """The transfer of `span`, or of the whole blob if the origin refuses ranges; what was asked for."""
        if span is not None:
            try:
                return await self._requests.send(source, span), span
            except RangeInvalid:
                raise
            except Unavailable as error:
                if not (self._fill.started.done() and self._fill.rest.confirmed):  # else it is tried again
                    await self._count(source, error)
                raise
            except RegistryError:
                pass
        self.refusals.reset()
        return await source.origin.get_blob(source.name, self._fill.digest), None

    async def _begin(self, source: BlobSource, blob: Blob, part: Part) -> None:
        await self.begin(source, blob.descriptor)
        if self.size >= 0:
            self.parts.cut(part, self.size)
        self._fill.rest.confirm()

    async def _close(self, blob: Blob) -> None:
        self._dropped += blob.unread
        await blob.close()

    def _end(self, part: Part) -> None:
        self.parts.remove(part)
        if part.position > part.start and self.size > 0:
            self._fill.rest.weigh(self.upload.offset / self.size, len(self.clients))
        self._fill.rest.tell()

    # What clients wait for

    def start(self, source: BlobSource, start: int, stop: int) -> asyncio.Task[None]:
        """Transfer [start, stop), as far as no other transfer brings it soon."""
        if source.client:
            self.clients.add(source.client)
        for each in self.clients:
            self.upload.add_client(each)
        instead = self.refusals.paused and self.waiting.places > 0
        self.waiting.places -= instead
        part = self.parts.add(start, stop, in_pieces=self._fill.rest.due, instead=instead)
        return self._spawn(self._fetch_range(source, part))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _fetch_range(self, source: BlobSource, part: Part) -> None:
        """Transfer the part, and those that follow it."""
        async with AsyncExitStack() as held:
            turn = held.enter_async_context(self._turns.turn(source.namespace, part.goal >= 0))
            following = await self._fetch_part(source, part, turn)
            while following is not None:
                part, following = following, await self._fetch_part(source, following)
            while part.position == part.stop and (waiting := await self.fetch_waiting()) is not None:
                part = waiting
            self.waiting.places += part.position == part.stop

    async def fetch_waiting(self) -> Part | None:
        """While no further transfer may begin, bring something of what clients wait for by this one."""
        if not self.refusals.paused or (found := self.waiting.next(self.parts.late)) is None:
            return None
        source, start, stop = found
        part = self.parts.add(start, min(stop, start + LEAST), instead=True)
        await self._fetch_part(source, part)
        return part

    def _fetch_also(self, source: BlobSource) -> None:
        """While long ranges are read, bring what comes first by one more transfer, so that it is hashed."""
        if self._turns.spare and (self._ahead is None or self._ahead.done()):
            self._ahead = self._spawn(self._fetch_first(source))

    async def _fetch_first(self, source: BlobSource) -> None:
        with suppress(StorageFailed):  # nobody can wait for a slot
            async with self._turns.turn(source.namespace, False, wanted=False):
                following = self.parts.first(self.size) if self._turns.spare else None
                while following is not None:
                    following = await self._fetch_part(source, following)

    async def _fetch_part(
        self, source: BlobSource, part: Part, turn: Awaitable[None] | None = None
    ) -> Part | None:
        """Transfer the part, when it is its turn; returns the one that the same transfer brings next."""
        try:
            if turn is not None:
                await turn
            await self._transfer(source, part)
            if part.left and part.position == part.stop:
                await self.fetch_waiting()
                brief = self.refusals.paused
                return self.parts.following(part, self.size, self._turns.spare, brief)
        except Dropped:
            pass
        except Unavailable as error:
            if part.start < part.position < part.stop:
                self._log_refused(part, error)
                return self.parts.rest(part)
            await self._refused(source, part, error)
        except RegistryError as error:
            await self._refused(source, part, error)
        except Exception as error:  # it would meet whoever asks again
            self._fail(source, part, error)
        finally:
            self._end(part)
        return None

    def _fail(self, source: BlobSource, part: Part, error: Exception) -> None:
        failure = OriginFailed(f"a range of {source.name} could not be fetched: see the log")
        self.refusals.add(part.start, part.stop, failure)
        self.refusals.end()
        self._fill.rest.fail(failure)
        self._fill.log.error("fill.failed", error=repr(error), exc_info=error)

    async def _count(self, source: BlobSource, error: RegistryError) -> None:
        """Count a refusal of a range, unless the origin is down, or may not have the blob."""
        unknown = self.size < 0 and isinstance(error, RangeInvalid | BlobUnknown | NameUnknown)
        if not (unknown or isinstance(error, StorageFailed)):
            resolve = partial(source.origin.resolve_blob, source.name, self._fill.digest)
            await self.refusals.count_if(resolve, error)

    async def _transfer(self, source: BlobSource, part: Part) -> None:
        blob, rest = await self._open(source, part), self._fill.rest
        if self.ranges is False or self.refusals.lasting:
            rest.demand()
        if blob is None:
            return
        try:
            paced = blob if rest.due else PacedBlob(blob, partial(rest.pace, part))
            await self._streams.stream(paced, part, self.size, self.upload)
        finally:
            await self._close(blob)

    async def _refused(self, source: BlobSource, part: Part, error: RegistryError) -> None:
        rest = self._fill.rest
        if not rest.due and not part.granted:
            await self._count(source, error)
        if rest.due:
            # It may refuse a second transfer, with any status, while it goes on with the first.
            if self.size >= 0 or not isinstance(error, RangeInvalid):  # else it may be no range of the blob
                self.refusals.pause(error)
                self.waiting.refused(source, part.position, part.stop)
            self.ranges = self.ranges and None  # only one range asks whether it is over
        elif isinstance(error, StorageFailed):
            rest.fail(error)
            return
        elif part.position > part.start or (part.granted and part.start not in self._cut):
            self._cut.add(part.start)
            return  # it broke off: who still waits for the rest of it asks again
        else:
            self.refusals.add(part.position, part.stop, error)
            self.upload.refuse(part.position, part.stop)
        self._log_refused(part, error)

    def _log_refused(self, part: Part, error: RegistryError) -> None:
        self._fill.log.info("fill.range_refused", offset=part.position, error=str(error))

    async def _open(self, source: BlobSource, part: Part) -> Blob | None:
        """The transfer of a part; None if its bytes have come meanwhile, or the origin does not send it."""
        if not part.granted and (self.ranges is None or self.refusals.wary):
            async with self._asking:  # the first answer tells whether the origin sends ranges
                if self.ranges is None or self.refusals.wary:
                    return await self._request(source, part)
        return await self._request(source, part)

    async def _request(self, source: BlobSource, part: Part) -> Blob | None:
        if self.ranges is False or self.refusals.lasting or self.refusals.ended:
            return None
        if not (part.granted or part.instead) and self.refusals.paused:
            self.waiting.add(source, part.position, part.stop)
            return None
        if not (part.granted or self.parts.clip(part)):
            return None
        part.requested = True
        span = Span(part.position, None if part.stop == LARGEST_UNSIZED else part.stop)
        blob = await self._requests.send(source, span)
        size = blob.descriptor.size
        try:
            self.ranges = is_range(blob, span)
            self.refusals.reset()
            if not (part.granted or part.instead):
                self.refusals.accepted()
            if self.ranges and self.size < 0 <= size:
                await self._begin(source, blob, part)
            elif self.ranges and size != self.size:
                raise OriginFailed(f"{source.namespace} first stated {self.size} bytes, now {size}")
            await self._streams.settled(part.position, self.parts)
            if self.ranges and (part.granted or self.parts.grant(part, self.size)):
                self._fetch_also(source)
                self._fill.rest.tell()
                return blob
        except BaseException:
            await self._close(blob)
            raise
        if blob.whole and not self._filling and self._whole is None:
            self._whole = source, blob, None
        else:
            await self._close(blob)
        return None
