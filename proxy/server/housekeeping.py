"""The background work on the stores: eviction, collection, scrubs, refreshing of pins, warming, webhooks.

One process of a server does it, and of several servers on one directory only one at a time.  It yields to
those that serve clients: it has a low priority, and rests as long as it worked where nothing is urgent.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import structlog

from proxy.config.schema import Config
from proxy.namespaces.composition import Composition
from storage.concurrency import Cancelled, run_in_thread
from storage.errors import RegistryError, StorageFailed
from storage.keys import LINK
from storage.oci import Digest
from storage.patient import RememberingStore
from storage.records import Records
from storage.totals import Totals

if TYPE_CHECKING:  # only a server with warm lists or webhooks imports them
    from proxy.admin.warm_schedule import Schedule
    from proxy.webhooks.delivery import Dispatcher

log = structlog.get_logger()

ABANDONED = 86400.0  # seconds without a write after which a partial file is removed
ROUND = 300.0  # seconds between two runs of work that has no interval of its own
REFRESHED = 60.0  # seconds between two searches for pins and warm lists that are due
SETTLED = 3600.0  # seconds before the first collection: after an outage, pushes resume with old content
CHECKED = 86400.0  # seconds for which a blob that was found intact is not checked again
AGAIN = 60.0  # seconds until work that failed is tried again


def warm_schedule(composition: Composition, forget: Callable[[str], Awaitable[None]]) -> Schedule | None:
    """The schedule of the warm lists, None if the configuration has none.

    `forget` drops what the workers remember of a repository whose upstream had nothing or did not answer.
    """
    if not (lists := composition.config.warm):
        return None
    from proxy.admin.readiness import Readiness
    from proxy.admin.warm import Warmer
    from proxy.admin.warm_schedule import Schedule

    readiness = Readiness(composition.store, composition.private, composition.hosted)
    warmer = Warmer(composition.namespaces, readiness, forget)
    return Schedule(lists, warmer, composition.store.records, composition.clock)


class Housekeeper:
    """Runs all background work of a composition.

    Call run() and, before cancelling it, close().
    """

    def __init__(
        self,
        composition: Composition,
        schedule: Schedule | None = None,
        dispatcher: Dispatcher | None = None,
    ) -> None:
        self._composition = composition
        self._dispatcher = dispatcher
        self._eviction = composition.maintenance.eviction
        self._collection = composition.maintenance.collection
        self._stopping = threading.Event()
        self._stored_by: set[str] = set()  # namespaces whose stored bytes are in the metrics
        self.evicting = asyncio.Lock()  # held by every eviction of this process
        self._evictions = 0  # that make room
        self._coming = 0  # bytes, at most, for which one is asked for room that waits
        self._schedule = schedule
        self._fetching: set[asyncio.Task[object]] = set()

    def pause(self, seconds: float) -> None:
        """Block the thread that works.  Raises Cancelled after close()."""
        if self._stopping.wait(seconds):
            raise Cancelled

    async def run(self) -> None:
        composition = self._composition
        async with composition.store.files.exclusive("keeper"), asyncio.TaskGroup() as work:
            work.create_task(self._forget_holds())
            work.create_task(self._repeat(self._count, ROUND))
            work.create_task(self._repeat(self._round, ROUND))
            work.create_task(self._repeat(self._refresh, REFRESHED))
            if (deposits := composition.deposits) is not None:
                work.create_task(self._repeat(deposits.resume, ROUND))
                work.create_task(self._repeat(self.evict_shared, composition.config.disk.evict_every))
            if self._dispatcher is not None:
                work.create_task(self._repeat(self._deliver, AGAIN))
            if composition.outboxes:
                work.create_task(self._repeat(self._resume, AGAIN))
            if isinstance(composition.private, RememberingStore):
                every = composition.config.shared.remember_for / 12
                work.create_task(self._repeat(composition.private.confirm, every))
            if self._schedule is not None:
                work.create_task(self._repeat(self._warm, REFRESHED))
            if _expires(composition.config):
                work.create_task(self._repeat(self.expire, composition.config.disk.evict_every))
            if composition.config.disk.scrub is not None:
                work.create_task(self._repeat(self._scrub, ROUND))
            else:
                work.create_task(self._repeat(self._verify_totals, CHECKED))
            if self._collection is not None and composition.config.disk.collect_every is not None:
                work.create_task(self._collect_regularly())

    async def _repeat(self, work: Callable[[], Awaitable[float | None]], every: float) -> None:
        """Do `work` again and again, `every` so many seconds and those that it returns."""
        task = work.__name__.strip("_")
        self._count_run(task, "done", 0)
        self._count_run(task, "failed", 0)
        while True:
            seconds, begun = every, time.monotonic()
            try:
                seconds += await work() or 0.0
                self._count_run(task, "done")
                metrics = self._composition.metrics
                metrics.housekeeping_seconds.labels(task).observe(time.monotonic() - begun)
                metrics.housekeeping_done_at.labels(task).set(self._composition.clock())
            except Cancelled:
                return
            except StorageFailed:
                seconds = min(seconds, AGAIN)  # the disk has logged it
                self._count_run(task, "failed")
            except Exception as error:
                seconds = min(seconds, AGAIN)
                log.exception("keeper.failed", work=task, error=str(error))
                self._count_run(task, "failed")
            await asyncio.sleep(seconds)

    def _count_run(self, task: str, result: str, number: int = 1) -> None:
        self._composition.metrics.housekeeping.labels(task, result).inc(number)

    async def _forget_holds(self) -> None:
        with suppress(StorageFailed):  # the next start does it
            await self._composition.guard.holds.forget()

    async def make_room(self, coming: int) -> None:
        """Evict if the cache and `coming` bytes more exceed a limit; who ask meanwhile share a look."""
        self._coming, asked = max(self._coming, coming), self._evictions
        async with self.evicting:
            if self._evictions > asked:
                return
            self._evictions += 1
            coming, self._coming = self._coming, 0
            with suppress(StorageFailed, Cancelled):
                if await run_in_thread(self._eviction.over, coming):
                    await run_in_thread(self._eviction.shrink, coming)
                else:
                    self._composition.metrics.eviction_short.set(0)

    async def _round(self) -> float:
        composition = self._composition
        await self.make_room(0)
        begun = time.monotonic()
        composition.metrics.stored.set(await run_in_thread(self._eviction.stored))
        await run_in_thread(self._count_stored)
        counted = time.monotonic() - begun
        if self._collection is not None:
            await run_in_thread(self._collection.watch.observe)
        if reaped := sum(
            [await run_in_thread(each.files.reap, ABANDONED) for each in composition.all_stores]
        ):
            log.info("partial.reaped", files=reaped)
        # Reading the totals of a hundred thousand repositories takes a second: rest in proportion.
        return 200 * counted

    def _count_stored(self) -> None:
        composition, metrics = self._composition, self._composition.metrics
        stored = dict.fromkeys(self._stored_by, 0)
        for each in composition.stores:
            for name, total in Totals(each.records).repositories():
                label = metrics.label(name.partition("/")[0])
                size = total.counted.bytes.get(LINK.name, 0) if total.counted else 0
                stored[label] = stored.get(label, 0) + size
        for label, size in stored.items():
            metrics.stored_by.labels(label).set(size)
        self._stored_by = set(stored)
        if composition.private is not None:
            metrics.stored_private.set(Totals(composition.private.records).stored() or 0)

    async def _count(self) -> None:
        for each in self._composition.maintenance.countings:
            await run_in_thread(each.run)

    async def _verify_totals(self) -> None:
        for each in self._composition.maintenance.countings:
            await run_in_thread(each.run, True)

    async def expire(self) -> None:
        # An expiry needs the totals.  Meanwhile others can make room.
        await run_in_thread(self._composition.maintenance.countings[0].run)
        async with self.evicting:
            await run_in_thread(self._eviction.expire)

    async def evict_shared(self) -> None:
        """Say what this server has used, and evict what none has, unless another server does."""
        composition, upkeep = self._composition, self._composition.maintenance.shared
        assert composition.common is not None and upkeep is not None
        await run_in_thread(upkeep.uses.report)
        async with _turn(composition.common.records, "evict") as ours:
            if ours:
                await run_in_thread(upkeep.counting.run)
                await run_in_thread(upkeep.eviction.expire)
                if await run_in_thread(upkeep.eviction.over):
                    await run_in_thread(upkeep.eviction.shrink)

    async def _deliver(self) -> None:
        assert self._dispatcher is not None
        await self._dispatcher.run()

    async def _resume(self) -> None:
        for each in self._composition.outboxes:
            await each.resume()

    async def _refresh(self) -> None:
        await self._fetch(self._composition.maintenance.freshener.run_once)

    async def _warm(self) -> None:
        assert self._schedule is not None
        await self._fetch(self._schedule.run_once)

    async def _fetch(self, work: Callable[[], Coroutine[None, None, object]]) -> None:
        """Do `work`, which asks upstreams.  A drill postpones it, which is no failure."""
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

    def postpone_fetches(self) -> None:
        """Called when a drill begins."""
        for task in self._fetching:
            task.cancel()

    async def _scrub(self) -> None:
        cache, *private = self._composition.maintenance.scrubs
        await cache.run(self.heal, older_than=CHECKED)
        for scrub in private:  # pushed content cannot be fetched again
            async with _turn(scrub.store.records, "scrub") as ours:
                if ours:
                    await scrub.run(older_than=CHECKED)

    async def _collect_regularly(self) -> None:
        await asyncio.sleep(SETTLED)
        await self._repeat(self._collect, ROUND)

    async def _collect(self) -> None:
        """Collect if the last collection, by any process or command, is `collect_every` ago."""
        collection, every = self._collection, self._composition.config.disk.collect_every
        assert collection is not None and every is not None
        if not 0 <= self._composition.clock() - collection.last().begun < every:
            await run_in_thread(collection.run)

    async def heal(self, digest: Digest, repositories: list[str]) -> bool:
        """Fetch a damaged blob again, for one of the repositories that link it."""
        for repository in repositories:
            with suppress(RegistryError):
                await self._composition.namespaces.fill_blob(repository, digest)
                return True
        return False

    def close(self) -> None:
        """Make work in threads end soon.  To be called before run() is cancelled."""
        self._stopping.set()


@asynccontextmanager
async def _turn(records: Records, name: str) -> AsyncIterator[bool]:
    """Whether this server has the turn at `name`, of all that share the records."""
    turn, entered = records.turn(name), []
    try:
        # 1. we are cancelled  2. the thread gets the turn: it is given back all the same
        await run_in_thread(lambda: entered.append(turn.__enter__()))
        yield entered[0]
    finally:
        if entered:
            await run_in_thread(turn.__exit__, None, None, None)


def _expires(config: Config) -> bool:
    """Whether content of any cache is removed by its age."""
    ages = [config.disk.keep_for]
    for each in config.namespaces.values():
        ages += [rule.keep_for for rule in each.repositories]
        ages += [] if each.keep_for is None else [each.keep_for]
    return any(map(math.isfinite, ages))
