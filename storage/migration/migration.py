"""What a registry of Distribution holds, taken over into a store of our own.

Repository by repository: a manifest when all that it names is here, blobs before it and children before their
index; tags last.  What is damaged or missing is told, and so is whatever cannot be whole without it; all else
is taken.  What is here already is not looked at again, so a second run takes what is new, and one that was
cut goes on.  Several processes may be at work in the store meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TypeAlias

from storage.concurrency import Cancelled
from storage.disk.records import Batch
from storage.errors import BlobUnknown, DigestInvalid, ManifestUnknown, NameInvalid, TagInvalid
from storage.keys import MANIFEST
from storage.migration.adoption import Adoption
from storage.migration.distribution import Absent, DistributionTree
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
from storage.store import Store

GROUP = 64  # manifests that are put, and whose blobs' directories are synced, together
TAGS = 500
WORKERS = 4  # threads that read and hash

_Parsed: TypeAlias = tuple[Manifest, ManifestContent]


@dataclass(frozen=True, slots=True)
class Damage:
    """`what` is a digest or a tag of `repository`, as it is named there."""

    repository: str
    what: str
    why: str


@dataclass(slots=True)
class MigratedRepository:
    """What was new, and `present`: manifests that were here before.

    Of the `blobs` `linked` take no room of their own.  `kept` are tags that were left as they are here.
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
    """From `source`, by the rules of where it goes.  Everything blocks.

    With `sparse`, an index may lack children.  A tag that is `immutable` here is not moved.
    """

    def __init__(
        self,
        store: Store,
        source: DistributionTree,
        *,
        sparse: bool = False,
        immutable: Callable[[Tag], bool] = lambda tag: False,
        dry_run: bool = False,
    ) -> None:
        self.taken = MigratedRepository()
        self.repository = ""  # that it is at
        self.begun = 0  # how many repositories
        self._store = store
        self._source = source
        self._sparse = sparse
        self._immutable = immutable
        self._dry_run = dry_run
        self._adoption = Adoption(store.files)
        self._stopped = False

    def stop(self) -> None:
        """Have run() end soon; what was taken stays."""
        self._stopped = True

    def run(self, names: Iterable[str], full: Callable[[str], str]) -> None:
        """Take these repositories; `full` says how one is named here.  Raises Cancelled, StorageFailed."""
        with ThreadPoolExecutor(WORKERS, "intake") as pool:
            for name in names:
                self.repository = name
                self.begun += 1
                repository = _Repository(self._store, name, full(name))
                try:
                    parse_name(name)
                    if len(repository.full) > NAME_LIMIT:
                        raise NameInvalid(f"{repository.full} is longer than a name may be")
                    self._take(repository, pool)
                except OSError as error:
                    self._damaged(repository, "", f"it cannot be read: {error.strerror}")
                except NameInvalid as error:
                    self._damaged(repository, "", str(error))
                self.taken.linked = self._adoption.linked

    def _take(self, repository: _Repository, pool: ThreadPoolExecutor) -> None:
        found = (
            each for text in self._source.manifests(repository.name) if (each := self._new(repository, text))
        )
        indexes = self._groups(repository, found, pool)
        # An index may name others: it comes when all that it names has been decided on.
        while indexes:
            repository.pending = set(indexes)
            again = (each for digest in indexes if (each := self._read(repository, digest)))
            indexes = self._groups(repository, again, pool)
        self.taken.repositories += any(repository.whole.values())
        self._tags(repository)

    def _groups(
        self, repository: _Repository, manifests: Iterator[_Parsed], pool: ThreadPoolExecutor
    ) -> list[Digest]:
        """Put them, but for indexes of what may come later still; those."""
        later: list[Digest] = []

        def decided() -> Iterator[_Parsed]:
            for manifest, content in manifests:
                if content.children and not repository.decides(manifest.digest, content):
                    later.append(manifest.digest)
                else:
                    yield manifest, content

        groups = decided()
        while group := list(islice(groups, GROUP)):
            self._put(repository, group, pool)
        return later

    def _new(self, repository: _Repository, text: str) -> _Parsed | None:
        self._check()
        try:
            digest = Digest.parse(text)
        except DigestInvalid:
            self._damaged(repository, text, "its digest is none, or of an unknown algorithm")
            return None
        if repository.holds(digest):
            self.taken.present += 1
            return None
        return self._read(repository, digest)

    def _read(self, repository: _Repository, digest: Digest) -> _Parsed | None:
        self._check()
        try:
            manifest = self._source.manifest(repository.name, digest)
        except Absent as error:
            self._damaged(repository, digest, str(error))
            return None
        return manifest, parse_manifest(manifest.content)

    def _put(self, repository: _Repository, group: list[_Parsed], pool: ThreadPoolExecutor) -> None:
        whole: list[_Parsed] = []
        for again in (True, False):
            self._gather(repository, group, pool)
            whole = [each for each in group if repository.decide(*each, self._sparse)]
            if not whole or self._dry_run:
                break
            try:
                self._store.records.transaction(partial(repository.put, whole=whole, sparse=self._sparse))
                break
            except (BlobUnknown, ManifestUnknown):
                # 1. we saw it here, named by nothing  2. it was collected  3. nothing can be linked to it.
                if not again:
                    raise
                repository.forget(group)
        self.taken.manifests += len(whole)
        for manifest, content in group:
            if lacking := repository.lacking(content, self._sparse):
                more = f", nor are {len(lacking) - 1} others" if len(lacking) > 1 else ""
                why = f"it names {lacking[0]}, which is not whole{more}"
                self._damaged(repository, manifest.digest, why)

    def _gather(self, repository: _Repository, group: list[_Parsed], pool: ThreadPoolExecutor) -> None:
        """Have the blobs that they name here, on the disk."""
        named = {each.digest for _, content in group for each in content.distributable}
        missing = [digest for digest in named if digest not in repository.blobs]
        for digest, got in zip(missing, pool.map(partial(self._blob, repository), missing), strict=True):
            repository.blobs[digest] = got.blob
            if got.blob is None:
                self._damaged(repository, digest, got.why)
            elif got.new:
                self.taken.blobs += 1
                self.taken.bytes += got.blob.size
        self._adoption.settle()  # before anything counts on them

    def _blob(self, repository: _Repository, digest: Digest) -> _Got:
        self._check()
        if (known := self._store.linked(repository.full, digest)) is not None:
            return _Got(known)
        try:
            path = self._source.blob(repository.name, digest)
            if self._store.holds(digest):
                return _Got(Descriptor(OCTETS, digest, self._store.files.path(digest).stat().st_size))
            size = path.stat().st_size if self._dry_run else self._adoption.take(digest, path)
        except (Absent, DigestInvalid) as error:
            return _Got(None, why=str(error))
        except OSError as error:
            return _Got(None, why=f"it cannot be read: {error.strerror}")
        return _Got(Descriptor(OCTETS, digest, size), new=True)

    def _tags(self, repository: _Repository) -> None:
        tags = self._moved(repository)
        while group := dict(islice(tags, TAGS)):
            if not self._dry_run:
                self._store.records.transaction(partial(repository.point, tags=group))
            self.taken.tags += len(group)

    def _moved(self, repository: _Repository) -> Iterator[tuple[Tag, Digest]]:
        """The tags that are to be put, and where they point to."""
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
            if not repository.holds(link.digest) and not repository.whole.get(link.digest):
                self._damaged(repository, text, f"it points to {link.digest}, which is not here")
            elif known is None or (link.moved_at > known.validated_at and not self._immutable(tag)):
                yield tag, link.digest
            else:
                why = "it is immutable" if self._immutable(tag) else "it was pushed here since"
                self.taken.kept.append(Damage(repository.name, text, f"it stays {known.digest}: {why}"))

    def _damaged(self, repository: _Repository, what: str, why: str) -> None:
        self.taken.damaged.append(Damage(repository.name, str(what), why))

    def _check(self) -> None:
        if self._stopped:
            raise Cancelled


