"""Listings of an origin: tags and referrers, kept for as long as a tag is fresh."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

from proxy.cache.absences import REFERRERS_API, TAGS
from proxy.cache.answered import Answered
from proxy.cache.negatives import RequestKey
from proxy.cache.origin import Origin
from proxy.cache.policy import Policy
from proxy.telemetry.exchange import needed, origin_age
from storage.concurrency import run_in_thread
from storage.errors import (
    ManifestInvalid,
    ManifestUnknown,
    NameUnknown,
    OriginDenied,
    StorageFailed,
    Unavailable,
)
from storage.graph import IndexEntries, fallback_tag
from storage.listings import ListedReferrers, Listing
from storage.oci import OCI_INDEX, Descriptor, Digest
from storage.registry import referrers_page
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
        self._indexes = IndexEntries()

    async def tags(self, repository: str, last: str, limit: int | None) -> Answered[list[str]]:
        """Raises NameUnknown."""
        name = f"{self._origin.namespace}/{repository}"
        key, read = (NameUnknown, name, "tags"), self._store.listings.get
        if self._origin.offline:
            known = await self._known(key, read)
            stored: list[str] = []
            with suppress(NameUnknown, StorageFailed):
                stored = await self._store.tags(name)
            found = sorted({*known.value, *stored}) if known else stored
            self._check_known(key, known is not None or bool(found))
            answered = self._hit(known, found)
        else:
            try:
                answered = await self._get(key, lambda: self._ask_tags(repository, name), read)
            except Unavailable as error:
                await self._origin.fail(error, repository, TAGS)
        start = bisect_right(answered.value, last) if last else 0
        return answered.with_value(answered.value[start : None if limit is None else start + limit])

    async def _ask_tags(self, repository: str, name: str) -> list[str]:
        absences = self._origin.absences
        try:
            found = await self._origin.registry.tags(repository)
        except (NameUnknown, OriginDenied) as error:
            await self._origin.keep(absences.add(name, TAGS, None, error))
            raise
        await absences.discard(name, TAGS, None)
        return found

    async def referrers(
        self, repository: str, digest: Digest, artifact_type: str | None, last: str, limit: int | None
    ) -> Answered[list[Descriptor]]:
        """Raises ManifestUnknown: clients then look for the fallback tag.

        Some clients (oras-go) take one list of a repository as proof that all can be had, and fail at a 404
        for another.  So it is not raised where nothing refers to the subject, as far as is known.
        """
        name = f"{self._origin.namespace}/{repository}"
        key = ManifestUnknown, name, f"referrers {digest}"
        absences = self._origin.absences

        async def ask() -> ListedReferrers:
            try:
                found = await self._origin.registry.referrers(repository, digest)
            except ManifestUnknown as error:
                await self._origin.keep(absences.add(name, REFERRERS_API, digest, error))
                raise
            await absences.discard(name, REFERRERS_API, digest)
            return ListedReferrers.of(found)

        try:
            if self._origin.offline:
                return await self._offline_referrers(key, digest, artifact_type, last, limit)
            answered = await self._get(key, ask, self._store.listings.referrers)
            return answered.with_value(referrers_page([answered.value.after(last)], artifact_type, limit))
        except Unavailable as error:
            if (fallback := await self._fallback(name, digest, last)) is None:
                await self._origin.fail(error, repository, REFERRERS_API)
            found = referrers_page([fallback.value], artifact_type, limit)
            return fallback.with_value(found)._replace(detail=error.code)

    async def _offline_referrers(
        self, key: RequestKey, digest: Digest, artifact_type: str | None, last: str, limit: int | None
    ) -> Answered[list[Descriptor]]:
        name = key[1]
        known = await self._known(key, self._store.listings.referrers)
        self._check_known(key, known is not None or await self._knows_referrers(name, digest))
        listed = known.value.after(last) if known else ()
        fallback = await self._fallback(name, digest, last)
        stored = _readable(self._store.referrers_after(name, digest, last))
        sources = [listed, fallback.value if fallback else (), stored]
        page = await run_in_thread(referrers_page, sources, artifact_type, limit)
        return self._hit(known, page)

    async def _knows_referrers(self, name: str, digest: Digest) -> bool:
        """Whether the store says what refers to the manifest; also that nothing does, if it is stored."""
        with suppress(ManifestUnknown, StorageFailed):
            if await self._fallback(name, digest) is not None:
                return True
            if await self._store.read(self._has_referrers, name, digest):
                return True
            if self._policy.offline:
                await self._store.read(self._store.manifest, name, digest)
                return True
        return False

    def _has_referrers(self, name: str, digest: Digest) -> bool:
        return next(self._store.referrers_after(name, digest), None) is not None

    async def _known(
        self, key: RequestKey, read: Callable[[str, str], Listing[T] | None]
    ) -> Listing[T] | None:
        """What the origin listed last."""
        try:
            return await self._store.read(read, key[1], key[2])
        except StorageFailed:
            return None

    def _age(self, known: Listing[Any] | None) -> float:
        return self._clock() - known.validated_at if known else 0.0

    def _hit(self, known: Listing[Any] | None, found: list[T]) -> Answered[list[T]]:
        """Offline, images imported or warmed since the origin was asked can be pulled, so they are listed."""
        return Answered(found, "hit", self._age(known))

    def _check_known(self, key: RequestKey, known: bool) -> None:
        """Raise the error of an origin that must not be asked, unless something is known without it."""
        if not known:
            self._origin.check(key)

    async def _get(
        self,
        key: RequestKey,
        ask: Callable[[], Awaitable[T]],
        read: Callable[[str, str], Listing[T] | None],
    ) -> Answered[T]:
        """What the origin lists; `read` reads what it listed last."""
        known = await self._known(key, read)
        age, fresh_for = self._age(known), self._policy.fresh_for("")
        if known and 0 <= age < fresh_for:
            return Answered.of(known.value, "hit", age, fresh_for)
        error = self._origin.paused(key) if known else None
        if error is None:
            self._origin.check(key)
            try:
                asking = self._origin.flights.join(key, lambda: self._list(key, ask, known is None))
                return Answered(await asking, "miss")
            except Unavailable as failure:
                error = failure
        if known is None:
            raise error.copy()
        return Answered.of(known.value, "stale", age, fresh_for, error.code)

    async def _fallback(self, name: str, digest: Digest, last: str = "") -> Answered[list[Descriptor]] | None:
        """The referrers that the stored fallback tag lists: distribution-spec, "Referrers Tag Schema".

        An empty list if the origin had neither that tag nor a referrers API when it was last asked; None if
        nothing is known.
        """
        tag, absences = fallback_tag(digest), self._origin.absences
        try:
            pointer = await self._store.read(self._store.pointer, name, tag)
            if pointer is None:
                absent = await absences.get(name, REFERRERS_API) and await absences.get(name, tag)
                return Answered([], "stale", ttl=0.0) if absent else None
            manifest = (await self._store.read(self._store.manifest, name, pointer.digest))[0]
            if manifest.media_type != OCI_INDEX:
                return None
            listed = await self._indexes.after(manifest, last)
        except (ManifestUnknown, ManifestInvalid, StorageFailed):
            return None
        age = self._clock() - pointer.validated_at
        return Answered.of(listed, "stale", age, self._policy.fresh_for(""))

    async def _list(self, key: RequestKey, ask: Callable[[], Awaitable[T]], cold: bool) -> T:
        needed.set(cold)  # in the task of this call alone
        try:
            listed = await ask()
        except (ManifestUnknown, NameUnknown) as error:
            self._origin.remember(key, error)
            raise
        except Unavailable as error:
            self._origin.pause(key, error)
            raise
        await self._origin.keep(self._store.listings.put(key[1], key[2], listed, origin_age.get()))
        return listed


def _readable(found: Iterator[T]) -> Iterator[T]:
    with suppress(StorageFailed):
        yield from found
