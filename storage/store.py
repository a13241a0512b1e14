"""A registry that keeps its content: blobs, as files or as objects, and records of everything else.

Each blob is stored once; a link, which is a record, says that a repository shows it.  storage/keys.py and
storage/values.py describe the records.

Records that change together change in one transaction: after a failure either the whole push is stored or
nothing of it.  The transaction that makes a link also finds the blob and sets its last use to the present
time.  So a transaction that removes blobs which are old and have no link never removes one that gets a link.
It also records that the blob is stored: storage/totals.py counts blobs, and all other records.

Times are seconds since the epoch.  Writes run in a thread, and so do reads if the records are remote.  What
cannot be parsed counts as absent: a cache fetches it again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import islice, takewhile
from typing import TypeAlias, TypeVar

from storage.concurrency import run_in_thread
from storage.conditions import ALWAYS, Conditions
from storage.content import BlobContent, LinkedUpload
from storage.errors import BlobUnknown, DigestInvalid, ManifestUnknown, NameUnknown, StorageFailed
from storage.keys import BLOB, CHANGES, LINK, MANIFEST, REFERRER, TAG
from storage.listings import OriginListings
from storage.oci import OCTETS, Descriptor, Digest, Manifest, Reference, Span, Tag
from storage.records import Batch, Records
from storage.registry import NOTHING, Blob, Located, Registry, Upload, everything, referrers_page
from storage.totals import CountedRecords
from storage.values import BlobUse, Link, Pointer, StoredManifest, encode_referrer, parse_referrer, subject_of

T = TypeVar("T")
THREADS = 8  # for remote records
DeletionCheck: TypeAlias = Callable[[Batch, Sequence[Tag]], None]
Work: TypeAlias = Callable[[Batch], None]


class Store(Registry):
    """A registry that keeps its content.  Every method may raise StorageFailed.

    `clock` returns seconds since the epoch.  A store that is `collected` counts the changes of each
    repository, for garbage collection.
    """

    def __init__(
        self,
        files: BlobContent,
        records: Records,
        clock: Callable[[], float] = time.time,
        collected: bool = False,
    ) -> None:
        self.files = files
        self.collected = collected
        self.records: Records = CountedRecords(records)
        self.listings = OriginListings(self.records, clock)
        self._clock = clock
        # Of their own: if a server does not answer, those who do not need it go on.
        self._threads = ThreadPoolExecutor(THREADS, "records") if records.remote else None

    @property
    def cut_off(self) -> bool:
        """Whether its records cannot be reached now: pulls are answered by what is known of them here."""
        return False

    @property
    def sure(self) -> bool:
        """Whether this thread reads what the records say now, and not what was known of them before."""
        return True

    def troubles(self) -> list[str]:
        """A sentence for each cause for which it cannot be used as it should, besides those of its parts."""
        return []

    # Pull

    async def read(self, work: Callable[..., T], *arguments: object) -> T:
        """The result of `work`, which reads a few records."""
        return await self.run(work, *arguments) if self.records.remote else work(*arguments)

    async def run(self, work: Callable[..., T], *arguments: object) -> T:
        """The result of `work`, which reads or writes records, in a thread."""
        return await run_in_thread(work, *arguments, threads=self._threads)

    async def get_blob(self, repository: str, digest: Digest, span: Span | None = None) -> Blob:
        blob = await self._open_linked(repository, digest)
        try:
            await blob.begin(span)
        except BaseException:
            await blob.close()
            raise
        return blob

    async def locate_blob(self, repository: str, digest: Digest) -> Located | None:
        if self.files.path(digest) is not None:
            return None
        blob = await self._open_linked(repository, digest)
        try:
            url = await blob.locate()
        finally:
            await blob.close()
        return None if url is None else Located(blob.descriptor, url, blob.used_at)

    async def _open_linked(self, repository: str, digest: Digest) -> Blob:
        link, sure = await self.read(lambda: (self._link_of(repository, digest), self.sure))
        return await self.open(digest, link.size, sure)

    async def open(self, digest: Digest, size: int | None = None, sure: bool = True) -> Blob:
        """Open a blob, whatever repositories show it: see BlobContent.open()."""
        if self.files.path(digest) is None:  # there are only records to read
            return await self.read(lambda: self.files.open(digest, size, self.sure))
        return self.files.open(digest, size, sure)  # not in a thread: a cancellation would lose the open file

    def blob(self, repository: str, digest: Digest) -> tuple[Blob, float]:
        """Open the blob; also returns when it was linked in `repository`.  Raises BlobUnknown.

        It is not asked for over a network: see Blob.begin().
        """
        link = self._link_of(repository, digest)
        return self.files.open(digest, link.size, self.sure), link.linked_at

    def _link_of(self, repository: str, digest: Digest) -> Link:
        link = Link.parse(self.records.get(LINK.key(repository, digest)))
        if link is None:
            raise BlobUnknown(f"{repository} has no blob {digest}")
        return link

    async def resolve_blob(self, repository: str, digest: Digest) -> Descriptor:
        blob = await self.get_blob(repository, digest, NOTHING)
        await blob.close()
        return blob.descriptor

    async def get_manifest(self, repository: str, reference: Reference) -> Manifest:
        return (await self.read(self.manifest, repository, reference))[0]

    async def resolve_manifest(self, repository: str, reference: Reference) -> Descriptor:
        return (await self.get_manifest(repository, reference)).descriptor

    def manifest(self, repository: str, reference: Reference) -> tuple[Manifest, float]:
        """The manifest, and when it was stored.  Raises ManifestUnknown."""
        if isinstance(reference, Tag):
            pointer = self.pointer(repository, reference)
            if pointer is None:
                raise ManifestUnknown(f"{repository} has no tag {reference}")
            reference = pointer.digest
        stored = StoredManifest.parse(self.records.get(MANIFEST.key(repository, reference)))
        # Verified at every read: that costs a microsecond, and a damaged record is no manifest.
        if stored is None or Digest.of(stored.content, reference.algorithm) != reference:
            raise ManifestUnknown(f"{repository} has no manifest {reference}")
        return Manifest(stored.media_type, stored.content, reference), stored.stored_at

    async def tags(self, repository: str, last: str = "", limit: int | None = None) -> list[str]:
        return await self.run(self._tags, repository, last, limit)

    def _tags(self, repository: str, last: str, limit: int | None) -> list[str]:
        found = islice(self.records.scan(TAG.prefix(repository), last), limit)
        tags = [TAG.parse(key)[1] for key, _ in found]
        if not tags and not any(self.records.first(kind.prefix(repository)) for kind in (MANIFEST, LINK)):
            raise NameUnknown(f"{repository} is empty")
        return tags

    async def referrers(
        self,
        repository: str,
        digest: Digest,
        artifact_type: str | None = None,
        last: str = "",
        limit: int | None = None,
    ) -> list[Descriptor]:
        sources = [self.referrers_after(repository, digest, last)]
        return await self.run(referrers_page, sources, artifact_type, limit)

    def referrers_after(self, repository: str, digest: Digest, last: str = "") -> Iterator[Descriptor]:
        """The referrers after the digest `last`, in order; each is read when it is asked for."""
        for _, value in self.records.scan(REFERRER.prefix(repository, digest), last):
            if (each := parse_referrer(value)) is not None:
                yield each

    async def repositories(
        self, last: str = "", limit: int | None = None, within: str | None = None
    ) -> list[str]:
        """Full names in lexical order; only those in the namespace `within`, if it is given."""
        return await self.run(self._repositories, last, limit, within)

    def _repositories(self, last: str, limit: int | None, within: str | None) -> list[str]:
        names = self.records.groups(MANIFEST.prefix(), max(last, f"{within}/") if within else last)
        if within:
            names = takewhile(lambda each: each.startswith(f"{within}/"), names)
        return list(islice(names, limit))

    # Push

    async def start_upload(
        self, repository: str, size: int | None = None, algorithm: str = "sha256"
    ) -> Upload:
        upload = self.files.create(repository, algorithm)
        if size is not None:
            try:
                upload.expect(size)
            except StorageFailed as error:
                await upload.cancel(error)
                raise
        return LinkedUpload(upload, partial(self._linked, repository))

    async def resume_upload(self, repository: str, id: str) -> Upload:
        return LinkedUpload(await self.files.reopen(id, repository), partial(self._linked, repository))

    async def _linked(self, repository: str, blob: Descriptor) -> None:
        # Not by link(), which opens the blob: a collection may have its file aside until the transaction.
        await self.run(self._link, repository, blob)

    async def mount_blob(
        self,
        repository: str,
        digest: Digest,
        source: str | None = None,
        visible: Callable[[str], bool] = everything,
    ) -> Descriptor:
        if source is None:
            source = await self.run(self._repository_with, digest, visible)
        await self.resolve_blob(source, digest)
        return await self.link(repository, digest)

    def _repository_with(self, digest: Digest, visible: Callable[[str], bool]) -> str:
        for key in self.records.linking(digest):
            if visible(repository := LINK.parse(key)[0]):
                return repository
        raise BlobUnknown(f"no repository that may be read has {digest}")

    def changed(self, batch: Batch, repository: str) -> None:
        """Count a change of tags or manifests, in the transaction that makes the change."""
        if self.collected:
            key = CHANGES.key(repository)
            known = batch.get(key) or b"0"
            batch.put(key, b"%d" % ((int(known) if known.isdigit() else 0) + 1))

    async def push_manifest(
        self,
        repository: str,
        reference: Reference,
        manifest: Manifest,
        tags: Sequence[Tag] = (),
        when: Conditions = ALWAYS,
        allowed: Work | None = None,
    ) -> Descriptor:
        """Store the manifest and its tags in one transaction.

        Raises DigestInvalid, PreconditionFailed, and what `allowed` raises, which is called in the
        transaction to check the push.
        """
        if isinstance(reference, Digest):
            named = Manifest.of(manifest.media_type, manifest.content, reference.algorithm)
            if named.digest != reference:
                raise DigestInvalid(f"the manifest is {named.digest}, not {reference}")
            manifest = named  # clients pull it by a digest of this algorithm
        else:
            tags = (reference, *tags)
        check = when.after(allowed, partial(self._digest, repository, reference))
        await self.run(self._push, repository, manifest, tags, check)
        return manifest.descriptor

    def _digest(self, repository: str, reference: Reference) -> Digest | None:
        with suppress(ManifestUnknown):
            return self.manifest(repository, reference)[0].digest
        return None

    def _push(self, repository: str, manifest: Manifest, tags: Sequence[Tag], allowed: Work | None) -> None:
        def work(batch: Batch) -> None:
            if allowed is not None:
                allowed(batch)
            self.put_manifest(batch, repository, manifest)
            self.put_tags(batch, repository, dict.fromkeys(tags, manifest.digest))
            self.changed(batch, repository)

        self.records.transaction(work, shared=True)

    def put_manifest(self, batch: Batch, repository: str, manifest: Manifest) -> None:
        """Store the manifest, and what it is a referrer of, as part of a transaction."""
        stored = StoredManifest(manifest.media_type, self._clock(), manifest.content)
        batch.put(MANIFEST.key(repository, manifest.digest), stored.encode())
        if (subject := subject_of(manifest.content)) is not None:
            batch.put(REFERRER.key(repository, subject.digest, manifest.digest), encode_referrer(manifest))

    def put_tags(self, batch: Batch, repository: str, tags: Mapping[Tag, Digest]) -> None:
        """Point tags to manifests that are stored, as part of a transaction."""
        now = self._clock()
        for tag, digest in tags.items():
            self.put_tag(batch, repository, tag, digest, now)

    def put_tag(self, batch: Batch, repository: str, tag: Tag, digest: Digest, validated_at: float) -> None:
        """Point a tag to a manifest that is stored, as part of a transaction."""
        batch.put(TAG.key(repository, tag), Pointer(digest, validated_at).encode())

    async def delete_manifest(
        self,
        repository: str,
        reference: Reference,
        when: Conditions = ALWAYS,
        allowed: DeletionCheck | None = None,
    ) -> None:
        """Delete a tag; or a manifest, its tags, and the record that makes it a referrer.

        Raises ManifestUnknown, PreconditionFailed, and what `allowed` raises, which is called in the
        transaction with the tags that will be deleted.
        """
        check = when.after(allowed, lambda: self.manifest(repository, reference)[0].digest)
        if not await self.run(self._delete, repository, reference, check):
            raise ManifestUnknown(f"{repository} has no {reference}")

    def _delete(self, repository: str, reference: Reference, allowed: DeletionCheck | None) -> bool:
        def work(batch: Batch) -> bool:
            tags = [reference] if isinstance(reference, Tag) else self.tags_of(batch, repository, reference)
            if allowed is not None:
                allowed(batch, tags)
            self.changed(batch, repository)
            if isinstance(reference, Tag):
                return batch.delete(TAG.key(repository, reference))
            return self._remove_manifest(batch, repository, reference, tags)

        return self.records.transaction(work, shared=True)

    def _remove_manifest(self, batch: Batch, repository: str, digest: Digest, tags: Sequence[Tag]) -> bool:
        """Remove the manifest, its tags, and the record that makes it a referrer; whether it was stored."""
        for tag in tags:
            batch.delete(TAG.key(repository, tag))
        stored = StoredManifest.parse(batch.get(MANIFEST.key(repository, digest)))
        subject = None if stored is None else subject_of(stored.content)
        if subject is not None:
            batch.delete(REFERRER.key(repository, subject.digest, digest))
        return batch.delete(MANIFEST.key(repository, digest))

    def tags_of(self, batch: Batch, repository: str, digest: Digest) -> list[Tag]:
        """The tags that point to the manifest."""
        return [Tag(TAG.parse(key)[1]) for key in batch.tags_at(repository, digest)]

    async def delete_blob(
        self, repository: str, digest: Digest, when: Conditions = ALWAYS, also: Work | None = None
    ) -> None:
        """`also` is called in the transaction."""

        def work(batch: Batch) -> None:
            if not batch.delete(LINK.key(repository, digest)):
                raise BlobUnknown(f"{repository} has no blob {digest}")
            when.check(digest)
            if also is not None:
                also(batch)

        await self.run(self.records.transaction, work, True)

    def linked(self, repository: str, digest: Digest) -> Descriptor | None:
        """The blob, if `repository` shows it and it is stored.  Does not count as use."""
        link = Link.parse(self.records.get(LINK.key(repository, digest)))
        return None if link is None or not self.holds(digest) else Descriptor(OCTETS, digest, link.size)

    # What a cache needs besides

    def holds(self, digest: Digest) -> bool:
        """Whether the blob is stored, whichever repositories show it."""
        return self.files.holds(digest)

    async def link(self, repository: str, digest: Digest, size: int = -1) -> Descriptor:
        """Show the blob in `repository`.  `size` is what the origin says; -1 if it says nothing.

        Raises BlobUnknown if the blob is not stored or is damaged.
        """
        blob = await self.open(digest)
        await blob.close()
        if size not in (-1, blob.descriptor.size):
            await asyncio.to_thread(self.files.verify, digest)  # one of the two is wrong
        await self.run(self._link, repository, blob.descriptor)
        return blob.descriptor

    def _link(self, repository: str, blob: Descriptor) -> None:
        self.records.transaction(lambda batch: self.put_link(batch, repository, blob), shared=True)

    def put_link(self, batch: Batch, repository: str, blob: Descriptor) -> None:
        """Link a stored blob, as part of a transaction.  Raises BlobUnknown if it is not stored."""
        self.files.renew(blob.digest, batch)
        now = self._clock()
        batch.put(LINK.key(repository, blob.digest), Link(blob.size, now).encode())
        batch.put(BLOB.key(blob.digest), BlobUse.at(now, blob.size).encode())

    def pointer(self, repository: str, tag: Tag) -> Pointer | None:
        """Where the tag points; None if it is not stored, or is damaged."""
        return Pointer.parse(self.records.get(TAG.key(repository, tag)))

    async def point(self, repository: str, tag: Tag, digest: Digest, age: float = 0.0) -> None:
        """Point a tag to a stored manifest: the origin has confirmed it `age` seconds ago."""
        pointer = Pointer(digest, self._clock() - age)
        await self.run(self.records.put, TAG.key(repository, tag), pointer.encode())

    async def close(self) -> None:
        self.records.close()
        if self._threads is not None:
            self._threads.shutdown(wait=False)
