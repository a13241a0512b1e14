"""The plan of a bundle: references, and all content that they need.

A manifest is exported with everything that it names, or not at all.  An index is exported unchanged, with
those of its children that are selected and stored.  So every reference in a bundle can be pulled.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from storage.archives import bundle
from storage.archives.bundle import BaseBundle, BundleContents, BundledReference, BundledReferrer
from storage.disk.health import translated
from storage.errors import ManifestUnknown
from storage.graph import Walk, contents, matches_platform, selected
from storage.keys import MANIFEST, REFERRER, TAG
from storage.names import written
from storage.oci import MANIFEST_LIMIT, Descriptor, Digest, ManifestContent, Reference, Tag, platform_of
from storage.store import Store

DEPTH_LIMIT = 50  # levels of indexes within indexes
NO_PLATFORM = "unknown/unknown"  # the platform of attestations by BuildKit
ATTESTED = "vnd.docker.reference.digest"  # annotation: the child that an attestation is about


class ExportReference(NamedTuple):
    """A reference to export.  `repository` is a full name.

    One that was `found` among others may be gone by now; one that was named must be there.
    """

    store: Store
    repository: str
    reference: Reference
    found: bool = False

    @property
    def name(self) -> str:
        return written(self.repository, self.reference)

    @property
    def stored(self) -> bool:
        kind = TAG if isinstance(self.reference, Tag) else MANIFEST
        return self.store.records.holds(kind.key(self.repository, self.reference))


class ContentSource(NamedTuple):
    """Where content is stored: a manifest in `repository`, or a blob if that is None."""

    store: Store
    size: int
    repository: str | None


@dataclass(slots=True)
class ExportTree:
    """A manifest with the stored content that it needs, and what is `missing` to make it complete.

    `declared` is the media type that it has in its text, `config` that of an image, which is no index.
    """

    content: dict[Digest, ContentSource] = field(default_factory=dict)
    manifests: dict[Digest, Descriptor] = field(default_factory=dict)
    platforms: list[str] = field(default_factory=list)
    declared: str | None = None
    config: Descriptor | None = None
    left_out: set[Digest] = field(default_factory=set)
    missing: set[Digest] = field(default_factory=set)

    def add(self, other: ExportTree) -> None:
        self.content |= other.content
        self.manifests |= other.manifests
        self.left_out |= other.left_out
        self.missing |= other.missing
        self.platforms += [each for each in other.platforms if each not in self.platforms]


class ExportTreeReader:
    """Reads the trees of manifests of a repository.  Each manifest is read once, however often it is named.

    Content of another size or type than the manifest says that names it counts as missing: clients refuse it.
    Unlike a Walk it decides bottom-up: an index is complete without a child that is not.
    """

    def __init__(self, store: Store, repository: str, platforms: Sequence[str] = ()) -> None:
        self._store = store
        self._repository = repository
        self._platforms = platforms
        self._trees: dict[Digest, ExportTree] = {}

    def tree(self, digest: Digest, depth: int = 0) -> ExportTree:
        if digest not in self._trees:
            self._trees[digest] = self._read(digest, depth)
        return self._trees[digest]

    def _read(self, digest: Digest, depth: int) -> ExportTree:
        try:
            manifest, _ = self._store.manifest(self._repository, digest)
        except ManifestUnknown:
            return ExportTree(missing={digest})
        tree = ExportTree(
            content={digest: ContentSource(self._store, len(manifest.content), self._repository)},
            manifests={digest: manifest.descriptor},
        )
        content = contents(manifest.content)
        if content is not None and content.declared is not None:  # an upstream may have stated another type
            tree.manifests[digest] = replace(manifest.descriptor, media_type=content.declared)
            tree.declared = content.declared
        if depth > DEPTH_LIMIT or content is None or content.unread:
            tree.missing.add(digest)  # what it names cannot be read
            return tree
        self._add_blobs(tree, content)
        if content.children:
            self._add_children(tree, content, depth)
        else:
            tree.config = content.config
        return tree

    def _add_blobs(self, tree: ExportTree, content: ManifestContent) -> None:
        for each in content.blobs:
            stored = self._store.linked(self._repository, each.digest)
            if stored is not None and stored.size == each.size:
                tree.content[each.digest] = ContentSource(self._store, each.size, None)
            elif each.distributable:
                tree.missing.add(each.digest)

    def _add_children(self, tree: ExportTree, content: ManifestContent, depth: int) -> None:
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
            below = self._child(child, depth)
            if below.missing and optional:
                tree.left_out.add(child.digest)
                continue
            tree.add(below)
            if platform is not None and platform not in (NO_PLATFORM, *tree.platforms):
                tree.platforms.append(platform)
            found = found or platform != NO_PLATFORM
        if not found:  # an index alone cannot be pulled
            tree.missing |= wanted or tree.left_out

    def _child(self, child: Descriptor, depth: int) -> ExportTree:
        """The tree of a child; one that is not what the index says that it is counts as missing."""
        tree = self.tree(child.digest, depth + 1)
        if (found := tree.manifests.get(child.digest)) is not None and (
            found.size != child.size or tree.declared not in (None, child.media_type)
        ):
            return ExportTree(missing={child.digest})
        return tree


class ExportPlanner:
    """Collects references and the content that they need, and makes the plan of a bundle.  Methods block."""

    def __init__(self, platforms: Sequence[str] = (), referrers: bool = True) -> None:
        self._platforms = platforms
        self._with_referrers = referrers
        self._references: dict[tuple[str, str], BundledReference] = {}
        self._referrers: dict[tuple[str, Digest], BundledReferrer] = {}
        self._content: dict[str, dict[Digest, ContentSource]] = defaultdict(dict)
        self._manifests: set[Digest] = set()
        self._planned: set[tuple[str, Digest]] = set()
        # What was not added, and what is missing of it: references, and referrers of what was added.
        self.incomplete: dict[str, set[Digest]] = {}
        self.incomplete_referrers: dict[str, set[Digest]] = {}
        self.other_platforms: dict[str, str] = {}  # images not added, since they are for this platform only

    def add(self, wanted: ExportReference) -> bool:
        """Add a reference unless it is incomplete, or an image for another platform; whether it was added.

        Raises ManifestUnknown if it is a tag that is not stored, and was not found among others.
        """
        store, repository = wanted.store, wanted.repository
        try:
            digest, validated = self._digest(wanted)
        except ManifestUnknown:
            if wanted.found:
                return False
            raise
        tree = ExportTreeReader(store, repository, self._platforms).tree(digest)
        if tree.missing and wanted.found and not wanted.stored:
            return False
        if tree.missing:
            self.incomplete[wanted.name] = tree.missing
            return False
        platform = self._platform(store, tree)
        if platform is not None and not any(matches_platform(platform, each) for each in self._platforms):
            self.other_platforms[wanted.name] = platform
            return False
        self._add_reference(wanted, digest, validated, tree)
        if self._with_referrers:
            self._add_referrers(store, repository, Walk(tree.manifests))
        return True

    def _platform(self, store: Store, tree: ExportTree) -> str | None:
        """The platform of an image that is no index, if that matters and the image states it."""
        if not self._platforms or tree.config is None or tree.config.size > MANIFEST_LIMIT:
            return None
        with translated(tree.config.digest), store.files.reader(tree.config.digest) as file:
            return platform_of(file.read(MANIFEST_LIMIT))

    def contains(self, repository: str, digest: Digest) -> bool:
        """Whether the manifest was added, by itself or as part of another one."""
        return (repository, digest) in self._planned

    def _digest(self, wanted: ExportReference) -> tuple[Digest, float | None]:
        if isinstance(wanted.reference, Digest):
            return wanted.reference, None
        pointer = wanted.store.pointer(wanted.repository, wanted.reference)
        if pointer is None:
            raise ManifestUnknown(f"{wanted.name} is not stored")
        return pointer.digest, pointer.validated_at

    def _add_content(self, repository: str, tree: ExportTree) -> None:
        self._content[repository.partition("/")[0]].update(tree.content)
        self._manifests.update(tree.manifests)
        self._planned.update((repository, digest) for digest in tree.manifests)

    def _add_referrers(self, store: Store, repository: str, subjects: Walk[Digest]) -> None:
        """Add the referrers of the subjects, and the referrers of these, as far as they are complete."""
        reader = ExportTreeReader(store, repository)
        for subject in subjects:
            for key, _ in store.records.scan(REFERRER.prefix(repository, subject)):
                digest = Digest(REFERRER.parse(key)[2])
                tree = reader.tree(digest)
                if tree.missing:
                    self.incomplete_referrers[written(repository, digest)] = tree.missing
                    continue
                if (repository, digest) in self._referrers:
                    continue
                top = tree.manifests[digest]
                self._referrers[repository, digest] = BundledReferrer(
                    repository=repository,
                    digest=str(digest),
                    media_type=top.media_type,
                    size=top.size,
                    subject=str(subject),
                )
                self._add_content(repository, tree)
                subjects.add(tree.manifests)
            # distribution-spec, "Referrers Tag Schema"; cosign appends .sig, .att and .sbom to that tag.
            start = f"{TAG.prefix(repository)}{subject.algorithm}-{subject.encoded}"
            for key, _ in list(store.records.scan(start)):
                tag = Tag(TAG.parse(key)[1])
                if (repository, tag) not in self._references:
                    wanted = ExportReference(store, repository, tag, found=True)
                    try:
                        digest, validated = self._digest(wanted)
                    except ManifestUnknown:
                        continue
                    tree = reader.tree(digest)
                    if tree.missing:
                        self.incomplete_referrers[wanted.name] = tree.missing
                        continue
                    self._add_reference(wanted, digest, validated, tree)
                    subjects.add(tree.manifests)

    def _add_reference(
        self, wanted: ExportReference, digest: Digest, validated: float | None, tree: ExportTree
    ) -> None:
        top = tree.manifests[digest]
        self._references[wanted.repository, str(wanted.reference)] = BundledReference(
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
        self._add_content(wanted.repository, tree)

    def plan(self, created: float, base: Mapping[BaseBundle, BundleContents]) -> ExportPlan:
        """The plan of a bundle without the blobs of the bundles in `base`.

        Manifests are always included, so that each bundle can be read by itself.
        """
        known: dict[str, set[str]] = defaultdict(set)
        for each in base.values():
            for contained in (each.blobs, each.elsewhere):
                for namespace, digests in contained.items():
                    known[namespace].update(digests)
        sources: dict[Digest, ContentSource] = {}
        blobs, elsewhere = {}, {}
        for namespace, needed in sorted(self._content.items()):
            omitted = {each for each in needed if each in known[namespace] and each not in self._manifests}
            blobs[namespace] = sorted(str(each) for each in needed if each not in omitted)
            if omitted:
                elsewhere[namespace] = sorted(map(str, omitted))
            sources |= {digest: source for digest, source in needed.items() if digest not in omitted}
        references = [reference for _, reference in sorted(self._references.items())]
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
            dict(sorted(sources.items())),
        )


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """The documents of a bundle, and where the content that it contains is stored."""

    contents: BundleContents
    index: bytes
    sources: Mapping[Digest, ContentSource]

    @property
    def bytes(self) -> int:
        return sum(each.size for each in self.sources.values())
