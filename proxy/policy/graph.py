"""How content of a repository is reached: by which tags, and by which manifests.

A digest is reached by the tags that point to it, by those that did (as far as their moves are recorded), and
by the manifests that name it, which are reached in turn.  What is stored is read from the records, again only
if they have changed.  Nothing is forgotten meanwhile: what a tag led to was served by that tag.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterator

from storage.graph import Walk, named_digests
from storage.keys import MANIFEST, MOVES, TAG
from storage.maintenance.usage import parse_moves
from storage.oci import Digest, Manifest, Reference, Tag
from storage.store import Store
from storage.values import Pointer, StoredManifest

REPOSITORIES = 256  # whose graphs are kept; of the others they are read again


class ReachedContent:
    """What leads to the digests of one repository, which is given by its full name."""

    def __init__(self, store: Store, repository: str) -> None:
        self._store = store
        self.repository = repository
        self._version: object = None
        self._known: set[Digest] = set()  # the manifests that were read
        self._tags: defaultdict[Digest, dict[Tag, None]] = defaultdict(dict)
        self._naming: defaultdict[Digest, dict[Digest, None]] = defaultdict(dict)

    async def refresh(self) -> bool:
        """Read what is stored, if that may have changed, and return whether.  Raises StorageFailed."""
        version = self._store.records.version()
        if version is not None and version == self._version:
            return False
        tags, manifests = await self._store.run(self._read, frozenset(self._known))
        for tag, digest in tags:
            self._tags[digest][tag] = None
        for digest, named in manifests:
            self._add(digest, named)
        self._version = version
        return True

    def _read(
        self, known: frozenset[Digest]
    ) -> tuple[list[tuple[Tag, Digest]], list[tuple[Digest, set[Digest]]]]:
        records, repository = self._store.records, self.repository
        tags = []
        for key, value in records.scan(TAG.prefix(repository)):
            if (pointer := Pointer.parse(value)) is not None:
                tags.append((Tag(TAG.parse(key)[1]), pointer.digest))
        for key, value in records.scan(MOVES.prefix(repository)):
            for move in parse_moves(value):
                tags += [(Tag(MOVES.parse(key)[1]), digest) for digest in (move.old, move.new)]
        manifests = []
        for key in records.keys(MANIFEST.prefix(repository)):
            digest = Digest(MANIFEST.parse(key)[1])
            if digest not in known and (stored := StoredManifest.parse(records.get(key))) is not None:
                manifests.append((digest, _named(stored.content)))
        return tags, manifests

    def add(self, reference: Reference, manifest: Manifest) -> None:
        """Take in what a reference stands for, which may not be stored."""
        if isinstance(reference, Tag):
            self._tags[manifest.digest][reference] = None
        if manifest.digest not in self._known:
            self._add(manifest.digest, _named(manifest.content))

    def _add(self, digest: Digest, named: set[Digest]) -> None:
        self._known.add(digest)
        for each in named:
            self._naming[each][digest] = None

    def tags(self, digest: Digest) -> list[Tag]:
        """The tags that lead to it, not by way of a manifest."""
        return list(self._tags.get(digest, ()))

    def naming(self, digest: Digest) -> list[Digest]:
        """The manifests that name it."""
        return list(self._naming.get(digest, ()))

    def leading(self, digest: Digest) -> Iterator[tuple[Digest, Tag | None]]:
        """The manifests from which it is reached, itself among them, each with a tag that leads to it.

        None is the tag of one that no tag and no manifest leads to.
        """
        walk = Walk([digest])
        for each in walk:
            walk.add(naming := self.naming(each))
            tags = self.tags(each)
            yield from ((each, tag) for tag in tags)
            if not tags and not naming:
                yield each, None


class ReachedRepositories:
    """What is known of the repositories of a store; the least recently asked for is dropped."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: OrderedDict[str, ReachedContent] = OrderedDict()

    def of(self, repository: str) -> ReachedContent:
        """What is known; refresh() reads what is new."""
        if (found := self._known.get(repository)) is None:
            found = self._known[repository] = ReachedContent(self._store, repository)
            if len(self._known) > REPOSITORIES:
                self._known.popitem(last=False)
        self._known.move_to_end(repository)
        return found


def _named(manifest: bytes) -> set[Digest]:
    manifests, blobs = named_digests(manifest)
    return manifests | blobs
