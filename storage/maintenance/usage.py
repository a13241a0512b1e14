"""The history, of bounded size: how often content was used, where tags pointed, and the traffic by hours.

    use <repository> <reference>              JSON [count, last, first]; of tags, and of manifests by digest
    moves <repository> <tag>                  JSON [[time, old digest, new digest], …], oldest first
    stats hour <YYYYMMDDHH> <namespace>       JSON object of counters; the hour is in UTC
    stats day <YYYYMMDD> <namespace>          the same by days

Repositories are full names, times seconds since the epoch.  A damaged record counts as absent: its history
begins again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import msgspec

from storage.keys import MOVES, STATISTICS, USE
from storage.maintenance.resolutions import Resolution, record_resolutions
from storage.oci import Digest, Tag
from storage.records import Batch, Records
from storage.totals import Totals

MOVES_KEPT = 50  # of a tag, the last ones
HOUR, DAY = 3600, 86400
KEEP_HOURS = 3 * DAY + HOUR  # one hour more, so that the last 72 are complete
KEEP_DAYS = 400 * DAY
_HOUR = "%Y%m%d%H"
# The periods of statistics: how one is formatted, and for how many seconds it is kept.
_PERIODS = (("hour", _HOUR, KEEP_HOURS), ("day", "%Y%m%d", KEEP_DAYS))


@dataclass(frozen=True, slots=True)
class Use:
    """How often and when something was used.

    `count` is the number of requests; 0 for what was only used as part of something else.
    """

    count: int
    last: float
    first: float

    def __add__(self, other: Use) -> Use:
        return Use(self.count + other.count, max(self.last, other.last), min(self.first, other.first))


@dataclass(frozen=True, slots=True)
class Move:
    """A tag that pointed to `old` and, from `at` on, to `new`."""

    at: float
    old: Digest
    new: Digest


class Counters(msgspec.Struct, omit_defaults=True):
    """The traffic of one namespace.  `received_bytes` and `upstream_requests` count traffic with upstreams.

    Of these, `ahead_bytes` and `ahead_requests` are what no client's request caused, such as warming.  The
    others count traffic with clients: `hits` to `errors` are requests by result (what an origin has just
    reported as unknown is an error), `sent_bytes` the bodies of all responses, and `hit_bytes` the bodies of
    those from the cache.
    """

    requests: int = 0
    hits: int = 0
    misses: int = 0
    revalidated: int = 0
    stale: int = 0
    negative: int = 0
    errors: int = 0
    hit_bytes: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    upstream_requests: int = 0
    pushed_bytes: int = 0
    ahead_bytes: int = 0
    ahead_requests: int = 0

    def __add__(self, other: Counters) -> Counters:
        return Counters(*(getattr(self, name) + getattr(other, name) for name in self.__struct_fields__))

    @property
    def hit_ratio(self) -> float:
        """The share of the requests answered with content whose content was stored; 0 if there were none."""
        served = self.hits + self.revalidated + self.stale
        return served / (served + self.misses) if served else 0.0

    @property
    def byte_hit_ratio(self) -> float:
        return self.hit_bytes / self.sent_bytes if self.sent_bytes else 0.0

    @property
    def bytes_saved(self) -> int:
        return max(0, self.sent_bytes - self.received_bytes)

    @property
    def requests_saved(self) -> int:
        return max(0, self.requests - self.upstream_requests)


Uses = Mapping[tuple[str, str], Use]  # by repository and reference
Moves = Sequence[tuple[str, Tag, Move]]  # with repository and tag
Resolved = Mapping[tuple[str, str], Sequence[Resolution]]  # by repository and tag
Counts = Mapping[tuple[int, str], Counters]  # by the beginning of the hour, and namespace


class Usage:
    """Reads and records the history.  Methods raise StorageFailed; those that write block."""

    def __init__(self, records: Records, clock: Callable[[], float] = time.time) -> None:
        self._records = records
        self._totals = Totals(records)
        self._clock = clock
        self._cleaned: str | None = None  # the hour in which old periods were last removed

    def use(self, repository: str, reference: str) -> Use | None:
        """`reference` is a tag, or a manifest's digest."""
        return _use(self._records.get(USE.key(repository, reference)))

    def last_uses(self, prefix: str) -> dict[str, float]:
        """When something of each repository was last used; `prefix` is that of their names."""
        found = self._totals.repositories(prefix)
        return {name: total.counted.used for name, total in found if total.counted and total.counted.used}

    def scan(self, prefix: str) -> Iterator[tuple[str, bytes]]:
        """The records of uses whose keys start with `prefix`."""
        return self._records.scan(prefix)

    def counted_by(self, records: Records) -> bool:
        """Whether the totals in `records` count what is used."""
        return records is self._records

    def moves(self, repository: str, tag: str) -> list[Move]:
        """Oldest first."""
        return parse_moves(self._records.get(MOVES.key(repository, tag)))

    def stats(self, since: float, until: float | None = None) -> dict[str, Counters]:
        """The traffic by namespace in all hours that overlap the interval, or in all such days if hours are
        no longer kept since `since`.
        """
        now = self._clock()
        period, form, keep = _PERIODS[0 if now - since < KEEP_HOURS else 1]
        first = _written(form, max(since, now - keep))
        last = _written(form, now if until is None else min(until, now))
        found: dict[str, Counters] = {}
        # The namespace follows the period in a key, so keys with `first` as their period come after it.
        for key, value in self._records.scan(STATISTICS.prefix(period), first):
            _, at, namespace = STATISTICS.parse(key)
            if at > last:
                break
            found[namespace] = found.get(namespace, Counters()) + _counters(value)
        return found

    def days(self, number: int) -> dict[str, dict[str, Counters]]:
        """The traffic by day, as YYYYMMDD in UTC, and namespace, in the last `number` days that had any."""
        first = _written("%Y%m%d", self._clock() - (number - 1) * DAY)
        found: dict[str, dict[str, Counters]] = {}
        for key, value in self._records.scan(STATISTICS.prefix("day"), first):
            _, day, namespace = STATISTICS.parse(key)
            found.setdefault(day, {})[namespace] = _counters(value)
        return found

    def record(
        self, uses: Uses, moves: Moves, counts: Counts, resolved: Resolved = MappingProxyType({})
    ) -> None:
        """Add to what is recorded, in one transaction."""
        hour = _written(_HOUR, self._clock())
        outdated = [] if hour == self._cleaned else list(self._outdated())

        def work(batch: Batch) -> None:
            for key in outdated:
                batch.delete(key)
            for (repository, reference), use in uses.items():
                _add_use(batch, USE.key(repository, reference), use)
            for (repository, tag), found in resolved.items():
                record_resolutions(batch, repository, tag, found)
            for repository, tag, move in moves:
                record_move(batch, repository, tag, move)
            for (at, namespace), counters in counts.items():
                for period, form, _ in _PERIODS:
                    key = STATISTICS.key(period, _written(form, at), namespace)
                    _add_counters(batch, key, counters)

        self._records.transaction(work)
        self._cleaned = hour

    def _outdated(self) -> Iterator[str]:
        for period, form, keep in _PERIODS:
            # The first period that is kept is the one that contains the oldest time to keep.
            oldest = _written(form, self._clock() - keep)
            for key, _ in self._records.scan(STATISTICS.prefix(period)):
                if STATISTICS.parse(key)[1] >= oldest:
                    break
                yield key


