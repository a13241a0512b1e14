"""Eviction as an operator asks for it: what is evicted now, and what is evicted next."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from itertools import islice

from proxy.admin.activity_reports import Evictable, EvictableRow, LimitRow
from proxy.admin.inventory import finite_or_none
from proxy.admin.reports import Evicted
from proxy.admin.rows import evicted
from proxy.namespaces.composition import Composition
from proxy.namespaces.references import FieldInvalid
from storage.concurrency import run_in_thread

Lock = asyncio.Lock | AbstractAsyncContextManager[None]


class EvictionControl:
    """Evicts from the cache of a composition.  Others that evict in this process hold `evicting`."""

    def __init__(self, parts: Composition, evicting: Lock) -> None:
        self._parts = parts
        self._eviction = parts.maintenance.eviction
        self._evicting = evicting

    async def evict(self, to: int | None, dry_run: bool) -> Evicted:
        """Raises FieldInvalid, StorageFailed."""
        if to is not None and to < 0:
            raise FieldInvalid("to", "must be a number of bytes, 0 or more")
        if to is None:  # an expiry needs the totals; meanwhile others can make room
            await run_in_thread(self._parts.maintenance.countings[0].run)
        async with self._evicting:
            return await run_in_thread(self._evict, to, dry_run)

    def _evict(self, to: int | None, dry_run: bool) -> Evicted:
        if to is not None:
            return evicted([self._eviction.shrink(0, to, dry_run)], dry_run)
        expired = self._eviction.expire(dry_run)
        if not dry_run:
            return evicted([expired, self._eviction.shrink()], dry_run)
        # Nothing was deleted, so a second report would count much of it again: both begin with the oldest.
        if self._eviction.over() <= expired.bytes:
            return evicted([expired], dry_run)
        return evicted([self._eviction.shrink(0, None, dry_run)], dry_run)

    def upcoming(self, limit: int) -> Evictable:
        """The next `limit` blobs that are evicted.  Blocks; raises StorageFailed."""
        config, stored = self._parts.config, self._eviction.stored()
        rows, left = [], stored
        for blob, repositories, expires in islice(self._eviction.upcoming(), limit + 1):
            left -= blob.size
            rows.append(
                EvictableRow(
                    digest=str(blob.digest),
                    bytes=blob.size,
                    last_used=blob.used_at,
                    repositories=repositories,
                    left=max(0, left),
                    expires=finite_or_none(expires),
                )
            )
        limits = {name: each.cache_limit for name, each in config.namespaces.items()}
        return Evictable(
            stored=stored,
            limit=config.disk.cache_limit,
            over=self._eviction.over(),
            limits=[
                LimitRow(namespace=name, limit=each) for name, each in limits.items() if each is not None
            ],
            rows=rows[:limit],
            more=len(rows) > limit,
        )
