"""Fills of lazy namespaces: what clients ask for is fetched and kept; the rest only when it is due.

A transfer goes no further than clients read.  While nobody reads, the file is left to other processes, and to
eviction.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

from proxy.cache.answered import Answered
from proxy.cache.fetcher import Fetcher
from proxy.cache.fill import Fill
from proxy.cache.parts import Part
from proxy.cache.readers import LOOK, BlobSource, FollowedBlob
from proxy.cache.rest import RECENT, Dropped
from proxy.telemetry.metrics import Metrics
from storage.disk.sparse import SparseUpload
from storage.disk.wanted import Wish
from storage.errors import (
    BlobUnknown,
    Denied,
    NameUnknown,
    OriginFailed,
    RangeInvalid,
    RegistryError,
    StorageFailed,
    Unavailable,
)
from storage.oci import Descriptor, Span
from storage.registry import Blob, ReadInto, RelayedBlob

HEARING = 0.1  # seconds between two looks at what other processes want


class LazyBlob(FollowedBlob):
    """A reader of parts of a blob.  It gets the last byte unverified, unless it reads all of the blob."""

    def __init__(
        self,
        upload: SparseUpload,
        descriptor: Descriptor,
        source: BlobSource,
        metrics: Metrics,
        fill: Fill,
        span: Span,
    ) -> None:
        super().__init__(upload.follow_parts(descriptor), source, metrics, fill)
        self._upload = upload
        self._fill = fill
        self._whole = False
        fill.rest.reads(self, [span])

    async def prepare(self, spans: Sequence[Span]) -> None:
        size = self.descriptor.size
        spans = [Span(each.start, size if each.stop is None else each.stop) for each in spans or (Span(0),)]
        self._fill.rest.reads(self, spans)
        self._whole = sum(min(each.stop or 0, size) - each.start for each in spans) >= size
        if self._whole:
            self._fill.demand()
        elif self._fill.fetcher is not None:
            with suppress(StorageFailed):  # then it is read from the origin
                await self._fill.fetcher.prepare(self._source, spans)
        else:
            gaps = gaps_of(self._upload, spans)
            for start, stop in gaps:
                self._fill.want(self._source, start, stop)
            for start, stop in gaps[:1]:
                await self.readable(start, stop)

    async def readable(self, offset: int, stop: int | None = None) -> int:
        size = self.descriptor.size
        wait = self._upload.wait_past if self._whole else self._upload.wait_for
        while True:
            self._fill.want(self._source, offset, stop)
            try:
                async with asyncio.timeout(LOOK):
                    end = await wait(offset, size)
            except TimeoutError:
                continue
            except Unavailable:
                if self._fill.fetcher is None:  # another process could not get it: the origin says why
                    await self._source.origin.resolve_blob(self._source.name, self.descriptor.digest)
                raise
            self._fill.rest.moved(self, offset, end)
            return end

    async def close(self) -> None:
        self._fill.rest.left(self)
        await super().close()


class _PacedBlob(RelayedBlob):
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


class LazyFetcher(Fetcher):
    """The transfers of a fill whose rest may not be due.

    known: the blob, if parts of it are kept and the repository of a source shows it
    """

    def __init__(self, known: Callable[[BlobSource], Descriptor | None], *arguments: Any) -> None:
        super().__init__(*arguments)
        self._known = known
        self._rest = self._fill.rest
        self._clients = set(self.upload.clients)
        self._starts: dict[Part, int] = {}  # where the parts began
        self._failures: dict[tuple[int, int], tuple[RegistryError, float]] = {}
        self._starting = asyncio.Lock()
        self._confirmed = False  # the origin sends the rest
        self._spawn(self._hear())

    async def due(self) -> None:
        """Wait until all of the blob is to be fetched.  Raises Idle when nobody reads its parts."""
        started = self._fill.started.result() if self._fill.started.done() else None
        if started and not self._rest.due:  # another process was its writer
            if self.upload.listed_size not in (-1, started[1].size):
                raise OriginFailed(
                    f"{self._fill.source.namespace} had told another size: {self.upload.listed_size}"
                )
            await self._reserve(started[1].size)
            self._size = started[1].size
        await self._rest.wait(lambda: bool(self._parts), lambda: self.upload.offset > 0)

    async def fetch(self) -> bool:
        """Fetch all that is missing when it is due; False if it is not due any more, as it cannot be got."""
        if self.upload.offset == self._size > 0:
            return True
        try:
            await self.run()
        except (Unavailable, BlobUnknown, NameUnknown, Denied) as error:
            if not self._fill.started.done() or (self._rest.demanded and self._confirmed):
                raise
            self._rest.postpone(error)
            self._confirmed, self._refused_until = False, -math.inf
            self.upload.refuse(*self.upload.extents.gap(0, self._size))
            self._fill.log.warning("fill.postponed", offset=self.upload.offset, error=str(error))
            return False
        return True

    async def close(self) -> None:
        await super().close()
        self._rest.tell()

    # The start

    async def begin(self, source: BlobSource, span: Span) -> None:
        if self._rest.due:
            await super().begin(source, span)
            return
        async with self._starting:
            if self._fill.started.done() or self._fill.error is not None:
                return
            try:
                await self._introduce(source, span)
            except RegistryError as error:
                self._rest.fail(error)

    async def _introduce(self, source: BlobSource, span: Span) -> None:
        """Find out the size of the blob, and whether the repository has it: by the range if it is missing."""
        descriptor = self._known(source)
        if descriptor is None:
            await super().begin(source, span)
            if self._fill.started.done():
                return
            for error, _ in self._failures.values():
                if not isinstance(error, RangeInvalid):
                    raise error
            if self._fill.ranges is False:
                return
            descriptor = await source.origin.resolve_blob(source.name, self._fill.digest)
        if descriptor.size <= 0:
            self._rest.demand()
            return
        if self.upload.listed_size not in (-1, descriptor.size):
            await self._renew(
                RangeInvalid(f"the bytes of a former transfer are of {self.upload.listed_size}")
            )
        await self._reserve(descriptor.size)
        self._size = descriptor.size
        self._fill.repositories.add(source.repository)
        self._fill.started.set_result((self.upload, descriptor))
        if self.upload.offset == self._size:
            self._rest.weigh(1.0, 0)

    async def _begin(self, source: BlobSource, descriptor: Descriptor, part: Part) -> None:
        await super()._begin(source, descriptor, part)
        if self._rest.due:
            self._confirmed = True
            self._rest.tell()

    async def _promised(self) -> bool:
        return await super()._promised() and (self._confirmed or not self._rest.lazy)

    async def confirm(self) -> None:
        while not self._confirmed and self.upload.offset < self._size:
            if (error := self._rest.error or self._fill.error) is not None:
                raise error
            await self._rest.change()

    async def _reserve(self, size: int) -> None:
        if self._rest.due:
            await super()._reserve(size)
        else:
            await self.upload.keep(size, self._clients)

    # What clients wait for

    async def prepare(self, source: BlobSource, spans: Sequence[Span]) -> None:
        """Ask at once for what is missing of the spans, unless all comes by itself.

        Returns when the first missing byte is under way.  Raises the error of the origin.
        """
        gaps = [] if self._rest.due else gaps_of(self.upload, spans)
        for start, stop in gaps:
            self._forgive(start, stop)
            self.want(source, start, stop)
        for start, stop in gaps[:1]:
            while not (self._rest.due or self._answered(start)):
                if self._fill.error is not None:
                    raise self._fill.error
                self.want(source, start, stop)
                await self._rest.change()

    def _answered(self, offset: int) -> bool:
        """Whether the byte is there, or a transfer has begun that brings it."""
        coming = any(each.granted and each.position <= offset < each.stop for each in self._parts)
        return coming or self.upload.extents.end(offset) > offset

    def want(self, source: BlobSource, offset: int, stop: int | None) -> None:
        """Raises the error with which the origin has just refused the byte, or StorageFailed."""
        if not self._rest.due and self.upload.extents.end(offset) == offset:
            if self.upload.failed:
                error = StorageFailed(f"{self._fill.digest} cannot be written on")
                self._rest.fail(error)
                raise error
            for (start, end), (refusal, at) in self._failures.items():
                if start <= offset < end and self._ticks() - at < RECENT:
                    raise refusal
        super().want(source, offset, stop)

    async def _hear(self) -> None:
        """Want what the clients of other processes wait for."""
        while True:
            await asyncio.sleep(HEARING)  # other processes can only leave a note in a file
            self._count(self.upload.extents.count)
            for wish in self.upload.wanted.hear():
                if wish.start == wish.stop:
                    self._rest.demand()
                elif self._size >= 0:
                    self._heard(self._fill.source, wish)
                elif self._fill.queued:
                    self._spawn(self._begin_for_others(self._fill.source, Span(wish.start, wish.stop)))

    async def _begin_for_others(self, source: BlobSource, span: Span) -> None:
        with suppress(RegistryError):  # the fill will meet it as well
            await self.begin(source, span)

    def _heard(self, source: BlobSource, wish: Wish) -> None:
        self._rest.heard(Span(wish.start, wish.stop))
        if wish.client and self.upload.extents.end(wish.start) == wish.start:
            self._clients.add(wish.client)
        self._forgive(wish.start, wish.stop)
        self.want(source, wish.start, wish.stop)

    def _forgive(self, start: int, stop: int) -> None:
        """Ask again for what was refused."""
        self._failures = {
            span: failure
            for span, failure in self._failures.items()
            if not (span[0] < stop and start < span[1])
        }

    def _start(self, source: BlobSource, part: Part) -> asyncio.Task[None]:
        self._starts[part] = part.position
        if source.client:
            self._clients.add(source.client)
        for each in self._clients:
            self.upload.add_client(each)
        return super()._start(source, part)

    async def _request(self, source: BlobSource, part: Part) -> Blob | None:
        blob = await super()._request(source, part)
        if self._fill.ranges is False:
            self._rest.demand()
        if blob is None or self._rest.due:
            return blob
        return _PacedBlob(blob, lambda: self._rest.pace(part, self._starts[part]))

    async def _fetch_part(self, source: BlobSource, part: Part) -> None:
        try:
            await super()._fetch_part(source, part)
        finally:
            del self._starts[part]

    def _refused(self, part: Part, error: RegistryError) -> None:
        if isinstance(error, Dropped):
            return
        if self._rest.due:
            super()._refused(part, error)
        elif isinstance(error, StorageFailed):
            self._rest.fail(error)
        elif part.position == self._starts[part]:  # else who still waits for the rest of it asks again
            self._failures[part.position, part.stop] = error, self._ticks()
            self.upload.refuse(part.position, part.stop)
            self._fill.log.info("fill.range_refused", offset=part.position, error=str(error))

    def _grant(self, part: Part) -> bool:
        granted = super()._grant(part)
        self._rest.tell()
        return granted

    def _release(self, part: Part) -> None:
        super()._release(part)
        if part.position > self._starts.get(part, part.position) and self._size > 0:
            self._rest.weigh(self.upload.offset / self._size, len(self._clients))
        self._rest.tell()


def follow_parts(
    fill: Fill, source: BlobSource, metrics: Metrics, started: tuple[SparseUpload, Descriptor], span: Span
) -> Answered[Blob] | None:
    """A reader of parts of a fill, `span` first; None if it has ended, or all of it is to be read."""
    upload, descriptor = started
    size, span = descriptor.size, span.of(descriptor.size)
    span = Span(span.start, size if span.stop is None else min(span.stop, size))
    if size <= 0 or span == Span(0, size):
        fill.demand()
        return None
    try:
        blob = LazyBlob(upload, descriptor, source, metrics, fill, span)
    except BlobUnknown:
        return None
    return Answered(blob, "miss" if gaps_of(upload, [span]) else "hit")


async def confirm(
    fill: Fill, source: BlobSource, metrics: Metrics, started: tuple[SparseUpload, Descriptor]
) -> None:
    """If only parts of the blob were promised so far, wait until the rest comes.  Raises its error."""
    upload, descriptor = started
    if not upload.clients or upload.complete or descriptor.size <= 0:
        return
    if fill.fetcher is not None:
        await fill.fetcher.confirm()
    elif gaps := gaps_of(upload, [Span(0, descriptor.size)]):
        with suppress(BlobUnknown):  # it ends meanwhile
            parts = LazyBlob(upload, descriptor, source, metrics, fill, Span(*gaps[0]))
            try:
                await parts.readable(*gaps[0])
            finally:
                await parts.close()


def gaps_of(upload: SparseUpload, spans: Sequence[Span]) -> list[tuple[int, int]]:
    """What of the spans is missing, in their order."""
    gaps = []
    for each in spans:
        start, stop = each.start, each.stop or 0
        while (gap := upload.extents.gap(start, stop))[0] < gap[1]:
            gaps.append(gap)
            start = gap[1]
    return gaps
