"""Refreshing: what a reference means now is whole here, before anybody asks for it.

The tag is revalidated, fresh or not; what it names and is not stored is fetched.  What has not changed
costs one HEAD.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import structlog

from proxy.namespaces import Refreshable
from storage.concurrency import run_in_thread
from storage.errors import (
    BlobUnknown,
    DigestInvalid,
    ManifestUnknown,
    NameInvalid,
    NameUnknown,
    RegistryError,
    TagInvalid,
    Unsupported,
)
from storage.graph import attestations, contents, fallback_tag, selected, signature_tags, walk
from storage.maintenance.pins import Pin, Pins
from storage.oci import Descriptor, Digest, Manifest, Reference, Tag
from storage.store import Store

log = structlog.get_logger()

FILLS = 4  # of one refreshing at once
BACKOFF = 60.0  # seconds after a failure, doubling
LONGEST_BACKOFF = 3600.0  # seconds


@dataclass(frozen=True, slots=True)
class Refreshed:
    """What is whole now.  `moved` is what the tag was before, None where it is what it was, or is new.

    `manifests` and `blobs` are how many it consists of, `fetched` how many blobs of them had to come, of
    `bytes`; `referrers` how many of the manifests refer to others of them.
    """

    repository: str
    reference: Reference
    digest: Digest
    new: bool
    moved: Digest | None
    manifests: int
    blobs: int
    fetched: int
    bytes: int
    referrers: int = 0

    @property
    def here(self) -> int:
        """How many blobs were stored already."""
        return self.blobs - self.fetched

    @property
    def changed(self) -> bool:
        return self.new or self.moved is not None or self.fetched > 0


async def refresh(
    registry: Refreshable,
    repository: str,
    reference: Reference,
    platforms: Sequence[str] = (),
    referrers: bool = False,
    sparing: bool = False,
) -> Refreshed:
    """Have all in the store that `reference` means now; of an index the children for `platforms`.

    With `referrers` also what refers to any of it, which costs a few requests for each manifest.  What the
    origin does not know is left out; then, when the rest is here, that is raised.  `sparing` leaves clients
    what is kept in reserve of the origin's rate limit: see Cache.spare().  Raises RegistryError.
    """
    old: Digest | None = None
    new = False
    if sparing:
        registry.spare(repository, reference)
    if isinstance(reference, Tag):
        _, manifest, old = await registry.revalidate(repository, reference)
        new = old is None
    else:
        manifest = await registry.get_manifest(repository, reference)
    whole = _Whole(registry, repository, sparing)
    await whole.take(manifest, platforms)
    if referrers:
        await whole.take_referrers()
    await whole.fill()
    if whole.unknown:
        raise whole.unknown[0]
    return Refreshed(
        repository,
        reference,
        manifest.digest,
        new,
        None if old == manifest.digest else old,
        len(whole.manifests),
        len(whole.blobs),
        whole.fetched,
        whole.bytes,
        whole.referrers,
    )


@dataclass(slots=True)
class _Whole:
    """What is being made whole; `unknown` is what the origin does not have."""

    registry: Refreshable
    repository: str
    sparing: bool
    manifests: set[Digest] = field(default_factory=set)
    blobs: dict[Digest, Descriptor] = field(default_factory=dict)
    unknown: list[RegistryError] = field(default_factory=list)
    fetched: int = 0
    bytes: int = 0
    referrers: int = 0
    attestations: set[Digest] = field(default_factory=set)

    async def take(self, manifest: Manifest, platforms: Sequence[str] = ()) -> None:
        todo = [manifest]
        while todo:
            manifest = todo.pop()
            self.manifests.add(manifest.digest)
            content = contents(manifest.content)
            if content is None:
                continue
            self.blobs.update((each.digest, each) for each in content.blobs)
            self.attestations |= attestations(content)
            for child in selected(content, platforms):
                if child.digest in self.manifests:
                    continue
                try:
                    todo.append(await self._manifest(child.digest))
                except ManifestUnknown as error:
                    self.unknown.append(error)

    async def _manifest(self, reference: Reference) -> Manifest:
        if self.sparing:
            self.registry.spare(self.repository, reference)
        return await self.registry.get_manifest(self.repository, reference)

    async def take_referrers(self) -> None:
        """What refers to the manifests, and what refers to that."""
        image = frozenset(self.manifests)
        signed = image - self.attestations  # these are about an image, and nobody signs them for themselves
        asked: set[Digest] = set()
        while ask := self.manifests - asked:
            asked |= ask
            for digest in ask:
                listed: list[Descriptor] = []
                tags = signature_tags(digest) if digest in signed else []
                try:
                    listed = await self.registry.referrers(self.repository, digest)
                except (ManifestUnknown, NameUnknown, Unsupported):  # it has no referrers API
                    tags = [fallback_tag(digest), *tags]
                found: list[Reference] = [*(each.digest for each in listed), *tags]
                for each in found:
                    if each not in self.manifests:
                        unknown = len(self.unknown)
                        with suppress(ManifestUnknown, NameUnknown):  # there is no such tag
                            await self.take(await self._manifest(each))
                        del self.unknown[unknown:]  # listed once, and gone
        self.referrers = len(self.manifests - image)

    async def fill(self) -> None:
        turns = asyncio.Semaphore(FILLS)
        try:
            async with asyncio.TaskGroup() as filling:
                for each in self.blobs.values():
                    filling.create_task(self._fill(each, turns))
        except ExceptionGroup as group:  # of those that failed before the others were given up
            raise group.exceptions[0] from None

    async def _fill(self, blob: Descriptor, turns: asyncio.Semaphore) -> None:
        async with turns:
            try:
                size = await self.registry.fill_blob(self.repository, blob.digest)
            except BlobUnknown as error:
                if not foreign(blob):
                    self.unknown.append(error)
                return
        if size:
            self.fetched += 1
            self.bytes += size


def foreign(blob: Descriptor) -> bool:
    """Whether clients are told to get it elsewhere: image-spec, layer.md, "Non-Distributable Layers"."""
    return "foreign" in blob.media_type or "nondistributable" in blob.media_type


class Freshener:
    """Refreshes what is pinned with `keep_fresh`, when that has passed since it was validated last.

    Also what is not whole here: clients fetch of an image only what is for their platform.  A pin without
    any wildcard is refreshed even if nobody has pulled it yet.  Where several pins match, the shortest
    `keep_fresh` counts, and all of their platforms.  `clock` tells seconds since the epoch.
    """

    def __init__(
        self, registry: Refreshable, store: Store, pins: Pins, clock: Callable[[], float] = time.time
    ) -> None:
        self._registry = registry
        self._store = store
        self._pins = pins
        self._clock = clock
        # How often it failed in a row, and when it is tried again.
        self._failed: dict[tuple[str, Reference], tuple[int, float]] = {}

    async def due(self) -> list[tuple[str, Reference, Pin]]:
        """What is to be refreshed now.  Raises StorageFailed."""
        planned = await run_in_thread(self._planned)
        now = self._clock()
        return [(repository, reference, pin) for at, repository, reference, pin in planned if at <= now]

    async def next_at(self) -> float | None:
        """When something is due; None: never.  Raises StorageFailed."""
        planned = await run_in_thread(self._planned)
        return min((at for at, *_ in planned if at < math.inf), default=None)

    async def run_once(self) -> list[Refreshed | RegistryError]:
        """Refresh what is due, one after the other.  Raises StorageFailed where the pins cannot be read."""
        return [await self._refresh(*each) for each in await self.due()]

    async def _refresh(self, repository: str, reference: Reference, pin: Pin) -> Refreshed | RegistryError:
        namespace, _, name = repository.partition("/")
        telling = log.bind(namespace=namespace, repository=name, reference=reference, pattern=pin.pattern)
        key = repository, reference
        try:
            done = await refresh(self._registry, repository, reference, pin.platforms)
            if done.changed or key in self._failed:  # by digest: only what refers to it is asked for
                await refresh(self._registry, repository, done.digest, pin.platforms, referrers=True)
        except RegistryError as error:
            failures = self._failed.get(key, (0, 0.0))[0]
            # Bounded, since it goes on for as long as the pin is there.
            wait = min(BACKOFF * 2 ** min(failures, 10), LONGEST_BACKOFF)
            wait = max(wait, error.retry_after or 0.0)
            self._failed[key] = failures + 1, self._clock() + wait
            telling.warning("pin.failed", error=str(error) or error.code, again_in=wait)
            return error
        self._failed.pop(key, None)
        if done.changed:
            telling.info(
                "pin.refreshed", digest=done.digest, old=done.moved, blobs=done.fetched, bytes=done.bytes
            )
        return done

    def _planned(self) -> list[tuple[float, str, Reference, Pin]]:
        """All that is kept fresh, and when it is due."""
        wanted: dict[tuple[str, Reference], Pin] = {}
        for pin in self._pins.list():
            if pin.keep_fresh is None:
                continue
            found = set(self._pins.matching(pin))
            with suppress(NameInvalid, TagInvalid, DigestInvalid):  # such a pin matches nothing
                found |= {pin.exact} if pin.exact else set()
            for each in found:
                wanted[each] = _both(wanted[each], pin) if each in wanted else pin
        for gone in self._failed.keys() - wanted.keys():
            self._failed.pop(gone, None)
        return sorted(
            (
                (self._due_at(repository, reference, pin), repository, reference, pin)
                for (repository, reference), pin in wanted.items()
            ),
            key=lambda planned: planned[:3],
        )

    def _due_at(self, repository: str, reference: Reference, pin: Pin) -> float:
        if (failed := self._failed.get((repository, reference))) is not None:
            return failed[1]
        if isinstance(reference, Digest):
            return math.inf if self._whole(repository, reference, pin.platforms) else 0.0
        pointer = self._store.pointer(repository, reference)
        # A clock that was set back must not keep a tag fresh for ever.
        if pointer is None or pointer.validated_at > self._clock():
            return 0.0
        if not self._whole(repository, pointer.digest, pin.platforms):
            return 0.0
        return pointer.validated_at + (pin.keep_fresh or 0.0)

    def _whole(self, repository: str, digest: Digest, platforms: Sequence[str]) -> bool:
        found = walk(self._store, repository, digest, platforms)
        # Not by opening them, which would count as use.
        return not found.missing and all(
            self._store.records.get(f"link {repository} {each}") is not None and self._store.holds(each)
            for each, blob in found.blobs.items()
            if not foreign(blob)
        )


def _both(one: Pin, other: Pin) -> Pin:
    """What keeps fresh what either does; no platforms are all platforms."""
    platforms = one.platforms and other.platforms and tuple(dict.fromkeys(one.platforms + other.platforms))
    shortest = min(filter(None, (one.keep_fresh, other.keep_fresh)))
    return replace(one, keep_fresh=shortest, platforms=platforms)
