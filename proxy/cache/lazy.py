"""Readers of parts of a blob, in lazy namespaces: what they ask for is fetched and kept."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from proxy.cache.answered import Answered
from proxy.cache.fill import Abandoned, Fill
from proxy.cache.readers import LOOK, BlobSource, FollowedBlob
from proxy.telemetry.metrics import Metrics
from storage.disk.sparse import SparseUpload
from storage.errors import BlobUnknown, StorageFailed, Unavailable
from storage.oci import Descriptor, Span
from storage.registry import Blob


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
        else:
            with suppress(StorageFailed):  # then it is read from the origin
                await self.ask(spans)

    async def ask(self, spans: Sequence[Span]) -> None:
        """Ask for what is missing of the spans, and wait until the first of it comes, or is under way.

        Raises the error of the origin, and StorageFailed.
        """
        if self._fill.fetcher is not None:
            await self._fill.fetcher.prepare(self._source, spans)
            return
        gaps = self._upload.missing(spans)
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


async def follow_parts(
    fill: Fill,
    source: BlobSource,
    metrics: Metrics,
    started: tuple[SparseUpload, Descriptor],
    span: Span | None,
) -> Answered[Blob] | None:
    """A reader of parts of a fill, `span` first; None if it has ended, or all of it is to be read.

    If another process transfers it, waits until the first missing byte has come.
    """
    upload, descriptor = started
    size = descriptor.size
    if span is None:
        return None
    span = span.of(size)
    span = Span(span.start, size if span.stop is None else min(span.stop, size))
    if size <= 0 or span == Span(0, size):
        fill.demand()
        return None
    try:
        blob = LazyBlob(upload, descriptor, source, metrics, fill, span)
    except BlobUnknown:
        return None
    result = "miss" if upload.missing([span]) else "hit"
    if fill.fetcher is None:
        try:
            await blob.ask([span])
        except BaseException as error:
            await blob.close()
            if isinstance(error, Abandoned):  # nothing is sent yet, so its client may follow another fill
                return None
            raise
    return Answered(blob, result)


async def confirm(
    fill: Fill, source: BlobSource, metrics: Metrics, started: tuple[SparseUpload, Descriptor]
) -> None:
    """If only parts of the blob were promised so far, wait until the rest comes.  Raises its error."""
    upload, descriptor = started
    if not upload.clients or upload.complete or descriptor.size <= 0:
        return
    if fill.fetcher is not None:
        await fill.fetcher.confirm()
    elif gaps := upload.missing([Span(0, descriptor.size)]):
        with suppress(BlobUnknown):  # it ends meanwhile
            parts = LazyBlob(upload, descriptor, source, metrics, fill, Span(*gaps[0]))
            try:
                await parts.readable(*gaps[0])
            finally:
                await parts.close()
