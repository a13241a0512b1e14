"""The migration of a Distribution registry's content into a private store.

Repository by repository, a manifest is stored after all that it names: first its blobs, children before their
index, tags last.  Damaged and missing content is reported, and so is whatever is incomplete without it; all
other content is migrated.  Content that is already stored is skipped, so that a second run migrates what is
new, and continues a run that was interrupted.  Other processes may use the store meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

from storage.concurrency import Cancelled
from storage.content import files_of
from storage.errors import BlobUnknown, DigestInvalid, ManifestUnknown, NameInvalid, TagInvalid
from storage.keys import MANIFEST, TAG
from storage.migration.adoption import Adoption
from storage.migration.distribution import Absent, DistributionTree, TagLink
from storage.oci import (
    NAME_LIMIT,
    OCTETS,
    Descriptor,
    Digest,
    Manifest,
    ManifestContent,
    Tag,
    parse_manifest,
    parse_name,
)
from storage.records import Batch, batches
from storage.store import Store
from storage.values import STEP, Pointer

MANIFEST_BATCH = 64  # manifests stored in one transaction, after their blobs are synced
WORKERS = 4  # threads that read and hash

_ParsedManifest: TypeAlias = tuple[Manifest, ManifestContent]


@dataclass(frozen=True, slots=True)
class Damage:
    """Content that was not migrated: `what` is a digest or a tag of the source's `repository`."""

    repository: str
    what: str
    why: str


@dataclass(slots=True)
class MigrationReport:
    """What was migrated.

    `present` counts the manifests that were stored before.  `linked` of the `blobs` are hard links, which
    take no space.  `kept` are tags that were not changed in the store.
    """

    repositories: int = 0
    tags: int = 0
    manifests: int = 0
    blobs: int = 0
    bytes: int = 0
    linked: int = 0
    present: int = 0
    kept: list[Damage] = field(default_factory=list)
    damaged: list[Damage] = field(default_factory=list)


