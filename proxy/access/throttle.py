"""Whoever tries passwords has to wait, the longer the more it has tried.

Failures are counted by address and by user.  After some of them the next attempt has to wait its turn, and
those that come meanwhile queue behind it, so that many at once gain nothing.  An attempt whose turn would be
too far away is refused at once.  A user who has logged in from an address does not wait there for what others
try in its name.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
import time
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass

from proxy.access.rules import IPAddress
from storage.errors import Throttled

FREE = 3  # failures that cost nothing: everybody mistypes
FIRST = 1.0  # seconds to wait after the next one, doubling
LONGEST = 30.0  # seconds between two attempts, and in the queue
FORGOTTEN = 900.0  # seconds after the last failure
REMEMBERED = 10_000  # of each kind; the oldest go


@dataclass(slots=True)
class _Failures:
    count: int = 0
    last: float = -math.inf
    turn: float = -math.inf  # when the next attempt may be made


class LoginThrottle:
    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._failures: dict[Hashable, _Failures] = {}
        self._welcome: dict[Hashable, None] = {}

    async def make(self, address: IPAddress | None, user: str, check: Callable[[], Awaitable[bool]]) -> bool:
        """What `check` tells, when it is its turn.  Raises Throttled, and what `check` does."""
        if seconds := self.turn(address, user):
            await self._sleep(seconds)
        right = await check()
        (self.succeeded if right else self.failed)(address, user)
        return right

    def turn(self, address: IPAddress | None, user: str) -> float:
        """How many seconds to wait before this attempt.  Raises Throttled."""
        now = self._clock()
        waiting = [
            found
            for key in self._keys(address, user)
            if (found := self._failures.get(key)) and found.count > FREE and now - found.last < FORGOTTEN
        ]
        start = max([now, *(each.turn for each in waiting)])
        if start - now > LONGEST:
            raise Throttled("too many wrong passwords: try again later", retry_after=start - now)
        for each in waiting:
            each.turn = start + min(FIRST * 2.0 ** (each.count - FREE - 1), LONGEST)
        return start - now

    def failed(self, address: IPAddress | None, user: str) -> None:
        now = self._clock()
        for key in self._keys(address, user):
            failures = self._failures.pop(key, None)
            if failures is None or now - failures.last >= FORGOTTEN:
                failures = _Failures()
            failures.count += 1
            failures.last = now
            if failures.count == FREE + 1:
                failures.turn = now + FIRST
            self._failures[key] = failures
            if len(self._failures) > REMEMBERED:
                del self._failures[next(iter(self._failures))]

    def succeeded(self, address: IPAddress | None, user: str) -> None:
        # What failed before stays counted: else whoever has one password could try others for ever.
        key = _place(address), user
        self._welcome.pop(key, None)
        self._welcome[key] = None
        if len(self._welcome) > REMEMBERED:
            del self._welcome[next(iter(self._welcome))]

    def _keys(self, address: IPAddress | None, user: str) -> list[Hashable]:
        place = _place(address)
        if (place, user) in self._welcome:
            return [("address", place)]
        return [("address", place), ("user", user)]


def _place(address: IPAddress | None) -> Hashable:
    """What one client has of addresses: of IPv6 a network of 64 bits."""
    if isinstance(address, ipaddress.IPv6Address):
        return int(address) >> 64
    return address
