"""Which ranges of a blob its origin has refused, and until when it is not asked again."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from storage.errors import RegistryError, TooManyRequests
from storage.oci import Digest
from storage.shared import SharedTable

RECENT = 5.0  # seconds for which the origin is not asked again for bytes that it has refused
LASTING = 3  # refusals, each after the time of the former, from which on all of the blob is asked for
FIRST_REST, REST = 0.25, 10.0  # seconds without further transfers after a refusal: the first, and at most


class RangeRefusals:
    """The refusals of the ranges of one blob of a namespace.

    ticks: seconds of a clock that nobody sets
    table: what all processes know; so a refusal is known to those who try again after the fill has failed
    """

    def __init__(
        self, ticks: Callable[[], float], table: SharedTable, namespace: str, digest: Digest
    ) -> None:
        self._ticks = ticks
        self._table = table
        self._key = table.key("ranges", namespace, digest)
        self._paused_until = -math.inf
        self._held = False
        self._rest = 0.0  # seconds, of the last pause
        self._wary_until = -math.inf
        self._spans: dict[tuple[int, int], tuple[RegistryError, float]] = {}

    @property
    def paused(self) -> bool:
        """Whether no further transfer begins: those that work bring what follows."""
        return self._held or self._ticks() < self._paused_until

    @contextmanager
    def held(self) -> Iterator[None]:
        """Pause while the fill, which the origin has refused as well, waits until it asks again."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def pause(self, error: RegistryError) -> None:
        """The origin has refused a range beside all of the blob: longer each time, until accepted()."""
        now = self._ticks()
        if now >= self._paused_until:  # else it is of the same time, and says no more
            self._rest = min(REST, max(FIRST_REST, 2 * self._rest))
            self._paused_until = now + self._rest
        self._paused_until = max(self._paused_until, now + min(REST, error.retry_after or 0.0))
        self._wary_until = 2 * self._paused_until - now

    @property
    def wary(self) -> bool:
        """Whether further transfers begin one after the other: for as long after a pause as it was.

        If all that have waited began at once, most would be refused, and the origin taken to be down.
        """
        return self._ticks() < self._wary_until

    def accepted(self) -> None:
        """The origin has sent a range by one more transfer."""
        self._rest = 0.0

    def resume(self) -> None:
        self._paused_until, self._rest = -math.inf, 0.0

    def end(self) -> None:
        """No range is requested any more."""
        self._paused_until = math.inf

    @property
    def ended(self) -> bool:
        return self._paused_until == math.inf

    def add(self, start: int, stop: int, error: RegistryError) -> None:
        """The origin has refused [start, stop)."""
        now = self._ticks()
        recent = {span: each for span, each in self._spans.items() if now - each[1] < RECENT}
        # A copy, since an error that was raised keeps alive all that its frames refer to.
        self._spans = {**recent, (start, stop): (error.copy(), now)}

    @property
    def counts(self) -> bool:
        """Whether a refusal counts now: others of the same time say no more."""
        return self._ticks() >= self._counted()[1]

    def count(self, error: RegistryError) -> None:
        """The origin refuses a range of a blob that it has."""
        again = self._ticks() + max(RECENT, error.retry_after or 0.0)
        self._table.put(self._key, (self._counted()[0] + 1, again))

    async def count_if(self, resolve: Callable[[], Awaitable[object]], error: RegistryError) -> None:
        """Count a refusal unless the origin is down: see `answers`."""
        if self.counts and await answers(resolve, error):
            self.count(error)

    @property
    def lasting(self) -> bool:
        """Whether the origin goes on to refuse ranges: it may send all of the blob."""
        return self._counted()[0] >= LASTING

    def reset(self) -> None:
        """The origin has sent a range, or was asked for all of the blob."""
        self._table.discard(self._key)

    def _counted(self) -> tuple[int, float]:
        """How many refusals in a row, and when the next one counts."""
        return self._table.get(self._key, tuple[int, float]) or (0, 0.0)

    def check(self, offset: int) -> None:
        """Raises the error with which the origin has just refused the byte."""
        for (start, stop), (error, at) in self._spans.items():
            if start <= offset < stop and self._ticks() - at < RECENT:
                raise error.copy()

    def errors(self) -> list[RegistryError]:
        return [error for error, _ in self._spans.values()]

    def forgive(self, start: int, stop: int) -> None:
        """Ask again for what was refused."""
        kept = {span: each for span, each in self._spans.items() if not (span[0] < stop and start < span[1])}
        self._spans = kept


async def answers(resolve: Callable[[], Awaitable[object]], error: RegistryError) -> bool:
    """Whether an origin is up that has failed with `error`: it answers `resolve`, a HEAD for the blob."""
    if not isinstance(error, TooManyRequests):  # a HEAD would be refused as well
        try:
            await resolve()
        except RegistryError:
            return False
    return True
