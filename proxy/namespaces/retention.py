"""What a configuration keeps: rules for eviction and retention, and the events of what these delete."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from proxy.config.registry_hosts import EVERY
from proxy.config.schema import Config
from proxy.webhooks.event import deletion
from storage.maintenance.collection import RemovalListener
from storage.maintenance.eviction import EvictionRules
from storage.maintenance.pins import Pins
from storage.maintenance.retention import KeepTags, RetentionRules
from storage.records import Batch

if TYPE_CHECKING:  # only a server with webhooks imports them
    from proxy.webhooks.outbox import Outbox


def eviction_rules(config: Config) -> EvictionRules:
    """The rules for the caches."""
    disk, namespaces = config.disk, config.namespaces.items()
    return EvictionRules(
        keep_for=config.keep_for,
        default_keep_for=disk.keep_for,
        limit=disk.cache_limit,
        evict_to=disk.evict_to,
        min_free=disk.min_free.of,
        limits={name: each.cache_limit for name, each in namespaces if each.cache_limit is not None},
        kept=frozenset(name for name, each in namespaces if config.offline or each.offline),
        key_of=lru_cache(maxsize=4096)(config.key_of),  # it is asked of each link
        shared=frozenset((EVERY,)),
    )


def retention_rules(config: Config, pins: Pins, repository: str) -> RetentionRules:
    """The rules for a repository, given by its full name."""
    namespace, _, relative = repository.partition("/")
    hosting = config.hosted().get(namespace)
    if hosting is None:  # the namespace was removed from the configuration; its content is kept
        return RetentionRules()
    tags = tuple(
        KeepTags(each.tag_patterns, each.last, each.pushed_within, each.pulled_within)
        for each in hosting.keep_tags
        if each.applies_to(relative)
    )
    return RetentionRules(hosting.keep_untagged_for, tags, hosting.immutable_tags, tuple(pins.list()))


class Deletions(RemovalListener):
    """Records the deletions for webhooks, for threads of the event loop that runs now."""

    def __init__(self, outbox: Outbox, clock: Callable[[], float]) -> None:
        self._outbox = outbox
        self._clock = clock
        self._loop = asyncio.get_running_loop()

    def record(self, batch: Batch, repository: str, tags: Sequence[str]) -> None:
        now = self._clock()
        self._outbox.record(batch, [deletion(now, repository, tag) for tag in tags])

    def removed(self) -> None:
        asyncio.run_coroutine_threadsafe(self._outbox.flush(), self._loop).result()


def deletions(outbox: Outbox | None, clock: Callable[[], float]) -> RemovalListener:
    return RemovalListener() if outbox is None else Deletions(outbox, clock)
