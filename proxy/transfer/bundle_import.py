"""Bundles: what is stored goes out under its full names, and comes in under them.

Names are read as a client's are.  What comes in goes where its namespace says: into the cache of an upstream,
or into the store of a namespace of our own, by whose rules tags move.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from proxy.namespaces.composition import Composition
from proxy.namespaces.references import (
    FieldInvalid,
    ReferenceReader,
)
from proxy.transfer.results import BoundRow, BundleImported, Tick
from storage.archives import bundle
from storage.archives.archive import Archive, open_archive, open_spooled
from storage.archives.import_plan import ImportPlanner, RootBinding
from storage.archives.importer import ImportedTag, Importer, ImportTarget
from storage.archives.layout import Layout, Root, read_layout
from storage.concurrency import run_cancellable, run_in_thread
from storage.disk.records import Batch, Records
from storage.errors import ArchiveInvalid, RegistryError, StorageFailed
from storage.maintenance.pins import Pin
from storage.names import written
from storage.oci import Digest, Tag

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Given:
    """How an archive is to be imported.

    `name` is for what has none in it, or only a tag.  With `pin`, what comes into a cache stays.  With `key`,
    a file, only what is signed by it comes in.
    """

    name: str | None = None
    pin: bool = False
    key: Path | None = None
    dry_run: bool = False


class BundleImport:
    """Every method raises RegistryError, or FieldInvalid where what it is given cannot be read."""

    def __init__(self, composition: Composition) -> None:
        self._parts = composition
        self._reading = ReferenceReader(composition.namespaces)

    async def import_(
        self, archive: Path, given: Given = Given(), tick: Tick = lambda done, whole: None
    ) -> BundleImported:
        """All of the archive at a path; `-` is standard input."""
        return await self._take_opened(
            lambda stopped: open_archive(archive, self.spool, stopped), given, tick
        )

    @property
    def spool(self) -> Path:
        """Where files may lie that have no name, while something is taken in."""
        return self._parts.store.files.root / "partial"

    async def import_spooled(self, file: IO[bytes], what: str, given: Given = Given()) -> BundleImported:
        """All of the archive that lies in `file`, which is closed; `what` it is called in messages."""
        return await self._take_opened(lambda stopped: open_spooled(file, what, self.spool, stopped), given)

    async def _take_opened(
        self,
        opened: Callable[[Callable[[], None]], Archive],
        given: Given,
        tick: Tick = lambda done, whole: None,
    ) -> BundleImported:
        try:
            archive = await run_cancellable(opened)
        except OSError as error:
            raise StorageFailed(f"{self.spool}: {error.strerror or error}") from error
        with closing(archive):
            return await self.take(archive, given, tick)

    async def take(
        self, archive: Archive, given: Given, tick: Tick = lambda done, whole: None
    ) -> BundleImported:
        layout, importer = await run_in_thread(self._planned, archive, given)
        whole = await run_in_thread(importer.required)
        moved: list[ImportedTag] = []
        if not given.dry_run:
            moved = await importer.run(lambda taken: tick(taken, whole))
            await self._settle(moved, given)
        return _landed(layout, importer, moved, given, whole if given.dry_run else importer.bytes)

    def _planned(self, archive: Archive, given: Given) -> tuple[Layout, Importer]:
        layout = read_layout(
            archive, lambda content, signature: _check(archive, given.key, content, signature)
        )
        planner = ImportPlanner(layout, lambda root: self._bound(archive, given, root), self._parts.clock)
        return layout, planner.plan()

    def _bound(self, archive: Archive, given: Given, root: Root) -> RootBinding:
        digest = root.descriptor.digest
        named = self._reading.reference("name", given.name) if given.name else None
        only_tag = root.name is not None and not set(":/@") & set(root.name)
        try:
            if root.name is not None and not only_tag:
                asked = self._reading.reference(root.name, root.name)
                repository, reference = asked.repository, asked.reference
            elif named is None:
                told = f"names {digest} only {root.name!r}" if only_tag else f"holds {digest} without a name"
                raise ArchiveInvalid(f"{archive.what} {told}: say what it is, by --as")
            else:
                repository = named.repository
                reference = named.reference if root.name is None else Tag.parse(root.name)
        except (FieldInvalid, RegistryError) as error:
            if isinstance(error, ArchiveInvalid):
                raise
            raise ArchiveInvalid(f"{archive.what}: {error}") from None
        if isinstance(reference, Digest) and reference != digest:
            raise ArchiveInvalid(f"{archive.what} says that {digest} is {root.name}")
        return RootBinding(self._place(repository), reference)

    def _place(self, repository: str) -> ImportTarget:
        namespace, _, relative = repository.partition("/")
        hosted = self._parts.hosted.get(namespace)
        if hosted is None:
            return ImportTarget(self._parts.store, repository)

        def allowed(records: Records | Batch, tag: Tag, digest: Digest) -> None:
            if isinstance(records, Batch):
                hosted.retag(records, relative, tag, digest)
            else:
                hosted.check_tag(records, relative, tag, digest)

        return ImportTarget(self._parts.store_of(namespace), repository, hosted.sparse, allowed)

    async def _settle(self, moved: Sequence[ImportedTag], given: Given) -> None:
        parts = self._parts
        for target, tag, digest, before in moved:
            cached = target.store is parts.store
            if before is not None and before != digest:
                if cached:
                    await parts.tag_moved(target.repository, tag, before, digest)
                elif parts.publisher is not None:
                    await parts.publisher.moved(target.repository, tag, before, digest)
            if given.pin and cached:
                await run_in_thread(parts.pins.add, Pin(written(target.repository, tag)))


def _check(archive: Archive, key: Path | None, content: bytes | None, signature: bytes | None) -> None:
    """Raises ArchiveInvalid where it is not signed by `key`."""
    if key is None:
        return
    if content is None or signature is None:
        raise ArchiveInvalid(f"{archive.what} is not signed, and only what {key} verifies is to come in")
    try:
        verified = bundle.verify(content, signature, key)
    except (ValueError, OSError) as error:
        raise FieldInvalid("verify_key", error) from None
    if not verified:
        raise ArchiveInvalid(f"{archive.what}: its signature is not by {key}, or something was changed since")


def _landed(
    layout: Layout, importer: Importer, moved: Sequence[ImportedTag], given: Given, taken: int
) -> BundleImported:
    before = {(each.target.repository, each.tag): each.before for each in moved}
    rows = []
    for planned in importer.repositories:
        for tag, (digest, _) in planned.tags.items():
            known = before.get((planned.target.repository, tag))
            rows.append(
                BoundRow(
                    repository=planned.target.repository,
                    tag=str(tag),
                    digest=str(digest),
                    before=None if known is None else str(known),
                )
            )
        for digest in planned.untagged:
            rows.append(
                BoundRow(repository=planned.target.repository, tag=None, digest=str(digest), before=None)
            )
    return BundleImported(
        archive=layout.what,
        references=rows,
        manifests=sum(len(planned.manifests) for planned in importer.repositories),
        blobs=importer.blobs,
        bytes=taken,
        verified=given.key is not None,
        dry_run=given.dry_run,
    )
