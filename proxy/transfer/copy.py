"""Copies images between registries: only what is missing, and nothing before what it names.

The blobs of an image come first, then its children, the image itself, its referrers, and its tags last.  So
an interruption leaves no incomplete image, and the next run continues.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import msgspec

from proxy.transfer.blob_copy import BlobCopy, ProgressListener, RetryPolicy
from storage.concurrency import shielded
from storage.errors import (
    BlobUnknown,
    Denied,
    ManifestInvalid,
    ManifestUnknown,
    NameUnknown,
    OriginFailed,
    Unsupported,
)
from storage.graph import (
    UNLISTED,
    attestations,
    contents,
    fallback_tag,
    missing_platforms,
    selected,
    signature_tags,
    unread,
)
from storage.oci import OCI_INDEX, Descriptor, Digest, Manifest, ManifestContent, Reference, Tag
from storage.registry import Registry

T = TypeVar("T")

REQUESTS = 16  # requests at once, besides the transfers
TAG_LIMIT = 128  # characters of a tag; one made of a sha512 digest is longer
# The answers for unknown content; some registries also answer Denied.
_ABSENT = (ManifestUnknown, NameUnknown, BlobUnknown, Denied)


@dataclass(frozen=True, slots=True)
class CopyOptions:
    """What to copy.  `platforms` are those of an index, all if empty; `transfers` is the number at once."""

    platforms: tuple[str, ...] = ()
    referrers: bool = True
    dry_run: bool = False
    transfers: int = 4


@dataclass(slots=True)
class CopyCounts:
    """What was transferred, or would be.

    Of the other blobs, `mounted` were in another repository of the destination, and `present` in the same.
    """

    manifests: int = 0
    tags: int = 0
    blobs: int = 0
    bytes: int = 0
    mounted: int = 0
    present: int = 0


@dataclass(frozen=True, slots=True)
class CopyRoute:
    """A copy from a `repository` of `source` to `target`, a repository of the destination.

    `tags` are all tags of the source, if they were listed; `within` means that both are in one registry.
    """

    source: Registry
    repository: str
    target: str
    within: bool = False
    tags: frozenset[str] | None = None


class Copier:
    """Copies to one destination from any number of sources.  Must be closed."""

    def __init__(
        self, destination: Registry, rules: CopyOptions, listener: ProgressListener, retries: RetryPolicy
    ) -> None:
        self.done = CopyCounts()
        self.retries = retries
        self._destination = destination
        self._rules = rules
        self._listener = listener
        self._transfers = asyncio.Semaphore(rules.transfers)
        self._requests = asyncio.Semaphore(REQUESTS)
        # Each manifest and blob is copied to a repository once, however many images share it.
        self._copies: dict[tuple[str, Digest], asyncio.Task[bool]] = {}
        self._blobs_present: set[tuple[str, Digest]] = set()
        self._holders: dict[Digest, str] = {}  # a repository of the destination that has the blob
        self._blob_locks: dict[Digest, asyncio.Lock] = {}

    async def copy(self, route: CopyRoute, reference: Reference, tags: Sequence[Tag]) -> tuple[Digest, bool]:
        """Copy an image, and set its tags; returns its digest, and whether anything changed.

        Raises RegistryError.
        """
        found = await self.ask(lambda: route.source.resolve_manifest(route.repository, reference))
        digest = found.digest
        if len(self._rules.platforms) == 1:
            digest = await self._chosen(route, digest)
        new = await self._manifest(route, digest)
        for tag in tags:
            new |= await self._tag(route, digest, tag)
        return digest, new

    async def ask(self, call: Callable[[], Awaitable[T]]) -> T:
        """Make one request, with retries and within the limit of requests at once."""

        async def attempt() -> T:
            async with self._requests:
                return await call()

        return await self.retries.persist(attempt)

    async def _existing(self, call: Callable[[], Awaitable[Descriptor]]) -> Descriptor | None:
        try:
            return await self.ask(call)
        except _ABSENT:
            return None

    async def _chosen(self, route: CopyRoute, digest: Digest) -> Digest:
        """The image of an index for the one platform that was asked for."""
        manifest = await self.ask(lambda: route.source.get_manifest(route.repository, digest))
        content = contents(manifest.content)
        if content is None or not content.children:
            return digest
        fit = {
            each.digest: each.platform
            for each in selected(content, self._rules.platforms)
            if each.platform is not None
        }
        if len(fit) != 1:
            has = ", ".join(
                sorted(fit.values()) or sorted({each.platform for each in content.children if each.platform})
            )
            raise ManifestUnknown(
                f"the index has {'several images' if fit else 'no image'}"
                f" for {self._rules.platforms[0]}: {has or 'it names no platform'}"
            )
        return next(iter(fit))

    # Manifests

    async def _manifest(self, route: CopyRoute, digest: Digest, *, signed: bool = True) -> bool:
        """Copy a manifest with all that it names; returns whether anything changed.

        `signed` says that the manifest may have signatures.
        """
        key = route.target, digest
        if (task := self._copies.get(key)) is None:
            task = self._copies[key] = asyncio.create_task(self._take(route, digest, signed))
        return await shielded(task)

    async def _take(self, route: CopyRoute, digest: Digest, signed: bool) -> bool:
        destination, target = self._destination, route.target
        new = await self._existing(lambda: destination.resolve_manifest(target, digest)) is None
        holder, repository = (route.source, route.repository) if new else (destination, target)
        manifest = await self.ask(lambda: holder.get_manifest(repository, digest))
        content = contents(manifest.content)
        if content is not None and signed:
            self._note_missing(f"{route.target}@{digest}", content)
        if new and unread(content):
            raise ManifestInvalid(
                f"{digest} is a {manifest.media_type}: what it names cannot be read, nor copied"
            )
        # Also of a manifest that is there: a registry may have lost or deleted a blob of it.
        parts = [] if content is None else self._parts(route, content)
        changed = await _all(parts) or new
        if new:
            if not self._rules.dry_run:
                await self.ask(lambda: destination.push_manifest(target, digest, manifest))
            self.done.manifests += 1
        if self._rules.referrers:
            changed |= await self._referrers(route, digest)
            changed |= await self._signatures(route, digest) if signed else False
        return changed

    def _note_missing(self, name: str, content: ManifestContent) -> None:
        """Note for which platforms an index has no image.  Raises ManifestUnknown if it has none at all."""
        if missing := missing_platforms(content, self._rules.platforms):
            cause = f"{name} has no image for {', '.join(missing)}"
            if len(missing) == len(self._rules.platforms):
                raise ManifestUnknown(cause)
            self._listener.note(cause)

    def _parts(self, route: CopyRoute, content: ManifestContent) -> list[Coroutine[Any, Any, bool]]:
        """The copies of what a manifest names, which come before it."""
        parts = [self._blob(route, each) for each in content.distributable]
        unsigned = attestations(content)
        return parts + [
            self._manifest(route, each.digest, signed=each.digest not in unsigned)
            for each in selected(content, self._rules.platforms)
        ]

    async def _tag(self, route: CopyRoute, digest: Digest, tag: Tag) -> bool:
        destination, target = self._destination, route.target
        found = await self._existing(lambda: destination.resolve_manifest(target, tag))
        if found is not None and found.digest == digest:
            return False
        if not self._rules.dry_run:
            manifest = await self.ask(lambda: destination.get_manifest(target, digest))
            await self.ask(lambda: destination.push_manifest(target, tag, manifest))
        self.done.tags += 1
        return True

    # Blobs

    async def _blob(self, route: CopyRoute, blob: Descriptor) -> bool:
        key = route.target, blob.digest
        # One copy of a digest at a time: if two repositories need it, the second mounts it.
        async with self._blob_locks.setdefault(blob.digest, asyncio.Lock()):
            if key in self._blobs_present:
                return False
            new = await self._existing(lambda: self._destination.resolve_blob(*key)) is None
            if not new:
                self.done.present += 1
            elif await self._mounted(route, blob.digest):
                self.done.mounted += 1
            else:
                size = await self._transferred(
                    route, blob
                )  # not within +=, since other tasks count meanwhile
                self.done.bytes += size
                self.done.blobs += 1
            self._blobs_present.add(key)
            self._holders.setdefault(blob.digest, route.target)
            return new

    async def _mounted(self, route: CopyRoute, digest: Digest) -> bool:
        holders = [self._holders.get(digest), route.repository if route.within else None]
        for holder in filter(None, holders):
            if self._rules.dry_run:
                return True
            try:
                await self.ask(partial(self._destination.mount_blob, route.target, digest, holder))
            except (*_ABSENT, Unsupported):
                continue
            return True
        return False

    async def _transferred(self, route: CopyRoute, blob: Descriptor) -> int:
        if self._rules.dry_run:
            return blob.size
        async with self._transfers:
            transfer = BlobCopy(route.source, route.repository, self._destination, route.target, blob)
            try:
                return await transfer.run(self._listener, self.retries)
            except BlobUnknown as error:
                raise BlobUnknown(f"blob {blob.digest}: {error}") from error

    # Referrers

    async def _referrers(self, route: CopyRoute, digest: Digest) -> bool:
        """Copy the referrers of a manifest that is present."""
        listed = await self._listed(route, digest)
        changed = await _all([self._manifest(route, each.digest, signed=False) for each in listed])
        if listed and not self._rules.dry_run:
            await self._list(route.target, digest, listed)
        return changed

    async def _signatures(self, route: CopyRoute, digest: Digest) -> bool:
        """Copy what is attached by the tags of cosign, which predate the referrers API."""
        changed = False
        for tag in signature_tags(digest):
            if len(tag) > TAG_LIMIT or (route.tags is not None and tag not in route.tags):
                continue
            found = await self._existing(partial(route.source.resolve_manifest, route.repository, tag))
            if found is not None:
                changed |= await self._manifest(route, found.digest, signed=False)
                changed |= await self._tag(route, found.digest, tag)
        return changed

    async def _listed(self, route: CopyRoute, digest: Digest) -> list[Descriptor]:
        """The referrers by the API (distribution-spec, "Listing Referrers"), else by the fallback tag."""
        try:
            return await self.ask(lambda: route.source.referrers(route.repository, digest))
        except UNLISTED:
            pass
        tag = fallback_tag(digest)
        if route.tags is not None and tag not in route.tags:
            return []
        try:
            index = await self.ask(lambda: route.source.get_manifest(route.repository, tag))
        except _ABSENT:
            return []
        content = contents(index.content)
        return [] if content is None else list(content.children)

    async def _list(self, target: str, digest: Digest, listed: Iterable[Descriptor]) -> None:
        """Update the fallback tag of a destination without referrers API.

        distribution-spec, "Pushing Manifests with Subject".
        """
        destination, tag = self._destination, fallback_tag(digest)
        try:
            await self.ask(lambda: destination.referrers(target, digest))
            return
        except UNLISTED:
            pass
        index: dict[str, Any] = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}
        if await self._existing(lambda: destination.resolve_manifest(target, tag)) is not None:
            found = await self.ask(lambda: destination.get_manifest(target, tag))
            index = msgspec.json.decode(found.content)
            if found.media_type != OCI_INDEX or not isinstance(index.get("manifests"), list):
                raise OriginFailed(f"tag {tag} of {target} is not an index of referrers: it was not changed")
        known = {each.get("digest") for each in index["manifests"]}
        if new := [each.to_json() for each in listed if each.digest not in known]:
            index["manifests"] += new
            manifest = Manifest.of(OCI_INDEX, msgspec.json.encode(index))
            await self.ask(lambda: destination.push_manifest(target, tag, manifest))

    async def close(self) -> None:
        """Cancel the copies in progress."""
        for task in self._copies.values():
            task.cancel()
        await asyncio.gather(*self._copies.values(), return_exceptions=True)


async def _all(parts: Iterable[Coroutine[Any, Any, bool]]) -> bool:
    """Whether any copy changed something.  Raises the first error, and cancels the other copies."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in parts]
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return any(task.result() for task in tasks)
