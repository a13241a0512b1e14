"""The journal of who pulled what, of bounded size: what a policy would have refused is judged by it.

    asked <YYYYMMDD> <repository> <reference>       JSON {who: [count, last, digest]}

Repositories are full names, references tags or digests; who is a user, or the address of a client without
one.  The day is in UTC, times are seconds since the epoch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeAlias

import msgspec

from storage.keys import ASKED
from storage.records import BATCH, Batch, Records, batches

CALLERS = 50  # of a reference and a day; more are not recorded
REFERENCES = 50_000  # of a day; more are not recorded
_DAY = "%Y%m%d"

# The numbers of pulls and the times of the last, by repository, reference, digest, and who.
Pulled: TypeAlias = Mapping[tuple[str, str, str, str], tuple[int, float]]


@dataclass(frozen=True, slots=True)
class PulledReference:
    """Pulls of a reference by one caller, who was given `digest` at `last`."""

    repository: str
    reference: str
    digest: str
    who: str
    count: int
    last: float


class PullJournal:
    """Records pulls, and keeps them for `keep` seconds.  Every method blocks, and raises StorageFailed."""

    def __init__(self, records: Records, keep: float, clock: Callable[[], float] = time.time) -> None:
        self._records = records
        self._keep = keep
        self._clock = clock
        self._cleaned = ""  # the day on which older ones were last removed

    def record(self, pulled: Pulled) -> None:
        """Add to what is recorded."""
        today = self._day(0.0)
        if today != self._cleaned:
            self._remove(self._day(self._keep))
            self._cleaned = today
        for some in batches(pulled.items(), BATCH):
            self._records.transaction(lambda batch, some=some: _add(batch, some))  # type: ignore[misc]

    def _remove(self, oldest: str) -> None:
        for key in list(self._records.keys(ASKED.prefix())):
            if ASKED.parse(key)[0] >= oldest:
                break
            self._records.delete(key)

    def since(self, seconds: float) -> Iterator[PulledReference]:
        """The pulls of the last `seconds`, by day, repository and reference."""
        begun = self._clock() - seconds
        for key, value in self._records.scan(ASKED.prefix(), self._day(seconds)):
            _, repository, reference = ASKED.parse(key)
            for who, (count, last, digest) in _parse(value).items():
                if last >= begun:
                    yield PulledReference(repository, reference, digest, who, count, last)

    def _day(self, ago: float) -> str:
        return _day_of(self._clock() - ago)


def _add(batch: Batch, pulled: list[tuple[tuple[str, str, str, str], tuple[int, float]]]) -> None:
    counted: dict[str, int] = {}
    for (repository, reference, digest, who), (count, last) in pulled:
        day = _day_of(last)
        key = ASKED.key(day, repository, reference)
        record = batch.get(key)
        if record is None:
            counted.setdefault(day, batch.count(ASKED.prefix(day)))
            if counted[day] >= REFERENCES:
                continue
            counted[day] += 1
        known = _parse(record)
        if who not in known and len(known) >= CALLERS:
            continue
        before, latest, former = known.get(who, (0, 0.0, ""))
        known[who] = before + count, max(last, latest), str(digest) if last >= latest else former
        batch.put(key, msgspec.json.encode(known))


def _parse(record: bytes | None) -> dict[str, tuple[int, float, str]]:
    with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return msgspec.json.decode(record or b"", type=dict[str, tuple[int, float, str]])
    return {}  # a damaged record counts as none


def _day_of(at: float) -> str:
    return time.strftime(_DAY, time.gmtime(at))
