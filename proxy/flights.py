"""Single flight: one call at a time for a key, whose outcome all share who asked meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Any, TypeVar, cast

T = TypeVar("T")


class Flights:
    def __init__(self) -> None:
        self._tasks: dict[Hashable, asyncio.Task[Any]] = {}

    async def join(self, key: Hashable, call: Callable[[], Awaitable[T]]) -> T:
        """What `call()` returns or raises; it is called only if no call for `key` is under way.

        The call is a task of its own: whoever leaves, the first included, disturbs nobody.
        """
        task = self._tasks.get(key)
        if task is None:
            task = self._tasks[key] = asyncio.ensure_future(self._fly(key, call))
            task.add_done_callback(_seen)
        return cast(T, await asyncio.shield(task))

    async def _fly(self, key: Hashable, call: Callable[[], Awaitable[T]]) -> T:
        try:
            return await call()
        finally:
            del self._tasks[key]

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _seen(task: asyncio.Task[Any]) -> None:
    # All who asked may have left; then nobody else would look at the exception.
    if not task.cancelled():
        task.exception()
