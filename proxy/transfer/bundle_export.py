"""Bundles go out: what is stored, under its full names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path

from proxy.namespaces.composition import Composition
from proxy.namespaces.references import FieldInvalid, ReferenceReader, read_platforms, read_seconds
from proxy.transfer.results import CarriedRow, Exported, IncompleteRow, Tick
from storage.archives import bundle
from storage.archives.archive import open_archive, read
from storage.archives.bundle import CONTENTS, BaseBundle, BundleContents, encode
from storage.archives.export_plan import ExportPlan, ExportPlanner, ExportReference
from storage.archives.exporter import Sink, write
from storage.concurrency import run_cancellable
from storage.errors import ArchiveInvalid, Incomplete, NameUnknown, StorageFailed
from storage.maintenance.pins import matching
from storage.names import is_glob
from storage.oci import Digest, Tag

EVERYTHING = ("*", "*@*")  # tags, and manifests
TOLD = 3  # digests, or names, that a message tells


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


class BundleExport:
    """Every method raises RegistryError, or BadField where what it is given cannot be read."""

    def __init__(self, composition: Composition) -> None:
        self._parts = composition
        self._reading = ReferenceReader(composition.namespaces)

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
        planner = ExportPlanner(read_platforms("platforms", selection.platforms), selection.referrers)
        base = dict(map(_base, selection.since))
        for wanted in self._selected(selection, planner):
            stopped()
            planner.add(wanted)
        if planner.incomplete and not selection.skip_incomplete:
            raise Incomplete(_lacking(planner.incomplete))
        plan = planner.plan(self._parts.clock(), base)
        if not plan.contents.references:
            raise NameUnknown("nothing that is stored here as a whole is what was asked for")
        return plan, planner.incomplete

    def _selected(self, selection: Selection, planner: ExportPlanner) -> Iterator[ExportReference]:
        since = None
        if selection.used_within is not None:
            since = self._parts.clock() - read_seconds("used_within", selection.used_within)
        elif not selection.names:
            raise FieldInvalid("names", "say what to export: references, globs, or used_within")
        for text in selection.names or EVERYTHING:
            found = False
            for wanted in self._named(text):
                found = True
                if since is None or self._used(wanted, since, planner):
                    yield wanted
            if not found and since is None:
                raise NameUnknown(f"nothing that is stored here is {text}")

    def _named(self, text: str) -> Iterator[ExportReference]:
        if not is_glob(text):
            asked = self._reading.reference("names", text)
            yield ExportReference(self._parts.store_of(asked.namespace), asked.repository, asked.reference)
            return
        pin = self._reading.pattern("names", text)
        for store in self._parts.stores:
            for repository, reference in matching(store, pin):
                yield ExportReference(store, repository, reference)

    def _used(self, wanted: ExportReference, since: float, planner: ExportPlanner) -> bool:
        use = self._parts.usage.use(wanted.repository, wanted.reference)
        if use is None or use.last < since:
            return False
        # Whoever pulls a tag asks for its manifests by digest as well: they are in it.
        return isinstance(wanted.reference, Tag) or (
            use.count > 0 and not planner.contains(wanted.repository, wanted.reference)
        )


def earlier(path: Path) -> Earlier:
    """The bundle at `path`, or the entrepot.json of one.  Raises ArchiveInvalid."""
    try:
        if path.is_file() and path.suffix == ".json":
            return Earlier(str(path), path.read_bytes())
        with closing(open_archive(path, path.parent)) as archive:
            return Earlier(str(path), read(archive, CONTENTS))
    except OSError as error:
        raise ArchiveInvalid(f"{path}: {error.strerror or error}") from error


def _base(given: Earlier) -> tuple[BaseBundle, BundleContents]:
    found = bundle.decode(given.content, given.what)
    return BaseBundle(str(Digest.of(given.content)), found.created), found


def _signer(key: Path) -> Callable[[bytes], bytes]:
    def sign(content: bytes) -> bytes:
        try:
            return bundle.sign(content, key)
        except ValueError as error:
            raise FieldInvalid("sign_key", error) from None

    return sign


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
            IncompleteRow(reference=reference, lacking=sorted(map(str, lacking)))
            for reference, lacking in sorted(incomplete.items())
        ],
        referrers=len(contents.referrers),
        blobs=len(plan.sources),
        bytes=plan.bytes,
        spared=len({digest for digests in contents.elsewhere.values() for digest in digests}),
        signed=signed,
    )
