"""Refreshing: what a reference means now is whole here, before anybody asks for it.

The tag is revalidated, fresh or not; what it names and is not stored is fetched.  What has not changed
costs one HEAD.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import structlog

from storage.errors import (
    BlobUnknown,
    ManifestUnknown,
    NameUnknown,
    RegistryError,
    Unsupported,
)
from storage.graph import Walk, attestations, contents, fallback_tag, selected, signature_tags
from storage.oci import Descriptor, Digest, Manifest, Reference, Tag

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
    whole = _ImageFetch(registry, repository, sparing)
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
class _ImageFetch:
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

    async def take(self, manifest: Manifest, platforms: Sequence[str] = ()) -> set[Digest]:
        steps = Walk([manifest.digest])
        for digest in steps:
            try:
                found = manifest if digest == manifest.digest else await self._manifest(digest)
            except ManifestUnknown as error:
                self.unknown.append(error)
                continue
            self.manifests.add(digest)
            if (content := contents(found.content)) is not None:
                self.blobs.update((each.digest, each) for each in content.blobs)
                self.attestations |= attestations(content)
                children = (each.digest for each in selected(content, platforms))
                steps.add(each for each in children if each not in self.manifests)
        return steps.reached & self.manifests

    async def _manifest(self, reference: Reference) -> Manifest:
        if self.sparing:
            self.registry.spare(self.repository, reference)
        return await self.registry.get_manifest(self.repository, reference)

    async def take_referrers(self) -> None:
        """What refers to the manifests, and what refers to that."""
        image = frozenset(self.manifests)
        signed = image - self.attestations  # these are about an image, and nobody signs them for themselves
        subjects = Walk(self.manifests)
        for digest in subjects:
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
                        subjects.add(await self.take(await self._manifest(each)))
                    del self.unknown[unknown:]  # listed once, deleted since
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
                if blob.distributable:
                    self.unknown.append(error)
                return
        if size:
            self.fetched += 1
            self.bytes += size


@runtime_checkable
class Refreshable(Protocol):
    """What a cache can besides a Registry: see Cache."""

    async def get_manifest(self, repository: str, reference: Reference) -> Manifest: ...
    async def referrers(self, repository: str, digest: Digest) -> list[Descriptor]: ...
    async def revalidate(self, repository: str, tag: Tag) -> tuple[str, Manifest, Digest | None]: ...
    async def fill_blob(self, repository: str, digest: Digest) -> int: ...
    def spare(self, repository: str, reference: Reference) -> None: ...
