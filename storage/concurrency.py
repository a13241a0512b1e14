"""Tasks and threads: work that cannot be interrupted, one call for many callers, and bounds.

A thread cannot be cancelled, and some work of tasks must not be cut in the middle.  `run_in_thread` and
`uninterrupted` return, or raise CancelledError, only once the work is done: whatever it works on is there
until then.  The cancellation then counts for more than the outcome of the work.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar, cast

T = TypeVar("T")


async def run_in_thread(function: Callable[..., T], *arguments: object) -> T:
    """Run in a thread; even who is cancelled meanwhile, however often, waits for its end.

    Else its caller would close the file under it, and the thread work on whatever gets its number next.
    """
    return await uninterrupted(asyncio.get_running_loop().run_in_executor(None, function, *arguments))


async def uninterrupted(work: Awaitable[T]) -> T:
    """The same of what goes on in this thread: it comes to its end before a cancellation counts."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        task.exception()  # seen
        raise cancelled
    return task.result()


class SingleFlight:
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


BURST = 0.1  # seconds that a transfer may be ahead of its rate, so that it does not sleep at every chunk


class Slots:
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


class RateLimit:
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


async def for_each(work: Callable[[T], Awaitable[None]], items: Iterable[T], most: int) -> None:
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


def share_of(total: int, workers: int) -> int:
    """One worker's part of `total`, at least 1."""
    return max(1, -(-total // workers))


class Cancelled(Exception):
    """The work was given up from outside."""


async def run_cancellable(work: Callable[..., T], *arguments: object) -> T:
    """Run `work` in a thread; its first argument raises Cancelled once whoever waits is cancelled."""
    end = threading.Event()

    def stopped() -> None:
        if end.is_set():
            raise Cancelled

    running = asyncio.ensure_future(run_in_thread(work, stopped, *arguments))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        end.set()
        await asyncio.wait([running])
        raise
