"""Keeping pinned tags fresh: each is refreshed on its schedule, even if no client pulls it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import structlog

from proxy.cache.refresh import BACKOFF, LONGEST_BACKOFF, Refreshable, RefreshResult, refresh
from storage.concurrency import run_in_thread
from storage.errors import DigestInvalid, NameInvalid, RegistryError, TagInvalid
from storage.graph import walk
from storage.maintenance.pins import Pin, Pins
from storage.oci import Digest, Reference
from storage.store import Store

log = structlog.get_logger()


class Freshener:
    """Refreshes images pinned with `keep_fresh`, when so much time has passed since their last validation.

    An image that is incomplete in the store is refreshed at once: clients fetch only the parts for their
    platform.  A pin without wildcards is refreshed even before the first pull.  If several pins match, the
    shortest `keep_fresh` counts, and all of their platforms.  `clock` returns seconds since the epoch.
    """

    def __init__(
        self, registry: Refreshable, store: Store, pins: Pins, clock: Callable[[], float] = time.time
    ) -> None:
        self._registry = registry
        self._store = store
        self._pins = pins
        self._clock = clock
        # Failures in a row, and the time of the next attempt.
        self._failed: dict[tuple[str, Reference], tuple[int, float]] = {}

    async def due(self) -> list[tuple[str, Reference, Pin]]:
        """The images to refresh now.  Raises StorageFailed."""
        planned = await run_in_thread(self._planned)
        now = self._clock()
        return [(repository, reference, pin) for at, repository, reference, pin in planned if at <= now]

    async def next_at(self) -> float | None:
        """The time when the next image is due, or None.  Raises StorageFailed."""
        planned = await run_in_thread(self._planned)
        return min((at for at, *_ in planned if at < math.inf), default=None)

    async def run_once(self) -> list[RefreshResult | RegistryError]:
        """Refresh the images that are due, one by one.  Raises StorageFailed if the pins cannot be read."""
        return [await self._refresh(*each) for each in await self.due()]

    async def _refresh(
        self, repository: str, reference: Reference, pin: Pin
    ) -> RefreshResult | RegistryError:
        namespace, _, name = repository.partition("/")
        event = log.bind(namespace=namespace, repository=name, reference=reference, pattern=pin.pattern)
        key = repository, reference
        try:
            done = await refresh(self._registry, repository, reference, pin.platforms)
            if done.changed or key in self._failed:  # by digest: only the referrers are requested
                await refresh(self._registry, repository, done.digest, pin.platforms, referrers=True)
        except RegistryError as error:
            failures = self._failed.get(key, (0, 0.0))[0]
            # The exponent is limited, since failures are counted as long as the pin exists.
            wait = min(BACKOFF * 2 ** min(failures, 10), LONGEST_BACKOFF)
            wait = max(wait, error.retry_after or 0.0)
            self._failed[key] = failures + 1, self._clock() + wait
            event.warning("pin.failed", error=str(error) or error.code, again_in=wait)
            return error
        self._failed.pop(key, None)
        if done.changed:
            event.info(
                "pin.refreshed", digest=done.digest, old=done.moved, blobs=done.fetched, bytes=done.bytes
            )
        return done

    def _planned(self) -> list[tuple[float, str, Reference, Pin]]:
        """All images that are kept fresh, and when each is due."""
        pinned: dict[tuple[str, Reference], Pin] = {}
        for pin in self._pins.known():
            if pin.keep_fresh is None:
                continue
            found = set(self._pins.matching(pin))
            with suppress(NameInvalid, TagInvalid, DigestInvalid):  # such a pin matches nothing
                found |= {pin.exact} if pin.exact else set()
            for each in found:
                pinned[each] = _both(pinned[each], pin) if each in pinned else pin
        for unpinned in self._failed.keys() - pinned.keys():
            self._failed.pop(unpinned, None)
        return sorted(
            (
                (self._due_at(repository, reference, pin), repository, reference, pin)
                for (repository, reference), pin in pinned.items()
            ),
            key=lambda planned: planned[:3],
        )

    def _due_at(self, repository: str, reference: Reference, pin: Pin) -> float:
        if (failed := self._failed.get((repository, reference))) is not None:
            return failed[1]
        if isinstance(reference, Digest):
            return math.inf if self._complete(repository, reference, pin.platforms) else 0.0
        pointer = self._store.pointer(repository, reference)
        # A clock that was set back must not keep a tag fresh forever.
        if pointer is None or pointer.validated_at > self._clock():
            return 0.0
        if not self._complete(repository, pointer.digest, pin.platforms):
            return 0.0
        return pointer.validated_at + (pin.keep_fresh or 0.0)

    def _complete(self, repository: str, digest: Digest, platforms: Sequence[str]) -> bool:
        found = walk(self._store, repository, digest, platforms)
        return not found.missing and all(
            self._store.linked(repository, each) is not None
            for each, blob in found.blobs.items()
            if blob.distributable
        )


def _both(one: Pin, other: Pin) -> Pin:
    """A pin that keeps fresh what both do; no platforms mean all platforms."""
    platforms = one.platforms and other.platforms and tuple(dict.fromkeys(one.platforms + other.platforms))
    shortest = min(filter(None, (one.keep_fresh, other.keep_fresh)))
    return replace(one, keep_fresh=shortest, platforms=platforms)
