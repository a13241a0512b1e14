"""Single flight: one call at a time for a key, whose outcome all share who asked meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from functools import partial
from typing import Any, TypeVar, cast

T = TypeVar("T")


class Flights:
    def __init__(self) -> None:
        self._flying: dict[Hashable, asyncio.Future[Any]] = {}

    async def join(self, key: Hashable, call: Callable[[], Awaitable[T]]) -> T:
        """What `call()` returns or raises; it is called only if no call for `key` is under way.

        The call is a task of its own: whoever leaves, the first included, disturbs nobody.
        """
        flight = self._flying.get(key)
        if flight is None:
            flight = self._flying[key] = asyncio.ensure_future(call())
            # A callback, not a finally in the call: one that is cancelled before its first step runs none.
            flight.add_done_callback(partial(self._land, key))
        return cast(T, await asyncio.shield(flight))

    def _land(self, key: Hashable, flight: asyncio.Future[Any]) -> None:
        del self._flying[key]
        # All who asked may have left; then nobody else would look at the exception.
        if not flight.cancelled():
            flight.exception()

    async def close(self) -> None:
        flights = list(self._flying.values())
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)