class Migration:
    """The migration from `source` into a store.  Methods block.

    If `sparse`, children of an index may be missing.  A tag for which `immutable` returns true is not moved.
    `retag` is called in the transaction that sets a tag of a repository, before it does.
    """

    def __init__(
        self,
        store: Store,
        source: DistributionTree,
        *,
        sparse: bool = False,
        immutable: Callable[[Tag], bool] = lambda tag: False,
        retag: Callable[[Batch, str, Tag, Digest], object] = lambda batch, repository, tag, digest: None,
        dry_run: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.report = MigrationReport()
        self.repository = ""  # the current one
        self.begun = 0  # repositories so far
        self._store = store
        self._source = source
        self._sparse = sparse
        self._immutable = immutable
        self._retag = retag
        self._dry_run = dry_run
        self._clock = clock
        self._files = files_of(store.files)
        self._adoption = Adoption(self._files)
        self._stopped = False

    def stop(self) -> None:
        """Make run() end soon; what was migrated stays."""
        self._stopped = True

    def run(self, names: Iterable[str], full: Callable[[str], str]) -> None:
        """Migrate these repositories.  `full` returns the full name of one in the store.

        Raises Cancelled, StorageFailed.
        """
        with ThreadPoolExecutor(WORKERS, "intake") as pool:
            for name in names:
                self.repository = name
                self.begun += 1
                repository = _RepositoryMigration(self._store, name, full(name))
                try:
                    parse_name(name)
                    if len(repository.full) > NAME_LIMIT:
                        raise NameInvalid(f"{repository.full} is longer than a name may be")
                    self._migrate(repository, pool)
                except OSError as error:
                    self._damaged(repository, "", f"it cannot be read: {error.strerror}")
                except NameInvalid as error:
                    self._damaged(repository, "", str(error))
                self.report.linked = self._adoption.linked

    def _migrate(self, repository: _RepositoryMigration, pool: ThreadPoolExecutor) -> None:
        found = (
            each for text in self._source.manifests(repository.name) if (each := self._new(repository, text))
        )
        indexes = self._groups(repository, found, pool)
        # An index may list other indexes: it follows when all that it lists is decided.
        while indexes:
            repository.pending = set(indexes)
            again = (each for digest in indexes if (each := self._read(repository, digest)))
            indexes = self._groups(repository, again, pool)
        self.report.repositories += any(repository.complete.values())
        self._tags(repository)

    def _groups(
        self, repository: _RepositoryMigration, manifests: Iterator[_ParsedManifest], pool: ThreadPoolExecutor
    ) -> list[Digest]:
        """Store manifests, and return the indexes that list something still to come."""
        later: list[Digest] = []

        def decided() -> Iterator[_ParsedManifest]:
            for manifest, content in manifests:
                if content.children and not repository.decides(manifest.digest, content):
                    later.append(manifest.digest)
                else:
                    yield manifest, content

        for group in batches(decided(), MANIFEST_BATCH):
            self._put(repository, group, pool)
        return later

    def _new(self, repository: _RepositoryMigration, text: str) -> _ParsedManifest | None:
        self._check()
        try:
            digest = Digest.parse(text)
        except DigestInvalid:
            self._damaged(repository, text, "its digest is invalid, or of an unknown algorithm")
            return None
        if repository.holds(digest):
            self.report.present += 1
            return None
        return self._read(repository, digest)

    def _read(self, repository: _RepositoryMigration, digest: Digest) -> _ParsedManifest | None:
        self._check()
        try:
            manifest = self._source.manifest(repository.name, digest)
        except Absent as error:
            self._damaged(repository, digest, str(error))
            return None
        return manifest, parse_manifest(manifest.content)

    def _put(
        self, repository: _RepositoryMigration, group: list[_ParsedManifest], pool: ThreadPoolExecutor
    ) -> None:
        complete: list[_ParsedManifest] = []
        for again in (True, False):
            self._store_blobs(repository, group, pool)
            complete = [each for each in group if repository.decide(*each, self._sparse)]
            if not complete or self._dry_run:
                break
            try:
                self._store.records.transaction(
                    partial(repository.put, complete=complete, sparse=self._sparse)
                )
                break
            except (BlobUnknown, ManifestUnknown):
                # 1. we saw that it is stored, named by nothing  2. it was collected  3. it cannot be linked.
                if not again:
                    raise
                repository.forget(group)
        self.report.manifests += len(complete)
        for manifest, content in group:
            if missing := repository.missing(content, self._sparse):
                more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
                why = f"it names {missing[0]}, which is missing or incomplete{more}"
                self._damaged(repository, manifest.digest, why)

    def _store_blobs(
        self, repository: _RepositoryMigration, group: list[_ParsedManifest], pool: ThreadPoolExecutor
    ) -> None:
        """Make sure that the blobs that they name are stored, and durable."""
        named = {each.digest for _, content in group for each in content.distributable}
        missing = [digest for digest in named if digest not in repository.blobs]
        for digest, result in zip(missing, pool.map(partial(self._blob, repository), missing), strict=True):
            repository.blobs[digest] = result.blob
            if result.blob is None:
                self._damaged(repository, digest, result.why)
            elif result.new:
                self.report.blobs += 1
                self.report.bytes += result.blob.size
        self._adoption.settle()  # before any record names them

    def _blob(self, repository: _RepositoryMigration, digest: Digest) -> _BlobResult:
        self._check()
        if (known := self._store.linked(repository.full, digest)) is not None:
            return _BlobResult(known)
        try:
            path = self._source.blob(repository.name, digest)
            if self._store.holds(digest):
                return _BlobResult(Descriptor(OCTETS, digest, self._files.path(digest).stat().st_size))
            size = path.stat().st_size if self._dry_run else self._adoption.adopt(digest, path)
        except (Absent, DigestInvalid) as error:
            return _BlobResult(None, why=str(error))
        except OSError as error:
            return _BlobResult(None, why=f"it cannot be read: {error.strerror}")
        return _BlobResult(Descriptor(OCTETS, digest, size), new=True)

    def _tags(self, repository: _RepositoryMigration) -> None:
        # By those times rules count tags as pushed: here now, and in the order in which they were there.
        found = sorted(self._moved(repository), key=lambda each: each[1].moved_at)
        first = self._clock() - len(found) * STEP
        timed = [(tag, link, first + number * STEP) for number, (tag, link) in enumerate(found)]
        stay: list[Damage] = []
        for group in batches(timed):
            work = partial(self._point, repository, group)
            done, kept = work(None) if self._dry_run else self._store.records.transaction(work)
            self.report.tags += done
            stay += kept
        self.report.kept += sorted(stay, key=lambda each: each.what)

    def _moved(self, repository: _RepositoryMigration) -> Iterator[tuple[Tag, TagLink]]:
        """The tags that are to be set."""
        for text in self._source.tags(repository.name):
            self._check()
            try:
                tag = Tag.parse(text)
                link = self._source.tag(repository.name, text)
            except (Absent, TagInvalid) as error:
                self._damaged(repository, text, str(error))
                continue
            known = self._store.pointer(repository.full, tag)
            if known is not None and known.digest == link.digest:
                continue
            if not repository.holds(link.digest) and not repository.complete.get(link.digest):
                self._damaged(repository, text, f"it points to {link.digest}, which is not stored")
            else:
                yield tag, link

    def _point(
        self,
        repository: _RepositoryMigration,
        links: Iterable[tuple[Tag, TagLink, float]],
        batch: Batch | None,
    ) -> tuple[int, list[Damage]]:
        """Set tags, in a transaction, or see which ones would be set: how many, and those that stay.

        Decided there, since clients push meanwhile: see Hosted.push_manifest.
        """
        full, done, kept = repository.full, 0, list[Damage]()
        read = self._store.records.get if batch is None else batch.get
        for tag, link, now in links:
            known = Pointer.parse(read(TAG.key(full, tag)))
            if known is not None and known.digest == link.digest:
                continue
            if known is not None and (link.moved_at <= known.validated_at or self._immutable(tag)):
                why = "it is immutable" if self._immutable(tag) else "it was pushed here since"
                kept.append(Damage(repository.name, str(tag), f"it stays {known.digest}: {why}"))
                continue
            if batch is not None:
                if batch.get(MANIFEST.key(full, link.digest)) is None:
                    kept.append(Damage(repository.name, str(tag), f"{link.digest} was deleted meanwhile"))
                    continue
                self._retag(batch, repository.name, tag, link.digest)
                self._store.put_tag(batch, full, tag, link.digest, now)
            done += 1
        if batch is not None:
            self._store.changed(batch, full)
        return done, kept

    def _damaged(self, repository: _RepositoryMigration, what: str, why: str) -> None:
        self.report.damaged.append(Damage(repository.name, str(what), why))

    def _check(self) -> None:
        if self._stopped:
            raise Cancelled


@dataclass(frozen=True, slots=True)
class _BlobResult:
    """A blob of the source: its descriptor, or None and `why` it cannot be migrated; whether it is `new`."""

    blob: Descriptor | None
    new: bool = False
    why: str = ""


class _RepositoryMigration:
    """The state of one repository during its migration."""

    def __init__(self, store: Store, name: str, full: str) -> None:
        self.name = name
        self.full = full
        self._store = store
        self.complete: dict[Digest, bool] = {}  # manifests: whether one is stored, or will be
        self.pending: set[Digest] | None = None  # indexes to come; None if not yet known
        self.blobs: dict[Digest, Descriptor | None] = {}

    def holds(self, digest: Digest) -> bool:
        """Whether the manifest is stored."""
        try:
            self._store.manifest(self.full, digest)
        except ManifestUnknown:
            return False
        self.complete[digest] = True
        return True

    def decides(self, digest: Digest, content: ManifestContent) -> bool:
        """Whether all that an index lists is decided; then it is no longer pending itself."""
        if self.pending is None or any(each.digest in self.pending for each in content.children):
            return False
        self.pending.discard(digest)
        return True

    def decide(self, manifest: Manifest, content: ManifestContent, sparse: bool) -> bool:
        """Decide whether a manifest can be stored; all that it names has been decided before."""
        self.complete[manifest.digest] = not self.missing(content, sparse)
        return self.complete[manifest.digest]

    def missing(self, content: ManifestContent, sparse: bool) -> list[Digest]:
        missing = [each.digest for each in content.distributable if self.blobs.get(each.digest) is None]
        if not sparse:
            children = (each.digest for each in content.children)
            missing += [each for each in children if not self.complete.get(each) and not self.holds(each)]
        return missing

    def forget(self, group: Iterable[_ParsedManifest]) -> None:
        """Forget what is known of their blobs."""
        for _, content in group:
            for each in content.distributable:
                self.blobs.pop(each.digest, None)

    def put(self, batch: Batch, complete: Iterable[_ParsedManifest], sparse: bool) -> None:
        """Store manifests.  Raises BlobUnknown, ManifestUnknown if something that they name was deleted."""
        for manifest, content in complete:
            for each in content.distributable:
                blob = self.blobs[each.digest]
                assert blob is not None
                self._store.put_link(batch, self.full, blob)
            for child in content.children:
                if not sparse and batch.get(MANIFEST.key(self.full, child.digest)) is None:
                    raise ManifestUnknown(f"{self.full} no longer has {child.digest}: migrate it again")
            self._store.put_manifest(batch, self.full, manifest)
        self._store.changed(batch, self.full)
