"""The metrics that are states of the server, and not counts: found out when somebody asks for them."""

from __future__ import annotations

import asyncio
import os
import platform
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version

from proxy.namespaces.composition import Composition
from proxy.namespaces.upkeep import SCRUBBED
from proxy.processes.state import ProcessReport
from proxy.server.health import MOMENT, Health, failing, troubles
from proxy.telemetry.metrics import Metrics
from storage.concurrency import run_in_thread
from storage.disk.troubles import Troubles
from storage.errors import RegistryError
from storage.keys import DEPOSIT
from storage.maintenance.collection import Collection
from storage.maintenance.scrub_progress import COUNTED

VERSION = version("entrepot")
TROUBLES = ("disk", "blobs", "records", "bucket", "database")  # kinds, whose numbers are shown from the start


class Observation:
    """Sets the metrics of a server that are states.  Must be closed.

    prepare() is called once, by the process that does the housekeeping: a count that begins at 0 shows its
    first increase, which an alert waits for.
    """

    def __init__(self, composition: Composition, health: Health, *, keeper: bool) -> None:
        self._composition = composition
        self._health = health
        self._keeper = keeper
        self._reading: asyncio.Task[None] | None = None
        self._troubles = Troubles(composition.shared.disks)

    @property
    def _metrics(self) -> Metrics:
        return self._composition.metrics

    def prepare(self) -> None:
        parts, metrics = self._composition, self._metrics
        metrics.build.labels(VERSION, platform.python_version()).set(1)
        for store, _ in zip(SCRUBBED, parts.maintenance.scrubs, strict=False):
            for name in COUNTED:
                metrics.scrubbed(name).labels(store)
        for reason in ("limit", "ttl", "asked"):
            metrics.evicted_blobs.labels(reason)
            metrics.evicted.labels(reason)
        if parts.maintenance.collection is not None:
            for result in ("done", "refused"):
                metrics.collections.labels(result)
        for webhook in parts.config.webhooks:
            for result in ("queued", "delivered", "failed", "dropped", "lost"):
                metrics.webhook_events.labels(webhook.name, result)
        for name in parts.config.extensions:
            for result in ("done", "failed", "late", "wrong"):
                metrics.extension_calls.labels(name, result)
        metrics.cache_limit.set(parts.config.disk.cache_limit or 0)

    async def observe(self) -> None:
        """Bring the states up to date."""
        metrics = self._metrics
        states = await self._health.states()
        metrics.degraded.set(bool(troubles(states) or failing(states)))
        kinds = Counter(each.kind for each in self._troubles)
        for kind in {*TROUBLES, *kinds}:
            metrics.troubles.labels(kind).set(kinds[kind])
        metrics.workers.set(len(states) - self._keeper)
        metrics.waiting.set(sum(each.queued and each.own for state in states for each in state.fills))
        metrics.credentials_refused.set(_refused(states))
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read())
        await asyncio.wait({self._reading}, timeout=MOMENT)  # else what was read last is shown

    async def _read(self) -> None:
        """Bring those up to date that a disk, a database or a name service may let wait."""
        parts, metrics = self._composition, self._metrics
        with suppress(OSError, RegistryError):
            await run_in_thread(self._observe_disk)
        if parts.peers is not None:
            metrics.peers.set(len(await parts.peers.known()))
        if (collection := parts.maintenance.collection) is not None:
            with suppress(RegistryError):
                await run_in_thread(self._observe_collection, collection)

    async def close(self) -> None:
        if self._reading is not None:
            await asyncio.gather(self._reading, return_exceptions=True)

    def _observe_disk(self) -> None:
        parts, metrics = self._composition, self._metrics
        status = os.statvfs(parts.config.disk.path)
        size = status.f_blocks * status.f_frsize
        metrics.disk_size.set(size)
        metrics.disk_free.set(status.f_bavail * status.f_frsize)
        metrics.disk_min_free.set(parts.config.disk.min_free.of(size))
        waiting = () if parts.deposits is None else parts.store.records.keys(DEPOSIT.prefix())
        metrics.deposits.set(sum(1 for _ in waiting))

    def _observe_collection(self, collection: Collection) -> None:
        """The last one may be that of a command, or of another server."""
        if begun := collection.last().begun:
            self._metrics.collected_at.set(begun)


def _refused(states: Sequence[ProcessReport]) -> int:
    """How many credentials upstreams refuse, by what any process knows."""
    return len(
        {
            (upstream.namespace, upstream.url, each.credential)
            for state in states
            for upstream in state.upstreams
            for each in upstream.refused
        }
    )
