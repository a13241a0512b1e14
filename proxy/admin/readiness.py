"""Whether images can be pulled while no upstream answers: what of each is stored, and what is missing.

The check asks no upstream, and is no use of an image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import msgspec

from proxy.admin.reports import MissingRow, ReadyRow
from proxy.namespaces.references import ImageReference
from storage.errors import ManifestInvalid, ManifestUnknown
from storage.graph import Walk, contents, missing_platforms, referring, selected, unread
from storage.oci import Descriptor, Digest, Manifest, ManifestContent, Reference, Tag
from storage.store import Store

MOST = 50  # platforms that a report names, of those to which the same is missing


@dataclass(frozen=True, slots=True)
class _ManifestCheck:
    """What one manifest names, and which blobs of it are not stored."""

    children: Sequence[Descriptor]
    missing: Sequence[Descriptor]
    unread: bool


@dataclass(slots=True)
class _ImageCheck:
    """The findings about one image."""

    store: Store
    repository: str
    missing: dict[Digest, MissingRow] = field(default_factory=dict)
    manifests: set[Digest] = field(default_factory=set)
    checked: dict[Digest, _ManifestCheck | None] = field(default_factory=dict)  # None: it is not stored
    times: Counter[Digest] = field(default_factory=Counter)

    def walk(
        self, digest: Digest, platform: str | None, kind: str | None = None, size: int = -1
    ) -> set[Digest]:
        """Check a manifest, of `size` bytes, and everything that it names; returns the stored manifests.

        Missing content is reported with `kind`, by default as manifest or blob, and a manifest of an unknown
        form as unreadable; and not for more platforms than MOST.
        """
        found, steps = set(), Walk([digest])
        for each in steps:
            check = self._check(each)
            if check is None:
                self.report(each, kind or "manifest", size if each == digest else -1, platform)
                continue
            found.add(each)
            steps.add(child.digest for child in check.children)
            self.times[each] += 1
            if self.times[each] > MOST:
                continue
            if check.unread:
                self.report(each, kind or "unreadable", -1, platform)
            for blob in check.missing:
                self.report(blob.digest, kind or "blob", blob.size, platform)
        self.manifests |= found
        return found

    def _check(self, digest: Digest) -> _ManifestCheck | None:
        """What is found of one manifest, which many others may name."""
        if digest not in self.checked:
            manifest = _manifest(self.store, self.repository, digest)
            self.checked[digest] = None if manifest is None else self.look(contents(manifest.content))
        return self.checked[digest]

    def look(self, content: ManifestContent | None) -> _ManifestCheck:
        if content is None:
            return _ManifestCheck((), (), True)
        blobs = {each.digest: each for each in content.blobs if each.distributable}
        missing = [each for each in blobs.values() if not self._holds(each.digest)]
        return _ManifestCheck(content.children, missing, unread(content))

    def _holds(self, digest: Digest) -> bool:
        return self.store.linked(self.repository, digest) is not None

    def report(self, digest: Digest, kind: str, size: int, platform: str | None) -> None:
        known = self.missing.get(digest)
        if known is None:
            known = MissingRow(digest=str(digest), kind=kind, size=size, platforms=[])
            self.missing[digest] = known
        if platform is not None and len(known.platforms) < MOST and platform not in known.platforms:
            known.platforms.append(platform)

    def check_referrers(self) -> tuple[int, int]:
        """Check what refers to the manifests, and to its referrers: how many are stored, and how many are
        known.
        """
        known: set[Digest] = set()
        subjects = Walk(self.manifests)
        for digest in subjects:
            found = {each for each, _ in referring(self.store, self.repository, digest)}
            for each in (found | self._listed(digest)) - known - self.manifests:
                known.add(each)
                subjects.add(self.walk(each, None, "referrer"))
        return sum(each in self.manifests for each in known), len(known)

    def _listed(self, digest: Digest) -> set[Digest]:
        """The referrers that upstream listed last."""
        listing = self.store.listings.get(self.repository, f"referrers {digest}")
        if listing is None or not isinstance(listing.value, list):
            return set()
        try:
            return {Descriptor.from_json(each).digest for each in listing.value}
        except ManifestInvalid:  # a damaged record counts as none
            return set()


class Readiness:
    """Checks whether images are complete.  `private` is the store of the `hosted` namespaces."""

    def __init__(self, store: Store, private: Store | None, hosted: Collection[str]) -> None:
        self._store = store
        self._private = private
        self._hosted = hosted

    def judge(self, image: ImageReference, platforms: Sequence[str] = (), referrers: bool = True) -> ReadyRow:
        """Check an image for `platforms`, by default for all.  Blocks, and may raise StorageFailed."""
        store = self._private if image.namespace in self._hosted and self._private else self._store
        digest = _digest(store, image.repository, image.reference)
        row = ReadyRow(
            asked=image.text,
            repository=image.repository,
            reference=str(image.reference),
            digest=None if digest is None else str(digest),
            state="absent",
        )
        manifest = None if digest is None else _manifest(store, image.repository, digest)
        if manifest is None:
            return row
        check = _ImageCheck(store, image.repository, manifests={manifest.digest})
        without_image: list[str] = []
        content = contents(manifest.content)
        own = check.look(content)
        if own.unread:
            check.report(manifest.digest, "unreadable", len(manifest.content), None)
        for blob in own.missing:
            check.report(blob.digest, "blob", blob.size, None)
        if content is not None:
            without_image = missing_platforms(content, platforms)
            for child in selected(content, platforms):
                check.walk(child.digest, child.platform, size=child.size)
        stored, known = check.check_referrers() if referrers else (0, 0)
        missing = list(check.missing.values())
        return msgspec.structs.replace(
            row,
            state="partial" if missing or without_image else "complete",
            missing=missing,
            lacking=without_image,
            referrers=stored,
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
