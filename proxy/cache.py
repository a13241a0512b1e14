"""A pull-through cache: any registry (the origin) behind a store.

Digests never change meaning, so what is stored is served without asking.  Tags do, so a tag is served
without asking only while it is fresh; then it is revalidated by a HEAD, and fetched, by digest, only if
it has moved.  An origin that cannot be asked does not take a known tag away; one that refuses us does.
A store that cannot be used is passed by: the pull goes on from the origin.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from proxy.fills import Fills, Source, Uncached
from proxy.flights import Flights
from proxy.telemetry import current
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
from storage.registry import Blob, Registry
from storage.store import Store

log = structlog.get_logger()
T = TypeVar("T")

REMEMBERED = 10_000  # negatives and pauses a cache keeps in memory


@dataclass(frozen=True, slots=True)
class Policy:
    """How long things count as what they were; seconds.

    `fresh_for` maps a tag to its freshness lifetime (RFC 9111 §4.2); listings have that of the tag "".
    """

    fresh_for: Callable[[str], float]
    negative_for: float = 10.0
    drop_deleted: bool = False
    offline: bool = False


class Remembered:
    """What holds for some seconds only, in memory; the oldest go when they are many."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until: dict[object, tuple[float, RegistryError]] = {}

    def get(self, key: object) -> RegistryError | None:
        until, error = self._until.get(key, (-math.inf, None))
        return error if self._clock() < until else None

    def put(self, key: object, seconds: float, error: RegistryError) -> None:
        self._until.pop(key, None)  # so that the order is that of the last put
        self._until[key] = self._clock() + seconds, error
        if len(self._until) > REMEMBERED:
            del self._until[next(iter(self._until))]


