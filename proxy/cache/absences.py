"""What an origin does not have of the referrers of stored images, kept on disk."""

from __future__ import annotations

import re
from itertools import islice

from storage.errors import DigestInvalid, ManifestUnknown, StorageFailed
from storage.graph import fallback_tag, signature_tags
from storage.keys import LISTING, MANIFEST
from storage.oci import ALGORITHMS, Digest, Reference, Tag
from storage.store import Store

MOST = 1000  # absences in a repository, beyond those of stored images
REFERRERS_API = "referrers"
_COMPANION = re.compile(rf"({'|'.join(ALGORITHMS)})-([0-9a-f]+)(?:\.[a-z]+)?")


class Absences:
    """What an origin last said it does not have: a referrers API, or a tag of the referrers of an image.

    Clients look for signatures in several places, and continue with the next only after a 404.  So that they
    find what is stored while the origin cannot be asked, the last 404 is kept.  All absences that concern a
    stored image are kept.  Clients also look for referrers of referrers, which are listed and not stored;
    of those `MOST` are kept for each repository with a stored image.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    async def contains(self, repository: str, what: str) -> bool:
        """Whether the origin said so when it was last asked; False if that cannot be read."""
        try:
            found = await self._store.read(self._store.listings.get, repository, _key(what))
            return found is not None
        except StorageFailed:
            return False

    async def add(self, repository: str, what: str, subject: Digest | None) -> None:
        """Keep that there is no `what` for `subject`.  Raises StorageFailed."""
        if subject is not None and await self._store.read(self._keeps, repository, subject):
            await self._store.listings.put(repository, _key(what), None)

    async def discard(self, repository: str, what: str) -> None:
        """Raises StorageFailed."""
        if await self.contains(repository, what):
            await self._store.listings.delete(repository, _key(what))

    def _keeps(self, repository: str, subject: Digest) -> bool:
        return self._stored(repository, subject) or self._room(repository)

    def _stored(self, repository: str, digest: Digest) -> bool:
        try:
            self._store.manifest(repository, digest)
        except ManifestUnknown:
            return False
        return True

    def _room(self, repository: str) -> bool:
        records = self._store.records
        held = records.first(MANIFEST.prefix(repository)) is not None
        kept = islice(records.keys(LISTING.prefix(repository) + _key("")), MOST)
        return held and sum(1 for _ in kept) < MOST


def subject_of(reference: Reference) -> Digest | None:
    """The image whose referrers clients find by this tag; None if it is not such a tag.

    Tags of sha512 digests are truncated, and do not contain the whole digest.
    """
    found = _COMPANION.fullmatch(reference) if isinstance(reference, Tag) else None
    try:
        digest = Digest.parse(f"{found[1]}:{found[2]}") if found else None
    except DigestInvalid:
        return None
    return digest if digest and reference in (fallback_tag(digest), *signature_tags(digest)) else None


def _key(what: str) -> str:
    return f"no {what}"
