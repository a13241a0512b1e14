"""How much at once, and how fast: turns, and a bound on bytes a second."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import TypeVar

T = TypeVar("T")

BURST = 0.1  # seconds that a transfer may be ahead of its rate, so that it does not sleep at every chunk


class Turns:
    """At most `total` at once, and of these at most so many for each namespace, first come first served.

    `shares` says how many each namespace may have; one that is not named has `total`.
    """

    def __init__(self, total: int, shares: dict[str, int] | None = None) -> None:
        self._all = asyncio.Semaphore(total)
        self._each = {name: asyncio.Semaphore(number) for name, number in (shares or {}).items()}

    @asynccontextmanager
    async def turn(self, namespace: str) -> AsyncIterator[None]:
        """Inside, it is this one's turn."""
        # The namespace's own first: who waits for a busy upstream does not keep others from theirs.
        each = self._each.get(namespace)
        if each is None:
            async with self._all:
                yield
            return
        async with each, self._all:
            yield


class Bandwidth:
    """Bytes a second, over all transfers that take theirs here; None is no bound."""

    def __init__(self, rate: float | None = None) -> None:
        self._rate = rate
        self._paid_until = 0.0  # of the loop's clock: when what was taken so far has been earned

    async def take(self, number: int) -> None:
        """Return when `number` bytes more fit the rate."""
        if self._rate is None:
            return
        now = asyncio.get_running_loop().time()
        self._paid_until = max(now, self._paid_until) + number / self._rate
        if (ahead := self._paid_until - now) > BURST:
            await asyncio.sleep(ahead)


async def several(work: Callable[[T], Awaitable[None]], items: Iterable[T], most: int) -> None:
    """Do it for each, in their order, at most so many at once.  The first failure ends all, and is raised."""
    left = iter(items)

    async def one_after_the_other() -> None:
        for item in left:
            await work(item)

    try:
        async with asyncio.TaskGroup() as working:
            for _ in range(most):
                working.create_task(one_after_the_other())
    except ExceptionGroup as group:
        raise group.exceptions[0] from None


def part(total: int, workers: int) -> int:
    """One worker's part of `total`, at least 1."""
    return max(1, -(-total // workers))
