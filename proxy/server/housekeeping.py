"""Keeping house: what nobody uses, or nothing reaches, or is too much goes; pins stay fresh; all is checked.

Of all processes on a directory one does it at a time.  It stands back behind those that serve: it has a low
priority, and what is not urgent works half of the time.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress

import structlog

from proxy.admin.readiness import Readiness
from proxy.admin.warm import Warmer
from proxy.admin.warm_schedule import Schedule
from proxy.config.schema import Config
from proxy.namespaces.composition import Composition
from proxy.webhooks.delivery import Dispatcher
from storage.concurrency import Cancelled, run_in_thread
from storage.errors import RegistryError, StorageFailed
from storage.oci import Digest

log = structlog.get_logger()

ABANDONED = 86400.0  # seconds after which a partial file that nobody went on with is removed
ROUND = 300.0  # seconds between lookings after what needs no more than that
REFRESHED = 60.0  # seconds between lookings for pins that are due
SETTLED = 3600.0  # seconds before the first collection: after an outage pushes go on with what is old by then
CHECKED = 86400.0  # seconds for which what was found right is let be
AGAIN = 60.0  # seconds after a piece of work failed


class Housekeeper:
    """run() until it is cancelled, then close()."""

    def __init__(
        self,
        composition: Composition,
        forget: Callable[[str], Awaitable[None]],
        deliveries: Dispatcher | None = None,
    ) -> None:
        self._composition = composition
        self._deliveries = deliveries
        self._eviction = composition.maintenance.eviction
        self._stopping = threading.Event()
        self.evicting = asyncio.Lock()  # one at a time
        readiness = Readiness(composition.store, composition.private, composition.hosted)
        warmer = Warmer(composition.namespaces, readiness, forget)
        rules = composition.config.warm
        self._fetching: set[asyncio.Task[object]] = set()
        self.schedule = Schedule(rules, warmer, composition.store.records, composition.clock)

    def pause(self, seconds: float) -> None:
        """In the thread that works.  Raises Cancelled when all is to end."""
        if self._stopping.wait(seconds):
            raise Cancelled

    async def run(self) -> None:
        composition = self._composition
        async with composition.store.exclusive("keeper"), asyncio.TaskGroup() as work:
            work.create_task(self._again_and_again(self._round, ROUND))
            work.create_task(self._again_and_again(self._refresh, REFRESHED))
            if self._deliveries is not None:
                work.create_task(self._again_and_again(self._deliver, AGAIN))
            if composition.config.warm:
                work.create_task(self._again_and_again(self._warm, REFRESHED))
            if _expires(composition.config):
                work.create_task(self._again_and_again(self.expire, composition.config.disk.evict_every))
            if composition.config.disk.scrub is not None:
                work.create_task(self._again_and_again(self._scrub, ROUND))
            if (
                composition.maintenance.collection is not None
                and composition.config.disk.collect_every is not None
            ):
                work.create_task(self._collect_now_and_then())

    async def _again_and_again(self, work: Callable[[], Awaitable[object]], every: float) -> None:
        while True:
            seconds = every
            try:
                await work()
            except Cancelled:
                return
            except StorageFailed:
                seconds = min(seconds, AGAIN)  # the disk has told of it
            except Exception as error:
                seconds = min(seconds, AGAIN)
                log.exception("keeper.failed", work=work.__name__.strip("_"), error=str(error))
            await asyncio.sleep(seconds)

    async def make_room(self, coming: int) -> None:
        """Evict where what is there and `coming` bytes more are too much."""
        async with self.evicting:
            with suppress(StorageFailed, Cancelled):
                if await run_in_thread(self._eviction.over, coming):
                    await run_in_thread(self._eviction.shrink, coming)

    async def _round(self) -> None:
        begun = time.monotonic()
        composition = self._composition
        await self.make_room(0)
        composition.metrics.stored.set(await run_in_thread(self._eviction.stored))
        stores = [composition.store] + ([composition.private] if composition.private else [])
        if reaped := sum([await run_in_thread(each.files.reap, ABANDONED) for each in stores]):
            log.info("partial.reaped", files=reaped)
        # To look at a million files takes seconds: so it takes a small part of the time.
        await asyncio.sleep(200 * (time.monotonic() - begun))

    async def expire(self) -> None:
        async with self.evicting:
            await run_in_thread(self._eviction.expire)

    async def _deliver(self) -> None:
        assert self._deliveries is not None
        await self._deliveries.run()

    async def _refresh(self) -> None:
        await self._fetch(self._composition.maintenance.freshener.run_once)

    async def _warm(self) -> None:
        await self._fetch(self.schedule.run_once)

    async def _fetch(self, work: Callable[[], Coroutine[None, None, object]]) -> None:
        """Do it, unless a drill goes on, and until one begins: then it is put off, which is no failure."""
        if self._composition.drill.left:
            return
        task = asyncio.create_task(work())
        self._fetching.add(task)
        try:
            await asyncio.wait({task})
        finally:
            self._fetching.discard(task)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        if not task.cancelled():
            task.result()

    def put_off(self) -> None:
        for task in self._fetching:
            task.cancel()

    async def _scrub(self) -> None:
        cache, *private = self._composition.maintenance.scrubs
        await cache.run(self.heal, older_than=CHECKED)
        for scrub in private:  # what was pushed can be fetched from nowhere
            await scrub.run(older_than=CHECKED)

    async def _collect_now_and_then(self) -> None:
        await asyncio.sleep(SETTLED)
        await self._again_and_again(self._collect, ROUND)

    async def _collect(self) -> None:
        """Where the last collection, by whomever, is long enough ago."""
        collection, every = (
            self._composition.maintenance.collection,
            self._composition.config.disk.collect_every,
        )
        assert collection is not None and every is not None
        if not 0 <= self._composition.clock() - collection.last().begun < every:
            await run_in_thread(collection.run)

    async def heal(self, digest: Digest, repositories: list[str]) -> bool:
        """Fetch what was damaged again, for one of those that show it."""
        for repository in repositories:
            with suppress(RegistryError):
                await self._composition.namespaces.fill_blob(repository, digest)
                return True
        return False

    def close(self) -> None:
        """Before run() is cancelled: what works in a thread ends soon."""
        self._stopping.set()


def _expires(config: Config) -> bool:
    """Whether content of any cache is removed by its age."""
    ages = [config.disk.keep_for]
    for each in config.namespaces.values():
        ages += [rule.keep_for for rule in each.repositories]
        ages += [] if each.keep_for is None else [each.keep_for]
    return any(map(math.isfinite, ages))
