"""What the servers of a fleet have in common, before an upstream.

    Cache ── Store                 each server's own: content on its disk
      └───── SharedTier ── SharedStore      of all servers: records in a database, blobs in a bucket
               └────────── upstream

What a blob or a tag is, the shared store says, if it can; otherwise the upstream.  Manifests and listings
that the upstream sends are stored here.  Its blobs are stored by the cache before, which hands them over
once they are verified: see deposits.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from proxy.cache.completeness import missing_in
from proxy.cache.drill import Drill
from proxy.cache.listings import Listings
from proxy.cache.negatives import RequestKey
from proxy.cache.origin import Origin, Vouched
from proxy.cache.policy import Policy
from proxy.cache.shared_store import BucketRest, SharedStore
from proxy.cache.tag_listener import TagListener
from proxy.cache.tags import TagRevalidation
from proxy.telemetry.exchange import origin_age
from storage.errors import (
    BlobUnknown,
    ManifestUnknown,
    RangeInvalid,
    RegistryError,
    StorageFailed,
    Unavailable,
)
from storage.oci import Descriptor, Digest, Manifest, ManifestContent, Reference, Span, Tag
from storage.registry import Blob, Located, Registry

_ILL = (StorageFailed, Unavailable)  # of the database, and of the bucket


class SharedTier(Registry):
    """The origin of a server's own cache: `store`, which servers share, and `upstream` for the rest.

    Repositories have the upstream's names; in the store `namespace` precedes them.  `policy` says when the
    upstream is asked; `listener` is called when a tag turns out to have moved there.
    """

    def __init__(
        self,
        namespace: str,
        upstream: Registry,
        store: SharedStore,
        policy: Policy,
        clock: Callable[[], float] = time.time,
        drill: Drill | None = None,
        listener: TagListener | None = None,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        self.upstream = upstream
        self._namespace = namespace
        self._store = store
        self._origin = Origin(namespace, upstream, store, policy, clock, drill or Drill(clock))
        self._tags = TagRevalidation(self._origin, store, policy, clock, listener)
        self._listings = Listings(self._origin, store, policy, clock)
        self._rest = BucketRest(ticks)

    # Blobs

    async def get_blob(self, repository: str, digest: Digest, span: Span | None = None) -> Blob:
        name = f"{self._namespace}/{repository}"
        ill: RegistryError | None = None
        if asked := not self._rest and not self._store.distrusts(digest):
            try:
                return await self._stored(name, digest, span)
            except BlobUnknown:
                pass
            except Unavailable as error:
                self._rest.begin()
                ill = error
            except StorageFailed as error:
                ill = error
        try:
            self._check((BlobUnknown, name, digest), ill)
            return await self.upstream.get_blob(repository, digest, span)
        except BlobUnknown as error:
            self._learn((BlobUnknown, name, digest), error)
            raise
        except Unavailable:
            if not asked:
                with suppress(BlobUnknown, *_ILL):
                    return await self._stored(name, digest, span)
            raise

    async def locate_blob(self, repository: str, digest: Digest) -> Located | None:
        if self._rest or self._store.distrusts(digest):
            return None
        with suppress(BlobUnknown, *_ILL):
            return await self._store.locate_blob(f"{self._namespace}/{repository}", digest)
        return None

    async def _stored(self, name: str, digest: Digest, span: Span | None) -> Blob:
        blob = await self._store.get_blob(name, digest, span)
        if span is not None and span.start >= max(1, blob.descriptor.size):
            await blob.close()
            raise RangeInvalid(f"{digest} has {blob.descriptor.size} bytes")
        return blob

    async def resolve_blob(self, repository: str, digest: Digest) -> Descriptor:
        name, ill = f"{self._namespace}/{repository}", None
        try:
            if (found := await self._store.read(self._store.linked, name, digest)) is not None:
                return found
        except StorageFailed as error:
            ill = error
        try:
            self._check((BlobUnknown, name, digest), ill)
            return await self.upstream.resolve_blob(repository, digest)
        except BlobUnknown as error:
            self._learn((BlobUnknown, name, digest), error)
            raise

    def _check(self, key: RequestKey, ill: RegistryError | None = None) -> None:
        """Raise the error of an upstream that must not be asked; `ill` is why the store could not be."""
        if ill is not None and self._origin.offline:
            raise Unavailable(str(ill), retry_after=ill.retry_after, public=ill.public)
        self._origin.check(key)

    def _learn(self, key: RequestKey, error: BlobUnknown) -> None:
        if not self._origin.offline:  # else it was not asked
            self._origin.remember(key, error)

    def distrust(self, digest: Digest) -> None:
        """What came of a blob was wrong."""
        self._store.distrust(digest)

    # Manifests

    async def vouch(self, repository: str, tag: Tag, forced: bool = False) -> Vouched:
        """What the tag stands for, as the shared records say, or the upstream if they are no longer fresh."""
        name = f"{self._namespace}/{repository}"
        try:
            await self._store.read(self._store.pointer, name, tag)
        except StorageFailed as ill:
            self._check((ManifestUnknown, name, tag), ill)
            descriptor = await self.upstream.resolve_manifest(repository, tag)
            return Vouched(descriptor.digest, origin_age.get())
        if forced:
            _, manifest, _ = await self._tags.revalidate(repository, tag)
            return Vouched(manifest.digest, 0.0, manifest)
        answered = await self._tags.get(repository, tag)
        error: RegistryError | None = None
        if answered.result == "stale":
            error = self._origin.paused((ManifestUnknown, name, tag)) or self._origin.failure
            error = error or Unavailable(f"{self._namespace} could not be asked for {tag}")
        manifest = answered.value
        return Vouched(manifest.digest, answered.age, manifest, error)

    async def resolve_manifest(self, repository: str, reference: Reference) -> Descriptor:
        return (await self.get_manifest(repository, reference)).descriptor

    async def get_manifest(self, repository: str, reference: Reference) -> Manifest:
        if isinstance(reference, Tag):
            return (await self._tags.get(repository, reference)).value
        name = f"{self._namespace}/{repository}"
        key, ill = (ManifestUnknown, name, reference), None
        try:
            return (await self._store.read(self._store.manifest, name, reference))[0]
        except ManifestUnknown:
            pass
        except StorageFailed as error:
            ill = error
        self._check(key, ill)
        return await self._origin.flights.join(
            key, lambda: self._origin.fetch_manifest(repository, reference)
        )

    async def supplies(self, repository: str, content: ManifestContent) -> bool:
        """Whether all that a manifest names may come, as far as is known."""
        if await self._origin.reachable():
            return True
        name = f"{self._namespace}/{repository}"
        try:
            return await self._store.read(missing_in, self._store, name, content) is None
        except StorageFailed:
            return False

    async def absence(self, repository: str, what: str) -> RegistryError | None:
        """See Origin.absence()."""
        return await self._origin.absence(repository, what)

    # Listings

    async def tags(self, repository: str, last: str = "", limit: int | None = None) -> list[str]:
        return (await self._listings.tags(repository, last, limit)).value

    async def referrers(
        self,
        repository: str,
        digest: Digest,
        artifact_type: str | None = None,
        last: str = "",
        limit: int | None = None,
    ) -> list[Descriptor]:
        return (await self._listings.referrers(repository, digest, artifact_type, last, limit)).value

    @property
    def spares(self) -> bool:
        """Whether it grants requests beyond those that are reserved for clients."""
        return bool(getattr(self.upstream, "spares", True))

    def forget(self, repository: str) -> None:
        self._origin.forget(repository)

    async def close(self) -> None:
        await self._origin.close()
