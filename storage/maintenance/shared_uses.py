"""What a server has used of its own copy of content, for the store that it shares with others.

A hit changes nothing but the server's own directory.  So each server says now and then what it used since it
last did: until then, the others may take that for unused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress

from storage.keys import REPORTED, USE
from storage.maintenance.usage import Usage, Use
from storage.records import batches
from storage.store import Store


class SharedUses:
    """Reports the uses of content of `store` to `shared`."""

    def __init__(self, store: Store, shared: Store, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._shared = shared
        self._usage = Usage(store.records, clock)
        self._reported = Usage(shared.records, clock)
        self._clock = clock

    def report(self) -> None:
        """Report what was used since the last report.  Blocks, and may raise StorageFailed."""
        begun, since = self._clock(), 0.0
        with suppress(ValueError):
            since = float(self._store.records.get(REPORTED.key()) or 0)
        for portion in self._store.files.portions():
            for blob in portion:
                if blob.used_at >= since:
                    self._shared.files.touch(blob.digest, blob.used_at)
        for some in batches(self._uses(since)):
            self._reported.record(dict(some), [], {})
        self._store.records.put(REPORTED.key(), str(begun).encode())

    def _uses(self, since: float) -> Iterator[tuple[tuple[str, str], Use]]:
        for key in self._store.records.keys(USE.prefix()):
            repository, reference = USE.parse(key)
            use = self._usage.use(repository, reference)
            if use is not None and use.last >= since:
                yield (repository, reference), Use(0, use.last, use.first)
