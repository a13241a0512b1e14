"""Delays logins after failed ones, the longer the more have failed.

Failures are counted by address, by user, and, if they are known, by address and credentials.  The same wrong
credentials are counted once for their address: a client that repeats them is not guessing.  After some
failures, the next attempt waits for its turn, and attempts that arrive meanwhile queue behind it, so that
many at once gain nothing.  An attempt whose turn would be too far away is refused at once.  A user who has
logged in from an address does not wait there because of what others try in the user's name.
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

FREE = 3  # failures without a delay: everybody mistypes
FIRST = 1.0  # seconds to wait after the next failure; doubled by each further one
LONGEST = 30.0  # seconds between two attempts, and in the queue
FORGOTTEN = 900.0  # seconds after the last failure until failures are forgotten
REMEMBERED = 10_000  # entries of each kind; the oldest are dropped


@dataclass(slots=True)
class _Failures:
    count: int = 0
    last: float = -math.inf
    turn: float = -math.inf  # when the next attempt may be made


class LoginThrottle:
    """Makes attempts to log in wait for their turn."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._failures: dict[Hashable, _Failures] = {}
        self._welcome: dict[Hashable, None] = {}

    async def attempt(
        self,
        address: IPAddress | None,
        user: str,
        check: Callable[[], Awaitable[bool]],
        credentials: Hashable = None,
    ) -> bool:
        """Call `check` when its turn comes, and return its result: whether the credentials are right.

        `credentials` identifies them, without being them.  Raises Throttled, and what `check` raises.
        """
        if seconds := self.turn(address, user, credentials):
            await self._sleep(seconds)
        right = await check()
        if right:
            self.succeeded(address, user)
        else:
            self.failed(address, user, credentials)
        return right

    def turn(self, address: IPAddress | None, user: str, credentials: Hashable = None) -> float:
        """Take a turn, and return how many seconds to wait for it.  Raises Throttled."""
        now = self._clock()
        waiting = [
            found
            for key in self._keys(address, user, credentials)
            if (found := self._failures.get(key)) and found.count > FREE and now - found.last < FORGOTTEN
        ]
        start = max([now, *(each.turn for each in waiting)])
        if start - now > LONGEST:
            raise Throttled("too many wrong passwords: try again later", retry_after=start - now)
        for each in waiting:
            each.turn = start + min(FIRST * 2.0 ** (each.count - FREE - 1), LONGEST)
        return start - now

    def failed(self, address: IPAddress | None, user: str, credentials: Hashable = None) -> None:
        now = self._clock()
        by_address, *keys = self._keys(address, user, credentials)
        known = self._failures.get(keys[-1]) if credentials is not None else None
        if known is None or now - known.last >= FORGOTTEN:
            keys.append(by_address)
        for key in keys:
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
        # Earlier failures stay counted: otherwise an attacker with one password could try others without end.
        key = _network(address), user
        self._welcome.pop(key, None)
        self._welcome[key] = None
        if len(self._welcome) > REMEMBERED:
            del self._welcome[next(iter(self._welcome))]

    def _keys(self, address: IPAddress | None, user: str, credentials: Hashable) -> list[Hashable]:
        network = _network(address)
        keys: list[Hashable] = [("address", network)]
        if (network, user) not in self._welcome:
            keys.append(("user", user))
        if credentials is not None:
            keys.append(("credentials", network, credentials))
        return keys


def _network(address: IPAddress | None) -> Hashable:
    """The addresses of one client: an IPv4 address, or a /64 network of IPv6."""
    if isinstance(address, ipaddress.IPv6Address):
        return int(address) >> 64
    return address
