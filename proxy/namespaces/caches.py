"""The caches of a configuration: how each is made of its settings, and those of the namespace `*`.

The namespace `*` stands for the hosts that its upstream lists.  The cache of such a host is made when a
client first asks for it, by each process for itself: what is stored belongs to the host's name, so that it
is found again by other processes, and after a restart.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, replace

import structlog

from proxy.cache.cache import Cache
from proxy.cache.drill import Drill
from proxy.cache.fills import Fills
from proxy.cache.policy import Policy, Threshold
from proxy.cache.shared_store import SharedStore
from proxy.cache.shared_tier import SharedTier
from proxy.cache.tag_listener import TagListener
from proxy.config.errors import StartError
from proxy.config.hosts import host_in_path
from proxy.config.registry_hosts import EVERY, find_pattern, registry_host
from proxy.config.schema import Config, NamespaceConfig
from proxy.config.upstream import UpstreamConfig
from proxy.extensions.extension import Extensions
from proxy.namespaces.routing import Member
from proxy.policy.guard import PolicyGuard
from proxy.telemetry.metrics import Metrics
from proxy.upstream.client import UpstreamRegistry
from proxy.upstream.configured import connect_of, credentials_of
from proxy.upstream.extended import ExtendedUpstream
from proxy.upstream.failover import Failover
from proxy.upstream.listing_memory import ListingMemory
from proxy.upstream.peers import Owners, Peers
from proxy.upstream.requests import UpstreamSettings
from storage.errors import Unavailable
from storage.limits import RateLimit
from storage.oci import NameGrammar
from storage.registry import Registry
from storage.shared import SharedState
from storage.store import Store

log = structlog.get_logger()

IDLE = 300.0  # seconds after its last request until the cache of a host may make place for another


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheFactory:
    """Makes caches over one store; if several servers share a store, before that.

    listener: is called when a cache learns that a tag moved
    upstream_listener: and when one of several servers does, from the upstream
    """

    config: Config
    clock: Callable[[], float]
    metrics: Metrics
    shared: SharedState
    store: Store
    common: SharedStore | None
    fills: Fills
    listener: TagListener
    upstream_listener: TagListener | None
    drill: Drill
    listings: ListingMemory
    guard: PolicyGuard
    extensions: Extensions
    peers: Peers | None = None

    def make(self, name: str, settings: NamespaceConfig) -> tuple[Cache, UpstreamRegistry | None]:
        """The cache of a namespace, and the last of its upstreams, if that is remote.  Raises StartError."""
        assert settings.upstream is not None
        if (wanted := settings.upstream.extension) is not None:
            source = ExtendedUpstream(name, self.extensions.get(wanted), self.metrics)
            return self._cache(name, source, settings), None
        upstreams = self._upstreams(name, settings.upstream)
        origin = Failover(upstreams, self.clock, self._owners(name, settings, upstreams))
        return self._cache(name, origin, settings), upstreams[-1]

    def _cache(self, name: str, origin: Registry, settings: NamespaceConfig) -> Cache:
        policy = self._policy(settings)
        if self.common is None:
            return Cache(name, origin, self.store, self.fills, policy, self.clock, self.listener, self.drill)
        else:
            tier = SharedTier(
                name, origin, self.common, policy, self.clock, self.drill, self.upstream_listener
            )
            local = before_shared(policy)
            return Cache(name, tier, self.store, self.fills, local, self.clock, self.listener)

    def _upstreams(self, name: str, upstream: UpstreamConfig) -> list[UpstreamRegistry]:
        """One for each URL.  Raises StartError if a file that they need cannot be read."""
        key = self.config.key_of(name)
        bandwidth = RateLimit(upstream.bandwidth, self.shared.upstreams, key)
        others = self.config.others
        private = others is None or key == name or others.lists(name)
        made = []
        with _start_errors(key, upstream):
            connect = replace(connect_of(upstream), private_home=private)
            credentials = [credentials_of(login, self.extensions) for login in upstream.logins()]
            for url in upstream.url:
                reach = replace(connect, plain_http=upstream.allows_http(url))
                settings = UpstreamSettings(
                    url, reach, upstream.token_realms, upstream.reserve.of, bandwidth,
                    shared=self.shared, listings=self.listings,
                )  # fmt: skip
                made.append(UpstreamRegistry(name, settings, credentials, self.metrics, self.clock))
        return made

    def _owners(
        self, name: str, settings: NamespaceConfig, upstreams: Sequence[UpstreamRegistry]
    ) -> Owners | None:
        """The other replicas that are asked first, if there are any."""
        if self.peers is None or settings.upstream is None:
            return None
        logins = settings.upstream.logins()
        accounts = [credentials_of(each, self.extensions).account for each in logins]
        tags = [(each.match.pattern, each.fresh_for) for each in settings.tags]
        rules = settings.upstream.url, accounts, settings.fresh_for, tags
        offline = settings.offline or self.config.offline
        return self.peers.owners(name, rules, upstreams, lambda: offline or self.drill.cuts(name))

    def check(self, name: str, upstream: UpstreamConfig) -> None:
        """Read the files that an upstream needs.  Raises StartError."""
        with _start_errors(name, upstream):
            connect_of(upstream).ssl_context()

    def _policy(self, namespace: NamespaceConfig) -> Policy:
        until = namespace.lazy_until
        return Policy(
            fresh_for=namespace.fresh_for_tag,
            negative_for=namespace.negative_for,
            absent_for=namespace.absent_for,
            revalidate_timeout=namespace.revalidate_timeout,
            drop_deleted=namespace.on_upstream_delete == "drop",
            offline=namespace.offline or self.config.offline,
            lazy=Threshold(until.share, until.clients) if namespace.lazy else None,
            refuse_incomplete=namespace.refuse_incomplete,
        )


def before_shared(policy: Policy) -> Policy:
    """The policy of a cache before what servers share: that knows what is negative, listed and offline."""
    return replace(
        policy,
        fresh_for=lambda tag: policy.fresh_for(tag) if tag else 0.0,
        negative_for=0.0,
        drop_deleted=policy.drop_deleted and not policy.offline,
        offline=False,
    )


@contextmanager
def _start_errors(key: str, upstream: UpstreamConfig) -> Iterator[None]:
    """Name the files of an upstream in the error if one of them cannot be read."""
    try:
        yield
    except OSError as error:
        needed = (upstream.ca_file, upstream.client_certificate, upstream.client_key)
        files = ", ".join(str(each) for each in needed if each is not None)
        raise StartError(f"namespaces.{key}.upstream: {files}: {error.strerror or error}") from error


@dataclass(frozen=True, slots=True)
class HostSettings:
    """How names in the namespace of a host are read: see Member."""

    name: str
    library: bool
    names: NameGrammar


class HostCaches:
    """The caches of the namespace `*`, by host; they are also in `caches` and `upstreams`, of all namespaces.

    There are at most `most` at a time.  One more takes the place of the one that was asked for the longest
    ago; while all are in use, it is refused, unless the list has it by its full name.
    """

    def __init__(
        self,
        factory: CacheFactory,
        caches: dict[str, Cache],
        upstreams: dict[str, UpstreamRegistry],
        most: int,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._factory = factory
        self._caches = caches
        self._upstreams = upstreams
        self._most = most
        self._monotonic = monotonic
        self._members: dict[str, Member] = {}  # what was asked for last at its end
        self._asked: dict[str, float] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def settings(self, host: str) -> HostSettings | None:
        config = self._factory.config
        name = self._name(host)
        if name is None or config.key_of(name) != EVERY or (found := config.namespace(name)) is None:
            return None
        return HostSettings(name, found.library, found.names)

    def _name(self, text: str) -> str | None:
        """The host that a client names; registry.example_8443 is one with a port, unless it is listed so."""
        others, name = self._factory.config.others, registry_host(text)
        with_port = registry_host(host_in_path(text))
        if others is None or with_port is None or (name is not None and others.lists(name)):
            return name
        return with_port if find_pattern(others.hosts, with_port) else name

    def member(self, name: str) -> Member | None:
        member = self._members.pop(name, None) or self._make(name)
        if member is not None:
            self._members[name] = member
            self._asked[name] = self._monotonic()
        return member

    def _make(self, name: str) -> Member | None:
        config = self._factory.config
        if config.key_of(name) != EVERY or (found := config.namespace(name)) is None:
            return None
        if len(self._members) >= self._most:
            self._make_place(name)
        try:
            cache, upstream = self._factory.make(name, found)
        except StartError as error:  # a file was there when the server started
            raise Unavailable(str(error)) from error
        assert upstream is not None  # it has hosts
        self._caches[name], self._upstreams[name] = cache, upstream
        log.info("namespace.made", namespace=name)
        served = self._factory.guard.of(name, cache, self._factory.store)
        return Member(served, name, library=found.library, names=found.names)

    def _make_place(self, wanted: str) -> None:
        """Raises Unavailable if there is none."""
        busy = {each.source.namespace for each in self._factory.fills.in_flight()}
        for name in self._members:
            if name not in busy and self._rests(name):
                self._drop(name)
                return
        others = self._factory.config.others
        if others is None or not others.lists(wanted):
            raise Unavailable(
                f"{wanted} must wait: {self._most} other registries are in use, and"
                " namespaces.*.upstream.max_hosts allows no more",
                retry_after=IDLE,
            )

    def _rests(self, name: str) -> bool:
        """Whether no request uses it now, as far as can be told, or it does not answer.

        Whoever makes up names must not take the places of all others by that.
        """
        return self._monotonic() - self._asked[name] >= IDLE or not self._upstreams[name].healthy

    def _drop(self, name: str) -> None:
        member = self._members.pop(name)
        for table in (self._asked, self._caches, self._upstreams):
            del table[name]
        closing = asyncio.get_running_loop().create_task(member.registry.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Wait until the caches that were dropped are closed.  The others are closed by who has `caches`."""
        await asyncio.gather(*self._closing)


class Caches:
    """All caches of a configuration, and the last upstream of each, by namespace.  Raises StartError.

    `others` makes those of the namespace `*`, if there is one.
    """

    def __init__(self, factory: CacheFactory) -> None:
        self.caches: dict[str, Cache] = {}
        self.upstreams: dict[str, UpstreamRegistry] = {}
        self.others: HostCaches | None = None
        for name, (namespace, upstream) in factory.config.cached().items():
            if name == EVERY:
                factory.check(name, upstream)
                self.others = HostCaches(factory, self.caches, self.upstreams, upstream.max_hosts)
            else:
                self.caches[name], remote = factory.make(name, namespace)
                if remote is not None:
                    self.upstreams[name] = remote

    async def close(self) -> None:
        async with AsyncExitStack() as closing:
            for each in self.caches.values():
                closing.push_async_callback(each.close)
            if self.others is not None:
                closing.push_async_callback(self.others.close)
