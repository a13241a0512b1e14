"""What is to go into a bundle: references, and all that they need.

A manifest goes with all that it names, or not at all; indexes stay as they are, to the byte, and of their
children those go along that are wanted and here.  So every name in a bundle is good for a pull.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from storage.archives import bundle
from storage.archives.bundle import BaseBundle, BundleContents, BundledReference, BundledReferrer
from storage.errors import ManifestUnknown
from storage.graph import contents, selected
from storage.keys import REFERRER, TAG
from storage.names import written
from storage.oci import DOCKER_SCHEMA1, Descriptor, Digest, ManifestContent, Reference, Tag
from storage.store import Store

DEEPEST = 50  # indexes within indexes that are looked into
NO_PLATFORM = "unknown/unknown"  # what BuildKit says of its attestations
ATTESTED = "vnd.docker.reference.digest"  # the child that an attestation is about


class Wanted(NamedTuple):
    """`repository` is a full name."""

    store: Store
    repository: str
    reference: Reference

    @property
    def name(self) -> str:
        return written(self.repository, self.reference)


class Source(NamedTuple):
    """Where something lies: a manifest in `repository`, a blob where there is none."""

    store: Store
    size: int
    repository: str | None


@dataclass(slots=True)
class Tree:
    """What a manifest needs of what is here, itself included; and what is `lacking` to make it whole."""

    found: dict[Digest, Source] = field(default_factory=dict)
    manifests: dict[Digest, Descriptor] = field(default_factory=dict)
    platforms: list[str] = field(default_factory=list)
    left_out: set[Digest] = field(default_factory=set)
    lacking: set[Digest] = field(default_factory=set)

    def join(self, other: Tree) -> None:
        self.found |= other.found
        self.manifests |= other.manifests
        self.left_out |= other.left_out
        self.lacking |= other.lacking
        self.platforms += [each for each in other.platforms if each not in self.platforms]


class Walk:
    """Looks at what a repository holds.  Each manifest is looked at once, however often it is named."""

    def __init__(self, store: Store, repository: str, platforms: Sequence[str] = ()) -> None:
        self._store = store
        self._repository = repository
        self._platforms = platforms
        self._seen: dict[Digest, Tree] = {}

    def tree(self, digest: Digest, depth: int = 0) -> Tree:
        if digest not in self._seen:
            self._seen[digest] = self._tree(digest, depth)
        return self._seen[digest]

    def _tree(self, digest: Digest, depth: int) -> Tree:
        try:
            manifest, _ = self._store.manifest(self._repository, digest)
        except ManifestUnknown:
            return Tree(lacking={digest})
        tree = Tree(
            found={digest: Source(self._store, len(manifest.content), self._repository)},
            manifests={digest: manifest.descriptor},
        )
        content = contents(manifest.content)
        if depth > DEEPEST or manifest.media_type == DOCKER_SCHEMA1 or content is None:
            # What it names cannot be told.
            tree.lacking.add(digest)
            return tree
        self._take_blobs(tree, content)
        if content.children:
            self._take_children(tree, content, depth)
        return tree

    def _take_blobs(self, tree: Tree, content: ManifestContent) -> None:
        needed = {each.digest for each in content.distributable}
        for each in content.blobs:
            if self._store.linked(self._repository, each.digest) is not None:
                tree.found[each.digest] = Source(self._store, each.size, None)
            elif each.digest in needed:
                tree.lacking.add(each.digest)

    def _take_children(self, tree: Tree, content: ManifestContent, depth: int) -> None:
        wanted = {each.digest for each in selected(content, self._platforms)}
        found = False
        for child in content.children:
            platform = child.platform
            optional = not self._platforms
            if child.digest not in wanted:
                about = (child.annotations or {}).get(ATTESTED)
                if platform != NO_PLATFORM or about not in wanted:
                    tree.left_out.add(child.digest)
                    continue
                optional = True
            below = self.tree(child.digest, depth + 1)
            if below.lacking and optional:
                tree.left_out.add(child.digest)
                continue
            tree.join(below)
            if platform is not None and platform not in (NO_PLATFORM, *tree.platforms):
                tree.platforms.append(platform)
            found = found or platform != NO_PLATFORM
        if not found:  # an index alone is good for nothing
            tree.lacking |= wanted or tree.left_out


class ExportPlanner:
    """What is to go into a bundle.  Blocks."""

    def __init__(self, platforms: Sequence[str] = (), referrers: bool = True) -> None:
        self._platforms = platforms
        self._with_referrers = referrers
        self._held: dict[tuple[str, str], BundledReference] = {}
        self._referrers: dict[tuple[str, Digest], BundledReferrer] = {}
        self._needed: dict[str, dict[Digest, Source]] = defaultdict(dict)
        self._manifests: set[Digest] = set()
        self._taken: set[tuple[str, Digest]] = set()
        self.incomplete: dict[str, set[Digest]] = {}  # what each lacks that was not taken

    def add(self, wanted: Wanted) -> bool:
        """Whether it was taken: it is not where something of it is lacking, see `incomplete`.

        Raises ManifestUnknown where nothing is known of it.
        """
        store, repository, _ = wanted
        digest, validated = self._digest(wanted)
        tree = Walk(store, repository, self._platforms).tree(digest)
        if tree.lacking:
            self.incomplete[wanted.name] = tree.lacking
            return False
        self._hold(wanted, digest, validated, tree)
        if self._with_referrers:
            self._refer(store, repository, list(tree.manifests))
        return True

    def holds(self, repository: str, digest: Digest) -> bool:
        """Whether it was taken with something else of the repository."""
        return (repository, digest) in self._taken

    def _digest(self, wanted: Wanted) -> tuple[Digest, float | None]:
        if isinstance(wanted.reference, Digest):
            return wanted.reference, None
        pointer = wanted.store.pointer(wanted.repository, wanted.reference)
        if pointer is None:
            raise ManifestUnknown(f"{wanted.name} is not stored here")
        return pointer.digest, pointer.validated_at

    def _take(self, repository: str, tree: Tree) -> None:
        self._needed[repository.partition("/")[0]].update(tree.found)
        self._manifests.update(tree.manifests)
        self._taken.update((repository, digest) for digest in tree.manifests)

    def _refer(self, store: Store, repository: str, todo: list[Digest]) -> None:
        """Take what refers to these, what refers to that, …; as far as it is here as a whole."""
        walk = Walk(store, repository)
        while todo:
            subject = todo.pop()
            for key, _ in store.records.scan(REFERRER.prefix(repository, subject)):
                digest = Digest(REFERRER.parse(key)[2])
                tree = walk.tree(digest)
                if tree.lacking or (repository, digest) in self._referrers:
                    continue
                top = tree.manifests[digest]
                self._referrers[repository, digest] = BundledReferrer(
                    repository=repository,
                    digest=str(digest),
                    media_type=top.media_type,
                    size=top.size,
                    subject=str(subject),
                )
                self._take(repository, tree)
                todo += tree.manifests
            # distribution-spec, "Referrers Tag Schema"; cosign adds .sig, .att and .sbom to it.
            start = f"{TAG.prefix(repository)}{subject.algorithm}-{subject.encoded}"
            for key, _ in list(store.records.scan(start)):
                tag = Tag(TAG.parse(key)[1])
                if (repository, tag) not in self._held:
                    self._add_fallback(Wanted(store, repository, tag), walk, todo)

    def _add_fallback(self, wanted: Wanted, walk: Walk, todo: list[Digest]) -> None:
        digest, validated = self._digest(wanted)
        tree = walk.tree(digest)
        if not tree.lacking:
            self._hold(wanted, digest, validated, tree)
            todo += tree.manifests

    def _hold(self, wanted: Wanted, digest: Digest, validated: float | None, tree: Tree) -> None:
        top = tree.manifests[digest]
        self._held[wanted.repository, str(wanted.reference)] = BundledReference(
            repository=wanted.repository,
            digest=str(digest),
            media_type=top.media_type,
            size=top.size,
            tag=str(wanted.reference) if isinstance(wanted.reference, Tag) else None,
            validated=validated,
            platforms=tree.platforms,
            complete=not tree.left_out,
            left_out=sorted(map(str, tree.left_out)),
        )
        self._take(wanted.repository, tree)

    def plan(self, created: float, base: Mapping[BaseBundle, BundleContents]) -> ExportPlan:
        """Without what is in the bundles of `base`; manifests always go along, so that each can be read."""
        known: dict[str, set[str]] = defaultdict(set)
        for each in base.values():
            for had in (each.blobs, each.elsewhere):
                for namespace, digests in had.items():
                    known[namespace].update(digests)
        write: dict[Digest, Source] = {}
        blobs, elsewhere = {}, {}
        for namespace, needed in sorted(self._needed.items()):
            there = {each for each in needed if each in known[namespace] and each not in self._manifests}
            blobs[namespace] = sorted(str(each) for each in needed if each not in there)
            if there:
                elsewhere[namespace] = sorted(map(str, there))
            write |= {digest: source for digest, source in needed.items() if digest not in there}
        references = [held for _, held in sorted(self._held.items())]
        referrers = [referrer for _, referrer in sorted(self._referrers.items())]
        index = bundle.index_of([*references, *referrers])
        return ExportPlan(
            BundleContents(
                created=created,
                index=str(Digest.of(index)),
                base=sorted(base, key=lambda each: each.digest),
                platforms=list(self._platforms),
                references=references,
                referrers=referrers,
                blobs=blobs,
                elsewhere=elsewhere,
            ),
            index,
            dict(sorted(write.items())),
        )


@dataclass(frozen=True, slots=True)
class ExportPlan:
    contents: BundleContents
    index: bytes
    blobs: Mapping[Digest, Source]

    @property
    def bytes(self) -> int:
        return sum(each.size for each in self.blobs.values())
