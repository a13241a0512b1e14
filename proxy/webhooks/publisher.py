"""Puts events into the queues of the webhooks: gathered in memory, and written in one transaction.

A push is answered once its events are in the queues.  If the queues cannot be written, the push succeeds all
the same: events that an outbox keeps come later, others are lost, and the first loss is logged as an error.
Pulls are written a little later, and no request waits for them.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import structlog

from proxy.config.webhooks import WebhookConfig
from proxy.telemetry.metrics import Metrics
from proxy.webhooks.event import Event, about_tag
from proxy.webhooks.queue import Queue
from storage.concurrency import run_in_thread, shielded
from storage.errors import StorageFailed
from storage.oci import Digest, Tag

log = structlog.get_logger()

LATER = 0.1  # seconds for which pulls are gathered
GATHERED = 10_000  # events in memory above which further pulls are lost
PENDING = 1_000_000  # pending events of a webhook above which further pulls are lost


class _Gathered(NamedTuple):
    """An event that is to be written; `kept` if it is not lost when that fails."""

    event: Event
    kept: bool


class Publisher:
    """Publishes the events of one process, in one event loop.  `wake` is called after events were queued."""

    def __init__(
        self,
        queue: Queue,
        webhooks: Sequence[WebhookConfig],
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._queue = queue
        self._webhooks = webhooks
        self._metrics = metrics
        self._clock = clock
        self._wake = wake
        self.pulls = any("pull" in each.actions for each in webhooks)  # whether any webhook wants them
        self._gathered: list[_Gathered] = []
        self._lost: Counter[str] = Counter()  # pulls that exceeded GATHERED
        self._losing: set[str] = set()  # webhooks whose loss of events is logged already
        self._later: asyncio.TimerHandle | None = None
        self._writing: asyncio.Task[None] | None = None
        # The error with which the events gathered now are written, if any.
        self._written: asyncio.Future[StorageFailed | None] | None = None

    async def publish(self, event: Event) -> None:
        """Return when the event is in all queues that it belongs to, or is lost.  Raises nothing."""
        await self._publish([event], kept=False)

    async def publish_kept(self, events: Iterable[Event]) -> None:
        """Return when `events`, which the caller keeps until then, are in the queues, in this order.

        Raises StorageFailed if they are in none.
        """
        if error := await self._publish(events, kept=True):
            raise error

    async def _publish(self, events: Iterable[Event], kept: bool) -> StorageFailed | None:
        if not (wanted := [_Gathered(each, kept) for each in events if self.wanted(each)]):
            return None
        self._gathered += wanted
        if self._written is None:
            self._written = asyncio.get_running_loop().create_future()
        written = self._written
        self._write()
        return await shielded(written)

    def wanted(self, event: Event) -> bool:
        """Whether it belongs to any queue."""
        return bool(self._recipients(event))

    async def held(self, repository: str, tag: Tag, old: Digest, new: Digest) -> None:
        """Publish that a tag is held at `old`, though its upstream moved it to `new`."""
        await self.publish(about_tag("hold", self._clock(), repository, tag, old, new))

    def publish_later(self, event: Event) -> None:
        """Publish a pull, without waiting until it is written."""
        if len(self._gathered) >= GATHERED:
            for name in self._recipients(event):
                self._lost[name] += 1
            return
        self._gathered.append(_Gathered(event, kept=False))
        if self._later is None and self._writing is None:
            self._later = asyncio.get_running_loop().call_later(LATER, self._write)

    def _recipients(self, event: Event) -> list[str]:
        return [
            each.name
            for each in self._webhooks
            if each.wants(event.action, event.repository, event.media_type)
        ]

    def _write(self) -> None:
        if self._later is not None:
            self._later.cancel()
            self._later = None
        if self._writing is None:
            self._writing = asyncio.create_task(self._run())

    async def _run(self) -> None:
        try:
            while self._gathered or self._lost:
                gathered, self._gathered = self._gathered, []
                written, self._written = self._written, None
                lost, self._lost = self._lost, Counter()
                error = None
                try:
                    error = await self._put(gathered, lost)
                finally:
                    if written is not None:
                        written.set_result(error)
        finally:
            self._writing = None

    async def _put(self, gathered: list[_Gathered], lost: Counter[str]) -> StorageFailed | None:
        cause, failure = f"{GATHERED} wait to be written", None
        # In a thread, since matching many patterns takes time.
        names = await run_in_thread(lambda: [self._recipients(each.event) for each in gathered])
        queued: Counter[str] = Counter()
        if any(names):
            recipients = [(each.event, some) for each, some in zip(gathered, names, strict=True)]
            try:
                queued = await run_in_thread(self._queue.put, recipients, PENDING)
                self._wake()
            except StorageFailed as error:
                cause, failure = str(error), error
        expected = Counter(
            name
            for each, some in zip(gathered, names, strict=True)
            if not (failure and each.kept)
            for name in some
        )
        if short := expected - queued:
            lost += short
            cause = f"{PENDING} are pending" if queued else cause
        self._count(queued, lost, cause)
        return failure

    def _count(self, queued: Counter[str], lost: Counter[str], cause: str) -> None:
        for name, events in lost.items():
            self._metrics.webhook_events.labels(name, "lost").inc(events)
            if name not in self._losing:
                log.error("webhook.lost", webhook=name, events=events, cause=cause)
        for name, events in queued.items():
            self._metrics.webhook_events.labels(name, "queued").inc(events)
        self._losing = (self._losing - queued.keys()) | lost.keys()

    async def close(self) -> None:
        """Write the gathered events and stop."""
        self._write()
        while self._writing is not None:
            await asyncio.wait([self._writing])
