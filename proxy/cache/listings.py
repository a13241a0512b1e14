"""Listings of an origin: tags and referrers, kept for as long as a tag is fresh."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from proxy.cache.absences import REFERRERS_API
from proxy.cache.answered import Answered
from proxy.cache.negatives import RequestKey
from proxy.cache.origin import Origin
from proxy.cache.policy import Policy
from storage.errors import ManifestUnknown, NameUnknown, StorageFailed, Unavailable
from storage.graph import contents, fallback_tag
from storage.oci import OCI_INDEX, Descriptor, Digest
from storage.store import Store

T = TypeVar("T")


class Listings:
    """Tags and referrers as the origin lists them, kept for as long as a tag is fresh.

    Offline, content that was stored since the origin was asked is added.
    """

    def __init__(self, origin: Origin, store: Store, policy: Policy, clock: Callable[[], float]) -> None:
        self._origin = origin
        self._store = store
        self._policy = policy
        self._clock = clock

    async def tags(self, repository: str, last: str, limit: int | None) -> Answered[list[str]]:
        """Raises NameUnknown."""

        async def stored(name: str) -> list[str] | None:
            return await self._store.tags(name) or None

        key = NameUnknown, f"{self._origin.namespace}/{repository}", "tags"
        answered = await self._get(key, lambda: self._origin.registry.tags(repository), stored)
        start = bisect_right(answered.value, last) if last else 0
        return answered.with_value(answered.value[start : None if limit is None else start + limit])

    async def referrers(
        self, repository: str, digest: Digest, artifact_type: str | None
    ) -> Answered[list[Descriptor]]:
        """Raises ManifestUnknown: clients then look for the fallback tag.

        Some clients (oras-go) take one list of a repository as proof that all can be had, and fail at a 404
        for another.  So it is not raised where nothing refers to the subject, as far as is known.
        """
        name = f"{self._origin.namespace}/{repository}"
        absences = self._origin.absences

        async def ask() -> list[dict[str, Any]]:
            try:
                found = await self._origin.registry.referrers(repository, digest)
            except ManifestUnknown:
                await self._origin.keep(absences.add(name, REFERRERS_API, digest))
                raise
            await self._origin.keep(absences.discard(name, REFERRERS_API))
            return [each.to_json() for each in found]

        async def stored(name: str) -> list[dict[str, Any]] | None:
            return await self._stored_referrers(name, digest)

        try:
            answered = await self._get((ManifestUnknown, name, f"referrers {digest}"), ask, stored)
        except Unavailable as error:
            if (fallback := self._fallback(name, digest)) is None:
                if absences.contains(name, REFERRERS_API):
                    raise self._origin.still_unknown(f"list of referrers of {digest}") from error
                raise
            answered = fallback._replace(detail=error.code)
        found = [Descriptor.from_json(each) for each in answered.value]
        return answered.with_value([each for each in found if artifact_type in (None, each.artifact_type)])

    async def _get(
        self,
        key: RequestKey,
        ask: Callable[[], Awaitable[list[T]]],
        stored: Callable[[str], Awaitable[list[T] | None]],
    ) -> Answered[list[T]]:
        """What it lists; offline, with what `stored` finds of the repository (None: nothing is known)."""
        _, name, what = key
        try:
            known = self._store.listings.get(name, what)
        except StorageFailed:
            known = None
        age = self._clock() - known.validated_at if known else 0.0
        fresh_for = self._policy.fresh_for("")
        if self._origin.offline:
            # Images imported or warmed since the origin was asked can be pulled, so they are listed.
            found = await self._stored(stored, name)
            if known is None and found is None:
                self._origin.check(key)
            return Answered(_merged(known.value if known else [], found or []), "hit", age)
        if known and 0 <= age < fresh_for:
            return Answered.of(known.value, "hit", age, fresh_for)
        error = self._origin.paused(key)
        if error is None:
            self._origin.check(key)
            try:
                return Answered(await self._origin.flights.join(key, lambda: self._list(key, ask)), "miss")
            except Unavailable as failure:
                error = failure
                self._origin.pause(key, error)
        if known is None:
            raise error.copy()
        return Answered.of(known.value, "stale", age, fresh_for, error.code)

    async def _stored_referrers(self, name: str, digest: Digest) -> list[dict[str, Any]] | None:
        """None if nothing is known.  Raises ManifestUnknown if that is because the subject is not stored."""
        fallback = self._fallback(name, digest)
        stored = [each.to_json() for each in await self._store.referrers(name, digest)]
        found = _merged(fallback.value if fallback else [], stored)
        if not found and fallback is None:
            if not self._policy.offline:
                return None
            self._store.manifest(name, digest)
        return found

    def _fallback(self, name: str, digest: Digest) -> Answered[list[dict[str, Any]]] | None:
        """The referrers that the stored fallback tag lists: distribution-spec, "Referrers Tag Schema".

        An empty list if the origin had neither that tag nor a referrers API when it was last asked; None if
        nothing is known.
        """
        tag, absences = fallback_tag(digest), self._origin.absences
        try:
            pointer = self._store.pointer(name, tag)
            if pointer is None:
                absent = absences.contains(name, REFERRERS_API) and absences.contains(name, tag)
                return Answered([], "stale", ttl=0.0) if absent else None
            manifest = self._store.manifest(name, pointer.digest)[0]
        except (ManifestUnknown, StorageFailed):
            return None
        content = contents(manifest.content) if manifest.media_type == OCI_INDEX else None
        if content is None:
            return None
        listed = [each.to_json() for each in content.listed]
        age = self._clock() - pointer.validated_at
        return Answered.of(listed, "stale", age, self._policy.fresh_for(""))

    async def _stored(self, stored: Callable[[str], Awaitable[list[T] | None]], name: str) -> list[T] | None:
        try:
            return await stored(name)
        except (ManifestUnknown, NameUnknown, StorageFailed):
            return None

    async def _list(self, key: RequestKey, ask: Callable[[], Awaitable[list[T]]]) -> list[T]:
        try:
            listed = await ask()
        except (ManifestUnknown, NameUnknown) as error:
            self._origin.remember(key, error)
            raise
        await self._origin.keep(self._store.listings.put(key[1], key[2], listed))
        return listed


def _merged(listed: list[T], stored: list[T]) -> list[T]:
    """Both lists as one: tags in their order, or descriptors as JSON, which their digests identify."""

    def identity(each: Any) -> str:
        return str(each["digest"] if isinstance(each, dict) else each)

    names = {identity(each) for each in listed}
    more = [each for each in stored if identity(each) not in names]
    return sorted([*listed, *more], key=identity) if more else listed
