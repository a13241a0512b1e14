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

import msgspec

from proxy.access.rules import IPAddress
from storage.errors import Throttled
from storage.shared import SharedTable

FREE = 3  # failures without a delay: everybody mistypes
FIRST = 1.0  # seconds to wait after the next failure; doubled by each further one
LONGEST = 30.0  # seconds between two attempts, and in the queue
FORGOTTEN = 900.0  # seconds after the last failure until failures are forgotten


class _Failures(msgspec.Struct, array_like=True):
    """`turn` is when the next attempt may be made."""

    count: int = 0
    last: float = -math.inf
    turn: float = -math.inf


class LoginThrottle:
    """Makes attempts to log in wait for their turn.

    All processes count in `table`.  If it is full, the oldest entries are dropped.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        table: SharedTable | None = None,
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._table = table or SharedTable()

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
        with self._table.lock:
            waiting = {
                key: found
                for key in self._keys(address, user, credentials)
                if (found := self._failures(key, now)).count > FREE
            }
            start = max([now, *(each.turn for each in waiting.values())])
            if start - now > LONGEST:
                raise Throttled("too many wrong passwords: try again later", retry_after=start - now)
            for key, each in waiting.items():
                each.turn = start + min(FIRST * 2.0 ** (each.count - FREE - 1), LONGEST)
                self._table.put(key, each)
        return start - now

    def failed(self, address: IPAddress | None, user: str, credentials: Hashable = None) -> None:
        now = self._clock()
        with self._table.lock:
            by_address, *keys = self._keys(address, user, credentials)
            if credentials is None or not self._failures(keys[-1], now).count:
                keys.append(by_address)
            for key in keys:
                failures = self._failures(key, now)
                failures.count += 1
                failures.last = now
                if failures.count == FREE + 1:
                    failures.turn = now + FIRST
                self._table.put(key, failures)

    def succeeded(self, address: IPAddress | None, user: str) -> None:
        # Earlier failures stay counted: otherwise an attacker with one password could try others without end.
        self._table.put(self._table.key("welcome", _network(address), user), True)

    def _failures(self, key: int, now: float) -> _Failures:
        """The failures that are not forgotten."""
        found = self._table.get(key, _Failures)
        return found if found is not None and now - found.last < FORGOTTEN else _Failures()

    def _keys(self, address: IPAddress | None, user: str, credentials: Hashable) -> list[int]:
        """By address, by user, by address and credentials, as far as they count."""
        network = _network(address)
        keys = [self._table.key("address", network)]
        if self._table.get(self._table.key("welcome", network, user), bool) is None:
            keys.append(self._table.key("user", user))
        if credentials is not None:
            keys.append(self._table.key("credentials", network, credentials))
        return keys


def _network(address: IPAddress | None) -> Hashable:
    """The addresses of one client: an IPv4 address, or a /64 network of IPv6."""
    if isinstance(address, ipaddress.IPv6Address):
        return int(address) >> 64
    return address