class Cache(Registry):
    """Repositories are the origin's names; in the store they stand under `namespace`."""

    def __init__(
        self,
        namespace: str,
        origin: Registry,
        store: Store,
        fills: Fills,
        policy: Policy,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._namespace = namespace
        self._origin = origin
        self._store = store
        self._fills = fills
        self._policy = policy
        self._clock = clock
        self._flights = Flights()
        self._unknown = Remembered(clock)
        self._paused = Remembered(clock)

    # Blobs

    async def get_blob(self, repository: str, digest: Digest, span: Span | None = None) -> Blob:
        source = Source(self._namespace, self._origin, repository)
        try:
            blob, linked_at = self._store.blob(source.repository, digest)
            current().came("hit", self._clock() - linked_at)
            return blob
        except (BlobUnknown, StorageFailed) as error:
            failed = isinstance(error, StorageFailed)
        self._ask_allowed(source.repository, digest)
        current().came("miss")
        try:
            if not failed:
                return await self._fills.join(source, digest, span)  # which knows whether it is a miss
        except StorageFailed:
            pass
        except BlobUnknown as error:
            self._remember(source.repository, digest, error)
            raise
        return Uncached(await self._origin.get_blob(repository, digest, span))

    async def resolve_blob(self, repository: str, digest: Digest) -> Descriptor:
        source = Source(self._namespace, self._origin, repository)
        name = source.repository
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
        self._ask_allowed(name, digest)
        current().came("miss")
        try:
            return await self._flights.join(
                ("blob", name, digest), lambda: self._origin.resolve_blob(repository, digest)
            )
        except BlobUnknown as error:
            self._remember(name, digest, error)
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
        self._ask_allowed(name, reference)
        current().came("miss")
        return await self._flights.join(
            ("manifest", name, reference), lambda: self._fetch(repository, name, reference)
        )

    async def _by_tag(self, repository: str, name: str, tag: Tag) -> Manifest:
        known = self._known(name, tag)
        if known is not None:
            manifest, age = known
            ttl = self._policy.fresh_for(tag) - age
            # A clock that was set back must not keep a tag fresh for ever: hence age >= 0.
            if self._policy.offline or (ttl > 0 and age >= 0):
                current().came("hit", age, None if math.isinf(ttl) else ttl)
                return manifest
            if (pause := self._paused.get((name, tag))) is not None:
                return self._stale(manifest, age, ttl, pause)
        self._ask_allowed(name, tag)
        call = (
            (lambda: self._fetch_tag(repository, name, tag))
            if known is None
            else (lambda: self._revalidate(repository, name, tag, known[0]))
        )
        result, manifest, error = await self._flights.join(("tag", name, tag), call)
        if error is not None and known is not None:
            return self._stale(manifest, known[1], ttl, error)
        fresh_for = self._policy.fresh_for(tag)
        current().came(result, 0.0, None if math.isinf(fresh_for) else fresh_for)
        return manifest

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

    async def _fetch_tag(
        self, repository: str, name: str, tag: Tag
    ) -> tuple[str, Manifest, RegistryError | None]:
        return "miss", await self._fetch(repository, name, tag), None

    async def _revalidate(
        self, repository: str, name: str, tag: Tag, known: Manifest
    ) -> tuple[str, Manifest, RegistryError | None]:
        """What came of it, the manifest, and the error if it is stale."""
        try:
            # HEAD does not count against a rate limit; GET does.
            digest = (await self._origin.resolve_manifest(repository, tag)).digest
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
            return "miss", moved, None
        except Unavailable as error:
            pause: RegistryError = error
        except (ManifestUnknown, NameUnknown) as error:
            if self._policy.drop_deleted:
                await self._keep(self._store.delete_manifest(name, tag))
                self._remember(name, tag, error)
                raise
            pause = error
        # Known content is served; the origin is let alone for a while, not asked at every request.
        seconds = max(self._policy.negative_for, pause.retry_after or 0)
        self._paused.put((name, tag), seconds, pause)
        return "stale", known, pause

    async def _fetch(self, repository: str, name: str, reference: Reference) -> Manifest:
        try:
            manifest = await self._origin.get_manifest(repository, reference)
        except (ManifestUnknown, NameUnknown) as error:
            self._remember(name, reference, error)
            raise
        except TooManyRequests as error:
            self._unknown.put((name, reference), max(1.0, error.retry_after or 0), error)
            raise
        await self._keep(self._store.push_manifest(name, reference, manifest))
        return manifest

    # Listings

    async def tags(self, repository: str, last: str = "", limit: int | None = None) -> list[str]:
        listed: list[str] = await self._listing(
            repository, "tags", lambda: self._origin.tags(repository), lambda name: self._store.tags(name)
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

        listed = await self._listing(repository, f"referrers {digest}", ask, local)
        found = [Descriptor.from_json(each) for each in listed]
        return [each for each in found if artifact_type in (None, each.artifact_type)]

    async def _listing(
        self,
        repository: str,
        what: str,
        ask: Callable[[], Awaitable[list[T]]],
        local: Callable[[str], Awaitable[list[T]]],
    ) -> list[T]:
        """What the origin lists, kept like a tag; offline, what was seen of it."""
        name = f"{self._namespace}/{repository}"
        try:
            known = self._store.listing(name, what)
        except StorageFailed:
            known = None
        age = self._clock() - known.validated_at if known else 0.0
        ttl = self._policy.fresh_for("") - age
        if self._policy.offline:
            seen: list[T] = known.value if known else await self._seen(local, name)
            if not seen:
                self._ask_allowed(name, what)
            current().came("hit", age)
            return seen
        if known and ttl > 0 and age >= 0:
            current().came("hit", age, ttl)
            return known.value  # type: ignore[no-any-return]
        pause = self._paused.get((name, what))
        if pause is None:
            self._ask_allowed(name, what)
            try:
                listed = await self._flights.join(
                    ("listing", name, what), lambda: self._list(name, what, ask)
                )
                current().came("miss")
                return listed
            except Unavailable as error:
                pause = error
                self._paused.put((name, what), self._policy.negative_for, error)
        if known is None:
            raise pause
        current().came("stale", age, ttl)
        current().detail = pause.code
        return known.value  # type: ignore[no-any-return]

    async def _seen(self, local: Callable[[str], Awaitable[list[T]]], name: str) -> list[T]:
        try:
            return await local(name)
        except (NameUnknown, StorageFailed):
            return []

    async def _list(self, name: str, what: str, ask: Callable[[], Awaitable[list[T]]]) -> list[T]:
        try:
            listed = await ask()
        except (ManifestUnknown, NameUnknown) as error:
            self._remember(name, what, error)
            raise
        await self._keep(self._store.keep_listing(name, what, listed))
        return listed

    # Both

    def _ask_allowed(self, name: str, what: str) -> None:
        """Raise what is known without asking: that we are offline, or what the origin said just now."""
        if self._policy.offline:
            unknown = BlobUnknown if isinstance(what, Digest) else ManifestUnknown
            raise unknown(f"{what} of {name} is not cached, and {self._namespace} is set offline")
        if (error := self._unknown.get((name, what))) is not None:
            current().came("negative")
            raise error.with_traceback(None)  # or it would grow by a frame each time

    def _remember(self, name: str, what: str, error: RegistryError) -> None:
        self._unknown.put((name, what), self._policy.negative_for, error)

    async def _keep(self, writing: Awaitable[object]) -> None:
        """A store that takes nothing in does not spoil the pull."""
        try:
            await writing
        except StorageFailed as error:
            log.error("store.failed", namespace=self._namespace, error=str(error))
        except ManifestUnknown:
            pass  # deleted already

    async def close(self) -> None:
        await self._flights.close()
        await self._origin.close()
