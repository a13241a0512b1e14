"""The journal of what tags stood for when clients asked, of bounded size.

    resolved <repository> <tag>       JSON [[time, digest], …], oldest first, each other than the one before

Repositories are full names, times seconds since the epoch.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from itertools import groupby
from operator import itemgetter
from typing import TypeAlias

import msgspec

from storage.errors import ManifestUnknown
from storage.keys import RESOLVED
from storage.oci import Digest, Tag
from storage.records import Batch
from storage.store import Store

KEPT = 200  # of a tag, the last ones

Resolution: TypeAlias = tuple[float, Digest]  # when, and what it stood for


class ResolutionJournal:
    """What is recorded in a store.  Every method may raise StorageFailed."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def of(self, repository: str, tag: str) -> list[Resolution]:
        """What a tag stood for, oldest first.  Blocks."""
        return _parse(self._store.records.get(RESOLVED.key(repository, tag)))

    async def at(self, repository: str, tag: Tag, when: float) -> Digest:
        """What a tag stood for at a time.  Raises ManifestUnknown if no client had asked for it yet."""
        found = await self._store.read(self.of, repository, tag)
        before = [digest for since, digest in found if since <= when]
        if not before:
            asked = datetime.fromtimestamp(when, UTC).isoformat(timespec="seconds")
            raise ManifestUnknown(f"no client had asked for {repository}:{tag} by {asked}")
        return before[-1]


def record_resolutions(batch: Batch, repository: str, tag: str, found: Iterable[Resolution]) -> None:
    """Add to what is recorded, as part of a transaction.

    Several processes record, each after some delay: so not always in chronological order.  A change that
    comes late is put where it belongs; what it stood for again after that is known by the next request.
    """
    key = RESOLVED.key(repository, tag)
    known = _parse(batch.get(key))
    ordered = sorted([*known, *found], key=itemgetter(0))
    changes = [next(same) for _, same in groupby(ordered, itemgetter(1))][-KEPT:]
    if changes != known:
        batch.put(key, msgspec.json.encode([(when, str(digest)) for when, digest in changes]))


def _parse(record: bytes | None) -> list[Resolution]:
    with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        found = msgspec.json.decode(record or b"", type=list[tuple[float, str]])
        return [(when, Digest(digest)) for when, digest in found]
    return []  # a damaged record counts as none
