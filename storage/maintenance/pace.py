"""The pace of maintenance, which leaves the processor and the disk to clients."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

SLICE = 0.05  # seconds of work without a pause
REST = 1.0  # seconds of pause for each second of work
GRAIN = 0.05  # seconds; shorter pauses are added up
CREDIT = 1.0  # seconds that may be made up for after a pause that took too long


class DutyCycle:
    """Pauses in proportion to the time that the work took.

    `pause` is called with a number of seconds to wait.
    """

    def __init__(self, pause: Callable[[float], None]) -> None:
        self._pause = pause
        self._since = time.monotonic()

    def pause(self) -> None:
        """Pause, if there was no pause for some time."""
        worked = time.monotonic() - self._since
        if worked > SLICE:
            self._pause(worked * REST)
            self._since = time.monotonic()


class Pace:
    """Pauses so that on average `rate` bytes are spent per second; never if `rate` is None."""

    def __init__(
        self, rate: float | None, ticks: Callable[[], float], sleep: Callable[[float], Awaitable[object]]
    ) -> None:
        self._rate = rate
        self._ticks = ticks
        self._sleep = sleep
        self._debt = 0.0  # seconds
        self._at = ticks()

    async def spend(self, size: int) -> None:
        if not self._rate:
            return
        now = self._ticks()
        self._debt = max(self._debt - (now - self._at), -CREDIT) + size / self._rate
        self._at = now
        if self._debt >= GRAIN:
            await self._sleep(self._debt)
