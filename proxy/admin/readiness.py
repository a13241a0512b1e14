"""Whether images could be pulled if no upstream answered: what of each is here, and what is not.

Nobody is asked, and nothing counts as use.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from proxy.admin.reports import MissingRow, ReadyRow
from proxy.namespaces.references import ImageReference
from storage.errors import ManifestInvalid, ManifestUnknown
from storage.graph import Walk, contents, lacking, referring, selected, walk
from storage.oci import Descriptor, Digest, Manifest, Reference, Tag
from storage.store import Store


@dataclass(slots=True)
class _Judged:
    """What was found of one image so far."""

    store: Store
    repository: str
    missing: dict[Digest, MissingRow] = field(default_factory=dict)
    manifests: set[Digest] = field(default_factory=set)

    def walk(
        self, digest: Digest, platform: str | None, kind: str | None = None, size: int = -1
    ) -> set[Digest]:
        """Judge the manifest, of `size` bytes, and everything that it names; the manifests that are stored.

        What is missing is reported as of this `kind`, by default as what it is.
        """
        found = walk(self.store, self.repository, digest)
        self.manifests |= found.manifests
        for each in found.missing:
            self._miss(each, kind or "manifest", size if each == digest else -1, platform)
        self.blobs(found.blobs.values(), platform, kind)
        return found.manifests

    def blobs(self, blobs: Iterable[Descriptor], platform: str | None, kind: str | None = None) -> None:
        for each in blobs:
            if each.distributable and self.store.linked(self.repository, each.digest) is None:
                self._miss(each.digest, kind or "blob", each.size, platform)

    def _miss(self, digest: Digest, kind: str, size: int, platform: str | None) -> None:
        known = self.missing.get(digest)
        if known is None:
            known = MissingRow(digest=str(digest), kind=kind, size=size, platforms=[])
            self.missing[digest] = known
        if platform is not None and platform not in known.platforms:
            known.platforms.append(platform)

    def refer(self) -> tuple[int, int]:
        """What refers to the manifests, and to that: how many are here, of how many that are known."""
        known: set[Digest] = set()
        subjects = Walk(self.manifests)
        for digest in subjects:
            found = {each for each, _ in referring(self.store, self.repository, digest)}
            for each in (found | self._listed(digest)) - known - self.manifests:
                known.add(each)
                subjects.add(self.walk(each, None, "referrer"))
        return sum(each in self.manifests for each in known), len(known)

    def _listed(self, digest: Digest) -> set[Digest]:
        """What upstream said last that refers to it."""
        listing = self.store.listings.get(self.repository, f"referrers {digest}")
        if listing is None or not isinstance(listing.value, list):
            return set()
        try:
            return {Descriptor.from_json(each).digest for each in listing.value}
        except ManifestInvalid:  # damaged: as none
            return set()


class Readiness:
    """It blocks, and may raise StorageFailed.  `private` holds what the `hosted` namespaces show."""

    def __init__(self, store: Store, private: Store | None, hosted: Collection[str]) -> None:
        self._store = store
        self._private = private
        self._hosted = hosted

    def judge(self, asked: ImageReference, platforms: Sequence[str] = (), referrers: bool = True) -> ReadyRow:
        """For `platforms`, for all where none are given; with what is known to refer to it, or without."""
        store = self._private if asked.namespace in self._hosted and self._private else self._store
        digest = _digest(store, asked.repository, asked.reference)
        row = ReadyRow(
            asked=asked.text,
            repository=asked.repository,
            reference=str(asked.reference),
            digest=None if digest is None else str(digest),
            state="absent",
        )
        manifest = None if digest is None else _manifest(store, asked.repository, digest)
        if manifest is None:
            return row
        judged = _Judged(store, asked.repository, manifests={manifest.digest})
        lacks: list[str] = []
        if (content := contents(manifest.content)) is not None:
            judged.blobs(content.blobs, None)
            lacks = lacking(content, platforms)
            for child in selected(content, platforms):
                judged.walk(child.digest, child.platform, size=child.size)
        here, known = judged.refer() if referrers else (0, 0)
        missing = list(judged.missing.values())
        return msgspec.structs.replace(
            row,
            state="partial" if missing or lacks else "complete",
            missing=missing,
            lacking=lacks,
            referrers=here,
            referrers_known=known,
        )


def _digest(store: Store, repository: str, reference: Reference) -> Digest | None:
    if not isinstance(reference, Tag):
        return reference
    pointer = store.pointer(repository, reference)
    return None if pointer is None else pointer.digest


def _manifest(store: Store, repository: str, digest: Digest) -> Manifest | None:
    try:
        return store.manifest(repository, digest)[0]
    except ManifestUnknown:
        return None
