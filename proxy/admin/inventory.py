"""What is stored: repositories, images, and the tree of one image.

Reading is no use of an image, and asks no upstream.  The memory that it takes depends on the number of
repositories, or of images on a page, not on the amount of content.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, takewhile
from os.path import commonprefix
from typing import NamedTuple, TypeAlias

from proxy.admin.measuring import Measured, Measurer
from proxy.admin.models import (
    ImageNode,
    ImageRow,
    ImageTree,
    Listed,
    MoveRow,
    RepositoryRow,
    Sort,
    UseRow,
)
from proxy.config.schema import Config
from storage.errors import ManifestUnknown
from storage.graph import contents, referring
from storage.keys import COPIES, LINK, MANIFEST, TAG, USE
from storage.maintenance.pins import Pin, Pins, matching
from storage.maintenance.usage import Usage
from storage.names import glob_matcher, is_glob, literal_prefix, written
from storage.oci import Descriptor, Digest, Manifest, Reference, Tag
from storage.store import Store
from storage.totals import Counts, Total, Totals, last_use
from storage.values import Pointer

Entry: TypeAlias = tuple[float, str, str]  # what a tag is sorted by, its repository, and itself

DEEPEST = 50  # levels of a tree: indexes can be nested without limit
NODES = 30_000  # of a tree: more than one manifest can name


class _SeenManifest(NamedTuple):
    """What is known of a manifest after the first place in a tree; `read` if its content could be."""

    present: bool
    read: bool
    artifact_type: str | None


class _Tree:
    """A tree while it is made: what is known of manifests, and room for so many more nodes.

    It is `cut` if it has no room for all.
    """

    def __init__(self) -> None:
        # By digest, and whether its children are shown.
        self.seen: dict[tuple[Digest, bool], _SeenManifest] = {}
        self.room = NODES
        self.cut = False

    def shown(self, named: Sequence[Descriptor]) -> Sequence[Descriptor]:
        """Those for which there is room."""
        found = named[: self.room]
        self.room -= len(found)
        self.cut |= len(found) < len(named)
        return found


class Inventory:
    """Lists the content of one store.  Every method blocks, and may raise StorageFailed."""

    def __init__(self, config: Config, store: Store, usage: Usage, pins: Pins) -> None:
        self._config = config
        self.store = store
        self._totals = Totals(store.records)
        self._usage = usage
        self._pins = pins

    # Listings

    def repositories(self, pattern: Pin) -> list[RepositoryRow]:
        """The repositories whose name matches; the tag or digest in `pattern` is ignored."""
        name_glob = pattern.parts[0]
        start = literal_prefix(name_glob) if is_glob(name_glob) else name_glob
        matches = glob_matcher(name_glob)
        totals = self._totals.repositories(start) if self._totals.listed else self._uncounted(start)
        shown = ((name, total) for name, total in totals if name != COPIES and _shown(total))
        found = [(name, total.counted) for name, total in shown if matches(name)]
        if self._usage.counted_by(self.store.records):
            return [_row(name, counts, counts.used if counts else 0.0) for name, counts in found]
        names = [name for name, _ in found]
        used = self._usage.last_uses(commonprefix(names)) if names else {}  # noqa: RUF071 - of characters
        return [_row(name, counts, used.get(name, 0.0)) for name, counts in found]

    def _uncounted(self, start: str) -> Iterator[tuple[str, Total]]:
        """The repositories while not all of them have a total."""
        names: set[str] = set()
        for kind in (TAG, MANIFEST, LINK):
            after = takewhile(
                lambda name: name.startswith(start), self.store.records.groups(kind.prefix(), start[:-1])
            )
            names.update(after)
        return ((name, Total()) for name in sorted(names))

    def images(self, pattern: Pin, limit: int | None = None, last: str = "") -> Listed:
        """At most `limit` of the images that match, in the order of their names, after `last`."""
        pins, measurer = self._pins.known(), Measurer(self.store)
        found = list(islice(self._matching(pattern, last), None if limit is None else limit + 1))
        page = found[:limit]
        rows = [self._image(repository, reference, pins, measurer) for repository, reference in page]
        more = page[-1] if len(found) > len(page) and page else None
        return Listed(images=rows, next=None if more is None else written(*more))

    def _matching(self, pattern: Pin, last: str) -> Iterator[tuple[str, Reference]]:
        prefix, after = pattern.prefix, ""
        if last:
            repository, sign, reference = Pin(last).parts
            key = (MANIFEST if sign == "@" else TAG).key(repository, reference)
            if not key.startswith(prefix):
                if key > prefix:
                    return  # all matches come before it
            else:
                after = key[len(prefix) :]
        yield from matching(self.store, pattern, after)

    def entries(self, pattern: Pin, sort: Sort) -> Iterator[Entry]:
        """The tags that match, with what they are sorted by: 0, when they were set or confirmed, or used."""
        matches, start = pattern.matcher, len(TAG.prefix())
        if sort == "updated":
            for key, value in self.store.records.scan(pattern.prefix):
                repository, _, tag = key[start:].partition(" ")
                if matches(repository, tag):
                    yield _set_at(value), repository, tag
            return
        used = dict(self._uses(pattern)) if sort == "used" else {}
        for key in self.store.records.keys(pattern.prefix):
            repository, _, tag = key[start:].partition(" ")
            if matches(repository, tag):
                yield used.get(key[start:], 0.0) if used else 0.0, repository, tag

    def _uses(self, pattern: Pin) -> Iterator[tuple[str, float]]:
        """When tags, each as in its key, were last used."""
        prefix = USE.name + pattern.prefix.removeprefix(TAG.name)
        for key, value in self._usage.scan(prefix):
            yield key[len(USE.prefix()) :], last_use(value)

    def rows(self, names: Iterable[tuple[str, str]]) -> list[ImageRow]:
        """Those of tags, each a repository and its tag."""
        pins, measurer = self._pins.known(), Measurer(self.store)
        return [self._image(repository, Tag(tag), pins, measurer) for repository, tag in names]

    def _image(
        self, repository: str, reference: Reference, pins: Sequence[Pin], measurer: Measurer
    ) -> ImageRow:
        digest = self.digest(repository, reference)
        measured = measurer.measure(repository, digest) if digest else Measured(None)
        use = self._usage.use(repository, reference)
        return ImageRow(
            repository=repository,
            tag=str(reference) if isinstance(reference, Tag) else None,
            digest=str(digest or ""),
            media_type=measured.media_type,
            bytes_held=measured.held,
            bytes_whole=measured.whole,
            complete=measured.complete,
            platforms=list(measured.platforms),
            last_used=use.last if use else None,
            uses=use.count if use else 0,
            fresh_until=self.fresh_until(repository, reference),
            pinned=any(pin.matches(repository, reference) for pin in pins),
        )

    def digest(self, repository: str, reference: Reference) -> Digest | None:
        """The digest of a reference, or None for an unknown tag."""
        if isinstance(reference, Digest):
            return reference
        pointer = self.store.pointer(repository, reference)
        return None if pointer is None else pointer.digest

    def pointer(self, repository: str, tag: Tag) -> Pointer | None:
        return self.store.pointer(repository, tag)

    def fresh_until(self, repository: str, reference: Reference) -> float | None:
        """When a tag becomes stale.  None means never: for a digest, or by the configuration."""
        if isinstance(reference, Digest):
            return None
        name = repository.partition("/")[0]
        namespace = self._config.namespace(name)
        pointer = self.store.pointer(repository, reference)
        if namespace is None or pointer is None:
            return 0.0  # it is stale
        if self._config.offline or namespace.offline or namespace.store is not None:
            return None
        return finite_or_none(pointer.validated_at + namespace.fresh_for_tag(reference))

    # One image

    def measure(self, repository: str, digest: Digest) -> Measured:
        """The parts of an image, and which of them are stored for this repository."""
        return Measurer(self.store).measure(repository, digest)

    def _manifest(self, repository: str, digest: Digest) -> Manifest | None:
        try:
            return self.store.manifest(repository, digest)[0]
        except ManifestUnknown:
            return None

    def tree(self, repository: str, reference: Reference) -> ImageTree:
        """The tree of one image.  Raises ManifestUnknown if it is not stored."""
        digest = self.digest(repository, reference)
        if digest is None:
            raise ManifestUnknown(f"{written(repository, reference)} is not stored")
        manifest = self.store.manifest(repository, digest)[0]
        tree = _Tree()
        use = self._usage.use(repository, reference)
        moves = self._usage.moves(repository, reference) if isinstance(reference, Tag) else []
        node = self._node(repository, "manifest", manifest.descriptor, tree)
        referrers = self._referrers(repository, digest, tree)
        return ImageTree(
            repository=repository,
            reference=str(reference),
            digest=str(digest),
            node=node,
            referrers=referrers,
            cut=tree.cut,
            moves=[MoveRow(at=each.at, old=str(each.old), new=str(each.new)) for each in moves],
            uses=UseRow(count=use.count, last=use.last, first=use.first) if use else None,
            pins=[pin.pattern for pin in self._pins.known() if pin.matches(repository, reference)],
        )

    def _referrers(self, repository: str, digest: Digest, tree: _Tree) -> list[ImageNode]:
        found = []
        for each in dict.fromkeys(each for each, _ in referring(self.store, repository, digest)):
            manifest = self._manifest(repository, each)
            if manifest is not None:
                found.append(self._node(repository, "referrer", manifest.descriptor, tree))
        return found

    def _node(
        self,
        repository: str,
        role: str,
        named: Descriptor,
        tree: _Tree,
        depth: int = 0,
    ) -> ImageNode:
        """A manifest and what it names, which is not read again at every other place that names it."""
        children: list[ImageNode] = []
        key = named.digest, depth < DEEPEST
        if key not in tree.seen:
            manifest = self._manifest(repository, named.digest)
            tree.cut |= manifest is not None and not tree.room
            content = contents(manifest.content) if manifest and tree.room else None
            tree.seen[key] = _SeenManifest(
                manifest is not None, content is not None, content.artifact_type if content else None
            )
            if content and depth < DEEPEST:
                for blob in tree.shown(content.blobs):
                    kind = "config" if blob is content.config else "layer"
                    children.append(self._leaf(repository, kind, blob))
                for child in tree.shown(content.children):
                    children.append(self._node(repository, "manifest", child, tree, depth + 1))
        found = tree.seen[key]
        return ImageNode(
            role=role,
            digest=str(named.digest),
            media_type=named.media_type,
            size=named.size,
            present=found.present,
            platform=named.platform,
            artifact_type=found.artifact_type if found.read and role == "referrer" else named.artifact_type,
            children=children,
        )

    def _leaf(self, repository: str, role: str, blob: Descriptor) -> ImageNode:
        return ImageNode(
            role=role,
            digest=str(blob.digest),
            media_type=blob.media_type,
            size=blob.size,
            present=self.store.linked(repository, blob.digest) is not None,
            platform=None,
            artifact_type=blob.artifact_type,
            children=[],
        )


def _set_at(value: bytes) -> float:
    """The time in the record of a tag, without reading all of it; 0 if it is damaged."""
    try:
        return float(value.rpartition(b" ")[2])
    except ValueError:
        return 0.0


def _shown(total: Total) -> bool:
    """Whether a repository has anything that a client can pull, as far as it is known."""
    if total.counted is None:
        return True
    numbers = total.counted.numbers  # which have no zeros
    return TAG.name in numbers or MANIFEST.name in numbers or LINK.name in numbers


def _row(name: str, counts: Counts | None, used: float) -> RepositoryRow:
    last_used = used or None
    if counts is None:
        return RepositoryRow(repository=name, tags=None, manifests=None, bytes=None, last_used=last_used)
    return RepositoryRow(
        repository=name,
        tags=counts.numbers.get(TAG.name, 0),
        manifests=counts.numbers.get(MANIFEST.name, 0),
        bytes=counts.size,
        last_used=last_used,
    )


def merged(pages: Sequence[Listed], limit: int | None) -> Listed:
    """One page, merged of pages that begin after the same image."""
    rows = sorted((row for page in pages for row in page.images), key=image_name)
    if limit is None or (len(rows) <= limit and all(page.next is None for page in pages)):
        return Listed(images=rows)
    last = rows[:limit][-1]
    return Listed(images=rows[:limit], next="".join(image_name(last)))


def image_name(row: ImageRow) -> tuple[str, str, str]:
    """The repository, `:` or `@`, and the tag or digest."""
    # A tuple, so that names sort like the keys of records, in which a space follows the repository.
    return (row.repository, ":", row.tag) if row.tag is not None else (row.repository, "@", row.digest)


def finite_or_none(number: float) -> float | None:
    """The number, or None for infinity, which JSON cannot express."""
    return None if number == float("inf") else number
