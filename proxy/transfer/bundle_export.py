"""The export of stored images to bundles, under their full names."""

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
from storage.graph import matches_platform
from storage.maintenance.pins import matching
from storage.names import is_glob
from storage.oci import Digest, Tag

EVERYTHING = ("*", "*@*")  # tags, and manifests
SHOWN = 3  # digests in a message


@dataclass(frozen=True, slots=True)
class EarlierBundle:
    """A bundle that was made before: its name in messages, and its entrepot.json."""

    what: str
    content: bytes


@dataclass(frozen=True, slots=True)
class Selection:
    """What to export.

    `names` are references, or globs over full names; without names, `used_within` (a duration) selects from
    everything.  `since` are earlier bundles, whose blobs are left out.
    """

    names: Sequence[str] = ()
    used_within: str | None = None
    platforms: Sequence[str] = ()
    referrers: bool = True
    since: Sequence[EarlierBundle] = ()
    skip_incomplete: bool = False


class BundleExport:
    """Exports bundles.  Every method raises RegistryError, or FieldInvalid for an invalid selection."""

    def __init__(self, composition: Composition) -> None:
        self._parts = composition
        self._reader = ReferenceReader(composition.namespaces)

    async def export(
        self,
        selection: Selection,
        bundle: str,
        opened: Callable[[Digest], AbstractContextManager[Sink]],
        key: Path | None = None,
        tick: Tick = lambda done, whole: None,
    ) -> Exported:
        """Write a bundle to the sink that `opened` gives, signed by the private `key` if there is one.

        `opened` is called with the digest of entrepot.json, when the content of the bundle is known.
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
        plan, skipped = self._plan(stopped, selection)
        whole = plan.bytes

        def done(count: int) -> None:
            stopped()
            tick(count, whole)

        try:
            with opened(Digest.of(encode(plan.contents))) as sink:
                digest = write(plan, sink, None if key is None else _signer(key), done)
        except OSError as error:
            raise StorageFailed(f"{error.filename or name}: {error.strerror or error}") from error
        return _exported(name, digest, plan, skipped, signed=key is not None)

    async def planned(self, selection: Selection, bundle: str) -> Exported:
        """What export() would write."""
        plan, skipped = await run_cancellable(self._plan, selection)
        digest = Digest.of(encode(plan.contents))
        return _exported(bundle, digest, plan, skipped, signed=False)

    def _plan(
        self, stopped: Callable[[], None], selection: Selection
    ) -> tuple[ExportPlan, list[IncompleteRow]]:
        """The plan, and the images and referrers that are left out."""
        planner = ExportPlanner(read_platforms("platforms", selection.platforms), selection.referrers)
        base = dict(map(_base, selection.since))
        for image in self._selected(selection, planner):
            stopped()
            planner.add(image)
        if planner.incomplete and not selection.skip_incomplete:
            raise Incomplete(_lacking(planner.incomplete))
        if planner.other_platforms and not selection.skip_incomplete:
            name, platform = next(iter(planner.other_platforms.items()))
            raise FieldInvalid(
                "platforms",
                f"{name} is an image for {platform}, not an index: leave out --platform, or give"
                " --skip-incomplete",
            )
        plan = planner.plan(self._parts.clock(), base)
        if not plan.contents.references:
            raise NameUnknown("no image that was asked for is stored completely")
        return plan, _skipped(planner)

    def _selected(self, selection: Selection, planner: ExportPlanner) -> Iterator[ExportReference]:
        since = None
        if selection.used_within is not None:
            since = self._parts.clock() - read_seconds("used_within", selection.used_within)
        elif not selection.names:
            raise FieldInvalid(
                "names", "name what to export: references or globs, or a time within which it was used"
            )
        for text in selection.names or EVERYTHING:
            found = False
            for image in self._named(text):
                found = True
                if since is None or self._used(image, since, planner):
                    yield image
            if not found and since is None:
                raise NameUnknown(f"nothing that is stored matches {text}")

    def _named(self, text: str) -> Iterator[ExportReference]:
        if not is_glob(text):
            image = self._reader.reference("names", text)
            yield ExportReference(self._parts.store_of(image.namespace), image.repository, image.reference)
            return
        pin = self._reader.pattern("names", text)
        for store in self._parts.stores:
            for repository, reference in matching(store, pin):
                yield ExportReference(store, repository, reference, found=True)

    def _used(self, image: ExportReference, since: float, planner: ExportPlanner) -> bool:
        use = self._parts.usage.use(image.repository, image.reference)
        if use is None or use.last < since:
            return False
        # A client that pulls a tag requests its manifests by digest too: those are part of the tag.
        return isinstance(image.reference, Tag) or (
            use.count > 0 and not planner.contains(image.repository, image.reference)
        )


def earlier(path: Path) -> EarlierBundle:
    """The bundle at `path`, or the entrepot.json of one.  Raises ArchiveInvalid."""
    try:
        if path.is_file() and path.suffix == ".json":
            return EarlierBundle(str(path), path.read_bytes())
        with closing(open_archive(path, path.parent)) as archive:
            return EarlierBundle(str(path), read(archive, CONTENTS))
    except OSError as error:
        raise ArchiveInvalid(f"{path}: {error.strerror or error}") from error


def _base(earlier_bundle: EarlierBundle) -> tuple[BaseBundle, BundleContents]:
    found = bundle.decode(earlier_bundle.content, earlier_bundle.what)
    return BaseBundle(str(Digest.of(earlier_bundle.content)), found.created), found


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
    more = f" and {len(digests) - SHOWN} more" if digests[SHOWN:] else ""
    others = f"; {len(names) - 1} more images are incomplete" if names[1:] else ""
    return (
        f"{names[0]} is incomplete: {', '.join(digests[:SHOWN])}{more} not stored as it is listed{others};"
        " fetch it (entrepot refresh), choose platforms that are stored, or give --skip-incomplete"
    )


def _skipped(planner: ExportPlanner) -> list[IncompleteRow]:
    incomplete = planner.incomplete | planner.incomplete_referrers
    rows = [IncompleteRow(reference=each, lacking=sorted(map(str, incomplete[each]))) for each in incomplete]
    for reference, platform in planner.other_platforms.items():
        rows.append(IncompleteRow(reference=reference, lacking=[], platform=platform))
    return sorted(rows, key=lambda row: row.reference)


def _exported(
    name: str, digest: Digest, plan: ExportPlan, skipped: list[IncompleteRow], signed: bool
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
                lacking=_without(contents.platforms, each.platforms),
            )
            for each in contents.references
        ],
        skipped=skipped,
        referrers=len(contents.referrers),
        blobs=len(plan.sources),
        bytes=plan.bytes,
        spared=len({digest for digests in contents.elsewhere.values() for digest in digests}),
        signed=signed,
    )


def _without(wanted: Sequence[str], platforms: Sequence[str]) -> list[str]:
    """The wanted platforms that an image with others does not have; an image that is no index has none."""
    if not platforms:
        return []
    return [each for each in wanted if not any(matches_platform(one, each) for one in platforms)]
