"""The tree of the configuration becomes the tree of registries, and what looks after their store.

No listeners, no processes, no loops: the workers, the keeper, and the commands that find no server running
all stand on it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace

from proxy.cache.cache import Cache
from proxy.cache.drill import Drill
from proxy.cache.fills import Fills
from proxy.cache.keep_fresh import Freshener
from proxy.cache.policy import Policy
from proxy.config.errors import StartError
from proxy.config.schema import Config, Hosting, NamespaceConfig
from proxy.config.upstream import UpstreamConfig as UpstreamKeys
from proxy.namespaces.hosted import Hosted, PushRules
from proxy.namespaces.routing import Member, Namespaces
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.usage_recorder import UsageRecorder
from proxy.upstream.client import UpstreamRegistry
from proxy.upstream.configured import connect_of, credentials_of
from proxy.upstream.failover import Failover
from proxy.upstream.requests import Settings
from proxy.webhooks.publisher import Publisher
from proxy.webhooks.queue import Queue
from storage.concurrency import RateLimit, Slots, share_of
from storage.disk.blobs import BlobFiles
from storage.disk.health import DiskHealth, MakeRoom, may_pass, nobody
from storage.disk.records import Records
from storage.errors import StorageFailed
from storage.maintenance.collection import Collection, CollectionReport
from storage.maintenance.eviction import Eviction, EvictionRules
from storage.maintenance.leases import Leases
from storage.maintenance.pins import Pin, Pins
from storage.maintenance.reachability import KeepTags
from storage.maintenance.reachability import RetentionRules as KeepRules
from storage.maintenance.scrub import Scrub
from storage.maintenance.usage import Usage
from storage.oci import Digest, Tag
from storage.store import Store


class Composition:
    """Raises StartError.  It belongs into one event loop; `workers` share what is bounded over all."""

    def __init__(
        self,
        config: Config,
        clock: Callable[[], float] = time.time,
        metrics: Metrics | None = None,
        workers: int = 1,
        make_room: MakeRoom = nobody,
    ) -> None:
        self.config = config
        self.clock = clock
        self.metrics = metrics or Metrics()
        self._workers = workers
        self._make_room = make_room
        self._closing = AsyncExitStack()
        try:
            self._compose()
        except StorageFailed as error:
            raise StartError(f"cannot store in {config.disk.path} (disk.path): {error}") from error

    def _compose(self) -> None:
        config, clock = self.config, self.clock
        root = config.disk.path / "cache"
        self.disk = DiskHealth(root, clock)
        self.files = BlobFiles(root, clock, self.disk)
        try:
            self.files.check()
        except StorageFailed as error:
            if not may_pass(error):
                raise
        self.store = Store(self.files, Records(root / "records", clock, self.disk), clock)
        self._closing.push_async_callback(self.store.close)
        self.usage = Usage(self.store.records, clock)
        self.recorder = UsageRecorder(self.store, self.usage, self.metrics, clock)
        self._closing.push_async_callback(self.recorder.close)
        self.queue = self._queue() if config.webhooks else None
        self.teller = self._teller(self.queue) if self.queue else None
        self.fills = Fills(
            self.store,
            self.metrics,
            self._turns(),
            make_room=self._make_room,
            clock=clock,
        )
        self.drill = Drill(clock)
        self.upstreams: dict[str, UpstreamRegistry] = {}  # of each cache, the one whose word is final
        self.caches = {name: self._cache(name, *each) for name, each in config.cached().items()}
        self._closing.push_async_callback(self.fills.close)  # before what they read from
        self.private = self._private() if config.hosted() else None
        self.hosted = {name: self._host(name, each) for name, each in config.hosted().items()}
        registries = {**self.caches, **self.hosted}
        members = [
            Member(registries[name], name, each.aliases, each.hosts, each.library)
            for name, each in config.namespaces.items()
        ]
        stores = [self.store] if self.private is None else [self.store, self.private]
        self.namespaces = Namespaces(members, config.default_namespace, stores)
        self.pins = Pins(
            self.store, [Pin(each.match, each.keep_fresh, each.platforms) for each in config.pins], clock
        )
        self.eviction = Eviction(self.store, self._rules(), self.pins.pinned, clock)
        self.scrub = Scrub(self.store, config.disk.scrub, clock)
        self.scrubs = [self.scrub]
        if self.private is not None:
            self.scrubs.append(Scrub(self.private, config.disk.scrub, clock, kept=None))
        self.collection = None if self.private is None else self._collection(self.private)
        self.freshener = Freshener(self.namespaces, self.store, self.pins, clock)
        self.disks = [each.files.disk for each in stores] + ([self._events] if config.webhooks else [])

    def _private(self) -> Store:
        store = private_store(self.config, self.clock)
        self._closing.push_async_callback(store.close)
        return store

    def _host(self, name: str, hosting: Hosting) -> Hosted:
        assert self.private is not None
        rules = PushRules(hosting.sparse, hosting.immutable_tags)
        leases = self._leases(self.private)
        # By way of the fills: whoever keeps house in this process is told to them.
        return Hosted(
            name,
            self.private,
            leases,
            rules,
            make_room=lambda coming: self.fills.make_room(coming),
            moved=self.teller.moved if self.teller else None,
        )

    def _queue(self) -> Queue:
        root = self.config.disk.path / "events"
        self._events = DiskHealth(root, self.clock)
        queue = Queue(Records(root / "records", self.clock, self._events, durable=True), self.clock)
        self._closing.callback(queue.close)
        return queue

    def _teller(self, queue: Queue) -> Publisher:
        teller = Publisher(queue, self.config.webhooks, self.metrics, self.clock)
        self._closing.push_async_callback(teller.close)
        return teller

    async def tag_moved(self, repository: str, tag: Tag, old: Digest, new: Digest) -> None:
        """In a cache."""
        self.recorder.moved(repository, tag, old, new)
        if self.teller is not None:
            await self.teller.moved(repository, tag, old, new)

    def _leases(self, store: Store) -> Leases:
        return Leases(store, self.config.disk.collect_grace, self.clock)

    def _collection(self, store: Store) -> Collection:
        def rules(repository: str) -> KeepRules:
            hosting = self.config.hosted().get(repository.partition("/")[0])
            if hosting is None:  # the namespace is gone from the configuration; what was pushed to it is not
                return KeepRules()
            tags = tuple(KeepTags(each.match, each.last) for each in hosting.keep_tags)
            return KeepRules(hosting.keep_untagged_for, tags, hosting.immutable_tags)

        return Collection(store, rules, self._leases(store), self.clock, done=self._count_collected)

    def _count_collected(self, report: CollectionReport) -> None:
        self.metrics.collected_blobs.inc(report.blobs)
        self.metrics.collected.inc(report.bytes)
        if not report.refused:
            self.metrics.collected_at.set(report.begun)

    def _turns(self) -> Slots:
        namespaces = self.config.cached().items()
        shares = {name: share_of(upstream.max_fills, self._workers) for name, (_, upstream) in namespaces}
        return Slots(share_of(self.config.limits.fills, self._workers), shares)

    def _rules(self) -> EvictionRules:
        config = self.config
        offline = [name for name, each in config.namespaces.items() if config.offline or each.offline]
        return EvictionRules(
            keep_for=config.keep_for,
            default_keep_for=config.disk.keep_for,
            limit=config.disk.cache_limit,
            evict_to=config.disk.evict_to,
            min_free=config.disk.min_free.of,
            limits={
                name: each.cache_limit
                for name, each in config.namespaces.items()
                if each.cache_limit is not None
            },
            kept=frozenset(offline),
        )

    @property
    def evicts(self) -> bool:
        """Whether there is an age at which anything goes."""
        config = self.config
        ages = [config.disk.keep_for]
        for each in config.namespaces.values():
            ages += [rule.keep_for for rule in each.repositories]
            ages += [] if each.keep_for is None else [each.keep_for]
        return any(map(math.isfinite, ages))

    def _cache(self, name: str, namespace: NamespaceConfig, upstream: UpstreamKeys) -> Cache:
        try:
            connect = connect_of(upstream)
            credentials = [credentials_of(login) for login in upstream.logins()]
            bandwidth = RateLimit(share_of(upstream.bandwidth, self._workers) if upstream.bandwidth else None)
            origins = []
            for url in upstream.url:
                reach = replace(connect, plain_http=upstream.allows_http(url))
                given = Settings(url, reach, upstream.token_realms, upstream.reserve.of, bandwidth)
                origins.append(UpstreamRegistry(name, given, credentials, self.metrics, self.clock))
        except OSError as error:
            needed = (upstream.ca_file, upstream.client_certificate, upstream.client_key)
            files = ", ".join(str(each) for each in needed if each is not None)
            raise StartError(f"namespaces.{name}.upstream: {files}: {error.strerror or error}") from error
        policy = Policy(
            fresh_for=namespace.fresh_for_tag,
            negative_for=namespace.negative_for,
            drop_deleted=namespace.on_upstream_delete == "drop",
            offline=namespace.offline or self.config.offline,
            lazy=namespace.lazy,
        )
        self.upstreams[name] = origins[-1]
        origin = origins[0] if len(origins) == 1 else Failover(origins, self.clock)
        cache = Cache(name, origin, self.store, self.fills, policy, self.clock, self.tag_moved, self.drill)
        self._closing.push_async_callback(cache.close)
        return cache

    def store_of(self, namespace: str) -> Store:
        """The store that holds what is stored of a namespace."""
        return self.private if self.private is not None and namespace in self.hosted else self.store

    async def close(self) -> None:
        """Stop what goes on, and let go of all."""
        await self._closing.aclose()


def private_store(config: Config, clock: Callable[[], float] = time.time) -> Store:
    """Where all that is pushed lies.  Nothing of it goes but what nobody can reach.  Raises StorageFailed."""
    root = config.disk.path / "private"
    files = BlobFiles(root, clock, private=True)
    records = Records(root / "records", clock, files.disk, durable=True)
    return Store(files, records, clock, collected=True)
