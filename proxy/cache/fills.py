"""Fills: at most one transfer per digest, however many clients ask, and following it while it grows.

There is no privileged leader.  A fill is a task of its own that pushes the origin's bytes into the
store; every client, the first included, follows the growing file.  One that goes away hurts nobody and
wastes nothing.  Fills are shared by all caches over one store, whichever origin the bytes come from.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import structlog

from proxy.cache.answered import Answered
from proxy.cache.readers import BlobSource, FollowedBlob
from proxy.telemetry.metrics import Metrics
from storage.concurrency import SingleFlight, Slots
from storage.disk.health import MakeRoom, nobody
from storage.disk.uploads import FileUpload
from storage.errors import (
    BlobUnknown,
    DigestInvalid,
    OriginFailed,
    RangeInvalid,
    RegistryError,
    StorageFailed,
    Unavailable,
)
from storage.oci import OCTETS, Descriptor, Digest, Span
from storage.registry import Blob
from storage.store import Store

log = structlog.get_logger()

UNTOLD = 64 << 30  # bytes that a blob may have whose size no origin tells: a body must end some time
LONGEST_WAIT = 30.0  # seconds, whatever an origin tells of when to come back
RETRIES = 4  # in a row without a byte between them
BACKOFF = 0.2  # seconds before the second one in a row, doubling; after progress there is no wait
FAR_AHEAD = 16 << 20  # bytes; a reader so far before the frontier asks the origin itself


@dataclass(slots=True)
class Fill:
    """`started` yields None if there is nothing to follow: the store has the blob, or there is an `error`.

    `repositories` are those whose origin said that they may show it.  `begun` is in seconds since the epoch.
    """

    digest: Digest
    source: BlobSource
    started: asyncio.Future[tuple[FileUpload, Descriptor] | None]
    begun: float
    followers: int = 0
    repositories: set[str] = field(default_factory=set)
    upload: FileUpload | None = None
    size: int = -1  # bytes, once it is stored
    task: asyncio.Task[None] | None = None
    received: bool = False  # nothing more is wanted of the origin
    error: Exception | None = None


class Fills:
    """`make_room` sees to it, as far as that is possible, that so many bytes more can be stored."""

    def __init__(
        self,
        store: Store,
        metrics: Metrics,
        turns: Slots | None = None,
        backoff: float = BACKOFF,
        make_room: MakeRoom = nobody,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._turns = turns or Slots(1000)
        self._backoff = backoff
        self._make_room = make_room
        self._clock = clock
        self._making_room: set[asyncio.Task[None]] = set()
        self._fills: dict[Digest, Fill] = {}
        self._permissions = SingleFlight()

    async def join(self, source: BlobSource, digest: Digest, span: Span | None = None) -> Answered[Blob]:
        """The blob while it comes in; `span` as in Registry.get_blob.

        Raises what the origin answers if it does not serve it, StorageFailed if it cannot be stored.
        """
        while True:
            fill = self._fills.get(digest)
            if fill is None:
                fill = self._start(source, digest)
            elif fill.error is not None and fill.task is not None:
                await asyncio.wait([fill.task])  # it has failed, and is clearing up
                continue
            elif source.repository not in (fill.source.repository, *fill.repositories):
                await self._permit(fill, source)
            # shield: a client that goes away must not cancel what others wait for.
            started = await asyncio.shield(fill.started)
            result = "hit" if started and started[0].complete else "miss"
            blob = await self._follow(fill, source, *started, span) if started else None
            if blob is None and source.repository in fill.repositories:
                blob = await self._stored(source, fill)
            if blob is not None:
                return Answered(blob, result)
            # What was answered to another repository says nothing of ours: then it is begun anew.
            if fill.error is not None and fill.source.repository == source.repository:
                raise fill.error

    async def _follow(
        self, fill: Fill, source: BlobSource, upload: FileUpload, descriptor: Descriptor, span: Span | None
    ) -> Blob | None:
        """None: the upload has ended."""
        if span is not None and upload.offset + FAR_AHEAD < span.start < descriptor.size:
            # Else it is to be waited for, which takes longer but needs nobody's leave.
            with suppress(Unavailable):
                return await source.origin.get_blob(source.name, descriptor.digest, span)
        try:
            blob = upload.follow(descriptor)
        except BlobUnknown:
            return None
        if descriptor.size == 0:
            # There is no last byte to withhold: withhold all.
            try:
                await blob.readable(0)
            except RegistryError:
                await blob.close()
                return None
            except BaseException:
                await blob.close()
                raise
        return FollowedBlob(blob, source, self._metrics, fill)

    async def _stored(self, source: BlobSource, fill: Fill) -> Blob | None:
        """What came of a fill that has ended; None if nothing did, or it was damaged since."""
        try:
            return await self._store.get_blob(source.repository, fill.digest)
        except BlobUnknown:
            pass
        try:
            # 1. the fill makes its links  2. our origin permits  3. nobody has made ours
            await self._store.link(source.repository, fill.digest, fill.size)
            return await self._store.get_blob(source.repository, fill.digest)
        except BlobUnknown:
            return None

    def filling(self, digest: Digest) -> bool:
        """Whether it is coming in just now, for whatever repository."""
        return digest in self._fills

    def going_on(self) -> list[Fill]:
        """To be looked at only."""
        return list(self._fills.values())

    async def ended(self, digest: Digest) -> None:
        """Wait for its fill, if there is one.  Raises what it failed with."""
        fill = self._fills.get(digest)
        if fill is not None and fill.task is not None:
            await asyncio.wait([fill.task])
            if fill.error is not None:
                raise fill.error

    def descriptor(self, repository: str, digest: Digest) -> Descriptor | None:
        """What is known of a blob that `repository` is getting just now."""
        fill = self._fills.get(digest)
        if fill is None or repository not in fill.repositories:
            return None
        started = fill.started.result() if fill.started.done() else None
        return started[1] if started else None

    def _start(self, source: BlobSource, digest: Digest) -> Fill:
        fill = Fill(digest, source, asyncio.get_running_loop().create_future(), self._clock())
        self._fills[digest] = fill
        fill.task = asyncio.create_task(self._run(fill))
        return fill

    async def _permit(self, fill: Fill, source: BlobSource) -> None:
        # Another repository's transfer brings the bytes; whether this one may show them its origin says.
        key = (source.repository, fill.digest)
        await self._permissions.join(key, lambda: source.origin.resolve_blob(source.name, fill.digest))
        fill.repositories.add(source.repository)

    async def _run(self, fill: Fill) -> None:
        begun, result = time.monotonic(), "failed"
        self._metrics.filling.inc()
        try:
            outcome, descriptor = await self._bring(fill)
            fill.size = descriptor.size
            for repository in list(fill.repositories):
                await self._store.link(repository, fill.digest, descriptor.size)
            result = outcome
            if outcome == "committed":
                self._tell_of_room(0)
            if not fill.started.done():
                fill.started.set_result(None)
            seconds = round(time.monotonic() - begun, 3)
            _log(fill).info(f"fill.{result}", bytes=descriptor.size, seconds=seconds)
        except asyncio.CancelledError:
            result = "suspended"
            await self._end(fill, Unavailable("the server is shutting down"))
            _log(fill).info("fill.suspended", bytes=fill.upload.offset if fill.upload else 0)
            raise
        except Exception as error:
            # Where nothing was begun, each client is answered with it: an event only if the fault is ours.
            told = not fill.started.done() and isinstance(error, RegistryError)
            if isinstance(error, BlobUnknown):
                # 1. the origin says so  2. the fill ends  3. another client asks  4. whoever waited learns it
                fill.source.unknown(error)
            await self._end(fill, error)
            if isinstance(error, StorageFailed):  # the disk has told of it, and each client goes on by itself
                result = "uncached"
                _log(fill).info("fill.uncached", error=str(error))
            elif not told:
                _log(fill).error("fill.failed", error=str(error) or type(error).__name__)
        finally:
            del self._fills[fill.digest]
            self._metrics.filling.dec()
            self._metrics.fills.labels(fill.source.namespace, result).inc()

    async def _bring(self, fill: Fill) -> tuple[str, Descriptor]:
        """Have the blob in the store: how it came there, and what it is."""
        resolve = fill.source.origin.resolve_blob
        while not self._store.holds(fill.digest):
            async with self._turns.turn(fill.source.namespace):
                brought = await self._fetch(fill)
            if brought is not None:
                return brought
        # HEAD is the permission; the bytes came for another repository.
        descriptor = await resolve(fill.source.name, fill.digest)
        fill.repositories.add(fill.source.repository)
        try:
            return "linked", await self._store.link(fill.source.repository, fill.digest, descriptor.size)
        except BlobUnknown:  # they were damaged, and are gone
            return await self._bring(fill)

    async def _fetch(self, fill: Fill) -> tuple[str, Descriptor] | None:
        """None: it has come meanwhile."""
        upload = fill.upload = await self._store.resume_fill(fill.digest)
        if not upload.ours:
            # Another process transfers it.  A HEAD tells whether we may show it, and its size.
            descriptor = await fill.source.origin.resolve_blob(fill.source.name, fill.digest)
            fill.repositories.add(fill.source.repository)
            fill.started.set_result((upload, descriptor))
            try:
                committed = await upload.watch(fill.digest)
            except Unavailable as error:  # its disk is ours, and may be full: each client goes on by itself
                raise StorageFailed(str(error)) from error
            if committed:
                return "followed", Descriptor(OCTETS, fill.digest, upload.offset)
        # 1. we find it missing  2. another process commits it  3. we get the lock
        if self._store.holds(fill.digest):
            await upload.cancel()
            return None
        upload = await self._transfer(fill, upload)
        fill.received = True
        try:
            return "committed", await upload.commit(fill.digest)
        except DigestInvalid as error:  # not the client's fault, as its status would have it
            raise OriginFailed(f"{fill.source.namespace} sent another blob: {error}") from error

    async def _transfer(self, fill: Fill, upload: FileUpload) -> FileUpload:
        """The upload with all of the bytes, not committed yet."""
        if upload.offset and upload.matches(fill.digest):
            # A former fill had all of it and was killed before it could say so.
            await fill.source.origin.resolve_blob(fill.source.name, fill.digest)
            fill.repositories.add(fill.source.repository)
            return upload
        failures, told = 0, 0.0
        while True:
            before = upload.offset
            try:
                await self._receive(fill, upload)
                return upload
            except RangeInvalid as error:
                if fill.started.done():
                    raise
                # What a former fill left is not the beginning of this blob: it is as long, or longer.
                await upload.cancel(error)
                upload = fill.upload = await self._store.resume_fill(fill.digest)
            except Unavailable as error:
                failures = 0 if upload.offset > before else failures + 1
                if not fill.started.done() or failures > RETRIES:
                    raise
                _log(fill).warning("fill.interrupted", offset=upload.offset, error=str(error))
                told = min(error.retry_after or 0.0, LONGEST_WAIT)
            if failures:
                await asyncio.sleep(max(told, self._backoff * 2 ** (failures - 1)))

    async def _receive(self, fill: Fill, upload: FileUpload) -> None:
        source = fill.source
        span = Span(upload.offset) if upload.offset else None
        blob = await source.origin.get_blob(source.name, fill.digest, span)
        try:
            fill.repositories.add(source.repository)
            size = blob.descriptor.size
            await self._see_to_room(upload, size)
            upload.expect(size)
            if not fill.started.done():
                fill.started.set_result((upload, blob.descriptor))
            elif (started := fill.started.result()) and 0 <= started[1].size != size:
                # Who follows was promised the other size, and would take that many bytes for all.
                raise OriginFailed(f"{source.namespace} told {started[1].size} bytes first, now {size}")
            async for chunk in blob.chunks(upload.offset):
                if (size if size >= 0 else UNTOLD) < upload.offset + len(chunk):
                    raise OriginFailed(f"{source.namespace} sent more than the {size} bytes it announced")
                await upload.write(chunk)
            if upload.offset < size:
                raise OriginFailed(f"{source.namespace} ended at byte {upload.offset} of {size}")
        finally:
            await blob.close()

    async def _see_to_room(self, upload: FileUpload, size: int) -> None:
        if upload.fits(size):
            self._tell_of_room(max(size, 0))
        else:
            await self._make_room(size)

    def _tell_of_room(self, coming: int) -> None:
        """There is room, but maybe more will be stored than is allowed: nobody waits for that."""
        task = asyncio.create_task(self._make_room(coming))
        self._making_room.add(task)
        task.add_done_callback(self._making_room.discard)

    async def _end(self, fill: Fill, error: Exception) -> None:
        """Tell all who wait or follow."""
        fill.error = error
        if fill.upload is not None:
            # On a full disk the bytes are in the way, and beyond the blob's end they are of no use; else
            # the next fill goes on from them.
            if isinstance(error, StorageFailed | RangeInvalid):
                await fill.upload.cancel(error)
            else:
                await fill.upload.suspend(error)
        if not fill.started.done():
            fill.started.set_result(None)

    async def close(self) -> None:
        """Stop all fills; what they have stays where the next one finds it."""
        tasks = []
        for fill in self._fills.values():
            if fill.task is not None:
                tasks.append(fill.task)
                if not fill.received:  # else it is done in a moment, and need not be asked for again
                    fill.task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in self._making_room:
            task.cancel()
        await asyncio.gather(*self._making_room, return_exceptions=True)
        await self._permissions.close()


def _log(fill: Fill) -> Any:
    source = fill.source
    return log.bind(namespace=source.namespace, repository=source.name, digest=fill.digest)
