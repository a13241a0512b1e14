"""Refreshing an image in the cache: its tag is revalidated, and missing content is fetched.

An image that has not changed costs one HEAD request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import structlog

from storage.concurrency import run_sized
from storage.errors import (
    BlobUnknown,
    ManifestInvalid,
    ManifestUnknown,
    NameUnknown,
    RegistryError,
)
from storage.graph import (
    UNLISTED,
    Walk,
    attestations,
    contents,
    fallback_tag,
    selected,
    signature_tags,
    unread,
)
from storage.oci import Descriptor, Digest, Manifest, Reference, Tag

log = structlog.get_logger()

FILLS = 4  # at once, of one image
BACKOFF = 60.0  # seconds after a failure, doubling
LONGEST_BACKOFF = 3600.0  # seconds


@dataclass(frozen=True, slots=True)
class RefreshResult:
    """The outcome of refreshing one image, which is complete in the store now.

    new: the tag was not known before
    moved: the tag's former digest, if it has moved
    manifests, blobs: how many the image consists of
    fetched: how many of the blobs were fetched, of `bytes` in total
    referrers: how many of the manifests refer to others of them
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
    def changed(self) -> bool:
        return self.new or self.moved is not None or self.fetched > 0


async def refresh(
    registry: Refreshable,
    repository: str,
    reference: Reference,
    platforms: Sequence[str] = (),
    referrers: bool = False,
    sparing: bool = False,
) -> RefreshResult:
    """Fetch into the store what `reference` stands for now and is missing there.

    Content that the origin does not know is left out, and raised once the rest is stored.  Raises
    RegistryError.

    platforms: those whose manifests are fetched, of an index; none means all
    referrers: fetch the referrers as well, which costs a few requests for each manifest
    sparing: leave to clients the requests that are reserved of the origin's rate limit; see Cache.spare()
    """
    old: Digest | None = None
    if sparing:
        registry.spare(repository, reference)
    if isinstance(reference, Tag):
        _, manifest, old = await registry.revalidate(repository, reference)
    else:
        manifest = await registry.get_manifest(repository, reference)
    image = _ImageFetch(registry, repository, sparing)
    await image.fetch_manifests(manifest, platforms)
    if referrers:
        await image.fetch_referrers()
    await image.fetch_blobs()
    if image.unknown:
        raise image.unknown[0]
    return image.result(reference, manifest.digest, old)


@dataclass(slots=True)
class _ImageFetch:
    """An image that is being fetched; `unknown` are the errors for content that the origin does not have, and
    for manifests whose content is unknown.
    """

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

    async def fetch_manifests(self, manifest: Manifest, platforms: Sequence[str] = ()) -> set[Digest]:
        """Fetch the manifests below this one; return the digests of those that are new, it included."""
        steps = Walk([manifest.digest])
        for digest in steps:
            try:
                found = manifest if digest == manifest.digest else await self._manifest(digest)
            except ManifestUnknown as error:
                self.unknown.append(error)
                continue
            self.manifests.add(digest)
            content = await run_sized(len(found.content), contents, found.content)
            if unread(content):
                self.unknown.append(
                    ManifestInvalid(
                        f"{digest} is a {found.media_type}: what it names cannot be read, nor fetched"
                    )
                )
            if content is not None:
                self.blobs.update((each.digest, each) for each in content.blobs)
                self.attestations |= attestations(content)
                children = (each.digest for each in selected(content, platforms))
                steps.add(each for each in children if each not in self.manifests)
        return steps.reached & self.manifests

    async def _manifest(self, reference: Reference) -> Manifest:
        if self.sparing:
            self.registry.spare(self.repository, reference)
        return await self.registry.get_manifest(self.repository, reference)

    async def fetch_referrers(self) -> None:
        """Fetch the referrers of the manifests, and their referrers."""
        image = frozenset(self.manifests)
        signed = image - self.attestations  # attestations describe an image, and are not signed themselves
        subjects = Walk(self.manifests)
        for digest in subjects:
            listed: list[Descriptor] = []
            tags = signature_tags(digest) if digest in signed else []
            try:
                listed = await self.registry.referrers(self.repository, digest)
            except UNLISTED:
                tags = [fallback_tag(digest), *tags]
            found: list[Reference] = [*(each.digest for each in listed), *tags]
            for each in found:
                if each not in self.manifests:
                    unknown = len(self.unknown)
                    with suppress(ManifestUnknown, NameUnknown):  # there is no such tag
                        subjects.add(await self.fetch_manifests(await self._manifest(each)))
                    del self.unknown[unknown:]  # listed once, deleted since
        self.referrers = len(self.manifests - image)

    async def fetch_blobs(self) -> None:
        slots = asyncio.Semaphore(FILLS)
        try:
            async with asyncio.TaskGroup() as filling:
                for each in self.blobs.values():
                    filling.create_task(self._fetch_blob(each, slots))
        except ExceptionGroup as group:  # of those that failed before the others were cancelled
            raise group.exceptions[0] from None

    async def _fetch_blob(self, blob: Descriptor, slots: asyncio.Semaphore) -> None:
        async with slots:
            try:
                size = await self.registry.fill_blob(self.repository, blob.digest)
            except BlobUnknown as error:
                if blob.distributable:
                    self.unknown.append(error)
                return
        if size:
            self.fetched += 1
            self.bytes += size

    def result(self, reference: Reference, digest: Digest, old: Digest | None) -> RefreshResult:
        return RefreshResult(
            self.repository,
            reference,
            digest,
            isinstance(reference, Tag) and old is None,
            None if old == digest else old,
            len(self.manifests),
            len(self.blobs),
            self.fetched,
            self.bytes,
            self.referrers,
        )


@runtime_checkable
class Refreshable(Protocol):
    """The methods of a cache that refreshing needs: see Cache."""

    async def get_manifest(self, repository: str, reference: Reference) -> Manifest: ...
    async def referrers(self, repository: str, digest: Digest) -> list[Descriptor]: ...
    async def revalidate(self, repository: str, tag: Tag) -> tuple[str, Manifest, Digest | None]: ...
    async def fill_blob(self, repository: str, digest: Digest) -> int: ...
    def spare(self, repository: str, reference: Reference) -> None: ...
