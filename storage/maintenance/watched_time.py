"""The time in which a private store was watched.  Retention by age counts no other time.

    watched                                   JSON: since, last, gaps

While no server runs, nobody can pull; and a clock that jumps ahead makes everything look old.  Both are gaps
between two observations, and a gap makes nothing older.  `since` is when pulls began to be recorded.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from storage.keys import WATCHED
from storage.store import Store

GAP = 86400.0  # seconds between two observations above which the time between them does not count
GAPS = 100  # that are kept; more are joined


class _WatchRecord(msgspec.Struct):
    since: float
    last: float
    gaps: list[tuple[float, float]] = []


@dataclass(frozen=True, slots=True)
class WatchedTime:
    """What is known of the time until `now`; all in seconds since the epoch."""

    now: float
    since: float = 0.0
    gaps: tuple[tuple[float, float], ...] = ()

    def age(self, at: float) -> float:
        """The seconds since `at` in which the store was watched; less than 0 for the future."""
        gaps = sum(max(0.0, min(end, self.now) - max(begin, at)) for begin, end in self.gaps)
        return self.now - at - gaps


class Watch:
    """Observes the time of a private store.  Methods block, and may raise StorageFailed."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock

    def look(self) -> WatchedTime:
        """The time as it would be after observe()."""
        found = self._next(self._store.records.get(WATCHED.key()))
        return WatchedTime(found.last, found.since, tuple(found.gaps))

    def observe(self) -> WatchedTime:
        """Record that the store is watched now.

        Of several processes that do so at the same time, it does not matter which is the last.
        """
        found = self._next(self._store.records.get(WATCHED.key()))
        self._store.records.put(WATCHED.key(), msgspec.json.encode(found))
        return WatchedTime(found.last, found.since, tuple(found.gaps))

    def _next(self, stored: bytes | None) -> _WatchRecord:
        now = self._clock()
        known = _WatchRecord(now, now)
        with suppress(msgspec.DecodeError, UnicodeDecodeError):  # absent or damaged: it begins again
            known = msgspec.json.decode(stored or b"", type=_WatchRecord)
        if any(self._store.files.root.glob("records.damaged-*")):
            known.since = now  # pulls were lost with other records
        gaps = [(begin, end) for begin, end in known.gaps if end <= now + GAP]  # others: the clock was wrong
        if now - known.last > GAP:
            gaps.append((known.last, now))
        if len(gaps) > GAPS:
            gaps[:2] = [(gaps[0][0], gaps[1][1])]
        return _WatchRecord(min(known.since, now), now, gaps)
