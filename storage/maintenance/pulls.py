"""Records when the tags of a private store were pulled last, for the retention rules.

    pulled <repository> <tag>                 when the tag was last requested

As a lease, it is recorded before the client is answered, in a transaction that the removal of the tag either
precedes or sees.  It is renewed every few hours, so that most pulls write nothing and read no record.  A pull
by digest is a lease: see leases.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress

from storage.errors import ManifestUnknown, StorageFailed
from storage.keys import PULLED, TAG
from storage.records import Batch, Records
from storage.store import Store

RENEWED = 4 * 3600.0  # seconds after which the time of a pull is recorded again
REMEMBERED = 20_000  # tags of which a process remembers when it recorded them


class Pulls:
    """Records the pulls of tags by one process."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock
        self._recorded: dict[tuple[str, str], float] = {}

    async def pulled(self, repository: str, tag: str) -> None:
        """Record a pull.  Raises ManifestUnknown if the tag was removed meanwhile."""
        key = repository, tag
        if self.due(repository, tag) and not self._store.cut_off:
            with suppress(StorageFailed):  # a disk that fails to write can still serve, and removes nothing
                at = await self._store.run(self._record, repository, tag)
                if len(self._recorded) >= REMEMBERED:
                    self._recorded.clear()
                self._recorded[key] = at

    def due(self, repository: str, tag: str) -> bool:
        """Whether pulled() has to record the pull."""
        return self._due(self._recorded.get((repository, tag), -math.inf))

    def _record(self, repository: str, tag: str) -> float:
        """Record it, unless another process has just done so; the recorded time."""
        at = last_pull(self._store.records, repository, tag)
        if not self._due(at):
            return at
        now = self._clock()

        def work(batch: Batch) -> None:
            if batch.get(TAG.key(repository, tag)) is None:
                raise ManifestUnknown(f"{repository} has no tag {tag}")
            batch.put(PULLED.key(repository, tag), str(now).encode())

        self._store.records.transaction(work, shared=True)
        return now

    def _due(self, at: float) -> bool:
        return not 0 <= self._clock() - at <= RENEWED


def last_pull(records: Records, repository: str, tag: str) -> float:
    """When the tag was last pulled, as far as is recorded; 0 for never."""
    with suppress(ValueError):
        at = float(records.get(PULLED.key(repository, tag)) or 0)
        return at if math.isfinite(at) else 0.0
    return 0.0
