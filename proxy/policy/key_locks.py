"""API keys that are for a lock file: of each namespace, their clients are served what the file has.

It is judged as a policy of one rule, which has no exceptions, beside the policy of the server.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from proxy.cache.refresh import Refreshable
from proxy.config.policy import PolicyConfig
from proxy.policy.judge import Judge
from proxy.policy.locks import LockedImages, parse_lock
from proxy.policy.overrides import NoOverrides
from proxy.policy.policed import PolicedRegistry
from proxy.policy.rules import RuleBook, ServingRule
from proxy.telemetry.exchange import KeyLock, current
from proxy.telemetry.metrics import Metrics
from storage.concurrency import SingleFlight
from storage.oci import Digest, Manifest, Reference, Tag
from storage.registry import Registry
from storage.store import Store

KEPT = 64  # keys whose judges are kept


class KeyLocks:
    """The judges of what clients with such keys may pull from one namespace."""

    def __init__(
        self,
        namespace: str,
        registry: Registry,
        store: Store,
        clock: Callable[[], float],
        flights: SingleFlight,
    ) -> None:
        self._namespace = namespace
        self._registry = registry
        self._store = store
        self._clock = clock
        self._judges: OrderedDict[KeyLock, Judge] = OrderedDict()
        self._flights = flights
        self.of_others = self._judge(RuleBook(PolicyConfig()))

    def of(self, lock: KeyLock) -> Judge:
        if (found := self._judges.get(lock)) is None:
            name = f"key:{lock.key}"
            locked = LockedImages(parse_lock("\n".join(lock.lines), name), f"the lock file of {name}")
            rule = ServingRule(name, True, "the key has a lock file", "enforce", conditions=(locked,))
            found = self._judges[lock] = self._judge(RuleBook(PolicyConfig(), rules=(rule,)))
            if len(self._judges) > KEPT:
                self._judges.popitem(last=False)
        self._judges.move_to_end(lock)
        return found

    def _judge(self, rules: RuleBook) -> Judge:
        registry, store = self._registry, self._store
        return Judge(self._namespace, registry, store, rules, NoOverrides(), self._clock, self._flights)


class LockedRegistry(PolicedRegistry):
    """The content of `registry`; for a client whose API key is for a lock file, what that has."""

    def __init__(self, registry: Registry, locks: KeyLocks, metrics: Metrics) -> None:
        super().__init__(registry, locks.of_others, metrics)
        self._locks = locks

    @property
    def _judge(self) -> Judge:
        lock = current().lock
        return self._locks.of_others if lock is None else self._locks.of(lock)


class LockedCache(LockedRegistry):
    """The same of a cache, which is refreshed for no client."""

    def __init__(self, cache: Registry, locks: KeyLocks, metrics: Metrics) -> None:
        super().__init__(cache, locks, metrics)
        assert isinstance(cache, Refreshable)
        self._cache = cache

    async def revalidate(self, repository: str, tag: Tag) -> tuple[str, Manifest, Digest | None]:
        """As Cache.revalidate()."""
        return await self._cache.revalidate(repository, tag)

    async def fill_blob(self, repository: str, digest: Digest) -> int:
        """As Cache.fill_blob()."""
        return await self._cache.fill_blob(repository, digest)

    def spare(self, repository: str, reference: Reference) -> None:
        """As Cache.spare()."""
        self._cache.spare(repository, reference)
