"""What a tag stood for: by what clients were served, by its moves, and by what it stands for now."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby

from proxy.admin.image_diff import ImageDiffer
from proxy.admin.inventory import Inventory
from proxy.admin.measuring import Measured, Measurer
from proxy.admin.tag_reports import HistoryRow, ImageDiff, TagHistory
from proxy.config.image_names import split
from proxy.namespaces.composition import Composition
from proxy.namespaces.references import FieldInvalid, ImageReference, ReferenceReader
from storage.concurrency import run_in_thread
from storage.errors import ManifestUnknown
from storage.maintenance.resolutions import ResolutionJournal
from storage.names import written
from storage.oci import ALGORITHMS, Digest, Tag


class TagChronicle:
    """Tells the history of tags, and compares what they stood for.  Methods may raise StorageFailed."""

    def __init__(
        self, parts: Composition, reader: ReferenceReader, inventory_of: Callable[[str], Inventory]
    ) -> None:
        self._usage = parts.usage
        self._journal = ResolutionJournal(parts.store)
        self._reader = reader
        self._inventory_of = inventory_of
        self._differ = ImageDiffer(parts.store, parts.private, parts.hosted)

    def history(self, ref: str) -> TagHistory:
        """The history of a tag.  Blocks; raises FieldInvalid, ManifestUnknown if nothing is known of it."""
        image = self._reader.reference("ref", ref)
        tag, inventory = _tag(image), self._inventory_of(image.namespace)
        known = [*self._known(image.repository, tag, inventory)]
        if not known:
            raise ManifestUnknown(f"{written(image.repository, tag)} was never pulled, and is not stored")
        ends = [since for since, _ in known[1:]]
        measurer = Measurer(inventory.store)
        rows = [
            _row(since, until, digest, measurer.measure(image.repository, digest))
            for (since, digest), until in zip(known, [*ends, None], strict=True)
        ]
        return TagHistory(repository=image.repository, tag=str(tag), rows=rows[::-1])

    async def diff(self, ref: str, other: str) -> ImageDiff:
        """See Operations.diff().  Raises FieldInvalid, ManifestUnknown."""
        image = self._reader.reference("ref", ref)
        if not other:
            digests = await run_in_thread(self._last_move, image)
            return await self._differ.diff(*((image.repository, each) for each in digests))
        old = image.repository, await run_in_thread(self._digest, image)
        if ":" in other and "/" not in other and other.partition(":")[0].removeprefix("@") in ALGORITHMS:
            other = f"{split(ref)[0]}@{other.removeprefix('@')}"
        latter = self._reader.reference("other", other)
        return await self._differ.diff(old, (latter.repository, await run_in_thread(self._digest, latter)))

    def _digest(self, image: ImageReference) -> Digest:
        found = self._inventory_of(image.namespace).digest(image.repository, image.reference)
        if found is None:
            raise ManifestUnknown(f"{written(image.repository, image.reference)} is not stored")
        return found

    def _last_move(self, image: ImageReference) -> tuple[Digest, Digest]:
        """What a tag stood for before its last move, and since."""
        tag = _tag(image)
        known = [*self._known(image.repository, tag, self._inventory_of(image.namespace))]
        if len(known) < 2:
            name = written(image.repository, tag)
            raise ManifestUnknown(f"{name} is not known to have moved: name the other image, too")
        return known[-2][1], known[-1][1]

    def _known(self, repository: str, tag: Tag, inventory: Inventory) -> Iterator[tuple[float, Digest]]:
        """When it stood for what, the oldest first; each digest other than the one before."""
        moves = self._usage.moves(repository, tag)
        found = [*self._journal.of(repository, tag), *((each.at, each.new) for each in moves)]
        if moves and not any(at < moves[0].at for at, _ in found):
            found.append((moves[0].at, moves[0].old))  # since when is not known: it sorts before the move
        found.sort(key=lambda each: (each[0], bool(moves) and each == (moves[0].at, moves[0].new)))
        pointer = inventory.pointer(repository, tag)
        if pointer is not None and (not found or found[-1][1] != pointer.digest):
            found.append((max(pointer.validated_at, found[-1][0] if found else 0.0), pointer.digest))
        yield from (next(same) for _, same in groupby(found, lambda each: each[1]))


def _tag(image: ImageReference) -> Tag:
    if not isinstance(image.reference, Tag):
        raise FieldInvalid("ref", "name a tag: a digest never changes")
    return image.reference


def _row(since: float, until: float | None, digest: Digest, measured: Measured) -> HistoryRow:
    return HistoryRow(
        digest=str(digest),
        since=since,
        until=until,
        stored=measured.media_type is not None,
        complete=measured.complete,
        bytes_whole=measured.whole,
        platforms=[each.platform for each in measured.platforms if each.platform],
    )
