"""What an origin does not have, as it said when it was last asked, kept on disk."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from typing import NamedTuple

from storage.errors import (
    DigestInvalid,
    ManifestUnknown,
    NameUnknown,
    OriginDenied,
    RegistryError,
    StorageFailed,
)
from storage.graph import fallback_tag, signature_tags
from storage.keys import ABSENT, LISTING, MANIFEST
from storage.oci import ALGORITHMS, Digest, Reference, Tag
from storage.store import Store
from storage.values import Absence

MOST = 1000  # absences of referrers in a repository, beyond those of stored images
SLOTS = 8192  # of all other absences: each has one by its hash, and takes it from the one before
REFERRERS_API, TAGS = "referrers API", "list of tags"  # no tag has a space
ABSENCES = (ManifestUnknown, NameUnknown, OriginDenied)  # large registries refuse what they do not have
_CODES = {each.code: each for each in ABSENCES}
_COMPANION = re.compile(rf"({'|'.join(ALGORITHMS)})-([0-9a-f]+)(?:\.[a-z]+)?")


class KnownAbsence(NamedTuple):
    """The error with which an origin said that it does not have something, and when.

    While the origin cannot be asked, that is answered until `until`; None: for as long as it is kept.  Times
    are in seconds since the epoch.
    """

    error: type[RegistryError]
    since: float
    until: float | None


class Absences:
    """What an origin last said it does not have: a manifest, a tag, a list of tags, a referrers API.

    Clients look for some things in several places, and continue with the next only after a 404.  So that they
    find what is stored while the origin cannot be asked, the last 404 is kept.

    All absences of the referrers of a stored image are kept.  Clients also look for referrers of referrers,
    which are listed and not stored; of those `MOST` are kept for each repository with a stored image.  Other
    absences are kept for `keep_for` seconds, in a fixed number of records.
    """

    def __init__(self, store: Store, keep_for: float, clock: Callable[[], float]) -> None:
        self._store = store
        self._keep_for = keep_for
        self._clock = clock

    async def get(self, repository: str, what: str) -> KnownAbsence | None:
        """What the origin said when it was last asked; None if that is not known."""
        try:
            kept = await self._store.read(self._store.listings.get, repository, _key(what))
            if kept is not None:
                return KnownAbsence(ManifestUnknown, kept.validated_at, None)
            found = await self._store.read(self._slot, repository, what)
        except StorageFailed:
            return None
        if found is None or not 0 <= self._clock() - found.at < self._keep_for:
            return None
        error = _CODES.get(found.code)
        return KnownAbsence(error, found.at, found.at + self._keep_for) if error is not None else None

    async def add(self, repository: str, what: str, subject: Digest | None, error: RegistryError) -> None:
        """Keep that there is no `what`, which would refer to `subject`.  Raises StorageFailed."""
        if subject is not None and await self._store.read(self._keeps, repository, subject):
            await self._store.listings.put(repository, _key(what), None)
        elif self._keep_for:
            value = Absence(self._clock(), error.code, repository, what).encode()
            await self._store.run(self._store.records.put, _slot_key(repository, what), value)

    async def discard(self, repository: str, what: str, subject: Digest | None) -> None:
        """The origin has it.  A record that cannot be removed stays until its time is over."""
        with suppress(StorageFailed):
            listings, key = self._store.listings, _key(what)
            if subject is not None and await self._store.read(listings.get, repository, key) is not None:
                await listings.delete(repository, key)
            if await self._store.read(self._slot, repository, what) is not None:
                await self._store.run(self._store.records.delete, _slot_key(repository, what))

    def _slot(self, repository: str, what: str) -> Absence | None:
        found = Absence.parse(self._store.records.get(_slot_key(repository, what)))
        return found if found is not None and (found.repository, found.what) == (repository, what) else None

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


def _slot_key(repository: str, what: str) -> str:
    found = hashlib.blake2b(f"{repository} {what}".encode(), digest_size=8).digest()
    return ABSENT.key(str(int.from_bytes(found) % SLOTS))
