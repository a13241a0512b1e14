"""Events in the records of a store, from the transaction of what they tell of until the queues have them.

    outbox <process> <number>    an event, as JSON

So no event is lost if a process is killed between that transaction and the queues, or if the queues cannot
be written: the housekeeping of a server with the same records finds it, a minute or two later.  Numbers begin
with the time in µs.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress

import structlog

from proxy.webhooks.event import Event, decode, encode
from proxy.webhooks.publisher import Publisher
from storage.concurrency import uninterrupted
from storage.errors import StorageFailed
from storage.keys import OUTBOX
from storage.records import Batch, batches
from storage.store import Store

log = structlog.get_logger()

LEFT = 60.0  # seconds after which the process that recorded an event has died, or cannot queue it
GATHERED = 1.0  # seconds for which records of queued events are gathered, to remove them in one transaction
AGAIN = 10.0  # seconds until a removal that failed is tried again: before others find them
_TIME, _COUNT = 16, 6  # digits of the two parts of a number


class Outbox:
    """The events of changes of a store, recorded in the transactions that make them.

    Who has recorded events calls flush() after the transaction.  A process has one for each store.
    """

    def __init__(self, store: Store, publisher: Publisher, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._publisher = publisher
        self._clock = clock
        self._process = uuid.uuid4().hex
        self._numbers = itertools.count()
        self._flushing = asyncio.Lock()
        self._queued: set[str] = set()  # keys of records that are to be removed
        self._closing = asyncio.Event()
        self._removing: asyncio.Task[None] | None = None

    def record(self, batch: Batch, events: Iterable[Event]) -> None:
        """Record those events that a webhook wants, as part of a transaction."""
        for event in filter(self._publisher.wanted, events):
            at = int(self._clock() * 1_000_000)
            number = f"{at:0{_TIME}}{next(self._numbers):0{_COUNT}}"
            batch.put(OUTBOX.key(self._process, number), encode(event))

    async def flush(self) -> None:
        """Queue what this process has recorded.  Raises nothing: what fails stays recorded."""
        await uninterrupted(self._flush())

    async def _flush(self) -> None:
        async with self._flushing:
            with suppress(StorageFailed):  # the records have logged it; resume() finds what is there
                found = await self._store.run(self._read, OUTBOX.prefix(self._process))
                await self._publisher.publish_kept(filter(None, found.values()))
                self._queued |= found.keys()
        removing = self._removing is not None and not self._removing.done()
        if self._queued and not removing and not self._closing.is_set():
            self._removing = asyncio.create_task(self._remove_later())

    def _read(self, prefix: str) -> dict[str, Event | None]:
        queued = set(self._queued)  # as it is now: one that is removed meanwhile may still be read
        records = self._store.records.scan(prefix)
        return {key: decode(value) for key, value in records if key not in queued}

    async def _remove_later(self) -> None:
        wait = GATHERED
        while self._queued:  # also what is queued while others are removed
            with suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._closing.wait()
            keys = sorted(self._queued)
            try:
                await self._store.run(self._remove, keys)
            except StorageFailed:  # during a move, for example, for some seconds
                if self._closing.is_set():
                    break
                wait = AGAIN
            else:
                self._queued.difference_update(keys)
                wait = GATHERED

    def _remove(self, keys: Iterable[str]) -> None:
        for some in batches(keys):

            def work(batch: Batch, some: list[str] = some) -> None:
                for key in some:
                    batch.delete(key)

            self._store.records.transaction(work, shared=True)

    async def resume(self) -> None:
        """Queue what was recorded a minute ago and is still there.  Raises StorageFailed."""
        await self._store.run(self._resume, asyncio.get_running_loop())

    def _resume(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._left():
            return
        with self._store.records.turn("outbox") as ours:
            if ours and (found := self._left()):
                events = sorted(filter(None, found.values()), key=lambda event: event.at)
                asyncio.run_coroutine_threadsafe(self._publisher.publish_kept(events), loop).result()
                self._remove(found)
                log.info("webhook.resumed", events=len(found))

    def _left(self) -> dict[str, Event | None]:
        before = f"{int((self._clock() - LEFT) * 1_000_000):0{_TIME}}"
        found = self._read(OUTBOX.prefix())
        return {key: event for key, event in found.items() if OUTBOX.parse(key)[1] < before}

    async def close(self) -> None:
        """Remove the records of what is queued."""
        self._closing.set()
        if self._removing is not None:
            await asyncio.wait([self._removing])
