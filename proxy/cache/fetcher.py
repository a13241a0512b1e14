"""What is fetched of one blob, and when: what clients wait for, and the rest when it is due.

While nobody reads parts of a blob whose rest is not due, the file is left to other processes and to eviction.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from proxy.cache.fill import LARGEST_UNSIZED, Fill, awaited
from proxy.cache.readers import BlobSource
from proxy.cache.refusals import answers
from proxy.cache.transfers import Transfers
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

HEARING = 0.1  # seconds between two looks at what other processes want
LONGEST_WAIT = 30.0  # seconds, whatever Retry-After says
HELD = 10.0  # seconds, or until Retry-After is over, for which clients wait with a fill that is refused
RETRIES = 7  # in a row without progress: 25 seconds or more
STALLED = 30.0  # seconds of attempts without progress, after which one more is made
_REFUSALS = (Unavailable, BlobUnknown, NameUnknown, Denied)
WHOLE = 3  # failures of an origin that is up, after which all of a blob is asked for


@dataclass(slots=True)
class _FailedAttempts:
    """Attempts in a row that brought nothing, and their seconds; `refusals` are of an origin that is up."""

    number: int = 0
    refusals: int = 0
    seconds: float = 0.0

    def and_one(self, seconds: float) -> _FailedAttempts:
        return _FailedAttempts(self.number + 1, self.refusals, self.seconds + seconds)

    @property
    def _stalled(self) -> bool:
        return self.seconds > STALLED

    @property
    def of_ranges(self) -> bool:
        """Whether all of a blob is to be asked for: the origin may refuse ranges alone."""
        return self.refusals >= (1 if self._stalled else WHOLE)

    @property
    def enough(self) -> bool:
        """Whether there is no further attempt."""
        return self.number > (1 if self._stalled else RETRIES)


class Fetcher:
    """Decides which `transfers` of a fill begin.

    known: the blob, if parts of it are kept and the repository shows it
    backoff: seconds before the first retry without progress
    """

    def __init__(
        self,
        fill: Fill,
        transfers: Transfers,
        known: Callable[[str], Descriptor | None],
        backoff: float,
    ) -> None:
        self._fill = fill
        self._rest = fill.rest
        self._transfers = transfers
        self._known = known
        self._backoff = backoff
        self._whole = False  # the next transfer is of all of the blob, whatever is there
        self._beginning = asyncio.Lock()
        self._first: asyncio.Task[None] | None = None  # the range that begins it
        self._tasks: set[asyncio.Task[None]] = set()
        self._spawn(self._hear())

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._transfers.close()
        self._rest.tell()

    @property
    def coming(self) -> list[tuple[int, int]]:
        return self._transfers.parts.coming(self._transfers.size)

    @property
    def repeated(self) -> int:
        return self._transfers.repeated

    # All of it

    async def due(self) -> None:
        """Wait until all of the blob is to be fetched.  Raises Idle when nobody reads its parts."""
        transfers = self._transfers
        started = self._fill.started.result() if self._fill.started.done() else None
        if started and not self._rest.due:  # another process was its writer
            if transfers.upload.listed_size not in (-1, started[1].size):
                raise OriginFailed(
                    f"{self._fill.source.namespace} had told another size: {transfers.upload.listed_size}"
                )
            await transfers.reserve(started[1].size)
        await self._rest.wait(lambda: any(transfers.parts), lambda: transfers.upload.offset > 0)

    async def fetch(self) -> bool:
        """Fetch all that is missing when it is due; False if it is not due any more, as it cannot be got.

        The upload has all bytes then, and is not committed.
        """
        transfers = self._transfers
        if transfers.upload.offset == transfers.size > 0:
            return True
        try:
            await self._run()
        except _REFUSALS as error:
            if not self._fill.started.done() or (self._rest.demanded and self._rest.promised):
                raise
            self._rest.postpone(error)
            transfers.refusals.resume()
            transfers.upload.refuse(*transfers.upload.extents.gap(0, transfers.size))
            self._fill.log.warning("fill.postponed", offset=transfers.upload.offset, error=str(error))
            return False
        return True

    async def _run(self) -> None:
        source, digest, upload = self._fill.source, self._fill.digest, self._transfers.upload
        if upload.offset and (upload.listed_size == upload.offset or upload.matches(digest)):
            # A former fill had received all of it, and was killed before it committed.
            await self._resolve()
            self._fill.repositories.add(source.repository)
            return
        if self._first is not None:
            await self._begun(self._first)
        await self._persist()

    async def _persist(self) -> None:
        failures, now = _FailedAttempts(), asyncio.get_running_loop().time
        while True:
            before, since = self._transfers.upload.offset, now()
            try:
                await self._close_gaps()
                return
            except RangeInvalid as error:
                if self._fill.started.done():
                    raise
                # The bytes of a former fill are not the beginning of this blob: they are as many, or more.
                await self._transfers.renew(error)
            except _REFUSALS as error:
                # What clients ask for themselves would be refused as well, most likely.
                with self._transfers.refusals.held():
                    # Some origins refuse more transfers than they like with any status.
                    offset = self._transfers.upload.offset
                    failures = _FailedAttempts() if offset > before else failures.and_one(now() - since)
                    begun = isinstance(error, Unavailable) or offset > 0
                    if failures.enough or not begun or not await self._promised():
                        raise
                    self._fill.log.warning("fill.interrupted", offset=offset, error=str(error))
                if failures.number:
                    await self._wait_after(error, failures)
                self._whole = failures.of_ranges

    async def _wait_after(self, error: RegistryError, failures: _FailedAttempts) -> None:
        """Wait for the next attempt, then count the last one if the origin is up: it may refuse ranges."""
        refusals, wait = self._transfers.refusals, min(error.retry_after or 0.0, LONGEST_WAIT)
        backoff = self._backoff * 2 ** (failures.number - 1)
        with refusals.held():
            await self._pause(max(wait, min(backoff, HELD)))
        if (left := backoff - max(wait, HELD)) > 0:
            await self._pause(left)
        with refusals.held():
            # After the wait, since refused ranges may be why the host was not asked.  If it is down,
            # that says nothing of ranges, and what is there need not come again.
            failures.refusals += await answers(self._resolve, error)

    async def _pause(self, seconds: float) -> None:
        """Wait so long, or until other transfers have brought what is missing."""
        transfers, pause = self._transfers, asyncio.ensure_future(asyncio.sleep(seconds))
        try:
            while transfers.upload.offset < transfers.end and not pause.done():
                await self._rest.change(ended=pause)
        finally:
            pause.cancel()
            await asyncio.gather(pause, return_exceptions=True)

    async def _promised(self) -> bool:
        """Whether clients know the size of the blob; if some of it is there, they may, and read that."""
        source, started = self._fill.source, self._fill.started
        if not started.done() and self._transfers.upload.offset:
            with suppress(Unavailable, RangeInvalid):
                await self._transfers.begin(source, await self._resolve())
                self._rest.confirm()
        return started.done() and self._rest.promised

    async def _resolve(self) -> Descriptor:
        return await self._fill.source.origin.resolve_blob(self._fill.source.name, self._fill.digest)

    async def _close_gaps(self) -> None:
        """Close the gaps in order.  Those that other transfers close are waited for."""
        transfers = self._transfers
        while True:
            whole = self._whole or transfers.refusals.lasting
            start, stop = transfers.parts.gap(transfers.end, whole)
            if start < stop:
                await transfers.fetch_gap(start, transfers.reach(start, stop), whole)
                self._whole = False  # what is missing still was left to a range that the origin sent
                if transfers.size < 0:
                    return
                await transfers.fetch_waiting()
            elif transfers.upload.offset >= transfers.end:
                return
            else:
                await self._rest.change()

    # The start

    async def begin(self, source: BlobSource, span: Span) -> None:
        """Start the fill by a range, while it waits for its turn, if the origin sends ranges."""
        async with self._beginning:
            if self._fill.started.done() or self._fill.error is not None:
                return
            try:
                await (self._begin_by if self._rest.due else self._introduce)(source, span)
            except RegistryError as error:
                if not self._rest.due:  # else the fill will meet it as well
                    self._rest.fail(error)

    async def _begin_by(self, source: BlobSource, span: Span) -> None:
        if self._transfers.ranges is False:
            return
        if span.start < 0:
            span = span.of((await source.origin.resolve_blob(source.name, self._fill.digest)).size)
        stop = LARGEST_UNSIZED if span.stop is None else span.stop
        if self._first is None or self._first.done():
            self._first = self._transfers.start(source, span.start, stop)
        await self._begun(self._first)

    async def _begun(self, first: asyncio.Task[None]) -> None:
        """Wait until it is known whether the range starts the fill."""
        waited: set[asyncio.Future[Any]] = {first, self._fill.started}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)

    async def _introduce(self, source: BlobSource, span: Span) -> None:
        """Find out the size of the blob, and whether the repository has it: by the range if it is missing."""
        transfers, descriptor = self._transfers, self._known(source.repository)
        if descriptor is None:
            await self._begin_by(source, span)
            if self._fill.started.done() or self._rest.due:
                return
            for error in transfers.refusals.errors():
                if not isinstance(error, RangeInvalid):
                    raise error
            descriptor = await source.origin.resolve_blob(source.name, self._fill.digest)
        if descriptor.size <= 0:
            self._rest.demand()
            return
        if (listed := transfers.upload.listed_size) not in (-1, descriptor.size):
            await transfers.renew(RangeInvalid(f"the bytes of a former transfer are of {listed}"))
        await transfers.begin(source, descriptor)
        if transfers.upload.offset == transfers.size:
            self._rest.weigh(1.0, 0)

    async def confirm(self) -> None:
        """Wait until it is known that the origin sends all of the blob.  Raises its error."""
        transfers = self._transfers
        while not self._rest.confirmed and transfers.upload.offset < transfers.size:
            if (error := self._rest.error or self._fill.error) is not None:
                raise error
            await self._rest.change()

    # What clients wait for

    async def prepare(self, source: BlobSource, spans: Sequence[Span]) -> None:
        """Ask at once for what is missing of the spans, unless all comes by itself.

        Returns when the first missing byte is under way.  Raises the error of the origin.
        """
        gaps = [] if self._rest.due else self._transfers.upload.missing(spans)
        for start, stop in gaps:
            self._transfers.refusals.forgive(start, stop)
            self.want(source, start, stop)
        for start, stop in gaps[:1]:
            while not (self._rest.confirmed or self._transfers.parts.has(start)):
                if self._fill.error is not None:
                    raise self._fill.error
                self.want(source, start, stop)
                await self._rest.change()

    def want(self, source: BlobSource, offset: int, stop: int | None) -> None:
        """Fetch [offset, stop), or its beginning, unless it comes soon; who waits calls this now and then.

        If the rest is not due, raises the error with which the origin has just refused the byte, or
        StorageFailed.
        """
        transfers = self._transfers
        if self._rest.due:
            offset, stop = awaited(transfers.upload, offset, stop)
        if transfers.upload.has(offset):
            return
        if not self._rest.due:
            if transfers.upload.failed:
                error = StorageFailed(f"{self._fill.digest} cannot be written on")
                self._rest.fail(error)
                raise error
            transfers.refusals.check(offset)
        stop = transfers.size if stop is None else min(stop, transfers.size)
        if offset >= stop or transfers.upload.failed or transfers.ranges is False:
            return
        if transfers.refusals.paused and not transfers.waiting.places:
            transfers.waiting.add(source, offset, stop)
        elif (stop := transfers.parts.late(offset, stop)) > offset:
            transfers.start(source, offset, stop)

    async def _hear(self) -> None:
        """Want what the clients of other processes wait for."""
        while True:
            await asyncio.sleep(HEARING)  # other processes can only leave a note in a file
            self._transfers.count(self._transfers.upload.extents.count)
            for wish in self._transfers.upload.wanted.hear():
                if wish.start == wish.stop:
                    self._rest.demand()
                elif self._transfers.size >= 0:
                    self._heard(self._fill.source, wish)
                elif self._fill.queued:
                    self._spawn(self.begin(self._fill.source, Span(wish.start, wish.stop)))

    def _heard(self, source: BlobSource, wish: Wish) -> None:
        transfers = self._transfers
        self._rest.heard(Span(wish.start, wish.stop))
        if wish.client and not transfers.upload.has(wish.start):
            transfers.clients.add(wish.client)
        transfers.refusals.forgive(wish.start, wish.stop)
        self.want(source, wish.start, wish.stop)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
