"""A circuit breaker for each host: one that fails is left in peace for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from proxy.upstream.ratelimit import LimitState, time_left
from storage.errors import RegistryError

FAILURES = 3  # in a row that open a breaker, where one alone proves nothing
FIRST, LAST = 1.0, 30.0  # seconds that a breaker stays open: the first time, and at most


@dataclass(frozen=True, slots=True)
class HostState:
    """A host that the upstream at `url` is reached by, or sends us to.

    While `open` it is let alone, for `seconds`; then one request finds out.  `limits` are the upstream's own.
    """

    url: str
    host: str
    open: bool
    seconds: float
    error: str | None
    limits: list[LimitState]


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
        self._since = self._seconds = 0.0  # when it opened last, and for how long
        self._openings = 0
        self._probing = False

    @property
    def closed(self) -> bool:
        return self._error is None

    @property
    def due(self) -> bool:
        """Half-open, and nobody is probing."""
        return self._error is not None and not self._probing and not self._left()

    def state(self, url: str, host: str, limits: list[LimitState]) -> HostState:
        error = self._error
        if error is None:
            return HostState(url, host, False, 0.0, None, limits)
        return HostState(url, host, True, self._left(), str(error), limits)

    def _left(self) -> float:
        return time_left(self._since, self._seconds, self._clock())

    @contextmanager
    def call(self) -> Iterator[Attempt]:
        """Around one request.  One that ends without a verdict, being cancelled, says nothing.

        Raises OriginFailed or OriginTimeout, as that which opened it.
        """
        error, probe = self._error, False
        if error is not None:
            seconds = self._left()
            if seconds or self._probing:
                raise type(error)(f"{error}; not asked again so soon", retry_after=seconds or FIRST)
            self._probing = probe = True
        try:
            yield Attempt(self, self._openings)
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
        self._since = self._clock()
        self._openings += 1
        if was is None:
            self._changed(error)

    def cut(self, error: RegistryError) -> None:
        """A transfer broke off, long after its request was answered."""
        if self._error is None:
            self.failed(error, self._openings, final=False)


class Attempt:
    """One request that a breaker let out."""

    def __init__(self, breaker: Breaker, opening: int) -> None:
        self._breaker = breaker
        self._opening = opening

    def succeeded(self) -> None:
        self._breaker.succeeded()

    def failed(self, error: RegistryError, *, final: bool = False) -> None:
        """`final`: this one failure proves that others would fail as well."""
        self._breaker.failed(error, self._opening, final=final)
