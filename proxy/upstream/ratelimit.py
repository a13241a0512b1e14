"""Rate limits, and which credentials to use next.  It does no I/O.

A request that is refused here costs the upstream nothing; the error says when to try again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from proxy.config.quantities import MAX_RETRY_AFTER

DEFAULT_BLOCK = 60.0  # seconds without a request after a 429 without Retry-After

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


class Budget:
    """The rate limit of one credential, read from response headers; a number is None until it is known.

    Docker Hub: `ratelimit-limit: 100;w=21600` is 100 requests in any 21600 seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.limit: int | None = None
        self._remaining: int | None = None
        self._window = DEFAULT_BLOCK  # seconds
        self._begun = self._read_at = -math.inf
        self._blocked = 0.0, 0.0  # since when, for how many seconds

    def read(self, headers: Mapping[str, str]) -> bool:
        """Read the limit from response headers; return whether they contain it."""
        limit = _LIMIT.match(headers.get("ratelimit-limit", ""))
        remaining = _LIMIT.match(headers.get("ratelimit-remaining", ""))
        if remaining is None:
            return False
        window = remaining[2] or (limit[2] if limit else None)
        if limit:
            self.limit = int(limit[1])
        self._remaining, self._read_at = int(remaining[1]), self._clock()
        self._window = min(MAX_RETRY_AFTER, float(window)) if window else DEFAULT_BLOCK
        if not time_left(self._begun, self._window, self._read_at):
            self._begun = self._read_at
        return True

    def refused(self, retry_after: float | None) -> float:
        """Record a 429; return for how many seconds nothing is to be sent."""
        now = self._clock()
        if retry_after is None:
            retry_after = time_left(self._begun, self._window, now) or DEFAULT_BLOCK
        seconds = min(MAX_RETRY_AFTER, max(1.0, self.blocked_for, retry_after))
        self._blocked = now, seconds
        return seconds

    @property
    def blocked_for(self) -> float:
        """Seconds; 0 means that the credential may be used."""
        return time_left(*self._blocked, self._clock())

    @property
    def remaining(self) -> int | None:
        """None also if it was read so long ago that all requests are available again."""
        return self._remaining if time_left(self._read_at, self._window, self._clock()) else None

    def spares(self, reserve: Callable[[int], float]) -> bool:
        """Whether requests are left beyond `reserve`, which maps the limit to the number to be reserved.

        The last number read counts until one more request has become available; spending that one may show
        that more have.
        """
        if (remaining := self.remaining) is None or remaining >= reserve(self.limit or 0):
            return True
        return not time_left(self._read_at, self._window / max(1, self.limit or 0), self._clock())


def time_left(since: float, seconds: float, now: float) -> float:
    """How many of the `seconds` are left; a clock that was set back must not turn them into hours."""
    return seconds - (now - since) if 0 <= now - since < seconds else 0.0


class Budgets:
    """The budgets of several credentials, by number."""

    def __init__(self, count: int, clock: Callable[[], float]) -> None:
        self._budgets = [Budget(clock) for _ in range(count)]
        self._turn = 0

    def __getitem__(self, number: int) -> Budget:
        return self._budgets[number]

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
