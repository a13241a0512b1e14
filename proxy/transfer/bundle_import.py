"""The import of archives: bundles, OCI image layouts, and the output of docker save.

Names are read as those of clients.  The namespace of an image decides where it is imported: into the cache
of an upstream, or into a private store, whose rules decide whether a tag may move.
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
from storage.archives.layout import Layout, Root
from storage.archives.listing import read_layout
from storage.concurrency import run_cancellable, run_in_thread
from storage.errors import ArchiveInvalid, RegistryError, StorageFailed
from storage.graph import contents
from storage.maintenance.pins import Pin
from storage.names import written
from storage.oci import Digest, Tag
from storage.records import Batch, Records

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """How to import an archive.

    `name` is for an image that has no name in the archive, or only a tag; several images without a name are
    imported by digest.  `pin` pins what is imported into a
    cache.  With `key`, a file, the archive must be signed by it.  Of an index only the children for
    `platforms` are imported.
    """

    name: str | None = None
    pin: bool = False
    key: Path | None = None
    dry_run: bool = False
    platforms: Sequence[str] = ()


class BundleImport:
    """Imports archives.  Every method raises RegistryError, or FieldInvalid for an invalid option."""

    def __init__(self, composition: Composition) -> None:
        self._parts = composition
        self._reader = ReferenceReader(composition.namespaces)

    async def import_(
        self, archive: Path, options: ImportOptions = ImportOptions(), tick: Tick = lambda done, whole: None
    ) -> BundleImported:
        """Import the archive at a path; `-` is standard input."""
        return await self._take_opened(
            lambda stopped: open_archive(archive, self.spool, stopped), options, tick
        )

    @property
    def spool(self) -> Path:
        """The directory for files without a name during an import."""
        return self._parts.store.files.root / "partial"

    async def import_spooled(
        self, file: IO[bytes], what: str, options: ImportOptions = ImportOptions()
    ) -> BundleImported:
        """Import the archive in `file`, and close it; messages call it `what`."""
        return await self._take_opened(lambda stopped: open_spooled(file, what, self.spool, stopped), options)

    async def _take_opened(
        self,
        opened: Callable[[Callable[[], None]], Archive],
        options: ImportOptions,
        tick: Tick = lambda done, whole: None,
    ) -> BundleImported:
        try:
            archive = await run_cancellable(opened)
        except OSError as error:
            raise StorageFailed(f"{self.spool}: {error.strerror or error}") from error
        with closing(archive):
            return await self.take(archive, options, tick)

    async def take(
        self, archive: Archive, options: ImportOptions, tick: Tick = lambda done, whole: None
    ) -> BundleImported:
        layout, importer = await run_in_thread(self._planned, archive, options)
        whole = await run_in_thread(importer.required)
        if not options.dry_run:
            try:
                await importer.run(lambda imported: tick(imported, whole))
            finally:
                await self._settle(importer.moved, options)
        return _imported(layout, importer, options, whole if options.dry_run else importer.bytes)

    def _planned(self, archive: Archive, options: ImportOptions) -> tuple[Layout, Importer]:
        layout = read_layout(
            archive, lambda content, signature: _check(archive, options.key, content, signature)
        )
        unnamed: list[Root] = []

        def bind(root: Root, several: bool) -> RootBinding:
            if _needs_name(root):
                unnamed.append(root)
            return self._bound(archive, options, root, several)

        planner = ImportPlanner(layout, bind, self._parts.clock, options.platforms)
        importer = planner.plan()
        if options.platforms and not planner.selected:
            raise FieldInvalid("platforms", f"{archive.what} has no index: --platform does not apply")
        if options.name and not unnamed:
            raise FieldInvalid("name", f"every image in {archive.what} has a name: --as does not apply")
        if options.pin:
            self._check_pinnable(layout, importer)
        return layout, importer

    def _check_pinnable(self, layout: Layout, importer: Importer) -> None:
        """Note what --pin does not apply to.  Raises FieldInvalid if it applies to nothing."""
        pinned = False
        for planned in importer.repositories:
            cached = planned.target.store is self._parts.store
            pinned |= cached and bool(planned.tags)
            for tag in () if cached else planned.tags:
                text = written(planned.target.repository, tag)
                layout.notes.append(f"{text} is not pinned: a store evicts nothing")
            for digest in planned.untagged:
                found = contents(layout.manifest(digest)) if layout.size(digest) is not None else None
                if found is None or found.subject is None:  # else it is pinned with its subject
                    text = written(planned.target.repository, digest)
                    layout.notes.append(f"{text} is not pinned: only tags are")
        if not pinned:
            raise FieldInvalid("pin", f"{layout.what} has no tag for a cache: --pin does not apply")

    def _bound(self, archive: Archive, options: ImportOptions, root: Root, several: bool) -> RootBinding:
        digest = root.descriptor.digest
        named = self._reader.reference("name", options.name) if options.name else None
        only_tag = root.name is not None and _needs_name(root)
        try:
            if root.name is not None and not only_tag:
                image = self._reader.reference(root.name, root.name)
                repository, reference = image.repository, image.reference
            elif named is None:
                cause = (
                    f"has only the tag {root.name!r} for {digest}"
                    if only_tag
                    else f"has no name for {digest}"
                )
                raise ArchiveInvalid(f"{archive.what} {cause}: name it with --as")
            else:
                repository = named.repository
                reference = named.reference if root.name is None else Tag.parse(root.name)
                states = _states_reference(options.name or "")
                if several and root.name is None:
                    if states:
                        raise ArchiveInvalid(
                            f"{archive.what} has two images named {written(repository, reference)}: give"
                            f" --as {repository}, and each is imported by its digest"
                        )
                    reference = digest
                elif reference != named.reference and states:
                    raise ArchiveInvalid(
                        f"{archive.what} has the tag {root.name!r} for {digest}: give --as {repository},"
                        f" without {named.reference}"
                    )
        except (FieldInvalid, RegistryError) as error:
            if isinstance(error, ArchiveInvalid):
                raise
            raise ArchiveInvalid(f"{archive.what}: {error}") from None
        if isinstance(reference, Digest) and reference != digest:
            raise ArchiveInvalid(
                f"{archive.what} gives {digest} the name {root.name}, which has another digest"
            )
        return RootBinding(self._target(repository), reference)

    def _target(self, repository: str) -> ImportTarget:
        namespace, _, relative = repository.partition("/")
        hosted = self._parts.hosted.get(namespace)
        if hosted is None:
            return ImportTarget(self._parts.store, repository, allowed=self._moving(repository))

        def allowed(records: Records | Batch, tag: Tag, digest: Digest) -> None:
            if isinstance(records, Batch):
                hosted.retag(records, relative, tag, digest)
            else:
                hosted.check_tag(records, relative, tag, digest)

        return ImportTarget(self._parts.store_of(namespace), repository, hosted.sparse, allowed)

    def _moving(self, repository: str) -> Callable[[Records | Batch, Tag, Digest], None]:
        """What records the moves of tags of a cache."""

        def moving(records: Records | Batch, tag: Tag, digest: Digest) -> None:
            pointer = self._parts.store.pointer(repository, tag)
            if isinstance(records, Batch) and pointer is not None and pointer.digest != digest:
                self._parts.moves.record(records, repository, tag, pointer.digest, digest)

        return moving

    async def _settle(self, moved: Sequence[ImportedTag], options: ImportOptions) -> None:
        parts = self._parts
        for target, tag, digest, before in moved:
            cached = target.store is parts.store
            if cached and before is not None and before != digest:
                await parts.moves.moved(target.repository, tag, before, digest)
            if options.pin and cached:
                await run_in_thread(parts.pins.add, Pin(written(target.repository, tag)))
        if parts.outbox is not None:
            await parts.outbox.flush()


def _needs_name(root: Root) -> bool:
    """Whether an image has no name in the archive, or only a tag."""
    return root.name is None or not set(":/@") & set(root.name)


def _states_reference(name: str) -> bool:
    return bool(set(":@") & set(name.rpartition("/")[2]))


def _check(archive: Archive, key: Path | None, content: bytes | None, signature: bytes | None) -> None:
    """Raise ArchiveInvalid if the archive is not signed by `key`."""
    if key is None:
        return
    if content is None or signature is None:
        raise ArchiveInvalid(f"{archive.what} is not signed, but {key} is required to verify it")
    try:
        verified = bundle.verify(content, signature, key)
    except (ValueError, OSError) as error:
        raise FieldInvalid("verify_key", error) from None
    if not verified:
        raise ArchiveInvalid(f"{archive.what}: the signature is not by {key}, or the content was changed")


def _imported(layout: Layout, importer: Importer, options: ImportOptions, imported: int) -> BundleImported:
    before = {(each.target.repository, each.tag): each.before for each in importer.moved}
    rows = []
    for planned in importer.repositories:
        for tag, (digest, _) in planned.tags.items():
            if not options.dry_run and (planned.target.repository, tag) not in before:
                text = written(planned.target.repository, tag)
                layout.notes.append(f"{text} was not set: its manifest was deleted during the import")
                continue
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
        bytes=imported,
        verified=options.key is not None,
        dry_run=options.dry_run,
        notes=layout.notes,
    )
