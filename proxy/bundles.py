"""Bundles: what is stored goes out under its full names, and comes in under them.

Names are read as a client's are.  What comes in goes where its namespace says: into the cache of an upstream,
or into the store of a namespace of our own, by whose rules tags move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from proxy.namespaces.composition import Composition
from proxy.namespaces.references import (
    WILD,
    FieldInvalid,
    ReferenceReader,
    read_platforms,
    read_seconds,
    written,
)
from proxy.receipts import BoundRow, CarriedRow, Exported, LackingRow, Landed
from storage.archives import bundle
from storage.archives.archive import Archive, open_archive, open_spooled, read
from storage.archives.bundle import CONTENTS, Base, Contents, encode
from storage.archives.export_plan import ExportPlan, ExportPlanner, Wanted
from storage.archives.exporter import Sink, write
from storage.archives.import_plan import Bound, ImportPlanner
from storage.archives.importer import Importer, ImportTarget, Moved
from storage.archives.layout import Layout, Root, read_layout
from storage.concurrency import run_cancellable, run_in_thread
from storage.disk.records import Batch, Records
from storage.errors import ArchiveInvalid, Incomplete, NameUnknown, RegistryError, StorageFailed
from storage.maintenance.pins import Pin
from storage.oci import Digest, Tag
from storage.store import Store

T = TypeVar("T")

EVERYTHING = ("*", "*@*")  # tags, and manifests
TOLD = 3  # digests, or names, that a message tells

Tick = Callable[[int, int], None]  # called with how many bytes are done, and of how many


@dataclass(frozen=True, slots=True)
class Earlier:
    """A bundle that was made before: what it is called, and its entrepot.json."""

    what: str
    content: bytes


@dataclass(frozen=True, slots=True)
class Selection:
    """What is to be exported.

    `names` are references, or globs over full names; none of them is everything, where `used_within` (a
    duration) is given.  `since` are earlier bundles: of what they have only manifests go along.
    """

    names: Sequence[str] = ()
    used_within: str | None = None
    platforms: Sequence[str] = ()
    referrers: bool = True
    since: Sequence[Earlier] = ()
    skip_incomplete: bool = False


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


class Bundles:
    """Every method raises RegistryError, or BadField where what it is given cannot be read."""

    def __init__(self, composition: Composition) -> None:
        self._parts = composition
        self._reading = ReferenceReader(composition.namespaces)

    # Out

    async def export(
        self,
        selection: Selection,
        bundle: str,
        opened: Callable[[Digest], AbstractContextManager[Sink]],
        key: Path | None = None,
        tick: Tick = lambda done, whole: None,
    ) -> Exported:
        """Into what `opened` gives, called `bundle`; signed by the private `key`, where it is given.

        `opened` is called with the digest of its entrepot.json, once all is found that is to go along.
        """
        return await run_cancellable(self._export, selection, bundle, opened, key, tick)

    def _export(
        self,
        stopped: Callable[[], None],
        selection: Selection,
        name: str,
        opened: Callable[[Digest], AbstractContextManager[Sink]],
        key: Path | None,
        tick: Tick,
    ) -> Exported:
        plan, incomplete = self._plan(stopped, selection)
        whole = plan.bytes

        def done(count: int) -> None:
            stopped()
            tick(count, whole)

        try:
            with opened(Digest.of(encode(plan.contents))) as sink:
                digest = write(plan, sink, None if key is None else _signer(key), done)
        except OSError as error:
            raise StorageFailed(f"{error.filename or name}: {error.strerror or error}") from error
        return _exported(name, digest, plan, incomplete, signed=key is not None)

    async def planned(self, selection: Selection, bundle: str) -> Exported:
        """What export() would come to."""
        plan, incomplete = await run_cancellable(self._plan, selection)
        digest = Digest.of(encode(plan.contents))
        return _exported(bundle, digest, plan, incomplete, signed=False)

    def _plan(
        self, stopped: Callable[[], None], selection: Selection
    ) -> tuple[ExportPlan, dict[str, set[Digest]]]:
        """And what lacks of those that are left out."""
        gathering = ExportPlanner(read_platforms("platforms", selection.platforms), selection.referrers)
        base = dict(map(_base, selection.since))
        for wanted in self._selected(selection, gathering):
            stopped()
            gathering.add(wanted)
        if gathering.incomplete and not selection.skip_incomplete:
            raise Incomplete(_lacking(gathering.incomplete))
        plan = gathering.plan(self._parts.clock(), base)
        if not plan.contents.references:
            raise NameUnknown("nothing that is stored here as a whole is what was asked for")
        return plan, gathering.incomplete

    def _selected(self, selection: Selection, gathering: ExportPlanner) -> Iterator[Wanted]:
        since = None
        if selection.used_within is not None:
            since = self._parts.clock() - read_seconds("used_within", selection.used_within)
        elif not selection.names:
            raise FieldInvalid("names", "say what to export: references, globs, or used_within")
        for text in selection.names or EVERYTHING:
            found = False
            for wanted in self._named(text):
                found = True
                if since is None or self._used(wanted, since, gathering):
                    yield wanted
            if not found and since is None:
                raise NameUnknown(f"nothing that is stored here is {text}")

    def _named(self, text: str) -> Iterator[Wanted]:
        if not WILD.search(text):
            asked = self._reading.reference("names", text)
            yield Wanted(self._store(asked.repository), asked.repository, asked.reference)
            return
        pin = self._reading.pattern("names", text)
        stores = [self._parts.store, *([self._parts.private] if self._parts.private else [])]
        for store in stores:
            for key, _ in store.records.scan(pin.prefix):
                kind, repository, reference = key.split(" ")
                if pin.matches(repository, reference):
                    yield Wanted(store, repository, Tag(reference) if kind == "tag" else Digest(reference))

    def _used(self, wanted: Wanted, since: float, gathering: ExportPlanner) -> bool:
        use = self._parts.usage.use(wanted.repository, wanted.reference)
        if use is None or use.last < since:
            return False
        # Whoever pulls a tag asks for its manifests by digest as well: they are in it.
        return isinstance(wanted.reference, Tag) or (
            use.count > 0 and not gathering.holds(wanted.repository, wanted.reference)
        )

    # In

    async def import_(
        self, archive: Path, given: Given = Given(), tick: Tick = lambda done, whole: None
    ) -> Landed:
        """All of the archive at a path; `-` is standard input."""
        return await self._take_opened(
            lambda stopped: open_archive(archive, self.spool, stopped), given, tick
        )

    @property
    def spool(self) -> Path:
        """Where files may lie that have no name, while something is taken in."""
        return self._parts.files.root / "partial"

    async def import_spooled(self, file: IO[bytes], what: str, given: Given = Given()) -> Landed:
        """All of the archive that lies in `file`, which is closed; `what` it is called in messages."""
        return await self._take_opened(lambda stopped: open_spooled(file, what, self.spool, stopped), given)

    async def _take_opened(
        self,
        opened: Callable[[Callable[[], None]], Archive],
        given: Given,
        tick: Tick = lambda done, whole: None,
    ) -> Landed:
        try:
            archive = await run_cancellable(opened)
        except OSError as error:
            raise StorageFailed(f"{self.spool}: {error.strerror or error}") from error
        with closing(archive):
            return await self.take(archive, given, tick)

    async def take(self, archive: Archive, given: Given, tick: Tick = lambda done, whole: None) -> Landed:
        layout, taking = await run_in_thread(self._planned, archive, given)
        whole = await run_in_thread(taking.lacking)
        moved: list[Moved] = []
        if not given.dry_run:
            moved = await taking.run(lambda taken: tick(taken, whole))
            await self._settle(moved, given)
        return _landed(layout, taking, moved, given, whole if given.dry_run else taking.taken)

    def _planned(self, archive: Archive, given: Given) -> tuple[Layout, Importer]:
        layout = read_layout(
            archive, lambda content, signature: _check(archive, given.key, content, signature)
        )
        importing = ImportPlanner(layout, lambda root: self._bound(archive, given, root), self._parts.clock)
        return layout, importing.plan()

    def _bound(self, archive: Archive, given: Given, root: Root) -> Bound:
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
        return Bound(self._place(repository), reference)

    def _store(self, repository: str) -> Store:
        if repository.partition("/")[0] in self._parts.hosted and self._parts.private is not None:
            return self._parts.private
        return self._parts.store

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

        return ImportTarget(self._store(repository), repository, hosted.sparse, allowed)

    async def _settle(self, moved: Sequence[Moved], given: Given) -> None:
        parts = self._parts
        for place, tag, digest, before in moved:
            cached = place.store is parts.store
            if before is not None and before != digest:
                if cached:
                    await parts.tag_moved(place.repository, tag, before, digest)
                elif parts.teller is not None:
                    await parts.teller.moved(place.repository, tag, before, digest)
            if given.pin and cached:
                await run_in_thread(parts.pins.add, Pin(written(place.repository, tag)))


def earlier(path: Path) -> Earlier:
    """The bundle at `path`, or the entrepot.json of one.  Raises ArchiveInvalid."""
    try:
        if path.is_file() and path.suffix == ".json":
            return Earlier(str(path), path.read_bytes())
        with closing(open_archive(path, path.parent)) as archive:
            return Earlier(str(path), read(archive, CONTENTS))
    except OSError as error:
        raise ArchiveInvalid(f"{path}: {error.strerror or error}") from error


def _base(given: Earlier) -> tuple[Base, Contents]:
    found = bundle.decode(given.content, given.what)
    return Base(str(Digest.of(given.content)), found.created), found


def _signer(key: Path) -> Callable[[bytes], bytes]:
    def sign(content: bytes) -> bytes:
        try:
            return bundle.sign(content, key)
        except ValueError as error:
            raise FieldInvalid("sign_key", error) from None

    return sign


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


def _lacking(incomplete: dict[str, set[Digest]]) -> str:
    names = list(incomplete)
    digests = sorted(incomplete[names[0]])
    more = f" and {len(digests) - TOLD} more" if digests[TOLD:] else ""
    others = f"; {len(names) - 1} more references lack something, too" if names[1:] else ""
    return (
        f"{names[0]} lacks {', '.join(digests[:TOLD])}{more}{others}: have it fetched (entrepot refresh),"
        " choose platforms that are here, or say --skip-incomplete"
    )


def _exported(
    name: str, digest: Digest, plan: ExportPlan, incomplete: dict[str, set[Digest]], signed: bool
) -> Exported:
    contents = plan.contents
    return Exported(
        bundle=name,
        digest=str(digest),
        references=[
            CarriedRow(
                reference=each.name,
                digest=each.digest,
                platforms=each.platforms,
                complete=each.complete,
                left_out=each.left_out,
            )
            for each in contents.references
        ],
        skipped=[
            LackingRow(reference=reference, lacking=sorted(map(str, lacking)))
            for reference, lacking in sorted(incomplete.items())
        ],
        referrers=len(contents.referrers),
        blobs=len(plan.blobs),
        bytes=plan.bytes,
        spared=len({digest for digests in contents.elsewhere.values() for digest in digests}),
        signed=signed,
    )


def _landed(layout: Layout, taking: Importer, moved: Sequence[Moved], given: Given, taken: int) -> Landed:
    before = {(each.place.repository, each.tag): each.before for each in moved}
    rows = []
    for share in taking.shares:
        for tag, (digest, _) in share.tags.items():
            known = before.get((share.place.repository, tag))
            rows.append(
                BoundRow(
                    repository=share.place.repository,
                    tag=str(tag),
                    digest=str(digest),
                    before=None if known is None else str(known),
                )
            )
        for digest in share.untagged:
            rows.append(
                BoundRow(repository=share.place.repository, tag=None, digest=str(digest), before=None)
            )
    return Landed(
        archive=layout.what,
        references=rows,
        manifests=sum(len(share.manifests) for share in taking.shares),
        blobs=taking.blobs,
        bytes=taken,
        verified=given.key is not None,
        dry_run=given.dry_run,
    )
