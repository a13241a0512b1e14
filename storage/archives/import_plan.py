"""The plan of an import: what an archive contains, checked before anything is changed.

The digest of every manifest and the size of every blob is verified, and all that is needed must be there.
Children of an index may be missing if the archive omits them on purpose, or does not say.

Knowing a digest is not a permission: a blob that an archive names but does not contain must already be
linked in a repository of the same namespace.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from storage.archives.importer import Importer, ImportTarget, RepositoryImport, manifest_of, renew_if_stored
from storage.archives.layout import Layout, Root
from storage.archives.saved import check_layers
from storage.errors import ArchiveInvalid, ManifestInvalid
from storage.graph import Walk, attestations, contents, missing_platforms, selected
from storage.keys import LINK
from storage.names import written
from storage.oci import (
    DOCKER_SCHEMA1,
    MANIFESTS,
    Descriptor,
    Digest,
    ManifestContent,
    Reference,
    Tag,
    parse_manifest,
)
from storage.store import Store
from storage.validation import validate
from storage.values import STEP


class RootBinding(NamedTuple):
    """Where a root of an archive is imported to."""

    target: ImportTarget
    reference: Reference


class ImportPlanner:
    """Checks what an archive contains, and makes the plan of its import.

    `bind` returns where a root is imported to, or raises RegistryError.  It is called for the roots with a
    name, and for those without one that belong to none of these, with whether there are several of them.
    `clock` returns seconds since the epoch.  Of an index only the children for `platforms` are imported, all
    without any.
    """

    def __init__(
        self,
        layout: Layout,
        bind: Callable[[Root, bool], RootBinding],
        clock: Callable[[], float] = time.time,
        platforms: Sequence[str] = (),
    ) -> None:
        self._layout = layout
        self._bind = bind
        self._clock = clock
        self._platforms = platforms
        self._required: set[Digest] = set()
        self.selected = False  # whether there was an index to select platforms of
        self._imports: dict[str, RepositoryImport] = {}
        # Blobs that the archive does not contain, and their sizes, by store and namespace.
        self._missing: dict[tuple[int, str], dict[Digest, int]] = defaultdict(dict)
        self._stores: dict[int, Store] = {}

    def plan(self) -> Importer:
        """Blocks.  Raises ArchiveInvalid, and the errors of `bind` and of ImportTarget.allowed."""
        for root in self._layout.roots:
            if root.name is not None:
                self._add_root(root)
        self._add_unnamed([root for root in self._layout.roots if root.name is None])
        if not self._imports:
            raise ArchiveInvalid(f"{self._layout.what} contains no images")
        self._check_missing()
        for planned in self._imports.values():
            if planned.target.store.collected:
                planned.tags = _pushed(planned.tags, self._clock())
            for tag, (digest, _) in planned.tags.items():
                planned.target.allowed(planned.target.store.records, tag, digest)
        return Importer(self._layout, list(self._imports.values()))

    def _add_root(self, root: Root, several: bool = False) -> None:
        target, reference = self._bind(root, several)
        planned = self._imports.setdefault(target.repository, RepositoryImport(target))
        self._stores[id(target.store)] = target.store
        self._walk(planned, root)
        if isinstance(reference, Tag):
            now = self._clock()
            known = planned.tags.get(reference)
            if known is not None and known[0] != root.descriptor.digest:
                raise ArchiveInvalid(
                    f"{self._layout.what} has two images named {written(target.repository, reference)}"
                )
            planned.tags[reference] = root.descriptor.digest, min(now, root.validated or now)
        elif root.descriptor.digest not in planned.untagged:
            planned.untagged.append(root.descriptor.digest)

    def _walk(self, planned: RepositoryImport, root: Root) -> None:
        """Add everything that the root names."""
        steps, absent, excluded = Walk([root.descriptor]), list[Descriptor](), list[Descriptor]()
        for named in steps:
            if named.digest in planned.manifests:
                continue
            content = manifest_of(self._layout, planned.target, named)
            if content is None:
                if (
                    named is root.descriptor
                    or (root.left_out is not None and named.digest not in root.left_out)
                    or named.digest in self._required
                ):
                    raise ArchiveInvalid(
                        f"{self._layout.what} does not contain the manifest {named.digest} of {root.name}"
                    )
                self._check_sparse(planned.target, named.digest)
                absent.append(named)
                continue
            planned.manifests[named.digest] = named
            found = self._parsed(named, content)
            for blob in found.blobs:
                self._add_blob(planned, blob, needed=blob.distributable)
            unwanted = self._unwanted(planned.target, named, found)
            incomplete = self._incomplete_attestations(planned.target, found)
            excluded += unwanted
            absent += incomplete
            steps.add(each for each in found.children if each not in (*unwanted, *incomplete))
            if found.children and all(
                manifest_of(self._layout, planned.target, child) is None for child in found.children
            ):
                raise ArchiveInvalid(f"{self._layout.what} contains no child of the index {named.digest}")
        self._note(root, "since the archive does not contain it", absent)
        self._note(root, "which is for other platforms", excluded)

    def _note(self, root: Root, why: str, left_out: list[Descriptor]) -> None:
        if left_out:
            parts = ", ".join(f"{each.platform or each.media_type} ({each.digest})" for each in left_out)
            self._layout.notes.append(f"left out of {root.name or root.descriptor.digest}, {why}: {parts}")

    def _unwanted(self, target: ImportTarget, named: Descriptor, index: ManifestContent) -> list[Descriptor]:
        """The children of an index that are for none of the platforms.

        Raises ArchiveInvalid if it has no child for any of them.
        """
        if not self._platforms or not index.children:
            return []
        if missing := missing_platforms(index, self._platforms):
            cause = f"{named.digest} has no image for {', '.join(missing)}"
            if len(missing) == len(self._platforms):
                raise ArchiveInvalid(f"{self._layout.what}: {cause}")
            self._layout.notes.append(cause)
        self.selected = True
        wanted = {each.digest for each in selected(index, self._platforms)}
        self._required |= wanted
        unwanted = [each for each in index.children if each.digest not in wanted | attestations(index)]
        for each in unwanted:
            self._check_sparse(target, each.digest)
        return unwanted

    def _incomplete_attestations(self, target: ImportTarget, index: ManifestContent) -> list[Descriptor]:
        """The children of an index that are attestations whose blobs are missing.

        No client needs attestations to run an image, and docker save omits their blobs.
        """
        incomplete = []
        optional = attestations(index)
        for child in index.children:
            content = manifest_of(self._layout, target, child) if child.digest in optional else None
            found = None if content is None else contents(content)
            if found and not all(self._obtainable(target, each) for each in found.distributable):
                self._check_sparse(target, child.digest)
                incomplete.append(child)
        return incomplete

    def _obtainable(self, target: ImportTarget, blob: Descriptor) -> bool:
        """Whether the archive contains a blob, or the namespace has a link to it."""
        if self._layout.size(blob.digest) is not None:
            return True
        return renew_if_stored(target.store, blob.digest, blob.size) and any(
            each == blob.digest for each in _linked(target.store, target.namespace)
        )

    def _parsed(self, named: Descriptor, content: bytes) -> ManifestContent:
        """A manifest; what a bundle has is not judged, since that is what an upstream has.

        Raises ArchiveInvalid.
        """
        what = f"{self._layout.what}: {named.digest}"
        if named.media_type == DOCKER_SCHEMA1:
            raise ArchiveInvalid(f"{what} has Docker's schema 1, which is not supported")
        try:
            found = parse_manifest(content)
            if self._layout.contents is None and named.media_type in MANIFESTS:
                validate(named.media_type, content)
        except ManifestInvalid as error:
            raise ArchiveInvalid(f"{what} is not a valid {named.media_type}: {error}") from None
        if found.unread:
            raise ArchiveInvalid(f"{what} is a {named.media_type}: what it names cannot be read")
        if self._layout.contents is None:
            check_layers(self._layout, named.digest, found)
        if found.declared not in (None, named.media_type):
            raise ArchiveInvalid(f"{what} has the type {found.declared}, but is listed as {named.media_type}")
        return found

    def _add_blob(self, planned: RepositoryImport, blob: Descriptor, needed: bool) -> None:
        size = self._layout.size(blob.digest)
        if size is None:
            if needed:
                self._missing[id(planned.target.store), planned.target.namespace][blob.digest] = blob.size
                planned.blobs[blob.digest] = blob.size
            return
        if size != blob.size:
            raise ArchiveInvalid(
                f"{self._layout.what}: {blob.digest} has {size} bytes, but is listed with {blob.size}"
            )
        planned.blobs[blob.digest] = size

    def _check_sparse(self, target: ImportTarget, digest: Digest) -> None:
        if not target.sparse:
            raise ArchiveInvalid(
                f"{self._layout.what} does not contain {digest}, but {target.repository} requires complete"
                f" indexes: set namespaces.{target.namespace}.store.sparse to allow it"
            )

    def _add_unnamed(self, roots: list[Root]) -> None:
        """Add roots without a name to the repositories that have them as a child or as a subject."""
        while roots:
            left = [root for root in roots if not self._belongs(root)]
            if len(left) == len(roots):
                # `bind` decides, first for those without a subject.
                tops = [root for root in left if self._subject(root) is None] or left
                several = len({root.descriptor.digest for root in tops}) > 1
                for root in tops:
                    self._add_root(root, several)
                left = [root for root in left if root not in tops]
            roots = left

    def _belongs(self, root: Root) -> bool:
        subject, digest = self._subject(root), root.descriptor.digest
        found = [each for each in self._imports.values() if digest in each.manifests]
        for planned in self._imports.values():
            if subject in planned.manifests and planned not in found:
                self._walk(planned, root)
                found.append(planned)
        return bool(found)

    def _subject(self, root: Root) -> Digest | None:
        if self._layout.size(root.descriptor.digest) is None:
            return None
        found = contents(self._layout.manifest(root.descriptor.digest))
        return found.subject.digest if found is not None and found.subject is not None else None

    def _check_missing(self) -> None:
        """What is not in the archive must be linked in the namespace."""
        for (store, namespace), blobs in self._missing.items():
            stored = {
                each for each, size in blobs.items() if renew_if_stored(self._stores[store], each, size)
            }
            linked = {each for each in _linked(self._stores[store], namespace) if each in stored}
            if missing := sorted(blobs.keys() - linked):
                raise ArchiveInvalid(
                    f"{self._layout.what} does not contain {len(missing)} of the blobs that it names, such as"
                    f" {missing[0]}{self._base()}"
                )

    def _base(self) -> str:
        found = self._layout.contents
        if found is None or not found.base:
            return ""
        made = time.strftime("%Y-%m-%d %H:%M", time.gmtime(found.base[-1].created))
        return f": it is based on the bundle of {made} UTC, import that one first"


def _pushed(tags: Mapping[Tag, tuple[Digest, float]], now: float) -> dict[Tag, tuple[Digest, float]]:
    """The tags as if they were pushed just now, one after the other in the order of their times.

    In a private store the time of a tag is that of its push, by which rules remove it.
    """
    newest_first = sorted(tags, key=lambda tag: tags[tag][1], reverse=True)
    times = {tag: now - number * STEP for number, tag in enumerate(newest_first)}
    return {tag: (digest, times[tag]) for tag, (digest, _) in tags.items()}


def _linked(store: Store, namespace: str) -> Iterator[Digest]:
    for key, _ in store.records.scan(LINK.within(namespace)):
        yield Digest(LINK.parse(key)[1])