def _written(form: str, at: float) -> str:
    return time.strftime(form, time.gmtime(at))


def _decoded(record: bytes | None, type: Any) -> Any:
    """Decode a record; None if it is absent or damaged."""
    try:
        return msgspec.json.decode(record or b"", type=type)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _use(record: bytes | None) -> Use | None:
    found = _decoded(record, tuple[int, float, float])
    return None if found is None else Use(*found)


def parse_moves(record: bytes | None) -> list[Move]:
    """The moves of a tag, oldest first."""
    found = _decoded(record, list[tuple[float, str, str]]) or []
    return [Move(at, Digest(old), Digest(new)) for at, old, new in found]


def _counters(record: bytes | None) -> Counters:
    found = _decoded(record, Counters)
    return found if isinstance(found, Counters) else Counters()


def _add_use(batch: Batch, key: str, use: Use) -> None:
    known = _use(batch.get(key))
    total = use if known is None else known + use
    batch.put(key, msgspec.json.encode((total.count, total.last, total.first)))


def record_move(batch: Batch, repository: str, tag: str, move: Move) -> None:
    """Add to the moves of a tag, as part of a transaction."""
    key = MOVES.key(repository, tag)
    # Several processes record, each after some delay: so not always in chronological order.
    known = sorted([*parse_moves(batch.get(key)), move], key=lambda each: each.at)[-MOVES_KEPT:]
    batch.put(key, msgspec.json.encode([(each.at, str(each.old), str(each.new)) for each in known]))


def _add_counters(batch: Batch, key: str, counters: Counters) -> None:
    batch.put(key, msgspec.json.encode(_counters(batch.get(key)) + counters))
