"""The parts that maintain the stores of a composition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from proxy.cache.keep_fresh import Freshener
from proxy.cache.shared_store import SharedStore
from proxy.config.schema import Config
from proxy.namespaces.retention import deletions, eviction_rules, retention_rules
from proxy.namespaces.routing import Namespaces
from proxy.telemetry.metrics import Metrics
from storage.maintenance.collection import Collection, CollectionReport
from storage.maintenance.counting import Counting
from storage.maintenance.eviction import Eviction, EvictionReport
from storage.maintenance.leases import Leases
from storage.maintenance.pins import PinnedContent, Pins
from storage.maintenance.scrub import Scrub
from storage.maintenance.shared_uses import SharedUses
from storage.store import Store

if TYPE_CHECKING:  # only a server with webhooks imports them
    from proxy.webhooks.outbox import Outbox

SCRUBBED = ("cache", "private")  # stores, as metrics name them


@dataclass(frozen=True, slots=True)
class SharedUpkeep:
    """What keeps the store small that the caches of several servers share.

    uses: is run by each server, before one of them runs `eviction`
    """

    uses: SharedUses
    counting: Counting
    eviction: Eviction


@dataclass(frozen=True, slots=True, kw_only=True)
class Maintenance:
    """What the housekeeping of a server runs, and what an operator can start.

    countings, scrubs: the one of the caches' store first
    shared: of the store that servers share
    """

    freshener: Freshener
    eviction: Eviction
    countings: list[Counting]
    scrubs: list[Scrub]
    collection: Collection | None
    shared: SharedUpkeep | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MaintenanceFactory:
    """Makes the maintenance of the stores of one configuration.  `pause` is that of Hooks."""

    config: Config
    clock: Callable[[], float]
    metrics: Metrics
    pause: Callable[[float], None]
    pins: Pins

    def make(
        self,
        store: Store,
        private: Store | None,
        namespaces: Namespaces,
        outbox: Outbox | None,
        common: SharedStore | None,
    ) -> Maintenance:
        """`common` is the store that servers share, if there is one; `outbox` is that of `private`."""
        pace = self.config.disk.scrub
        countings = [Counting(each, self.pause) for each in (store, private) if each is not None]
        counted = [partial(self._count_scrubbed, name) for name in SCRUBBED]
        scrubs = [Scrub(store, pace, self.clock, counting=countings[0], counted=counted[0])]
        if private is not None:
            kept = Scrub(private, pace, self.clock, kept=None, counting=countings[1], counted=counted[1])
            scrubs.append(kept)
        rules = eviction_rules(self.config)
        made = Maintenance(
            freshener=Freshener(namespaces, store, self.pins, self.clock),
            eviction=Eviction(
                store, rules, self.pins.pinned, self.clock, self.pause, countings[0], self._count_evicted
            ),
            countings=countings,
            scrubs=scrubs,
            collection=None if private is None else self._collection(private, outbox),
            shared=None,
        )
        return made if common is None else self._shared(made, store, common)

    def _shared(self, made: Maintenance, store: Store, common: SharedStore) -> Maintenance:
        """With the upkeep of the store that servers share, of which `store` has a part."""
        caches, counting = self.config.shared.caches, Counting(common, self.pause)
        assert caches is not None
        rules = replace(
            eviction_rules(self.config),
            keep_for=lambda repository: caches.keep_for,
            default_keep_for=caches.keep_for,
            limit=caches.cache_limit,
            min_free=lambda size: 0,
            limits={},
        )
        pinned = self._pinned_in(common)
        eviction = Eviction(common, rules, pinned, self.clock, self.pause, counting, self._count_evicted)
        return replace(made, shared=SharedUpkeep(SharedUses(store, common, self.clock), counting, eviction))

    def _pinned_in(self, common: SharedStore) -> Callable[[], PinnedContent]:
        """What the pins keep of the store that servers share."""

        def pinned() -> PinnedContent:
            return Pins(common, self.pins.known(), self.clock).pinned()

        return pinned

    def _collection(self, store: Store, outbox: Outbox | None) -> Collection:
        return Collection(
            store,
            partial(retention_rules, self.config, self.pins),
            leases(self.config, store, self.clock),
            self.clock,
            self.pause,
            self._count_collected,
            deletions(outbox, self.clock),
        )

    def _count_collected(self, report: CollectionReport) -> None:
        self.metrics.collected_tags.inc(report.tags)
        self.metrics.collected_blobs.inc(report.blobs)
        self.metrics.collected.inc(report.bytes)
        refused = bool(report.refused or any(row.refused for row in report.rows))
        self.metrics.collections.labels("refused" if refused else "done").inc()
        self.metrics.collection_seconds.observe(report.seconds)
        if not report.refused:
            self.metrics.collected_at.set(report.begun)

    def _count_evicted(self, report: EvictionReport, reason: str) -> None:
        self.metrics.evicted_blobs.labels(reason).inc(report.blobs)
        self.metrics.evicted.labels(reason).inc(report.bytes)
        self.metrics.eviction_seconds.labels(reason).observe(report.seconds)
        if reason == "limit":
            self.metrics.eviction_short.set(report.short)

    def _count_scrubbed(self, store: str, name: str, number: int) -> None:
        self.metrics.scrubbed(name).labels(store).inc(number)


def leases(config: Config, store: Store, clock: Callable[[], float]) -> Leases:
    """The leases of a private registry."""
    return Leases(store, config.disk.collect_grace, clock)
