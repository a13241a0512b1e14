"""A pull-through cache: any registry (the origin) behind a store.

Digests never change meaning, so what is stored is served without asking.  Tags do, so a tag is served
without asking only while it is fresh; then it is revalidated by a HEAD, and fetched, by digest, only if
it has moved.  An origin that cannot be asked does not take a known tag away; one that refuses us does.
A store that cannot be used is passed by: the pull goes on from the origin.
"""

from __future__ import annotations

import asyncio
import math
import time
from bisect import bisect_right
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable

import structlog

from proxy.cache.drill import Drill
from proxy.cache.fills import Fills
from proxy.cache.negatives import Key, Negatives
from proxy.cache.readers import Source, UncachedBlob
from proxy.telemetry.exchange import current
from storage.concurrency import SingleFlight
from storage.disk.uploads import FileBlob
from storage.errors import (
    BlobUnknown,
    ManifestUnknown,
    NameUnknown,
    RegistryError,
    StorageFailed,
    TooManyRequests,
    Unavailable,
)
from storage.oci import Descriptor, Digest, Manifest, Reference, Span, Tag
from storage.registry import Blob, Moved, Registry
from storage.store import Store

log = structlog.get_logger()
T = TypeVar("T")

PATIENCE = 0.02  # seconds to wait for an origin that has failed, where something known can be served


@dataclass(frozen=True, slots=True)
class Policy:
    """How long things count as what they were; seconds.

    With `lazy`, a byte range of what is not cached does not start its fill.

    `fresh_for` maps a tag to its freshness lifetime (RFC 9111 §4.2); listings have that of the tag "".
    """

    fresh_for: Callable[[str], float]
    negative_for: float = 10.0
    drop_deleted: bool = False
    offline: bool = False
    lazy: bool = False


@runtime_checkable
class _Limited(Protocol):
    """An origin that grants so many requests in a time."""

    @property
    def spares(self) -> bool: ...