@dataclass(frozen=True, slots=True)
class _Got:
    """`blob` is to be linked; where it is None, `why`.  It was `new` here."""

    blob: Descriptor | None
    new: bool = False
    why: str = ""


class _Repository:
    """What is known of one while it is taken."""

    def __init__(self, store: Store, name: str, full: str) -> None:
        self.name = name
        self.full = full
        self._store = store
        self.whole: dict[Digest, bool] = {}  # manifests: whether it is here, or is to be
        self.pending: set[Digest] | None = None  # indexes to come; None: nobody knows yet
        self.blobs: dict[Digest, Descriptor | None] = {}

    def holds(self, digest: Digest) -> bool:
        """Whether it was here before, or is by now."""
        try:
            self._store.manifest(self.full, digest)
        except ManifestUnknown:
            return False
        self.whole[digest] = True
        return True

    def decides(self, digest: Digest, content: ManifestContent) -> bool:
        """Whether all that an index names has been decided on; then it is no longer pending itself."""
        if self.pending is None or any(each.digest in self.pending for each in content.children):
            return False
        self.pending.discard(digest)
        return True

    def decide(self, manifest: Manifest, content: ManifestContent, sparse: bool) -> bool:
        """Whether it is to be here; those that it names have been decided on."""
        self.whole[manifest.digest] = not self.lacking(content, sparse)
        return self.whole[manifest.digest]

    def lacking(self, content: ManifestContent, sparse: bool) -> list[Digest]:
        lacking = [each.digest for each in content.distributable if self.blobs.get(each.digest) is None]
        if not sparse:
            children = (each.digest for each in content.children)
            lacking += [each for each in children if not self.whole.get(each) and not self.holds(each)]
        return lacking

    def forget(self, group: Iterable[_Parsed]) -> None:
        """What was found of their blobs."""
        for _, content in group:
            for each in content.distributable:
                self.blobs.pop(each.digest, None)

    def put(self, batch: Batch, whole: Iterable[_Parsed], sparse: bool) -> None:
        """Raises BlobUnknown, ManifestUnknown where what they name is here no more."""
        for manifest, content in whole:
            for each in content.distributable:
                blob = self.blobs[each.digest]
                assert blob is not None
                self._store.put_link(batch, self.full, blob)
            for child in content.children:
                if not sparse and batch.get(MANIFEST.key(self.full, child.digest)) is None:
                    raise ManifestUnknown(f"{self.full} holds {child.digest} no more: migrate it again")
            self._store.put_manifest(batch, self.full, manifest)
        self._store.changed(batch, self.full)

    def point(self, batch: Batch, tags: Mapping[Tag, Digest]) -> None:
        here = {tag: each for tag, each in tags.items() if batch.get(MANIFEST.key(self.full, each))}
        self._store.put_tags(batch, self.full, here)
        self._store.changed(batch, self.full)
