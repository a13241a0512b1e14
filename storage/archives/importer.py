"""What an archive brings is taken into stores: all of it, or nothing that anybody could see.

Blobs come first, each compared with its digest, and shown to nobody.  Only when all are here do links and
manifests follow, and tags last.  So an archive that is damaged, wherever, moves no tag; and what was taken in
before is not taken in again, not even the half of a blob.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple, TypeVar

from storage.archives.layout import Layout
from storage.concurrency import run_in_thread
from storage.disk.records import Batch, Records
from storage.disk.uploads import CHUNK, FileUpload
from storage.errors import (
    ArchiveInvalid,
    BlobUnknown,
    DigestInvalid,
    ManifestUnknown,
    StorageFailed,
    Unavailable,
)
from storage.oci import OCTETS, Descriptor, Digest, Manifest, Tag
from storage.store import Store

T = TypeVar("T")
BATCH = 500  # records in a transaction: nobody else can write while it lasts
Tick = Callable[[int], None]  # called with how many bytes were taken in


class ImportTarget(NamedTuple):
    """Where it goes: `repository` is a full name.

    If it is `sparse`, an index may lack children.  `allowed` raises what speaks against moving a tag there.
    """

    store: Store
    repository: str
    sparse: bool = True
    allowed: Callable[[Records | Batch, Tag, Digest], None] = lambda records, tag, digest: None

    @property
    def namespace(self) -> str:
        return self.repository.partition("/")[0]


class Moved(NamedTuple):
    """A tag was bound; `before` is what it was."""

    place: ImportTarget
    tag: Tag
    digest: Digest
    before: Digest | None


@dataclass(slots=True)
class RepositoryImport:
    """What one repository gets: tags with the time at which an origin said so; `untagged` are other roots."""

    place: ImportTarget
    manifests: dict[Digest, Descriptor] = field(default_factory=dict)
    blobs: dict[Digest, int] = field(default_factory=dict)
    tags: dict[Tag, tuple[Digest, float]] = field(default_factory=dict)
    untagged: list[Digest] = field(default_factory=list)


class Importer:
    """`shares` is what is to be taken of `layout`: see importing.py, which makes sure that all is there."""

    def __init__(self, layout: Layout, shares: Sequence[RepositoryImport]) -> None:
        self._layout = layout
        self.shares = shares
        self.taken = 0  # bytes
        self.blobs = 0  # that were taken

    def lacking(self) -> int:
        """How many bytes are to be taken in.  Blocks.  Raises StorageFailed where they find no room."""
        whole = 0
        for store, blobs in self._blobs():
            lacking = sum(size for digest, size in blobs.items() if not held(store, digest, size))
            if lacking > store.files.room():
                raise StorageFailed(
                    f"{store.files.root}: it takes {lacking} bytes, and {max(0, store.files.room())} are free"
                )
            whole += lacking
        return whole

    def _blobs(self) -> Iterator[tuple[Store, dict[Digest, int]]]:
        """What each store is to have."""
        stores = {id(share.place.store): share.place.store for share in self.shares}
        for store in stores.values():
            found: dict[Digest, int] = {}
            for share in self.shares:
                if share.place.store is store:
                    found |= share.blobs
            yield store, found

    async def run(self, tick: Tick = lambda taken: None) -> list[Moved]:
        """Raises ArchiveInvalid, StorageFailed; then no tag has moved."""
        for store, blobs in self._blobs():
            for digest in sorted(blobs, key=self._layout.position):
                if not held(store, digest, blobs[digest]):
                    await self._take(store, digest, blobs[digest], tick)
        return await run_in_thread(self._show)

    async def _take(self, store: Store, digest: Digest, size: int, tick: Tick) -> None:
        upload = await self._started(store, digest)
        while upload is not None and not held(store, digest, size):
            begun = upload.offset
            try:
                await self._copy(upload, digest, tick)
                return
            except DigestInvalid as error:
                if not begun:
                    raise ArchiveInvalid(f"{self._layout.what} is damaged: {digest}: {error}") from error
            upload = await self._started(store, digest)  # what somebody had left of it was something else
        if upload is not None:
            await upload.cancel()

    async def _started(self, store: Store, digest: Digest) -> FileUpload | None:
        """None: another process had it on its way, and it has come."""
        while True:
            upload = await store.files.resume(digest)
            try:
                if upload.ours or not await upload.watch(digest):
                    return upload
                return None
            except Unavailable:  # and gave up
                await upload.cancel()
            except BaseException as error:
                await upload.suspend(error)
                raise

    async def _copy(self, upload: FileUpload, digest: Digest, tick: Tick) -> None:
        try:
            with self._layout.opened(digest) as part:
                if upload.offset <= part.size:
                    upload.expect(part.size)
                    self.taken += upload.offset
                    while chunk := await run_in_thread(part.at, upload.offset, CHUNK):
                        await upload.write(chunk)
                        self.taken += len(chunk)
                        tick(self.taken)
                await upload.commit(digest)
                self.blobs += 1
        except DigestInvalid:
            raise
        except (ArchiveInvalid, StorageFailed) as error:
            await upload.cancel(error)
            raise
        except BaseException as error:
            await upload.suspend(error)  # to go on with, by whoever takes it next
            raise

    def _show(self) -> list[Moved]:
        for share in self.shares:
            repository, store = share.place.repository, share.place.store
            for links in _batches(share.blobs.items()):
                store.records.transaction(_linking(store, repository, links))
            for manifests in _batches(share.manifests.values()):
                found = [self._read(share, each) for each in manifests]
                store.records.transaction(_storing(store, repository, found))
        moved = []
        for share in self.shares:
            for tags in _batches(share.tags.items()):
                moved += share.place.store.records.transaction(_binding(share.place, tags))
        return moved

    def _read(self, share: RepositoryImport, named: Descriptor) -> Manifest:
        content = manifest_of(self._layout, share.place, named)
        if content is None:
            raise ArchiveInvalid(f"{self._layout.what}: {named.digest} has gone meanwhile")
        return Manifest(named.media_type, content, named.digest)


def manifest_of(layout: Layout, place: ImportTarget, named: Descriptor) -> bytes | None:
    """From the archive, else as the repository has it already; None where neither has it."""
    size = layout.size(named.digest)
    if size is None:
        with suppress(ManifestUnknown):
            return place.store.manifest(place.repository, named.digest)[0].content
        return None
    if size != named.size:
        raise ArchiveInvalid(
            f"{layout.what}: {named.digest} has {size} bytes; what names it says {named.size}"
        )
    return layout.manifest(named.digest)


def held(store: Store, digest: Digest, size: int) -> bool:
    """Whether it is here; and it counts as used, so that it does not go before it is linked."""
    # Not Files.open(), which would remove what has another size: that is told by whoever made the archive.
    with suppress(FileNotFoundError, BlobUnknown):
        if store.files.path(digest).stat().st_size == size:
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
    place: ImportTarget, tags: Sequence[tuple[Tag, tuple[Digest, float]]]
) -> Callable[[Batch], list[Moved]]:
    def work(batch: Batch) -> list[Moved]:
        moved = []
        for tag, (digest, validated_at) in tags:
            place.allowed(batch, tag, digest)
            known = place.store.pointer(place.repository, tag)
            place.store.put_tag(batch, place.repository, tag, digest, validated_at)
            moved.append(Moved(place, tag, digest, None if known is None else known.digest))
        place.store.changed(batch, place.repository)
        return moved

    return work


def _batches(found: Iterable[T]) -> Iterator[Sequence[T]]:
    rest = iter(found)
    while batch := list(islice(rest, BATCH)):
        yield batch