class Cache(Registry):
    """Repositories are the origin's names; in the store they stand under `namespace`.

    `moved` is told of a tag that moves.  While `drill` cuts the namespace, all is as if it were offline.
    """

    def __init__(
        self,
        namespace: str,
        origin: Registry,
        store: Store,
        fills: Fills,
        policy: Policy,
        clock: Callable[[], float] = time.time,
        moved: Moved | None = None,
        drill: Drill | None = None,
    ) -> None:
        self._namespace = namespace
        self._origin = origin
        self._store = store
        self._fills = fills
        self._policy = policy
        self._clock = clock
        self._moved = moved
        self._drill = drill or Drill(clock)
        self._flights = SingleFlight()
        self._unknown = Negatives(clock)
        self._paused = Negatives(clock)
        self._failing: RegistryError | None = None  # what the origin has failed with last, until it serves

    # Blobs

    async def get_blob(self, repository: str, digest: Digest, span: Span | None = None) -> Blob:
        key = BlobUnknown, f"{self._namespace}/{repository}", digest
        source = Source(self._namespace, self._origin, repository, partial(self._remember, key))
        try:
            blob, linked_at = self._store.blob(source.repository, digest)
            current().came("hit", self._clock() - linked_at)
            return blob
        except (BlobUnknown, StorageFailed) as error:
            failed = isinstance(error, StorageFailed)
        self._ask_allowed(key)
        current().came("miss")
        try:
            if not failed and not (span and self._policy.lazy and not self._fills.filling(digest)):
                return await self._fills.join(source, digest, span)  # which knows whether it is a miss
        except StorageFailed:
            pass
        except BlobUnknown as error:
            self._remember(key, error)
            raise
        return UncachedBlob(await self._origin.get_blob(repository, digest, span), source)

    async def fill_blob(self, repository: str, digest: Digest) -> int:
        """Have the blob in the store; how many bytes came for it.

        Raises as get_blob() does, what its fill failed with, and StorageFailed where it cannot be kept.
        """
        blob = await self.get_blob(repository, digest)
        await blob.close()
        if isinstance(blob, FileBlob):
            return 0
        if isinstance(blob, UncachedBlob):
            raise StorageFailed(f"{digest} could not be stored")
        await self._fills.ended(digest)
        try:
            stored = await self._store.get_blob(f"{self._namespace}/{repository}", digest)
        except BlobUnknown as error:  # the fill failed before it could be waited for, or the blob was taken
            raise Unavailable(f"{digest} did not stay: {error}") from error
        await stored.close()
        return stored.descriptor.size

    async def resolve_blob(self, repository: str, digest: Digest) -> Descriptor:
        source = Source(self._namespace, self._origin, repository)
        name = source.repository
        key = BlobUnknown, name, digest
        try:
            blob, linked_at = self._store.blob(name, digest)
            await blob.close()
            current().came("hit", self._clock() - linked_at)
            return blob.descriptor
        except (BlobUnknown, StorageFailed):
            pass
        if (known := self._fills.descriptor(name, digest)) is not None:
            current().came("hit")
            return known
        self._ask_allowed(key)
        current().came("miss")
        try:
            return await self._flights.join(key, lambda: self._origin.resolve_blob(repository, digest))
        except BlobUnknown as error:
            self._remember(key, error)
            raise

    # Manifests

    async def resolve_manifest(self, repository: str, reference: Reference) -> Descriptor:
        return (await self.get_manifest(repository, reference)).descriptor

    async def get_manifest(self, repository: str, reference: Reference) -> Manifest:
        name = f"{self._namespace}/{repository}"
        if isinstance(reference, Tag):
            return await self._by_tag(repository, name, reference)
        try:
            manifest, stored_at = self._store.manifest(name, reference)
            current().came("hit", self._clock() - stored_at)
            return manifest
        except (ManifestUnknown, StorageFailed):
            pass
        key = ManifestUnknown, name, reference
        self._ask_allowed(key)
        current().came("miss")
        return await self._flights.join(key, lambda: self._fetch(repository, name, reference))

    async def _by_tag(self, repository: str, name: str, tag: Tag) -> Manifest:
        key = ManifestUnknown, name, tag
        known = self._known(name, tag)
        if known is not None:
            manifest, age = known
            ttl = self._policy.fresh_for(tag) - age
            if self._offline or self._fresh(tag, age):
                current().came("hit", age, None if math.isinf(ttl) else ttl)
                return manifest
            if (pause := self._paused.get(key)) is not None:
                return self._stale(manifest, age, ttl, pause)
        self._ask_allowed(key)
        try:
            # It may be slow to fail again: then let who asks next know how it ended.
            async with asyncio.timeout(PATIENCE if known and self._failing else None):
                result, manifest, error = await self._flights.join(
                    key, lambda: self._ask(repository, name, tag)
                )
        except TimeoutError:
            return self._stale(manifest, age, ttl, self._failing or Unavailable())
        if error is not None and known is not None:
            return self._stale(manifest, known[1], ttl, error)
        fresh_for = self._policy.fresh_for(tag)
        current().came(result, 0.0, None if math.isinf(fresh_for) else fresh_for)
        return manifest

    async def revalidate(self, repository: str, tag: Tag) -> tuple[str, Manifest, Digest | None]:
        """Ask the origin, fresh or not: hit, miss or revalidated, the manifest, and what the tag was before.

        Where get_manifest() would serve what is stale, this raises why.
        """
        name = f"{self._namespace}/{repository}"
        if self._offline:
            raise Unavailable(f"{tag} of {name} cannot be validated: {self._why_offline}")
        known = self._known(name, tag)
        result, manifest, error = await self._flights.join(
            (ManifestUnknown, name, tag), lambda: self._ask(repository, name, tag, forced=True)
        )
        if error is not None:
            raise error.copy()
        return result, manifest, known[0].digest if known else None

    def spare(self, repository: str, reference: Reference) -> None:
        """Raise TooManyRequests where fetching it would take of what is kept for clients' misses."""
        name = f"{self._namespace}/{repository}"
        if isinstance(self._origin, _Limited) and not self._origin.spares:
            try:
                self._store.manifest(name, reference)
            except (ManifestUnknown, StorageFailed):
                raise TooManyRequests(
                    f"what {self._namespace} still grants us is kept for what clients ask for"
                ) from None

    def _known(self, name: str, tag: Tag) -> tuple[Manifest, float] | None:
        """What the tag was last, and how many seconds ago the origin said so."""
        try:
            pointer = self._store.pointer(name, tag)
            if pointer is None:
                return None
            return self._store.manifest(name, pointer.digest)[0], self._clock() - pointer.validated_at
        except (ManifestUnknown, StorageFailed):
            return None

    def _stale(self, manifest: Manifest, age: float, ttl: float, why: RegistryError) -> Manifest:
        current().came("stale", age, ttl)
        current().detail = why.code
        return manifest

    def _fresh(self, tag: Tag, age: float) -> bool:
        # A clock that was set back must not keep a tag fresh for ever.
        return 0 <= age < self._policy.fresh_for(tag)

    async def _ask(
        self, repository: str, name: str, tag: Tag, forced: bool = False
    ) -> tuple[str, Manifest, RegistryError | None]:
        """What came of asking the origin, or of another process that did: see _revalidate()."""
        begun = self._clock()
        async with self._store.exclusive(f"tag {name} {tag}") as waited:
            known = self._known(name, tag)
            if known is None:
                return "miss", await self._fetch(repository, name, tag), None
            fresh = not forced and self._fresh(tag, known[1])
            if fresh or (waited and self._clock() - known[1] >= begun):
                return "hit", known[0], None
            if waited:  # it was asked for just now, in vain: who waited so long is not to wait again
                return "stale", known[0], Unavailable(f"{self._namespace} could not be asked for {tag}")
            return await self._revalidate(repository, name, tag, known[0])

    async def _revalidate(
        self, repository: str, name: str, tag: Tag, known: Manifest
    ) -> tuple[str, Manifest, RegistryError | None]:
        """What came of it, the manifest, and the error if it is stale."""
        try:
            # HEAD does not count against a rate limit; GET does.
            digest = (await self._origin.resolve_manifest(repository, tag)).digest
            self._failing = None
            if digest == known.digest:
                await self._keep(self._store.point(name, tag, digest))
                return "revalidated", known, None
            try:
                # By digest, since the tag may move again in between.
                moved = await self._origin.get_manifest(repository, digest)
            except ManifestUnknown:  # it has moved again, and what it was is gone
                moved = await self._origin.get_manifest(repository, tag)
            await self._keep(self._store.push_manifest(name, tag, moved))
            log.info(
                "tag.moved",
                namespace=self._namespace,
                repository=repository,
                tag=tag,
                old=known.digest,
                new=moved.digest,
            )
            if self._moved is not None:
                await self._moved(name, tag, known.digest, moved.digest)
            return "miss", moved, None
        except Unavailable as error:
            self._fails(error)
            pause: RegistryError = error
        except (ManifestUnknown, NameUnknown) as error:
            if self._policy.drop_deleted:
                await self._keep(self._store.delete_manifest(name, tag))
                self._remember((ManifestUnknown, name, tag), error)
                raise
            pause = error
        self._pause((ManifestUnknown, name, tag), pause)
        return "stale", known, pause

    async def _fetch(self, repository: str, name: str, reference: Reference) -> Manifest:
        try:
            manifest = await self._origin.get_manifest(repository, reference)
        except (ManifestUnknown, NameUnknown) as error:
            self._remember((ManifestUnknown, name, reference), error)
            raise
        except Unavailable as error:
            self._fails(error)
            raise
        self._failing = None
        await self._keep(self._store.push_manifest(name, reference, manifest))
        return manifest

    # Listings

    async def tags(self, repository: str, last: str = "", limit: int | None = None) -> list[str]:
        listed: list[str] = await self._listing(
            (NameUnknown, f"{self._namespace}/{repository}", "tags"),
            lambda: self._origin.tags(repository),
            self._store.tags,
        )
        start = bisect_right(listed, last) if last else 0
        return listed[start:] if limit is None else listed[start : start + limit]

    async def referrers(
        self, repository: str, digest: Digest, artifact_type: str | None = None
    ) -> list[Descriptor]:
        async def ask() -> list[dict[str, Any]]:
            return [each.to_json() for each in await self._origin.referrers(repository, digest)]

        async def local(name: str) -> list[dict[str, Any]]:
            return [each.to_json() for each in await self._store.referrers(name, digest)]

        listed = await self._listing(
            (ManifestUnknown, f"{self._namespace}/{repository}", f"referrers {digest}"), ask, local
        )
        found = [Descriptor.from_json(each) for each in listed]
        return [each for each in found if artifact_type in (None, each.artifact_type)]

    async def _listing(
        self,
        key: Key,
        ask: Callable[[], Awaitable[list[T]]],
        local: Callable[[str], Awaitable[list[T]]],
    ) -> list[T]:
        """What the origin lists, kept like a tag; offline, what was seen of it."""
        _, name, what = key
        try:
            known = self._store.listing(name, what)
        except StorageFailed:
            known = None
        age = self._clock() - known.validated_at if known else 0.0
        ttl = self._policy.fresh_for("") - age
        if self._offline:
            # What was carried in, or warmed, since it was listed is served: so it is to be seen.
            seen = _merged(known.value if known else [], await self._seen(local, name))
            if known is None and not seen:
                self._ask_allowed(key)
            current().came("hit", age)
            return seen
        if known and ttl > 0 and age >= 0:
            current().came("hit", age, ttl)
            return known.value  # type: ignore[no-any-return]
        pause = self._paused.get(key)
        if pause is None:
            self._ask_allowed(key)
            try:
                listed = await self._flights.join(key, lambda: self._list(key, ask))
                current().came("miss")
                return listed
            except Unavailable as error:
                pause = error
                self._pause(key, error)
        if known is None:
            raise pause.with_traceback(None)
        current().came("stale", age, ttl)
        current().detail = pause.code
        return known.value  # type: ignore[no-any-return]

    async def _seen(self, local: Callable[[str], Awaitable[list[T]]], name: str) -> list[T]:
        try:
            return await local(name)
        except (NameUnknown, StorageFailed):
            return []

    async def _list(self, key: Key, ask: Callable[[], Awaitable[list[T]]]) -> list[T]:
        try:
            listed = await ask()
        except (ManifestUnknown, NameUnknown) as error:
            self._remember(key, error)
            raise
        await self._keep(self._store.keep_listing(key[1], key[2], listed))
        return listed

    # Both

    def _ask_allowed(self, key: Key) -> None:
        """Raise what is known without asking: that we are offline, or what the origin said just now."""
        unknown, name, what = key
        if self._policy.offline:
            raise unknown(f"{what} of {name} is not cached, and {self._why_offline}")
        if (error := self._unknown.get(key)) is not None:
            current().came("negative")
            raise error
        if self._drill.cuts(self._namespace):
            self._drill.missed()
            raise unknown(f"{what} of {name} is not cached, and {self._why_offline}")

    @property
    def _offline(self) -> bool:
        return self._policy.offline or self._drill.cuts(self._namespace)

    @property
    def _why_offline(self) -> str:
        return f"{self._namespace} is {'set offline' if self._policy.offline else 'cut off by a drill'}"

    def _remember(self, key: Key, error: RegistryError) -> None:
        self._unknown.put(key, self._policy.negative_for, error)

    def _pause(self, key: Key, error: RegistryError) -> None:
        """What is known is served; the origin is let alone for a while, not asked at every request."""
        self._paused.put(key, max(self._policy.negative_for, error.retry_after or 0), error)

    def _fails(self, error: Unavailable) -> None:
        # A rate limit is told at once: it makes nobody wait.
        if not isinstance(error, TooManyRequests):
            self._failing = error

    async def _keep(self, writing: Awaitable[object]) -> None:
        """A store that takes nothing in does not spoil the pull."""
        with suppress(StorageFailed, ManifestUnknown):  # the disk has told of it; deleted already
            await writing

    @property
    def origin(self) -> Registry:
        return self._origin

    def forget(self, repository: str) -> None:
        """The origin is asked anew, also for what it did not have and where it did not answer just now."""
        for remembered in (self._unknown, self._paused):
            remembered.forget(f"{self._namespace}/{repository}")

    async def close(self) -> None:
        await self._flights.close()
        await self._origin.close()


def _merged(listed: list[T], seen: list[T]) -> list[T]:
    """Of tags, in their order, or of descriptors as JSON, which are told apart by their digests."""

    def named(each: Any) -> str:
        return str(each["digest"] if isinstance(each, dict) else each)

    names = {named(each) for each in listed}
    more = [each for each in seen if named(each) not in names]
    return sorted([*listed, *more], key=named) if more else listed
