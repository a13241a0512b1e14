"""Rate limits, and which credentials to use next.  It does no I/O.

A request that is refused here costs the upstream nothing; the error says when to try again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from proxy.config.quantities import MAX_RETRY_AFTER
from storage.shared import SharedTable

DEFAULT_BLOCK = 60.0  # seconds without a request after a 429 without Retry-After
# Seconds until it is asked again, whatever it has said: Retry-After is advice (RFC 9110 §10.2.3), Docker
# Hub sends none with its limit of six hours and grants more bit by bit, and an account may be upgraded.
LONGEST_BLOCK = 900.0

_LIMIT = re.compile(r"\s*([0-9]{1,9})\s*(?:;\s*w=([0-9]{1,9})\s*)?(?:[,;]|$)")


@dataclass(frozen=True, slots=True)
class LimitState:
    """The rate limit of one credential, given by its number; None stands for unknown values.

    `blocked_for` is in seconds; 0 means that the credential may be used.
    """

    credential: int
    limit: int | None
    remaining: int | None
    blocked_for: float


class Spent(msgspec.Struct, array_like=True, frozen=True):
    """What a server tells others of a budget: read `age` seconds ago, blocked for so many seconds more."""

    age: float
    limit: int | None
    remaining: int | None
    window: float
    blocked_for: float


class _Told(msgspec.Struct, array_like=True):
    """What the upstream has told, to any process; a number is None until it is known.  Times in seconds.

    begun: when the window began
    blocked_at, blocked_for: since when, and for how long, nothing is to be sent
    """

    limit: int | None = None
    remaining: int | None = None
    window: float = DEFAULT_BLOCK
    begun: float = -math.inf
    read_at: float = -math.inf
    blocked_at: float = 0.0
    blocked_for: float = 0.0


class Budget:
    """The rate limit of one credential, read from response headers.

    Docker Hub: `ratelimit-limit: 100;w=21600` is 100 requests in any 21600 seconds.  Budgets of the same
    `name` in `table` are one.
    """

    def __init__(
        self, clock: Callable[[], float], table: SharedTable | None = None, name: object = ""
    ) -> None:
        self._clock = clock
        self._table = table or SharedTable()
        self._key = self._table.key("budget", name)

    def _told(self) -> _Told:
        return self._table.get(self._key, _Told) or _Told()

    def read(self, headers: Mapping[str, str]) -> bool:
        """Read the limit from response headers; return whether they contain it."""
        limit = _LIMIT.match(headers.get("ratelimit-limit", ""))
        remaining = _LIMIT.match(headers.get("ratelimit-remaining", ""))
        if remaining is None:
            return False
        window = remaining[2] or (limit[2] if limit else None)
        with self._table.lock:
            told = self._told()
            if limit:
                told.limit = int(limit[1])
            told.remaining, told.read_at = int(remaining[1]), self._clock()
            told.window = min(MAX_RETRY_AFTER, float(window)) if window else DEFAULT_BLOCK
            if not time_left(told.begun, told.window, told.read_at):
                told.begun = told.read_at
            self._table.put(self._key, told)
        return True

    def refused(self, retry_after: float | None) -> float:
        """Record a 429; return for how many seconds nothing is to be sent."""
        now = self._clock()
        with self._table.lock:
            told = self._told()
            if retry_after is None:
                retry_after = time_left(told.begun, told.window, now) or DEFAULT_BLOCK
            seconds = min(LONGEST_BLOCK, max(1.0, self.blocked_for, retry_after))
            told.blocked_at, told.blocked_for = now, seconds
            self._table.put(self._key, told)
        return seconds

    def spent(self) -> Spent | None:
        """What to tell other servers that use the account, None if nothing is known."""
        told, blocked = self._told(), self.blocked_for
        known = time_left(told.read_at, told.window, self._clock()) > 0
        if not known and not blocked:
            return None
        age = self._clock() - told.read_at if known else told.window
        return Spent(age, told.limit, told.remaining if known else None, told.window, blocked)

    def learn(self, spent: Spent, *, blocks: bool) -> None:
        """Have known what another server was told later than this one; with `blocks`, pauses too."""
        now = self._clock()
        with self._table.lock:
            told = self._told()
            read_at = now - max(0.0, spent.age)
            if spent.remaining is not None and read_at > told.read_at:
                told.limit, told.remaining, told.read_at = spent.limit, spent.remaining, read_at
                told.window = min(MAX_RETRY_AFTER, max(0.0, spent.window))
                if not time_left(told.begun, told.window, now):
                    told.begun = read_at
            seconds = min(LONGEST_BLOCK, spent.blocked_for)
            if blocks and seconds > time_left(told.blocked_at, told.blocked_for, now):
                told.blocked_at, told.blocked_for = now, seconds
            self._table.put(self._key, told)

    @property
    def blocked_for(self) -> float:
        """Seconds; 0 means that the credential may be used."""
        told = self._told()
        return time_left(told.blocked_at, told.blocked_for, self._clock())

    @property
    def limit(self) -> int | None:
        return self._told().limit

    @property
    def remaining(self) -> int | None:
        """None also if it was read so long ago that all requests are available again."""
        told = self._told()
        return told.remaining if time_left(told.read_at, told.window, self._clock()) else None

    def spares(self, reserve: Callable[[int], float]) -> bool:
        """Whether requests are left beyond `reserve`, which maps the limit to the number to be reserved.

        The last number read counts until one more request has become available; spending that one may show
        that more have.
        """
        told, limit = self._told(), self.limit or 0
        if (remaining := self.remaining) is None or remaining >= reserve(limit):
            return True
        return not time_left(told.read_at, told.window / max(1, limit), self._clock())


def time_left(since: float, seconds: float, now: float) -> float:
    """How many of the `seconds` are left; a clock that was set back must not turn them into hours."""
    return seconds - (now - since) if 0 <= now - since < seconds else 0.0


class Budgets:
    """The budgets of several credentials, by number; `names` name the accounts, for Budget."""

    def __init__(
        self, names: Sequence[object], clock: Callable[[], float], table: SharedTable | None = None
    ) -> None:
        table = table or SharedTable()
        self._budgets = [Budget(clock, table, (number, name)) for number, name in enumerate(names)]
        self._turn = 0

    def __getitem__(self, number: int) -> Budget:
        return self._budgets[number]

    def __iter__(self) -> Iterator[Budget]:
        return iter(self._budgets)

    def take_turn(self) -> list[int]:
        """The numbers of credentials that are not blocked, in the order in which to try them.

        The one with the most requests left comes first, an unknown number counting as the most; equals take
        turns.
        """
        order = self._order()
        if order:
            self._turn = order[0] + 1
        return order

    def _order(self) -> list[int]:
        def rank(number: int) -> tuple[float, int]:
            remaining = self._budgets[number].remaining
            return -math.inf if remaining is None else -remaining, (number - self._turn) % count

        count = len(self._budgets)
        return sorted((n for n in range(count) if not self._budgets[n].blocked_for), key=rank)

    def spares(self, reserve: Callable[[int], float]) -> bool:
        """Budget.spares() of the credential that is next."""
        order = self._order()
        return not order or self._budgets[order[0]].spares(reserve)

    def state(self) -> list[LimitState]:
        return [
            LimitState(number, each.limit, each.remaining, each.blocked_for)
            for number, each in enumerate(self._budgets)
        ]

    @property
    def blocked_for(self) -> float:
        """Seconds until the first blocked credential may be used again; 0 if none is blocked."""
        return min((each.blocked_for for each in self._budgets if each.blocked_for), default=0.0)
