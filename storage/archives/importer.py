"""Imports an archive into stores: all of it, or nothing that clients can see.

Blobs are written first and verified, without links, so that no client can see them.  When all of them are
stored, links and manifests follow, and tags last.  A damaged archive moves no tag.  A repeated import skips
what is stored, and resumes a blob that was written in part.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from storage.archives.layout import Layout
from storage.concurrency import run_in_thread
from storage.disk.sparse import SparseUpload
from storage.disk.uploads import CHUNK
from storage.errors import (
    ArchiveInvalid,
    BlobUnknown,
    DigestInvalid,
    ManifestUnknown,
    StorageFailed,
    Unavailable,
)
from storage.keys import MANIFEST
from storage.oci import OCTETS, Descriptor, Digest, Manifest, Tag
from storage.records import Batch, Records, batches
from storage.store import Store

TRIES = 3  # how often blobs are imported again that were evicted meanwhile
Tick = Callable[[int], None]  # called with the bytes imported so far


class ImportTarget(NamedTuple):
    """The repository that something is imported into; `repository` is its full name.

    If `sparse`, children of an index may be missing.  `allowed` raises an error if a tag must not be moved.
    """

    store: Store
    repository: str
    sparse: bool = True
    allowed: Callable[[Records | Batch, Tag, Digest], None] = lambda records, tag, digest: None

    @property
    def namespace(self) -> str:
        return self.repository.partition("/")[0]


class ImportedTag(NamedTuple):
    """A tag that an import has set; `before` is the digest that it had."""

    target: ImportTarget
    tag: Tag
    digest: Digest
    before: Digest | None


@dataclass(slots=True)
class RepositoryImport:
    """What is imported into one repository.

    `tags` map to the digest and to when an origin last confirmed it; `untagged` are the other roots.
    """

    target: ImportTarget
    manifests: dict[Digest, Descriptor] = field(default_factory=dict)
    blobs: dict[Digest, int] = field(default_factory=dict)
    tags: dict[Tag, tuple[Digest, float]] = field(default_factory=dict)
    untagged: list[Digest] = field(default_factory=list)


class Importer:
    """An import of `repositories` from `layout`, which import_plan.py has checked."""

    def __init__(self, layout: Layout, repositories: Sequence[RepositoryImport]) -> None:
        self._layout = layout
        self.repositories = repositories
        self.bytes = 0  # imported so far
        self.blobs = 0  # imported so far
        self.moved: list[ImportedTag] = []  # the tags that were set

    def required(self) -> int:
        """How many bytes are to be imported.  Blocks.  Raises StorageFailed if the disk is too full."""
        total = 0
        for store, blobs in self._blobs():
            required = sum(size for digest, size in blobs.items() if not renew_if_stored(store, digest, size))
            if required > (room := store.files.room()):
                free = max(0, room)
                raise StorageFailed(f"{store.files.root}: {required} bytes are needed, and {free} are free")
            total += required
        return total

    def _blobs(self) -> Iterator[tuple[Store, dict[Digest, int]]]:
        """The blobs that each store must contain."""
        stores = {id(planned.target.store): planned.target.store for planned in self.repositories}
        for store in stores.values():
            found: dict[Digest, int] = {}
            for planned in self.repositories:
                if planned.target.store is store:
                    found |= planned.blobs
            yield store, found

    async def run(self, tick: Tick = lambda done: None) -> None:
        """Import it.  Raises ArchiveInvalid and StorageFailed before tags are set, unless the records fail.

        If a tag has become immutable meanwhile, the error of `allowed` may come after some were set.
        """
        for _ in range(TRIES):
            for store, blobs in self._blobs():
                for digest in sorted(blobs, key=self._layout.position):
                    if not renew_if_stored(store, digest, blobs[digest]):
                        await self._import_blob(store, digest, blobs[digest], tick)
            try:
                return await run_in_thread(self._publish)
            except BlobUnknown:
                continue  # it was evicted before it was linked
        raise StorageFailed(
            f"blobs of {self._layout.what} are evicted before all are imported: the cache is too small",
            cause=os.strerror(errno.ENOSPC),
        )

    async def _import_blob(self, store: Store, digest: Digest, size: int, tick: Tick) -> None:
        upload = await self._started(store, digest)
        while upload is not None and not renew_if_stored(store, digest, size):
            begun = upload.offset
            try:
                await self._copy(upload, digest, tick)
                return
            except DigestInvalid as error:
                if not begun:
                    raise ArchiveInvalid(f"{self._layout.what} is damaged: {digest}: {error}") from error
            upload = await self._started(store, digest)  # the resumed part was of other content
        if upload is not None:
            await upload.cancel()

    async def _started(self, store: Store, digest: Digest) -> SparseUpload | None:
        """Start or resume the blob's upload; None if another process has completed it meanwhile."""
        while True:
            upload = await store.files.resume(digest)
            try:
                if upload.ours or not await upload.watch(digest):
                    return upload
                return None
            except Unavailable:  # the other process gave up
                await upload.cancel()
            except BaseException as error:
                await upload.suspend(error)
                raise

    async def _copy(self, upload: SparseUpload, digest: Digest, tick: Tick) -> None:
        try:
            with self._layout.opened(digest) as part:
                if upload.offset <= part.size and upload.listed_size in (-1, part.size):
                    upload.expect(part.size)
                    self.bytes += upload.offset
                    for start, stop in upload.extents.gaps(0, part.size):
                        for position in range(start, stop, CHUNK):
                            chunk = await run_in_thread(part.at, position, min(CHUNK, stop - position))
                            await upload.write_at(position, chunk)
                            self.bytes += len(chunk)
                            tick(self.bytes)
                await upload.commit(digest)
                self.blobs += 1
        except DigestInvalid:
            raise
        except (ArchiveInvalid, StorageFailed) as error:
            await upload.cancel(error)
            raise
        except BaseException as error:
            await upload.suspend(error)  # the next import resumes it
            raise

    def _publish(self) -> None:
        for planned in self.repositories:
            repository, store = planned.target.repository, planned.target.store
            for links in batches(planned.blobs.items()):
                store.records.transaction(_linking(store, repository, links))
            for manifests in batches(planned.manifests.values()):
                found = [self._read(planned, each) for each in manifests]
                store.records.transaction(_storing(store, repository, found))
        for planned in self.repositories:
            for tags in batches(planned.tags.items()):
                self.moved += planned.target.store.records.transaction(_binding(planned.target, tags))

    def _read(self, planned: RepositoryImport, named: Descriptor) -> Manifest:
        content = manifest_of(self._layout, planned.target, named)
        if content is None:
            raise ArchiveInvalid(f"{self._layout.what}: {named.digest} was deleted since the import began")
        return Manifest(named.media_type, content, named.digest)


