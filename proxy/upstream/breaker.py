"""Circuit breakers: a host that fails gets no requests for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from proxy.upstream.ratelimit import LimitState, time_left
from proxy.upstream.refusals import Refusal
from storage.errors import RegistryError

FAILURES = 3  # in a row that open a breaker, if one alone is not final
FIRST, LAST = 1.0, 30.0  # seconds that a breaker stays open: the first time, and at most


@dataclass(frozen=True, slots=True)
class HostState:
    """The state of one host: that of the upstream at `url`, or one to which it redirects.

    open: it gets no requests for `seconds` more; then one request probes it
    limits: the rate limits of the upstream's credentials
    refused: where credentials of the upstream are refused
    """

    url: str
    host: str
    open: bool
    seconds: float
    error: str | None
    limits: list[LimitState]
    refused: list[Refusal]


class Breaker:
    """A circuit breaker.  Closed: requests are sent.  Open: none is.  Then half-open: one is, the probe.

    `changed` is called with the error that opened it, and with None when it has closed.
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
        """Whether it is half-open and no probe is under way."""
        return self._error is not None and not self._probing and not self._left()

    def state(
        self, url: str, host: str, limits: Sequence[LimitState] = (), refused: Sequence[Refusal] = ()
    ) -> HostState:
        error = self._error
        message = None if error is None else str(error)
        seconds = 0.0 if error is None else self._left()
        return HostState(url, host, error is not None, seconds, message, list(limits), list(refused))

    def _left(self) -> float:
        return time_left(self._since, self._seconds, self._clock())

    @contextmanager
    def call(self) -> Iterator[Attempt]:
        """A context for one request, whose outcome is reported to the Attempt; a cancelled one has none.

        Raises the error that opened it, OriginFailed or OriginTimeout, while no request may be sent.
        """
        error, probe = self._error, False
        if error is not None:
            seconds = self._left()
            if seconds or self._probing:
                raise type(error)(f"{error}; the next attempt is not due yet", retry_after=seconds or FIRST)
            self._probing = probe = True
        try:
            yield Attempt(self, self._openings)
        finally:
            if probe:
                self._probing = False

    def succeeded(self) -> None:
        """Record a response, whenever its request was sent: the host is alive."""
        self._failures = 0
        if self._error is not None:
            self._error = None
            self._changed(None)

    def failed(self, error: RegistryError, opening: int, *, final: bool) -> None:
        # 1. many requests are sent  2. one times out and opens it  3. so do the others: that is no news.
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
        """Record a body that ended early, long after the headers of its response."""
        if self._error is None:
            self.failed(error, self._openings, final=False)


class Attempt:
    """One request that a breaker has allowed."""

    def __init__(self, breaker: Breaker, opening: int) -> None:
        self._breaker = breaker
        self._opening = opening

    def succeeded(self) -> None:
        self._breaker.succeeded()

    def failed(self, error: RegistryError, *, final: bool = False) -> None:
        """`final`: this failure alone proves that other requests would fail too."""
        self._breaker.failed(error, self._opening, final=final)
