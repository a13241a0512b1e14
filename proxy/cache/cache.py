"""A pull-through cache: any registry (the origin) behind a store.

A digest never changes its meaning, so stored content is served without asking.  A tag does: see tags.py.
If the store cannot be used, the pull continues from the origin.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from proxy.cache.completeness import Completeness
from proxy.cache.drill import Drill
from proxy.cache.fills import Fills
from proxy.cache.listings import Listings
from proxy.cache.negatives import RequestKey
from proxy.cache.origin import CheckedRegistry, Origin
from proxy.cache.policy import Policy
from proxy.cache.readers import BlobSource, UncachedBlob
from proxy.cache.shared_tier import SharedTier
from proxy.cache.tag_listener import TagListener
from proxy.cache.tags import TagRevalidation
from proxy.telemetry.exchange import current
from storage.disk.blobs import TOUCH
from storage.disk.kept import shown_parts
from storage.disk.uploads import FileBlob
from storage.errors import BlobUnknown, ManifestUnknown, RangeInvalid, StorageFailed, Unavailable
from storage.held import held_blob, held_manifest
from storage.keys import MANIFEST
from storage.oci import Descriptor, Digest, Manifest, Reference, Span, Tag
from storage.registry import Blob, Held, Located, Registry, Validity
from storage.store import Store

T = TypeVar("T")


def _client() -> str:
    """A word for the client that asks; empty outside of a request."""
    now = current()
    asking = f"{now.client} {now.user}".strip()
    return hashlib.blake2b(asking.encode(), digest_size=8).hexdigest() if asking else ""


class Cache(Registry):
    """A registry that answers from `store` and fills it from `origin`.

    Repositories have the origin's names; in the store `namespace` precedes them.  `listener` is
    called when a tag moves.  While `drill` cuts off the namespace, the cache behaves as if it were offline.
    """

    def __init__(
        self,
        namespace: str,
        origin: Registry,
        store: Store,
        fills: Fills,
        policy: Policy,
        clock: Callable[[], float] = time.time,
        listener: TagListener | None = None,
        drill: Drill | None = None,
    ) -> None:
        self._namespace = namespace
        self._store = store
        self._fills = fills
        self._policy = policy
        self._clock = clock
        self._origin = Origin(namespace, origin, store, policy, clock, drill or Drill(clock))
        self._tags = TagRevalidation(self._origin, store, policy, clock, listener)
        self._listings = Listings(self._origin, store, policy, clock)
        self._completeness = Completeness(policy.refuse_incomplete, self._origin, store, fills)

    # Blobs

    async def get_blob(self, repository: str, digest: Digest, span: Span | None = None) -> Blob:
        name = f"{self._namespace}/{repository}"
        try:
            blob, linked_at = self._store.blob(name, digest)
            return self._hit(blob, linked_at)
        except (BlobUnknown, StorageFailed) as error:
            failed = isinstance(error, StorageFailed)
        key = BlobUnknown, name, digest
        registry = self._origin.registry
        # containerd begins a pull of the whole blob with `bytes=0-`.
        part = None if span == Span(0) else span
        wait = part is not None and not failed and not current().stored_only
        lazy = self._policy.lazy if wait else None
        if lazy is None:
            self._miss(key)
        else:  # parts of it may be here
            self._record(None, "miss")
            registry = CheckedRegistry(registry, lambda: self._origin.check(key))
        source = BlobSource(
            self._namespace, registry, repository, lambda e: self._learn(key, e), _client() if lazy else "",
            lambda: self._origin.distrust(digest),
        )  # fmt: skip
        try:
            if not failed:
                return self._record(*await self._fills.join(source, digest, part, lazy))
        except StorageFailed:
            pass
        except BlobUnknown as error:
            self._learn(key, error)
            raise
        if part is None or part.start >= 0:
            with suppress(RangeInvalid):  # there may be more ranges, and the answer states the size
                opened = await registry.get_blob(repository, digest, part)
                return UncachedBlob(opened.descriptor, source, opened, part)
        return UncachedBlob(await registry.resolve_blob(repository, digest), source)

    async def locate_blob(self, repository: str, digest: Digest) -> Located | None:
        """Only what is not here, and does not come: what is here is sent at once."""
        with suppress(StorageFailed):
            if self._store.linked(f"{self._namespace}/{repository}", digest) is not None:
                return None
        if self._fills.filling(digest):
            return None
        found = await self._origin.registry.locate_blob(repository, digest)
        return None if found is None else self._record(found, "hit")

    def _learn(self, key: RequestKey, error: BlobUnknown) -> None:
        if not self._origin.offline:  # else it was not asked
            self._origin.remember(key, error)

    async def fill_blob(self, repository: str, digest: Digest) -> int:
        """Fetch the blob into the store unless it is there; return the number of bytes that were fetched.

        Raises what get_blob() raises, the error that ended the fill, and StorageFailed if the blob cannot
        be stored.
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
        except BlobUnknown as error:  # the fill failed before it was waited for, or the blob was evicted
            raise Unavailable(f"{digest} was fetched, but is not stored: {error}") from error
        await stored.close()
        return stored.descriptor.size

    async def resolve_blob(self, repository: str, digest: Digest) -> Descriptor:
        name = f"{self._namespace}/{repository}"
        try:
            blob, linked_at = self._store.blob(name, digest)
            await blob.close()
            return self._hit(blob.descriptor, linked_at)
        except (BlobUnknown, StorageFailed):
            pass
        if (known := self._fills.descriptor(name, digest)) is not None:
            return self._record(known, "hit")
        if (
            self._policy.lazy is not None
            and (known := shown_parts(self._store.files.root, name, digest)) is not None
        ):
            return self._record(known, "hit")
        key = BlobUnknown, name, digest
        self._miss(key)
        try:
            resolve = self._origin.registry.resolve_blob
            return await self._origin.flights.join(key, lambda: resolve(repository, digest))
        except BlobUnknown as error:
            self._origin.remember(key, error)
            raise

    def hold_blob(self, repository: str, digest: Digest) -> Held | None:
        def validity(linked_at: float, used_at: float) -> Validity | None:
            now = self._clock()
            # Opening the blob would record that it is used.
            return Validity("hit", now - linked_at) if 0 <= now - used_at < TOUCH else None

        return held_blob(self._store, f"{self._namespace}/{repository}", digest, validity)

    # Manifests

    async def resolve_manifest(self, repository: str, reference: Reference) -> Descriptor:
        return (await self.get_manifest(repository, reference)).descriptor

    async def get_manifest(self, repository: str, reference: Reference) -> Manifest:
        try:
            manifest = await self._manifest(repository, reference)
        except Unavailable as error:
            await self._origin.fail(error, repository, reference)
        await self._completeness.check(repository, manifest, current().agent)
        return manifest

    async def _manifest(self, repository: str, reference: Reference) -> Manifest:
        if isinstance(reference, Tag):
            return self._record(*await self._tags.get(repository, reference))
        name = f"{self._namespace}/{repository}"
        try:
            return self._hit(*self._store.manifest(name, reference))
        except (ManifestUnknown, StorageFailed):
            pass
        key = ManifestUnknown, name, reference
        self._miss(key)
        return await self._origin.flights.join(key, lambda: self._fetch(repository, reference))

    async def _fetch(self, repository: str, digest: Digest) -> Manifest:
        """Ask the origin, or wait for another process that does.

        As an outage ends the breaker lets one request through, and refuses those of other processes.
        """
        name = f"{self._namespace}/{repository}"
        async with self._store.files.exclusive(MANIFEST.key(name, digest)) as waited:
            if waited:
                with suppress(ManifestUnknown, StorageFailed):
                    return self._store.manifest(name, digest)[0]
            return await self._origin.fetch_manifest(repository, digest)

    def hold_manifest(self, repository: str, reference: Reference) -> Held | None:
        if isinstance(reference, Tag):
            held = self._tags.hold(repository, reference)
        else:
            name = f"{self._namespace}/{repository}"
            held = held_manifest(
                self._store,
                lambda: self._store.manifest(name, reference),
                lambda stored_at: Validity("hit", self._clock() - stored_at),
            )
        return None if self._completeness.refuses(current().agent, held.content or b"") else held

    async def revalidate(self, repository: str, tag: Tag) -> tuple[str, Manifest, Digest | None]:
        return await self._tags.revalidate(repository, tag)

    def spare(self, repository: str, reference: Reference) -> None:
        self._origin.spare(repository, reference)

    # Listings

    async def tags(self, repository: str, last: str = "", limit: int | None = None) -> list[str]:
        return self._record(*await self._listings.tags(repository, last, limit))

    async def referrers(
        self,
        repository: str,
        digest: Digest,
        artifact_type: str | None = None,
        last: str = "",
        limit: int | None = None,
    ) -> list[Descriptor]:
        answered = await self._listings.referrers(repository, digest, artifact_type, last, limit)
        if last and current().result:
            return answered.value  # more for the same page: the first call tells how it was answered
        return self._record(*answered)

    # What the exchange records

    def _hit(self, value: T, since: float) -> T:
        return self._record(value, "hit", self._clock() - since)

    def _miss(self, key: RequestKey) -> None:
        """Record that the origin is asked, whatever it answers; raise the error if it must not be asked."""
        self._origin.check(key)
        self._record(None, "miss")

    def _record(
        self, value: T, result: str, age: float = 0.0, ttl: float | None = None, detail: str = ""
    ) -> T:
        now = current()
        now.result, now.age, now.ttl = result, age, ttl
        if detail:
            now.detail = detail
        return value

    @property
    def origin(self) -> Registry:
        registry = self._origin.registry
        return registry.upstream if isinstance(registry, SharedTier) else registry

    def forget(self, repository: str) -> None:
        self._origin.forget(repository)

    async def close(self) -> None:
        await self._origin.close()
