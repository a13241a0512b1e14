"""Where the policy stands: in front of each namespace, if there is anything to judge."""

from __future__ import annotations

from collections.abc import Callable

from proxy.cache.cache import Cache
from proxy.config.schema import Config
from proxy.extensions.extension import Extensions
from proxy.policy.judge import Judge
from proxy.policy.moves import TagHeld, TagHolds
from proxy.policy.overrides import Overrides
from proxy.policy.policed import PolicedCache, PolicedCatalog, PolicedRegistry
from proxy.policy.rules import RuleBook
from proxy.telemetry.metrics import Metrics
from storage.concurrency import SingleFlight
from storage.registry import Registry
from storage.store import Store


class PolicyGuard:
    """Puts the policy in front of registries.  Raises StartError if a file of the policy cannot be read.

    caches: the store of all caches
    rules: those of the policy; None without one
    held: is called when a tag is held
    extensions: those that are conditions are made already
    """

    def __init__(
        self,
        config: Config,
        caches: Store,
        clock: Callable[[], float],
        metrics: Metrics,
        held: TagHeld | None = None,
        extensions: Extensions | None = None,
    ) -> None:
        policy = config.policy
        self._locks = config.access.api_keys
        self._metrics = metrics
        self._clock = clock
        self.rules = RuleBook(policy, clock, extensions=extensions) if policy.active else None
        self._judges: dict[str, Judge] = {}
        self._flights = SingleFlight()
        self.overrides = Overrides(caches, clock)
        self.holds = TagHolds(caches, policy.moves, clock, metrics, held)

    def of(self, namespace: str, registry: Registry, store: Store) -> Registry:
        """What serves a namespace, of which `store` has the records: the registry itself without a policy."""
        served = self._policed(namespace, registry, store)
        if not self._locks:
            return served  # no client has an API key, which may be for a lock file
        from proxy.policy.key_locks import KeyLocks, LockedCache, LockedRegistry

        locks = KeyLocks(namespace, registry, store, self._clock, self._flights)
        kind = LockedCache if isinstance(registry, Cache) else LockedRegistry
        return kind(served, locks, self._metrics)

    def _policed(self, namespace: str, registry: Registry, store: Store) -> Registry:
        if self.rules is None:
            return registry
        judge = Judge(namespace, registry, store, self.rules, self.overrides, self._clock, self._flights)
        self._judges[namespace] = judge
        if isinstance(registry, Cache):
            return PolicedCache(registry, judge, self._metrics, self.holds, self.overrides)
        return PolicedRegistry(registry, judge, self._metrics)

    def catalog(self, registry: Registry) -> Registry:
        """What lists the repositories of `registry`, by their full names: without those that are refused."""
        return registry if self.rules is None else PolicedCatalog(registry, self._lists)

    def _lists(self, repository: str) -> bool:
        assert self.rules is not None
        return self.rules.refusing(repository) is None or self.overrides.concern(repository)

    async def close(self) -> None:
        """End what is being verified."""
        await self._flights.close()

    def judge(self, namespace: str) -> Judge | None:
        """Who judges the content of a namespace that is there; nobody without a policy."""
        return self._judges.get(namespace)
