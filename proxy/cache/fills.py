"""Fills: transfers of blobs from an origin into the store, one per digest, which many clients follow.

No client leads.  A fill is a task of its own that pushes the origin's bytes into the store; every client, the
first included, follows the growing file.  A client that disconnects does not affect the others or the fill.
All caches over one store share their fills, whichever origin the bytes come from.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import structlog

from proxy.cache.answered import Answered
from proxy.cache.deposits import Deposits, handed_over
from proxy.cache.fetcher import Fetcher
from proxy.cache.fill import Abandoned, EndedFill, Fill, kept
from proxy.cache.lazy import confirm, follow_parts
from proxy.cache.policy import Threshold
from proxy.cache.readers import BlobSource, FollowedBlob
from proxy.cache.rest import Idle, Rest
from proxy.cache.transfers import Transfers
from proxy.telemetry.exchange import current
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.tracing import current_span, step
from storage.concurrency import SingleFlight, shielded, uninterrupted
from storage.disk.health import MakeRoom, make_no_room
from storage.disk.kept import show_parts, shown_parts
from storage.disk.sparse import SparseUpload
from storage.errors import (
    BlobUnknown,
    DigestInvalid,
    OriginFailed,
    RangeInvalid,
    RegistryError,
    StorageFailed,
    Unavailable,
)
from storage.limits import Slots
from storage.oci import OCTETS, Descriptor, Digest, Span
from storage.registry import Blob
from storage.shared import SharedTable
from storage.store import Store

log = structlog.get_logger()

UNEXPECTED = "an unexpected fault"
REMEMBERED = 50  # fills that have ended
BACKOFF = 0.2  # seconds before the first retry without progress, doubling


class Fills:
    """The fills of one store, which all caches over it share.

    slots: how many fills transfer at once; those that follow another process need none
    range_slots: how many ranges are transferred at once beside them; each blob has a share
    make_room: evicts, as far as possible, so that a number of bytes can be stored
    deposits: gets what is stored
    known: what all processes know of upstreams
    backoff: seconds before the first retry without progress; BACKOFF if it is None
    """

    def __init__(
        self,
        store: Store,
        metrics: Metrics,
        slots: Slots | None = None,
        range_slots: Slots | None = None,
        backoff: float | None = None,
        make_room: MakeRoom = make_no_room,
        clock: Callable[[], float] = time.time,
        ticks: Callable[[], float] = time.monotonic,
        deposits: Deposits | None = None,
        known: SharedTable | None = None,
    ) -> None:
        self._store, self._metrics, self._deposits = store, metrics, deposits
        self._slots, self._range_slots = slots or Slots(1000), range_slots or Slots(1000)
        self._clock, self._ticks, self._known = clock, ticks, known or SharedTable()
        self._backoff = BACKOFF if backoff is None else backoff
        self._make_room = make_room
        self._making_room: set[asyncio.Task[None]] = set()
        self._fills: dict[Digest, Fill] = {}
        self.last: deque[EndedFill] = deque(maxlen=REMEMBERED)  # to end
        self._permissions = SingleFlight()

    async def join(
        self, source: BlobSource, digest: Digest, span: Span | None = None, lazy: Threshold | None = None
    ) -> Answered[Blob]:
        """The blob, readable while the fill is under way; `span` is as in Registry.get_blob.

        If it is `lazy`, only what is read of it is fetched until this threshold is reached.  Raises the
        origin's error if it does not serve the blob, StorageFailed if it cannot be stored.
        """
        while True:
            fill = self._fills.get(digest)
            if fill is None:
                fill = self._start(source, digest, lazy)
            elif fill.error is not None and fill.task is not None:
                await asyncio.wait([fill.task])  # it has failed, and is cleaning up
                continue
            with fill.rest.joining():
                answered = await self._join(fill, source, span, lazy)
            if answered is not None:
                return answered
            # An error for another repository, or met by another process, says nothing about ours: then a
            # new fill is started.
            ours = fill.source.repository == source.repository and not isinstance(fill.error, Abandoned)
            if fill.error is not None and ours:
                raise fill.error

    async def _join(
        self, fill: Fill, source: BlobSource, span: Span | None, lazy: Threshold | None
    ) -> Answered[Blob] | None:
        """The blob, readable; None if the fill has failed."""
        fill.note_request()
        if current().peer:
            fill.urged.set()
        if source.repository not in (fill.source.repository, *fill.repositories):
            await self._permit(fill, source)
        if lazy is None:
            fill.demand()
        if span is not None:
            await self._start_by_range(fill, source, span)
        # shielded: a client that disconnects must not cancel what others wait for.
        started = await shielded(fill.started)
        fill.link_writer(current_span.get())
        result = "hit" if started and started[0].complete else "miss"
        parts = await follow_parts(fill, source, self._metrics, started, span) if started and lazy else None
        if parts is not None:
            if source.repository not in fill.shown:
                with suppress(OSError):  # then its origin is asked again whether it has the blob
                    show_parts(self._store.files.root, fill.digest, source.repository)
                fill.shown.add(source.repository)
            return parts
        if started:
            await confirm(fill, source, self._metrics, started)
        blob = await self._follow(fill, source, *started, span or Span(0)) if started else None
        if blob is not None and blob.descriptor.size < 0 and span is not None and fill.task is not None:
            # The position of a range in the blob can be stated only when the size is known.
            await blob.close()
            blob = None
            await asyncio.wait([fill.task])
        if blob is None and source.repository in fill.repositories:
            blob = await self._stored(source, fill)
        return None if blob is None else Answered(blob, result)

    async def _start_by_range(self, fill: Fill, source: BlobSource, span: Span) -> None:
        """If it is not the turn of the fill, start it by the range, which can come at once."""
        await fill.opened.wait()
        if fill.queued and fill.fetcher is not None:
            await fill.fetcher.begin(source, span)

    async def _follow(
        self, fill: Fill, source: BlobSource, upload: SparseUpload, descriptor: Descriptor, span: Span
    ) -> Blob | None:
        """A reader of the upload, `span` first; None if the upload has ended."""
        try:
            blob = FollowedBlob(upload.follow(descriptor), source, self._metrics, fill)
        except BlobUnknown:
            return None
        size, span = descriptor.size, span.of(descriptor.size)
        if size <= 0 or not (upload.ours or upload.extents.total):
            # There may be no last byte to withhold, and the process that transfers it may be refused the
            # first one: withhold the response.
            try:
                await blob.readable(span.start if span.start < size else 0, span.stop)
            except BaseException as error:
                await blob.close()
                if isinstance(error, RegistryError):
                    return None
                raise
        return blob

    async def _stored(self, source: BlobSource, fill: Fill) -> Blob | None:
        """The blob of a fill that has ended; None if it failed, or the blob was damaged since."""
        try:
            return await self._store.get_blob(source.repository, fill.digest)
        except BlobUnknown:
            pass
        try:
            # 1. the fill makes its links  2. our origin confirms the blob  3. our link is missing
            await self._store.link(source.repository, fill.digest, fill.size)
            return await self._store.get_blob(source.repository, fill.digest)
        except BlobUnknown:
            return None

    def filling(self, digest: Digest) -> bool:
        """Whether a fill of the blob is in flight, for any repository."""
        return digest in self._fills

    def in_flight(self) -> list[Fill]:
        """All fills, for reading only."""
        return list(self._fills.values())

    async def ended(self, digest: Digest) -> None:
        """Wait for the blob's fill, if there is one.  Raises the error with which it failed."""
        fill = self._fills.get(digest)
        if fill is not None and fill.task is not None:
            await asyncio.wait([fill.task])
            if fill.error is not None:
                raise fill.error

    def descriptor(self, repository: str, digest: Digest) -> Descriptor | None:
        """The descriptor of a blob whose fill is in flight for `repository`, if it is known."""
        fill = self._fills.get(digest)
        if fill is None or repository not in fill.repositories:
            return None
        started = fill.started.result() if fill.started.done() else None
        return started[1] if started else None

    def coming(self, repository: str, digest: Digest) -> bool:
        """Whether all of a blob is in transfer for `repository`."""
        return self.descriptor(repository, digest) is not None and self._fills[digest].rest.due

    def _start(self, source: BlobSource, digest: Digest, lazy: Threshold | None) -> Fill:
        started = asyncio.get_running_loop().create_future()
        fill = Fill(digest, source, started, self._clock(), Rest(lazy))
        self._fills[digest] = fill
        fill.task = asyncio.create_task(self._run(fill))
        return fill

    async def _permit(self, fill: Fill, source: BlobSource) -> None:
        # The bytes come for another repository; the origin says whether this one has the blob.
        key = (source.repository, fill.digest)
        if shown_parts(self._store.files.root, *key) is None:
            await self._permissions.join(key, lambda: source.origin.resolve_blob(source.name, fill.digest))
        fill.repositories.add(source.repository)

    async def _run(self, fill: Fill) -> None:
        current_span.set(fill.span)
        begun, result = time.monotonic(), "failed"
        self._metrics.filling.inc()
        try:
            outcome, descriptor = await self._store_blob(fill)
            fill.size = descriptor.size
            deposited = outcome != "followed" and not fill.source.linked
            async with handed_over(fill.digest, self._deposits if deposited else None):
                with step("store.write"), kept(fill.digest):
                    for repository in list(fill.repositories):
                        await self._store.link(repository, fill.digest, descriptor.size)
            result = outcome
            if outcome == "committed":
                self.make_room_later(0)
            if not fill.started.done():
                fill.started.set_result(None)
            seconds = round(time.monotonic() - begun, 3)
            fill.log.info(f"fill.{result}", bytes=descriptor.size, seconds=seconds)
        except Idle as error:
            result = "kept"
            await uninterrupted(self._keep(fill, error))
        except asyncio.CancelledError:
            result = "suspended"
            stopping = Unavailable("the server is shutting down")
            await self._end(fill, stopping, keep_empty=fill.rest.demanded)
            fill.log.info("fill.suspended", bytes=fill.upload.offset if fill.upload else 0)
            raise
        except Exception as error:
            result = "uncached" if isinstance(error, StorageFailed) else result
            await self._fail(fill, error)
        finally:
            fill.opened.set()
            fill.end_span(result)
            del self._fills[fill.digest]
            self.last.append(fill.ended(result, self._clock()))
            self._metrics.filling.dec()
            self._metrics.fills.labels(self._metrics.label(fill.source.namespace), result).inc()

    async def _fail(self, fill: Fill, error: Exception) -> None:
        # Before the transfer has started, each client gets the error: log only those that are our fault.
        answered = not fill.started.done() and isinstance(error, RegistryError)
        if isinstance(error, BlobUnknown):
            # 1. the origin says so  2. the fill ends  3. another client asks  4. those that wait learn it
            fill.source.unknown(error)
        fill.error = error  # before anybody can join
        await uninterrupted(self._end(fill, error))
        if isinstance(error, StorageFailed):  # it is logged, and clients read on from the origin
            fill.log.info("fill.uncached", error=str(error))
        elif not answered:
            unexpected = not isinstance(error, RegistryError)
            fill.log.error("fill.failed", error=str(error) or UNEXPECTED, exc_info=unexpected and error)

    async def _keep(self, fill: Fill, error: Idle) -> None:
        """Leave the parts that are here to other processes."""
        await self._end(fill, error)
        if fill.upload is not None and fill.upload.ours:
            fill.log.info("fill.kept", bytes=fill.upload.offset, size=fill.upload.listed_size)

    async def _store_blob(self, fill: Fill) -> tuple[str, Descriptor]:
        """Get the blob into the store; return how, committed, followed or linked, and its descriptor."""
        resolve = fill.source.origin.resolve_blob
        while not self._store.holds(fill.digest):
            if (stored := await self._fetch(fill)) is not None:
                return stored
        # HEAD is the permission; the bytes came for another repository.
        descriptor = await resolve(fill.source.name, fill.digest)
        fill.repositories.add(fill.source.repository)
        try:
            return "linked", await self._store.link(fill.source.repository, fill.digest, descriptor.size)
        except BlobUnknown:  # they were damaged, and deleted
            return await self._store_blob(fill)

    async def _fetch(self, fill: Fill) -> tuple[str, Descriptor] | None:
        """Transfer the blob, or follow another process that does; None if it was stored meanwhile."""
        upload = fill.upload = await self._store.files.resume(fill.digest)
        if not upload.ours:
            fill.opened.set()
            # Another process transfers it.  A HEAD says whether our repository has it, and its size.
            descriptor = shown_parts(self._store.files.root, fill.source.repository, fill.digest)
            if descriptor is None:
                descriptor = await fill.source.origin.resolve_blob(fill.source.name, fill.digest)
            fill.repositories.add(fill.source.repository)
            fill.link_writer(fill.span)
            fill.started.set_result((upload, descriptor))
            if await fill.watch(upload):
                return "followed", Descriptor(OCTETS, fill.digest, upload.offset)
        # 1. we find it missing  2. another process commits it  3. we get the lock
        if self._store.holds(fill.digest):
            await upload.cancel()
            return None
        fill.note_trace(upload)
        # The other processes, which follow the upload already, wait with us.
        fetcher = fill.fetcher = self._fetcher(fill, upload)
        try:
            complete = False
            while not complete:
                fill.queued = True
                fill.opened.set()
                await self._due(fill, fetcher)
                async with self._slots.turn(fill.source.namespace, urged=fill.urged):
                    fill.queued = False
                    complete = await fetcher.fetch()
        finally:
            await fetcher.close()
        fill.received = True
        return "committed", await self._commit(fill, fill.upload)

    async def _commit(self, fill: Fill, upload: SparseUpload) -> Descriptor:
        try:
            with step("store.write"):
                return await upload.commit(fill.digest)
        except DigestInvalid as error:  # its status would blame the client
            fill.source.wrong()
            raise OriginFailed(f"{fill.source.namespace} sent wrong content: {error}") from error

    async def _due(self, fill: Fill, fetcher: Fetcher) -> None:
        try:
            await fetcher.due()
        except (Idle, RegistryError) as error:
            fill.error = error  # before anybody can join
            raise

    def _fetcher(self, fill: Fill, upload: SparseUpload) -> Fetcher:
        files = self._store.files
        again, room, slots = partial(files.resume, fill.digest), self._ensure_room, self._range_slots
        transfers = Transfers(fill, upload, again, room, self._metrics, slots, self._ticks, self._known)
        return Fetcher(fill, transfers, partial(shown_parts, files.root, digest=fill.digest), self._backoff)

    async def _ensure_room(self, upload: SparseUpload, size: int) -> None:
        if upload.fits(size):
            self.make_room_later(max(size, 0))
        else:
            await self._make_room(size)

    def make_room_later(self, coming: int) -> None:
        """There is room, but maybe more than the cache limit will be stored: evict in the background."""
        task = asyncio.create_task(self._make_room(coming))
        self._making_room.add(task)
        task.add_done_callback(self._making_room.discard)

    async def _end(self, fill: Fill, error: Exception, *, keep_empty: bool = False) -> None:
        """Pass the error to all clients that wait or follow."""
        fill.error = error
        if fill.upload is not None:
            # On a full disk the bytes take up space, and beyond the end of the blob they are useless;
            # otherwise the next fill resumes after them.
            if isinstance(error, StorageFailed | RangeInvalid):
                await fill.upload.cancel(error)
            else:
                await fill.upload.suspend(error, keep_empty=keep_empty)
        if not fill.started.done():
            fill.started.set_result(None)

    async def close(self) -> None:
        """Stop all fills; the next ones resume with the bytes that are received."""
        tasks = []
        for fill in self._fills.values():
            if fill.task is not None:
                tasks.append(fill.task)
                if not fill.received:  # else it is committed in a moment
                    fill.task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in self._making_room:
            task.cancel()
        await asyncio.gather(*self._making_room, return_exceptions=True)
        await self._permissions.close()
