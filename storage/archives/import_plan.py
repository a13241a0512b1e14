"""What an archive would bring, looked at before anything is done.

Each manifest is compared with its digest, each size with what names it, and all must be there that is needed.
Of an index children may lack, if that is so on purpose, or if nobody says that it is not.

To know a digest is no permission: what an archive names and does not hold must be shown already by a
repository of the same namespace.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

from storage.archives.importer import Importer, ImportTarget, RepositoryImport, held, manifest_of
from storage.archives.layout import Layout, Root
from storage.errors import ArchiveInvalid
from storage.graph import Walk, contents
from storage.keys import LINK
from storage.oci import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    DOCKER_SCHEMA1,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    Digest,
    ManifestContent,
    Reference,
    Tag,
)
from storage.store import Store


class Bound(NamedTuple):
    """What a root's name means here."""

    place: ImportTarget
    reference: Reference


class ImportPlanner:
    """`bind` tells what a root's name means here; one that has none and belongs to none that has, too.

    It raises RegistryError where it can mean nothing.  `clock` tells seconds since the epoch.
    """

    def __init__(
        self,
        layout: Layout,
        bind: Callable[[Root], Bound],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._layout = layout
        self._bind = bind
        self._clock = clock
        self._shares: dict[str, RepositoryImport] = {}
        self._lacking: dict[tuple[int, str], dict[Digest, int]] = defaultdict(dict)  # by store and namespace
        self._stores: dict[int, Store] = {}

    def plan(self) -> Importer:
        """Blocks.  Raises ArchiveInvalid, and what `bind` and what speaks against a tag raise."""
        for root in self._layout.roots:
            if root.name is not None:
                self._take_root(root)
        self._take_unnamed([root for root in self._layout.roots if root.name is None])
        if not self._shares:
            raise ArchiveInvalid(f"{self._layout.what} holds no images")
        self._check_lacking()
        for share in self._shares.values():
            for tag, (digest, _) in share.tags.items():
                share.place.allowed(share.place.store.records, tag, digest)
        return Importer(self._layout, list(self._shares.values()))

    def _take_root(self, root: Root) -> None:
        place, reference = self._bind(root)
        share = self._shares.setdefault(place.repository, RepositoryImport(place))
        self._stores[id(place.store)] = place.store
        self._walk(share, root)
        if isinstance(reference, Tag):
            now = self._clock()
            known = share.tags.get(reference)
            if known is not None and known[0] != root.descriptor.digest:
                raise ArchiveInvalid(f"{self._layout.what} says {place.repository}:{reference} is two things")
            share.tags[reference] = root.descriptor.digest, min(now, root.validated or now)
        elif root.descriptor.digest not in share.untagged:
            share.untagged.append(root.descriptor.digest)

    def _walk(self, share: RepositoryImport, root: Root) -> None:
        """Take all that the root names."""
        steps = Walk([root.descriptor])
        for named in steps:
            if named.digest in share.manifests:
                continue
            content = manifest_of(self._layout, share.place, named)
            if content is None:
                if named is root.descriptor or (
                    root.left_out is not None and named.digest not in root.left_out
                ):
                    raise ArchiveInvalid(
                        f"{self._layout.what} lacks the manifest {named.digest}, of {root.name}"
                    )
                self._check_sparse(share.place, named.digest)
                continue
            share.manifests[named.digest] = named
            found = self._parsed(named, content)
            if found is None:
                continue
            for blob in found.blobs:
                self._take_blob(share, blob, needed=blob.distributable)
            steps.add(found.children)
            if found.children and all(
                manifest_of(self._layout, share.place, child) is None for child in found.children
            ):
                raise ArchiveInvalid(
                    f"{self._layout.what} holds nothing of what {named.digest} is an index of"
                )

    def _parsed(self, named: Descriptor, content: bytes) -> ManifestContent | None:
        what = f"{self._layout.what}: {named.digest}"
        found = contents(content)
        if found is None and named.media_type in (OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST):
            raise ArchiveInvalid(f"{what} cannot be read as what it is said to be, {named.media_type}")
        if named.media_type == DOCKER_SCHEMA1:
            raise ArchiveInvalid(f"{what} is of Docker's schema 1, which nobody pulls any more")
        if found is not None and found.declared not in (None, named.media_type):
            raise ArchiveInvalid(f"{what} says it is {found.declared}; what names it says {named.media_type}")
        return found

    def _take_blob(self, share: RepositoryImport, blob: Descriptor, needed: bool) -> None:
        size = self._layout.size(blob.digest)
        if size is None:
            if needed:
                self._lacking[id(share.place.store), share.place.namespace][blob.digest] = blob.size
                share.blobs[blob.digest] = blob.size
            return
        if size != blob.size:
            raise ArchiveInvalid(
                f"{self._layout.what}: {blob.digest} has {size} bytes; what names it says {blob.size}"
            )
        share.blobs[blob.digest] = size

    def _check_sparse(self, place: ImportTarget, digest: Digest) -> None:
        if not place.sparse:
            raise ArchiveInvalid(
                f"{self._layout.what} lacks {digest}, of an index that {place.repository} is to have whole:"
                f" allow it by namespaces.{place.namespace}.store.sparse"
            )

    def _take_unnamed(self, roots: list[Root]) -> None:
        """What is part of what is here already, or refers to it, goes with that."""
        while roots:
            left = [root for root in roots if not self._belongs(root)]
            if len(left) == len(roots):
                # It is for `bind` to say what they are: first of those that refer to nothing.
                tops = [root for root in left if self._subject(root) is None] or left
                for root in tops:
                    self._take_root(root)
                left = [root for root in left if root not in tops]
            roots = left

    def _belongs(self, root: Root) -> bool:
        subject, digest = self._subject(root), root.descriptor.digest
        found = [each for each in self._shares.values() if digest in each.manifests]
        for share in self._shares.values():
            if subject in share.manifests and share not in found:
                self._walk(share, root)
                found.append(share)
        return bool(found)

    def _subject(self, root: Root) -> Digest | None:
        if self._layout.size(root.descriptor.digest) is None:
            return None
        found = contents(self._layout.manifest(root.descriptor.digest))
        return found.subject.digest if found is not None and found.subject is not None else None

    def _check_lacking(self) -> None:
        """What is not in the archive must be shown here, within the namespace."""
        for (store, namespace), lacking in self._lacking.items():
            here = {each for each, size in lacking.items() if held(self._stores[store], each, size)}
            shown = {each for each in _linked(self._stores[store], namespace) if each in here}
            if missing := sorted(lacking.keys() - shown):
                raise ArchiveInvalid(
                    f"{self._layout.what} lacks {len(missing)} blobs that it names, {missing[0]} for one"
                    f"{self._base()}"
                )

    def _base(self) -> str:
        found = self._layout.contents
        if found is None or not found.base:
            return ""
        made = time.strftime("%Y-%m-%d %H:%M", time.gmtime(found.base[-1].created))
        return f": it is a delta of the bundle of {made} UTC, import that first"


def _linked(store: Store, namespace: str) -> Iterator[Digest]:
    for key, _ in store.records.scan(LINK.within(namespace)):
        yield Digest(LINK.parse(key)[1])
