"""Rate limits, and whose credentials to use next.  Pure policy: no I/O.

A request that is refused here costs no request and no time; the refusal says when to come back.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from proxy.config.quantities import MAX_RETRY_AFTER

UNTOLD = 60.0  # seconds without a request after a 429 that does not tell how long

_LIMIT = re.compile(r"\s*([0-9]{1,9})\s*(?:;\s*w=([0-9]{1,9})\s*)?(?:[,;]|$)")


@dataclass(frozen=True, slots=True)
class LimitState:
    """The rate limit of one credential, by number, as far as it is told.

    `blocked_for` is in seconds, 0: it may be used.
    """

    credential: int
    limit: int | None
    remaining: int | None
    blocked_for: float


class Budget:
    """The rate limit of one credential, as the registry tells it; a number is None as long as it is untold.

    Docker Hub: `ratelimit-limit: 100;w=21600` is 100 requests in any 21600 seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.limit: int | None = None
        self._remaining: int | None = None
        self._window = UNTOLD  # seconds
        self._begun = self._told = -math.inf
        self._blocked = 0.0, 0.0  # since when, and for how many seconds

    def read(self, headers: Mapping[str, str]) -> bool:
        """Whether they tell anything."""
        limit = _LIMIT.match(headers.get("ratelimit-limit", ""))
        remaining = _LIMIT.match(headers.get("ratelimit-remaining", ""))
        if remaining is None:
            return False
        window = remaining[2] or (limit[2] if limit else None)
        if limit:
            self.limit = int(limit[1])
        self._remaining, self._told = int(remaining[1]), self._clock()
        self._window = min(MAX_RETRY_AFTER, float(window)) if window else UNTOLD
        if not time_left(self._begun, self._window, self._told):
            self._begun = self._told
        return True

    def refused(self, retry_after: float | None) -> float:
        """A 429: nothing is sent for as many seconds as are returned."""
        now = self._clock()
        if retry_after is None:
            retry_after = time_left(self._begun, self._window, now) or UNTOLD
        seconds = min(MAX_RETRY_AFTER, max(1.0, self.blocked_for, retry_after))
        self._blocked = now, seconds
        return seconds

    @property
    def blocked_for(self) -> float:
        """Seconds; 0: it may be used."""
        return time_left(*self._blocked, self._clock())

    @property
    def remaining(self) -> int | None:
        """None too when it was told so long ago that all has come back."""
        return self._remaining if time_left(self._told, self._window, self._clock()) else None

    def spares(self, reserve: Callable[[int], float]) -> bool:
        """Whether it can be spent on what is known already; `reserve` is what to keep of a limit.

        What was told counts for as long as one request of the window takes to come back; then one more
        request, which may tell that much has come back, costs no more than that.
        """
        if (remaining := self.remaining) is None or remaining >= reserve(self.limit or 0):
            return True
        return not time_left(self._told, self._window / max(1, self.limit or 0), self._clock())


def time_left(since: float, seconds: float, now: float) -> float:
    """How many of the `seconds` are left; a clock that was set back must not make hours of them."""
    return seconds - (now - since) if 0 <= now - since < seconds else 0.0


class Budgets:
    """Those of several credentials, by number."""

    def __init__(self, count: int, clock: Callable[[], float]) -> None:
        self._budgets = [Budget(clock) for _ in range(count)]
        self._turn = 0

    def __getitem__(self, number: int) -> Budget:
        return self._budgets[number]

    def take_turn(self) -> list[int]:
        """Those not blocked, in the order to try.

        That with the most remaining comes first, the untold counting as much, among equals each in turn.
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
        """Budget.spares() of the one whose turn it is."""
        order = self._order()
        return not order or self._budgets[order[0]].spares(reserve)

    def state(self) -> list[LimitState]:
        return [
            LimitState(number, each.limit, each.remaining, each.blocked_for)
            for number, each in enumerate(self._budgets)
        ]

    @property
    def blocked_for(self) -> float:
        """Seconds until the first of those that are blocked is not; 0: none is."""
        return min((each.blocked_for for each in self._budgets if each.blocked_for), default=0.0)
