"""Origin: the registry behind a cache, and when it may be asked."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import NamedTuple, NoReturn, Protocol, runtime_checkable

from proxy.cache.absences import ABSENCES, Absences, subject_of
from proxy.cache.doubts import Doubts
from proxy.cache.drill import Drill
from proxy.cache.negatives import Negatives, RequestKey
from proxy.cache.policy import Policy
from proxy.telemetry.exchange import current, origin_age
from proxy.telemetry.tracing import step
from storage.concurrency import SingleFlight
from storage.errors import (
    ManifestUnknown,
    OriginDenied,
    RegistryError,
    StorageFailed,
    TooManyRequests,
    Unavailable,
)
from storage.oci import Descriptor, Digest, Manifest, ManifestContent, Reference, Span, Tag
from storage.registry import Blob, Registry
from storage.store import Store


@runtime_checkable
class _RateLimited(Protocol):
    """An origin that grants a number of requests in a period."""

    @property
    def spares(self) -> bool: ...


@runtime_checkable
class _Guarded(Protocol):
    """An origin with a circuit breaker."""

    @property
    def healthy(self) -> bool: ...

    @property
    def probe_due(self) -> bool: ...

    @property
    def pause(self) -> float | None: ...

    async def probe(self) -> None: ...


class Vouched(NamedTuple):
    """What a tag stood for `age` seconds ago; `error` is why the origin could not be asked since."""

    digest: Digest
    age: float
    manifest: Manifest | None = None
    error: RegistryError | None = None


@runtime_checkable
class _Remembering(Protocol):
    """An origin that remembers what other registries said."""

    async def vouch(self, repository: str, tag: Tag, forced: bool) -> Vouched: ...

    def distrust(self, digest: Digest) -> None: ...

    def forget(self, repository: str) -> None: ...

    async def absence(self, repository: str, what: str) -> RegistryError | None: ...

    async def supplies(self, repository: str, content: ManifestContent) -> bool: ...


async def _probe(registry: _Guarded) -> None:
    await registry.probe()
    while not registry.healthy and (pause := registry.pause) is not None:
        await asyncio.sleep(pause)
        await registry.probe()


class CheckedRegistry(Registry):
    """The blobs of a registry that may not be asked at times: `check` raises the error then."""

    def __init__(self, registry: Registry, check: Callable[[], None]) -> None:
        self._registry = registry
        self._check = check

    async def get_blob(self, repository: str, digest: Digest, span: Span | None = None) -> Blob:
        self._check()
        return await self._registry.get_blob(repository, digest, span)

    async def resolve_blob(self, repository: str, digest: Digest) -> Descriptor:
        self._check()
        return await self._registry.resolve_blob(repository, digest)


LONGEST_PAUSE = 600.0  # seconds without asking about what is known, whatever Retry-After says
RECENT = 5.0  # seconds after a failure in which the origin is expected to fail again


class Origin:
    """The registry behind a cache, whose answers are kept in a store.

    It is not asked while the namespace is offline or cut off by a drill, nor, for some seconds, for what it
    has just said it does not know.  Requests for one thing at one time are one request: see `flights`.
    """

    def __init__(
        self,
        namespace: str,
        registry: Registry,
        store: Store,
        policy: Policy,
        clock: Callable[[], float],
        drill: Drill,
    ) -> None:
        self.namespace = namespace
        self.registry = registry
        self.flights = SingleFlight()
        self.failure: RegistryError | None = None  # the last one, until the origin serves again
        self._failed_at = -math.inf
        self.absences = Absences(store, policy.absent_for, clock)
        self._store = store
        self._policy = policy
        self._drill = drill
        self._clock = clock
        self.doubts = Doubts(store, clock)
        self._unknown = Negatives(clock)
        self._paused = Negatives(clock)

    def check(self, key: RequestKey) -> None:
        """Raise what is known without asking: the namespace is offline, or the origin's recent answer."""
        unknown, name, what = key
        if not self._set_offline:
            if (error := self._unknown.get(key)) is not None:
                raise error.copy(remembered=True)
            if not self._drill.cuts(self.namespace):
                return
            self._drill.missed()
        raise unknown(f"{what} of {name} is not cached, and {self.why_offline}")

    @property
    def offline(self) -> bool:
        return self._set_offline or self._drill.cuts(self.namespace)

    @property
    def _set_offline(self) -> bool:
        return self._policy.offline or current().stored_only

    @property
    def why_offline(self) -> str:
        if current().stored_only:
            return "only what is stored is asked for"
        return f"{self.namespace} is {'set offline' if self._policy.offline else 'cut off by a drill'}"

    def remember(self, key: RequestKey, error: RegistryError) -> None:
        if isinstance(key[2], Digest) and not isinstance(error, OriginDenied):
            self.doubts.add(key[1], key[2])
        if error.remembered:  # by another replica, and for as long as it should be
            return
        self._unknown.put(key, self._policy.negative_for, error)

    def pause(self, key: RequestKey, error: RegistryError) -> None:
        """Have the known value served for a while, instead of asking again at every request."""
        seconds = min(LONGEST_PAUSE, error.retry_after or 0)
        self._paused.put(key, max(self._policy.negative_for, seconds), error)

    def resume(self, key: RequestKey) -> None:
        self._paused.drop(key)

    def paused(self, key: RequestKey) -> RegistryError | None:
        return self._paused.get(key)

    def failed(self, error: Unavailable) -> None:
        # A rate limit is answered at once: no client waits for it.
        if not isinstance(error, TooManyRequests):
            self.failure = error
            self._failed_at = self._clock()

    @property
    def failing(self) -> bool:
        """Whether it is likely to fail again: its circuit is open, or its last failure is seconds old."""
        if isinstance(self.registry, _Guarded) and not self.registry.healthy:
            return True
        return self.failure is not None and 0 <= self._clock() - self._failed_at < RECENT

    async def reachable(self) -> bool:
        """Whether it may be asked, as far as is known.

        One that was down is probed when that is due, again and again if it may be back in a moment; the
        answer is waited for as long as for that of a tag, by all who ask meanwhile.
        """
        if self.offline:
            return False
        registry = self.registry
        if not isinstance(registry, _Guarded) or registry.healthy:
            return True
        if registry.probe_due or registry.pause is not None or self.flights.has("probe"):
            with suppress(TimeoutError):
                async with asyncio.timeout(self._policy.revalidate_timeout):
                    await self.flights.join("probe", lambda: _probe(registry))
        return registry.healthy

    async def supplies(self, repository: str, content: ManifestContent) -> bool:
        """Whether all that a manifest names may come, as far as is known."""
        if isinstance(self.registry, _Remembering):
            return await self.registry.supplies(repository, content)
        return await self.reachable()

    def served(self) -> None:
        """Record that the origin serves again."""
        self.failure = None

    async def fetch_manifest(self, repository: str, reference: Reference) -> Manifest:
        """The manifest, which is stored then.  Raises as get_manifest() does."""
        name, vouched = f"{self.namespace}/{repository}", None
        try:
            if isinstance(reference, Tag) and isinstance(self.registry, _Remembering):
                vouched = await self.registry.vouch(repository, reference, False)
            manifest = vouched.manifest if vouched else None
            if manifest is None:
                what = vouched.digest if vouched else reference
                manifest = await self.registry.get_manifest(repository, what)
            if vouched:
                origin_age.set(vouched.age)
        except ABSENCES as error:
            if not isinstance(error, OriginDenied):  # other credentials may be accepted at once
                self.remember((ManifestUnknown, name, reference), error)
            await self.keep(self.absences.add(name, reference, subject_of(reference), error))
            raise
        except Unavailable as error:
            self.failed(error)
            raise
        self.served()
        await self.absences.discard(name, reference, subject_of(reference))
        await self.keep(self._store.push_manifest(name, reference, manifest))
        if isinstance(reference, Tag) and (age := origin_age.get()):
            await self.keep(self._store.point(name, reference, manifest.digest, age))
        return manifest

    async def vouch(self, repository: str, tag: Tag, forced: bool = False) -> Vouched:
        """What the tag stands for; `forced`: even if an origin knows that itself.

        Raises as resolve_manifest() does.
        """
        if isinstance(self.registry, _Remembering):
            return await self.registry.vouch(repository, tag, forced)
        # HEAD does not count against a rate limit; GET does.
        digest = (await self.registry.resolve_manifest(repository, tag)).digest
        return Vouched(digest, origin_age.get())

    def distrust(self, digest: Digest) -> None:
        """What the origin sent of this blob was wrong."""
        if isinstance(self.registry, _Remembering):
            self.registry.distrust(digest)

    async def absence(self, repository: str, what: str) -> RegistryError | None:
        """The error for what the origin, which cannot be asked now, did not have when it was last asked.

        Another replica is not told: it may be able to ask.
        """
        if current().peer:
            return None
        if (known := await self.absences.get(f"{self.namespace}/{repository}", what)) is not None:
            message = f"{self.namespace} had no {what} of {repository} when it was last asked"
            return known.error(f"{message}, and cannot be asked now").copy(remembered=True)
        remembering = self.registry if isinstance(self.registry, _Remembering) else None
        return await remembering.absence(repository, what) if remembering else None

    async def fail(self, error: Unavailable, repository: str, what: str) -> NoReturn:
        """Raise its absence(), or if nothing is known of that, the error with which it could not be asked."""
        if (absence := await self.absence(repository, what)) is not None:
            raise absence from error
        raise error

    async def keep(self, writing: Awaitable[object]) -> None:
        """Await a write to the store; one that fails does not fail the pull."""
        # The disk has logged it; it is deleted already.
        with suppress(StorageFailed, ManifestUnknown), step("store.write"):
            await writing

    def spare(self, repository: str, reference: Reference) -> None:
        """Raise TooManyRequests if fetching the manifest would use up requests reserved for clients."""
        if isinstance(self.registry, _RateLimited) and not self.registry.spares:
            try:
                self._store.manifest(f"{self.namespace}/{repository}", reference)
            except (ManifestUnknown, StorageFailed):
                raise TooManyRequests(
                    f"the remaining requests that {self.namespace} grants are reserved for clients"
                ) from None

    def forget(self, repository: str) -> None:
        """Ask anew for what the origin did not know, and where it failed."""
        for remembered in (self._unknown, self._paused, self.doubts):
            remembered.forget(f"{self.namespace}/{repository}")
        if isinstance(self.registry, _Remembering):
            self.registry.forget(repository)

    async def close(self) -> None:
        await self.flights.close()
        await self.registry.close()