def manifest_of(layout: Layout, target: ImportTarget, named: Descriptor) -> bytes | None:
    """Read a manifest from the archive, or else from the repository; None if neither contains it."""
    size = layout.size(named.digest)
    if size is None:
        with suppress(ManifestUnknown):
            return target.store.manifest(target.repository, named.digest)[0].content
        return None
    if size != named.size:
        raise ArchiveInvalid(
            f"{layout.what}: {named.digest} has {size} bytes, but is listed with {named.size}"
        )
    return layout.manifest(named.digest)


def renew_if_stored(store: Store, digest: Digest, size: int) -> bool:
    """Whether the blob is stored; if so, mark it as used, so that it is not evicted before it is linked."""
    # Not by open(), which removes a file of another size: the archive, not trusted, states the size.
    found = store.files.find(digest)
    if found is not None and found.size == size:
        with suppress(BlobUnknown):
            store.files.renew(digest)
            return True
    return False


def _linking(store: Store, repository: str, links: Sequence[tuple[Digest, int]]) -> Callable[[Batch], None]:
    def work(batch: Batch) -> None:
        for digest, size in links:
            store.put_link(batch, repository, Descriptor(OCTETS, digest, size))

    return work


def _storing(store: Store, repository: str, manifests: Sequence[Manifest]) -> Callable[[Batch], None]:
    def work(batch: Batch) -> None:
        for manifest in manifests:
            store.put_manifest(batch, repository, manifest)
        store.changed(batch, repository)

    return work


def _binding(
    target: ImportTarget, tags: Sequence[tuple[Tag, tuple[Digest, float]]]
) -> Callable[[Batch], list[ImportedTag]]:
    def work(batch: Batch) -> list[ImportedTag]:
        moved = []
        for tag, (digest, validated_at) in tags:
            if batch.get(MANIFEST.key(target.repository, digest)) is None:
                continue  # it was deleted after it was stored, and its tags with it
            target.allowed(batch, tag, digest)
            known = target.store.pointer(target.repository, tag)
            target.store.put_tag(batch, target.repository, tag, digest, validated_at)
            moved.append(ImportedTag(target, tag, digest, None if known is None else known.digest))
        target.store.changed(batch, target.repository)
        return moved

    return work
