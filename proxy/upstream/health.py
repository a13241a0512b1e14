"""When to leave an upstream alone.  Pure policy: it is told what happened, and does no I/O.

    Breaker   of one host: after a failure nobody waits for it, until one probe has been answered
    Budgets   of the credentials for one registry: which to use next, and whether to ask for little

A refusal costs no request and no time; it says when to come back.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC
from email.utils import parsedate_to_datetime

from storage.errors import RegistryError, TooManyRequests

FAILURES = 3  # in a row that open a breaker, where one alone proves nothing
FIRST, LAST = 1.0, 30.0  # seconds that a breaker stays open: the first time, and at most
UNTOLD = 60.0  # seconds without a request after a 429 that does not tell how long
BLOCKED = 86400.0  # seconds without a request at most, whatever Retry-After says

_LIMIT = re.compile(r"\s*([0-9]{1,9})\s*(?:;\s*w=([0-9]{1,9})\s*)?(?:[,;]|$)")


class Breaker:
    """Closed: all calls go out.  Open: none does.  Half-open, when its time is up: one at a time, the probe.

    `changed` is called with the failure that opened it, and with None when it has closed.
    """

    def __init__(
        self, clock: Callable[[], float], changed: Callable[[RegistryError | None], None] = lambda error: None
    ) -> None:
        self._clock = clock
        self._changed = changed
        self._failures = 0  # in a row, while closed
        self._error: RegistryError | None = None  # what opened it; None: closed
        self._seconds = 0.0  # how long it is open this time
        self._until = 0.0
        self._openings = 0
        self._probing = False

    @property
    def closed(self) -> bool:
        return self._error is None

    @property
    def due(self) -> bool:
        """Half-open, and nobody is probing."""
        return self._error is not None and not self._probing and self._clock() >= self._until

    @contextmanager
    def call(self) -> Iterator[Call]:
        """Around one request.  One that ends without a verdict, being cancelled, says nothing.

        Raises OriginFailed or OriginTimeout, as that which opened it.
        """
        error, probe = self._error, False
        if error is not None:
            left = self._until - self._clock()
            if left > 0 or self._probing:
                seconds = max(left, FIRST) if self._probing else left
                raise type(error)(f"{error}; not asked again so soon", retry_after=seconds)
            self._probing = probe = True
        try:
            yield Call(self, self._openings)
        finally:
            if probe:
                self._probing = False

    def succeeded(self) -> None:
        """It has answered, whenever it was asked: it is alive."""
        self._failures = 0
        if self._error is not None:
            self._error = None
            self._changed(None)

    def failed(self, error: RegistryError, opening: int, *, final: bool) -> None:
        # 1. many are asked  2. one times out and opens it  3. so do the others: that is no news.
        if opening != self._openings:
            return
        self._failures += 1
        if self._error is None and not final and self._failures < FAILURES:
            return
        was, self._error = self._error, error
        self._seconds = min(LAST, self._seconds * 2) if was is not None else FIRST
        self._until = self._clock() + self._seconds
        self._openings += 1
        if was is None:
            self._changed(error)


class Call:
    """One request that a breaker let out, and the transfer that follows."""

    def __init__(self, breaker: Breaker, opening: int) -> None:
        self._breaker = breaker
        self._opening = opening

    def succeeded(self) -> None:
        self._breaker.succeeded()

    def failed(self, error: RegistryError, *, final: bool = False) -> None:
        """`final`: this one failure proves that others would fail as well."""
        self._breaker.failed(error, self._opening, final=final)


class Budget:
    """The rate limit of one credential, as the registry tells it; a number is None as long as it is untold.

    Docker Hub: `ratelimit-limit: 100;w=21600` is 100 requests in any 21600 seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.limit: int | None = None
        self._remaining: int | None = None
        self._window = UNTOLD  # seconds
        self._begun = self._told = self._blocked = -math.inf

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
        self._window = min(BLOCKED, float(window)) if window else UNTOLD
        if self._told >= self._begun + self._window:
            self._begun = self._told
        return True

    def refused(self, retry_after: float | None) -> float:
        """A 429: nothing is sent for as many seconds as are returned."""
        now = self._clock()
        rest = self._begun + self._window - now
        seconds = retry_after if retry_after is not None else rest if rest > 0 else UNTOLD
        seconds = min(BLOCKED, max(1.0, seconds))
        self._blocked = max(self._blocked, now + seconds)
        return seconds

    @property
    def blocked_for(self) -> float:
        """Seconds; 0: it may be used."""
        return max(0.0, self._blocked - self._clock())

    @property
    def remaining(self) -> int | None:
        """None too when it was told so long ago that all has come back."""
        return self._remaining if self._clock() < self._told + self._window else None

    def spares(self, reserve: Callable[[int], float]) -> bool:
        """Whether it can be spent on what is known already; `reserve` is what to keep of a limit.

        What was told counts for as long as one request of the window takes to come back; then one more
        request, which may tell that much has come back, costs no more than that.
        """
        if (remaining := self.remaining) is None or remaining >= reserve(self.limit or 0):
            return True
        return self._clock() >= self._told + self._window / max(1, self.limit or 0)


class Budgets:
    """Those of several credentials, by number."""

    def __init__(self, count: int, clock: Callable[[], float]) -> None:
        self._budgets = [Budget(clock) for _ in range(count)]
        self._turn = 0

    def __getitem__(self, number: int) -> Budget:
        return self._budgets[number]

    def usable(self) -> list[int]:
        """In the order to try: with the most remaining, the untold counting as much; among equals in turn.

        Raises TooManyRequests when all are blocked.
        """
        count = len(self._budgets)
        found = [number for number in range(count) if not self._budgets[number].blocked_for]
        if not found:
            seconds = min(budget.blocked_for for budget in self._budgets)
            raise TooManyRequests("the rate limit is used up", retry_after=seconds)

        def rank(number: int) -> tuple[float, int]:
            remaining = self._budgets[number].remaining
            return -math.inf if remaining is None else -remaining, (number - self._turn) % count

        found.sort(key=rank)
        self._turn = (found[0] + 1) % count
        return found


def seconds_until(headers: Mapping[str, str], now: Callable[[], float]) -> float | None:
    """Retry-After (RFC 9110 §10.2.3) in seconds, where there is one that can be read.

    A date is compared with the answer's own where it has one: its clock and ours may differ.  `now` is in
    seconds since the epoch.
    """
    value = headers.get("Retry-After", "")
    if value.isascii() and value.isdigit():
        return min(BLOCKED, float(value[:10]))
    due, sent = _date(value), _date(headers.get("Date", ""))
    if due is None:
        return None
    return min(BLOCKED, max(0.0, due - (now() if sent is None else sent)))


def _date(text: str) -> float | None:
    try:
        found = parsedate_to_datetime(text)
    except ValueError:
        return None
    # RFC 9110 §5.6.7: always GMT; a zone of -0000 is parsed as none.
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
