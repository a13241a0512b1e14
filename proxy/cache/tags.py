"""Tags of an origin: what each stands for, and when the origin is asked again.

A tag is served without asking while it is fresh.  Then it is revalidated by a HEAD, and the manifest is
fetched, by digest, only if the tag has moved.  An origin that cannot be asked does not take a known tag away.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import structlog

from proxy.cache.absences import ABSENCES, subject_of
from proxy.cache.answered import Answered
from proxy.cache.negatives import RequestKey
from proxy.cache.origin import Origin, Vouched
from proxy.cache.policy import Policy
from proxy.cache.tag_listener import TagListener
from proxy.telemetry.exchange import origin_age, past_owners
from storage.errors import (
    ManifestUnknown,
    OriginDenied,
    OriginTimeout,
    RegistryError,
    StorageFailed,
    Unavailable,
)
from storage.held import held_manifest
from storage.keys import TAG
from storage.oci import Digest, Manifest, Tag
from storage.records import Batch
from storage.registry import Held, Validity
from storage.store import Store

log = structlog.get_logger()

PATIENCE = 0.02  # seconds to wait for an origin that is failing, if a known manifest can be served


class _Known(NamedTuple):
    """What a tag stood for when the origin last vouched for it, `age` seconds ago."""

    manifest: Manifest
    age: float

    def answered(self, result: str, fresh_for: float, why: RegistryError | None = None) -> Answered[Manifest]:
        return Answered.of(self.manifest, result, self.age, fresh_for, why.code if why else "")


class _Validated(NamedTuple):
    """What came of asking the origin: miss, hit or revalidated; stale, because of `error`.

    `age` is in seconds, since another replica was told so.
    """

    result: str
    manifest: Manifest
    error: RegistryError | None = None
    age: float = 0.0


class TagRevalidation:
    """What a tag stands for, revalidated when it is no longer fresh.

    `listener` is called when a tag turns out to stand for another manifest than before.
    """

    def __init__(
        self,
        origin: Origin,
        store: Store,
        policy: Policy,
        clock: Callable[[], float],
        listener: TagListener | None = None,
    ) -> None:
        self._origin = origin
        self._store = store
        self._policy = policy
        self._clock = clock
        self._listener = listener

    async def get(self, repository: str, tag: Tag) -> Answered[Manifest]:
        """The manifest: as known if that is fresh or the origin cannot be asked, else as the origin says.

        Raises ManifestUnknown, NameUnknown.
        """
        name = f"{self._origin.namespace}/{repository}"
        key = ManifestUnknown, name, tag
        known = await self._known(name, tag)
        fresh_for = self._policy.fresh_for(tag)
        doubted = False
        if known is not None:
            if (fresh := _fresh(known, fresh_for)) and not math.isinf(fresh_for):
                doubted = await self._doubted(name, tag, known)
            if (fresh and not doubted) or self._origin.offline:
                return known.answered("hit", fresh_for)
            if (error := self._origin.paused(key)) is not None:
                return known.answered("stale", fresh_for, error)
        self._origin.check(key)
        try:
            async with asyncio.timeout(self._patience(known)):
                result, manifest, error, age = await self._origin.flights.join(
                    key, lambda: self._validate(repository, tag, forced=doubted)
                )
        except TimeoutError:
            assert known is not None  # else there was no time limit
            return known.answered("stale", fresh_for, self._delayed(key))
        if error is not None and known is not None:
            return known._replace(manifest=manifest).answered("stale", fresh_for, error)
        return _Known(manifest, age).answered(result, fresh_for)

    def hold(self, repository: str, tag: Tag) -> Held:
        """The known manifest, to be served as get() does while that needs nothing but records.

        Raises ManifestUnknown.
        """
        name = f"{self._origin.namespace}/{repository}"
        fresh_for = self._policy.fresh_for(tag)
        forever = math.isinf(fresh_for)

        def read() -> tuple[Manifest, float]:
            if (pointer := self._store.pointer(name, tag)) is None:
                raise ManifestUnknown(f"{name} has no tag {tag}")
            return self._store.manifest(name, pointer.digest)[0], pointer.validated_at

        def validity(validated_at: float) -> Validity | None:
            age = self._clock() - validated_at
            fresh = 0 <= age < fresh_for and (forever or not self._origin.doubts.any(name, tag, validated_at))
            if not (fresh or self._origin.offline):
                return None
            return Validity("hit", age, None if forever else fresh_for - age)

        return held_manifest(self._store, read, validity)

    async def _doubted(self, name: str, tag: Tag, known: _Known) -> bool:
        """Whether the origin no longer has something of a fresh tag's image."""
        doubts, since = self._origin.doubts, self._clock() - known.age
        if doubts.any(name, tag, since):
            with suppress(StorageFailed):
                return await doubts.about(name, tag, known.manifest.content, since)
        return False

    def _patience(self, known: _Known | None) -> float | None:
        """Seconds to wait for the origin before the known manifest is served; None means no limit.

        The validation continues after that, and the next request learns how it ended.
        """
        if known is None:
            return None
        # An origin that has failed may be slow to fail again.
        return PATIENCE if self._origin.failing else self._policy.revalidate_timeout

    def _delayed(self, key: RequestKey) -> RegistryError:
        """Why a validation is not waited for any longer; clients that come soon do not wait at all."""
        if self._origin.failing:
            return self._origin.failure or Unavailable()
        error = OriginTimeout(f"{self._origin.namespace} did not answer within revalidate_timeout")
        self._origin.pause(key, error)
        return error

    async def revalidate(self, repository: str, tag: Tag) -> tuple[str, Manifest, Digest | None]:
        """Ask the origin even if the tag is fresh: hit, miss or revalidated, the manifest, the former digest.

        Where get() would serve a stale manifest, this raises the error.
        """
        name = f"{self._origin.namespace}/{repository}"
        if self._origin.offline:
            raise Unavailable(f"{tag} of {name} cannot be validated: {self._origin.why_offline}")
        known = await self._known(name, tag)
        result, manifest, error, _ = await self._origin.flights.join(
            (ManifestUnknown, name, tag), lambda: self._validate(repository, tag, forced=True)
        )
        if error is not None:
            raise error.copy()
        return result, manifest, known.manifest.digest if known else None

    async def _known(self, name: str, tag: Tag) -> _Known | None:
        try:
            return await self._store.read(self._read, name, tag)
        except (ManifestUnknown, StorageFailed):
            return None

    def _read(self, name: str, tag: Tag) -> _Known | None:
        if (pointer := self._store.pointer(name, tag)) is None:
            return None
        manifest = self._store.manifest(name, pointer.digest)[0]
        return _Known(manifest, self._clock() - pointer.validated_at)

    async def _validate(self, repository: str, tag: Tag, forced: bool = False) -> _Validated:
        """Ask the origin, or wait for another process that does; `forced`: even if the tag is fresh."""
        begun = self._clock()
        past_owners.set(forced)  # in the task of this call alone
        name = f"{self._origin.namespace}/{repository}"
        async with self._store.files.exclusive(TAG.key(name, tag)) as waited:
            known = await self._known(name, tag)
            if known is None:
                manifest = await self._origin.fetch_manifest(repository, tag)
                return _Validated("miss", manifest, age=origin_age.get())
            fresh = not forced and _fresh(known, self._policy.fresh_for(tag))
            if fresh or (waited and self._clock() - known.age >= begun):
                return _Validated("hit", known.manifest)
            if waited:  # another process has just asked in vain: a client that waited so long waits no more
                error = Unavailable(f"{self._origin.namespace} could not be asked for {tag}")
                return _Validated("stale", known.manifest, error)
            return await self._ask(repository, name, tag, known.manifest, forced)

    async def _ask(self, repository: str, name: str, tag: Tag, known: Manifest, forced: bool) -> _Validated:
        key = ManifestUnknown, name, tag
        error: RegistryError
        try:
            vouched = await self._origin.vouch(repository, tag, forced)
            manifest, age = known, vouched.age
            self._origin.served()
            self._origin.resume(key)
            if vouched.digest != known.digest:
                manifest = await self._follow(repository, name, tag, known.digest, vouched)
                if not age:
                    return _Validated("miss", manifest, vouched.error)
            await self._origin.keep(self._store.point(name, tag, manifest.digest, age))
            result = "revalidated" if manifest is known else "miss"
            return _Validated(result, manifest, vouched.error, age)
        except Unavailable as failure:
            self._origin.failed(failure)
            error = failure
        except ABSENCES as unknown:
            # Large registries answer 401 for what was deleted, and a password may expire: it is not gone.
            if self._policy.drop_deleted:
                await self._origin.keep(self._store.delete_manifest(name, tag))
                await self._origin.keep(self._origin.absences.add(name, tag, subject_of(tag), unknown))
                if not isinstance(unknown, OriginDenied):  # other credentials may be accepted at once
                    self._origin.remember(key, unknown)
                raise
            error = unknown
        self._origin.pause(key, error)
        return _Validated("stale", known, error)

    async def _follow(self, repository: str, name: str, tag: Tag, old: Digest, new: Vouched) -> Manifest:
        """Fetch and store the manifest to which the tag has moved."""
        try:
            # By digest, since the tag may move again in between.
            manifest = new.manifest or await self._origin.registry.get_manifest(repository, new.digest)
        except ManifestUnknown:  # it has moved again, and the manifest in between is deleted
            manifest = await self._origin.registry.get_manifest(repository, tag)

        def moving(batch: Batch) -> None:
            if self._listener is not None:
                self._listener.record(batch, name, tag, old, manifest.digest)

        await self._origin.keep(self._store.push_manifest(name, tag, manifest, allowed=moving))
        namespace = self._origin.namespace
        log.info(
            "tag.moved", namespace=namespace, repository=repository, tag=tag, old=old, new=manifest.digest
        )
        if self._listener is not None:
            await self._listener.moved(name, tag, old, manifest.digest)
        return manifest


def _fresh(known: _Known, fresh_for: float) -> bool:
    # A clock that was set back must not keep a tag fresh forever.
    return 0 <= known.age < fresh_for
