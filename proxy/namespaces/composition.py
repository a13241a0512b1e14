"""The registries of a configuration, and the parts that maintain their stores.

`compose` turns the configuration into a `Composition`.  It opens no listener and starts no process and no
task: the server's processes do, and the commands that work without a server.

    <disk.path>/cache      blobs and records of all caches
    <disk.path>/private    blobs and records of the private registry, if a namespace has `store:`
    <disk.path>/events     queues of the webhooks, if there are any
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from proxy.cache.cache import Cache
from proxy.cache.copies import BlobCopies
from proxy.cache.deposits import Deposits
from proxy.cache.drill import Drill
from proxy.cache.fills import Fills
from proxy.cache.shared_store import SharedStore
from proxy.cache.turns import ClientSlots
from proxy.config.errors import StartError
from proxy.config.registry_hosts import EVERY
from proxy.config.schema import Config
from proxy.extensions.extension import Extensions
from proxy.namespaces.caches import CacheFactory, Caches
from proxy.namespaces.engines import shared_caches, signed_objects
from proxy.namespaces.hooks import NONE, Hooks
from proxy.namespaces.hosted import Hosted, PushRules
from proxy.namespaces.private import private_store
from proxy.namespaces.routing import Member, Namespaces
from proxy.namespaces.tag_move_recorder import TagMoveRecorder
from proxy.namespaces.upkeep import Maintenance, MaintenanceFactory, leases
from proxy.namespaces.webhook_factory import outboxes_of, queue_and_publisher
from proxy.policy.guard import PolicyGuard
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.usage_recorder import UsageRecorder
from proxy.upstream.client import UpstreamRegistry
from proxy.upstream.fleet import fleet_of
from proxy.upstream.listing_memory import ListingMemory
from proxy.upstream.peers import Peers
from storage.disk.blobs import BlobFiles
from storage.disk.format import take_over
from storage.disk.health import DiskHealth, may_pass
from storage.disk.records import SQLiteRecords
from storage.disk.troubles import Troubled, Troubles
from storage.errors import StorageFailed
from storage.maintenance.pins import Pin, Pins
from storage.maintenance.pull_journal import PullJournal
from storage.maintenance.pulls import Pulls
from storage.maintenance.usage import Usage
from storage.shared import SharedState
from storage.store import Store

if TYPE_CHECKING:  # only a server with webhooks imports them
    from proxy.webhooks.outbox import Outbox
    from proxy.webhooks.publisher import Publisher
    from proxy.webhooks.queue import Queue


@dataclass(frozen=True, slots=True, kw_only=True)
class Composition:
    """All parts of a configuration, for one event loop.  `compose` makes it, close() closes every part.

    store, private: the store of all caches, and the one of all hosted namespaces
    copies: the files that are copies of what the private registry has in a bucket
    common, deposits: the store that the caches of several servers share, and what hands blobs over to it
    disks: the state of each directory and database that the parts write to
    shared: what all processes of the server know
    outbox, outboxes: the events for webhooks of the private registry, and of each store
    moves: records and publishes that a tag of a cache moved
    peers: the other replicas of the fleet, if it is one
    extensions: those that the configuration names; those of its parts are loaded
    upstreams, caches, hosted: by namespace; of several upstreams the last, whose answer is final.  Those of a
        host of the namespace `*` are there once a client has asked for it.
    """

    config: Config
    clock: Callable[[], float]
    metrics: Metrics
    shared: SharedState
    store: Store
    common: SharedStore | None
    deposits: Deposits | None
    private: Store | None
    copies: BlobCopies
    disks: list[Troubled]
    usage: Usage
    recorder: UsageRecorder
    queue: Queue | None
    publisher: Publisher | None
    outbox: Outbox | None
    outboxes: list[Outbox]
    moves: TagMoveRecorder
    drill: Drill
    fills: Fills
    peers: Peers | None
    upstreams: dict[str, UpstreamRegistry]
    caches: dict[str, Cache]
    hosted: dict[str, Hosted]
    namespaces: Namespaces
    guard: PolicyGuard
    extensions: Extensions
    pins: Pins
    maintenance: Maintenance
    closing: AsyncExitStack

    @property
    def stores(self) -> list[Store]:
        return [self.store] if self.private is None else [self.store, self.private]

    @property
    def all_stores(self) -> list[Store]:
        """With what the caches share with those of other servers."""
        return self.stores if self.common is None else [*self.stores, self.common]

    def is_cache(self, namespace: str) -> bool:
        """Whether it is the name of a cache, which may still have to be made."""
        return namespace not in self.hosted and self.config.namespace(namespace) is not None

    def store_of(self, namespace: str) -> Store:
        """The store that holds the content of a namespace."""
        return self.private if self.private is not None and namespace in self.hosted else self.store

    async def close(self) -> None:
        await self.closing.aclose()


def compose(
    config: Config,
    clock: Callable[[], float] = time.time,
    metrics: Metrics | None = None,
    shared: SharedState | None = None,
    hooks: Hooks = NONE,
) -> Composition:
    """Make all parts of `config`; processes with the same `shared` share its limits.  Raises StartError."""
    try:
        with ExitStack() as failed:
            shared = shared or SharedState()
            metrics = metrics or Metrics(shared.exemplars)
            take_over(config.disk.path)
            made = _Composer(config, clock, metrics, shared, hooks, failed).compose()
            failed.pop_all()
            return made
    except StorageFailed as error:
        raise StartError(f"cannot store in {config.disk.path} (disk.path): {error}") from error


class _Composer:
    """Makes the parts of one composition, the last closed first.  `failed` closes them after an error."""

    def __init__(
        self,
        config: Config,
        clock: Callable[[], float],
        metrics: Metrics,
        shared: SharedState,
        hooks: Hooks,
        failed: ExitStack,
    ) -> None:
        self._config = config
        self._clock = clock
        self._metrics = metrics
        self._shared = shared
        self._hooks = hooks
        self._failed = failed
        self._closing = AsyncExitStack()
        self._disks: list[Troubled] = []
        self._troubles = Troubles(shared.disks)
        self._listings = ListingMemory()
        self._extensions = Extensions(config.extensions, metrics, clock)
        if (reader := signed_objects(config.shared)) is not None:
            self._closing.push_async_callback(reader.close)
        self._reader = reader

    def compose(self) -> Composition:
        # long: each part takes a line
        config, clock = self._config, self._clock
        self._load()
        store = self._store()
        usage, recorder = self._usage(store)
        queue, publisher = self._webhooks()
        drill = Drill(clock, self._hooks.drill_begun, config.key_of)
        common, deposits = self._common(store)
        fills = self._fills(store, deposits)
        copies = self._copies(store, fills)
        private = self._private(copies, store)
        outboxes = outbox, cached, upstream = self._outboxes(publisher, private, store, common)
        moves = TagMoveRecorder(recorder, cached, config.policy.active, clock)
        peers = fleet_of(config, clock, self._metrics, self._shared)
        held = publisher.held if publisher else None
        guard = PolicyGuard(config, store, clock, self._metrics, held, self._extensions)
        factory = CacheFactory(
            config=config,
            clock=clock,
            metrics=self._metrics,
            shared=self._shared,
            store=store,
            common=common,
            fills=fills,
            listener=moves if common is None else TagMoveRecorder(recorder, None, config.policy.active),
            upstream_listener=TagMoveRecorder(None, upstream, clock=clock),
            drill=drill,
            listings=self._listings,
            guard=guard,
            extensions=self._extensions,
            peers=peers,
        )
        made = self._caches(factory)
        hosted = self._hosted(private, outbox, copies) if private else {}
        namespaces = self._namespaces(store, private, guard, made, hosted)
        pins = self._pins(store, private, common)
        upkeep = MaintenanceFactory(
            config=config, clock=clock, metrics=self._metrics, pause=self._hooks.pause, pins=pins
        )
        return Composition(
            config=config,
            clock=clock,
            metrics=self._metrics,
            shared=self._shared,
            store=store,
            common=common,
            deposits=deposits,
            private=private,
            copies=copies,
            disks=self._disks,
            usage=usage,
            recorder=recorder,
            queue=queue,
            publisher=publisher,
            outbox=outbox,
            outboxes=[each for each in outboxes if each is not None],
            moves=moves,
            drill=drill,
            fills=fills,
            peers=peers,
            upstreams=made.upstreams,
            caches=made.caches,
            hosted=hosted,
            namespaces=namespaces,
            guard=guard,
            extensions=self._extensions,
            pins=pins,
            maintenance=upkeep.make(store, private, namespaces, outbox, common),
            closing=self._closing,
        )

    def _load(self) -> None:
        """Make the extensions that parts of every composition call; others the process makes that does."""
        self._failed.callback(self._extensions.abandon)
        self._closing.push_async_callback(self._extensions.close)
        self._extensions.load("credential_provider", "upstream", "storage", "policy_condition")

    def _fills(self, store: Store, deposits: Deposits | None) -> Fills:
        return Fills(
            store,
            self._metrics,
            self._slots(),
            self._slots("ranges"),
            make_room=self._hooks.make_room,
            clock=self._clock,
            deposits=deposits,
            known=self._shared.upstreams,
        )

    def _caches(self, factory: CacheFactory) -> Caches:
        made = Caches(factory)
        if factory.peers is not None:
            self._closing.push_async_callback(factory.peers.close)
        for each in (made, factory.fills, factory.guard):  # the last first, before what they read from
            self._closing.push_async_callback(each.close)
        return made

    # Storage

    def _pins(self, store: Store, private: Store | None, common: Store | None) -> Pins:
        configured = [Pin(each.match, each.keep_fresh, each.platforms) for each in self._config.pins]
        remote = [each.records for each in (private, common) if each is not None and each.records.remote]
        shared = remote[0] if remote else None
        return Pins(store, configured, self._clock, shared)

    def _store(self) -> Store:
        root = self._config.disk.path / "cache"
        disk = DiskHealth(root, self._clock, self._troubles)
        files = BlobFiles(root, self._clock, disk)
        try:
            files.check()
        except StorageFailed as error:
            if not may_pass(error):
                raise
        return self._opened(Store(files, SQLiteRecords(root / "records", self._clock, disk), self._clock))

    def _common(self, store: Store) -> tuple[SharedStore, Deposits] | tuple[None, None]:
        if self._config.shared.caches is None:
            return None, None
        given = self._clock, self._troubles, self._extensions, self._reader
        common, deposits = shared_caches(self._config, store, *given)
        self._opened(common)
        self._closing.push_async_callback(deposits.close)
        return common, deposits

    def _copies(self, store: Store, fills: Fills) -> BlobCopies:
        copies = BlobCopies(store, fills)
        self._closing.push_async_callback(copies.close)
        return copies

    def _private(self, copies: BlobCopies, store: Store) -> Store | None:
        if not self._config.hosted():
            return None
        given = self._clock, self._troubles, copies, self._extensions, self._reader, store.records
        return self._opened(private_store(self._config, *given))

    def _opened(self, store: Store) -> Store:
        self._closing.push_async_callback(store.close)
        self._disks += [store.files.disk, store.records, store]
        self._failed.callback(store.records.close)
        return store

    def _usage(self, store: Store) -> tuple[Usage, UsageRecorder]:
        usage = Usage(store.records, self._clock)
        keep = self._config.policy.journal
        journal = None if keep is None else PullJournal(store.records, keep, self._clock)
        recorder = UsageRecorder(store, usage, self._metrics, self._clock, journal)
        self._closing.push_async_callback(recorder.close)
        return usage, recorder

    def _webhooks(self) -> tuple[Queue, Publisher] | tuple[None, None]:
        if not self._config.webhooks:
            return None, None
        disk = DiskHealth(self._config.disk.path / "events", self._clock, self._troubles)
        self._disks.append(disk)
        given = self._config, disk, self._clock, self._metrics, self._hooks.wake
        queue, publisher = queue_and_publisher(*given)
        self._closing.callback(queue.close)
        self._failed.callback(queue.close)
        self._closing.push_async_callback(publisher.close)
        return queue, publisher

    def _outboxes(self, publisher: Publisher | None, *stores: Store | None) -> list[Outbox | None]:
        made = outboxes_of(stores, publisher, self._clock)
        for each in filter(None, made):
            self._closing.push_async_callback(each.close)
        return made

    # Registries

    def _slots(self, kind: str = "") -> ClientSlots:
        part = 2 if self._hooks.background else 1
        cached = self._config.cached().items()
        each = {name: max(1, upstream.max_fills // part) for name, (_, upstream) in cached}
        total, key_of = max(1, self._config.limits.fills // part), self._config.key_of
        return ClientSlots(total, each, self._shared, key_of, kind)

    def _hosted(self, store: Store, outbox: Outbox | None, copies: BlobCopies) -> dict[str, Hosted]:
        pulls = Pulls(store, self._clock)
        return {
            name: Hosted(
                name,
                store,
                leases(self._config, store, self._clock),
                PushRules(each.sparse, each.immutable_tags),
                pulls,
                self._hooks.make_room,
                outbox=outbox,
                clock=self._clock,
                copies=copies,
            )
            for name, each in self._config.hosted().items()
        }

    def _namespaces(
        self,
        store: Store,
        private: Store | None,
        guard: PolicyGuard,
        made: Caches,
        hosted: Mapping[str, Hosted],
    ) -> Namespaces:
        served = {
            **{name: guard.of(name, each, store) for name, each in made.caches.items()},
            **{name: guard.of(name, each, private or store) for name, each in hosted.items()},
        }
        members = [
            Member(served[name], name, each.aliases, each.hosts, each.library, each.names)
            for name, each in self._config.namespaces.items()
            if name != EVERY
        ]
        catalogs = [guard.catalog(each) for each in (store, private) if each is not None]
        return Namespaces(members, self._config.default_namespace, catalogs, others=made.others)
