"""Tasks and threads: work that is not interrupted, and one call for many callers.

A thread cannot be cancelled, and some tasks must not stop halfway.  `run_in_thread` and `uninterrupted`
return, or raise CancelledError, only after the work is done: so the files that it uses stay open.  A
cancellation in the meantime replaces the result of the work.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Hashable, Iterable
from concurrent.futures import Executor
from functools import partial
from typing import Any, TypeVar, cast

T = TypeVar("T")
LARGE = 64 << 10  # bytes of JSON whose parsing takes 5 ms


async def run_in_thread(function: Callable[..., T], *arguments: object, threads: Executor | None = None) -> T:
    """Run `function` in one of `threads` and wait for its end, even if the caller is cancelled.

    The default are those of the event loop.

    Otherwise the caller could close a file that the thread uses, and the thread would work on the next file
    that gets the same descriptor.
    """
    return await uninterrupted(asyncio.get_running_loop().run_in_executor(threads, function, *arguments))


async def run_sized(size: int, function: Callable[..., T], *arguments: object) -> T:
    """Run `function`, which parses `size` bytes, in a thread if they are many: 4 MiB take 300 ms."""
    return await run_in_thread(function, *arguments) if size > LARGE else function(*arguments)


async def uninterrupted(work: Awaitable[T]) -> T:
    """Await `work` to its end, even if the caller is cancelled."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        task.exception()  # mark it as retrieved
        raise cancelled
    return task.result()


async def shielded(work: Awaitable[T]) -> T:
    """Await `work`, which does not end if the caller is cancelled; then nobody needs its result.

    asyncio.shield() of Python 3.14 reports a failure that comes after that as an error of the event loop.
    """
    task = asyncio.ensure_future(work)
    if not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            task.add_done_callback(mark_retrieved)
            raise
    return task.result()


def mark_retrieved(future: asyncio.Future[Any]) -> None:
    """Have an error that comes when nobody waits any more not be logged as lost."""
    if not future.cancelled():
        future.exception()


class Waiters:
    """Those who wait until something is so.  Who changes it calls tell(), which wakes only them.

    To wake all each time would cost as much as the work itself, where many wait for different things.
    """

    def __init__(self) -> None:
        self._waiting: dict[asyncio.Future[None], Callable[[], bool]] = {}

    async def until(self, ready: Callable[[], bool]) -> None:
        """Wait until `ready()` returns True, at once or when something has changed."""
        while not ready():
            woken = asyncio.get_running_loop().create_future()
            self._waiting[woken] = ready
            try:
                await woken
            finally:
                del self._waiting[woken]

    def tell(self) -> None:
        """Something has changed."""
        for woken, ready in self._waiting.items():
            if not woken.done() and ready():
                woken.set_result(None)


class SingleFlight:
    """One call for all callers that ask for the same key at the same time."""

    def __init__(self) -> None:
        self._flights: dict[Hashable, asyncio.Future[Any]] = {}

    async def join(self, key: Hashable, call: Callable[[], Awaitable[T]]) -> T:
        """The result of `call()`, which is called only if no call for `key` is in progress.

        The call is a task of its own: a caller that is cancelled, even the first, does not affect the others.
        """
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = asyncio.ensure_future(call())
            # A callback, not a finally in the call: a task that is cancelled before its first step runs none.
            flight.add_done_callback(partial(self._forget, key))
        return cast(T, await shielded(flight))

    def has(self, key: Hashable) -> bool:
        """Whether a call for `key` is in progress."""
        return key in self._flights

    @property
    def count(self) -> int:
        """How many calls are in progress."""
        return len(self._flights)

    def _forget(self, key: Hashable, flight: asyncio.Future[Any]) -> None:
        del self._flights[key]
        mark_retrieved(flight)  # all callers may have been cancelled

    async def close(self) -> None:
        flights = list(self._flights.values())
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)


async def for_each(work: Callable[[T], Awaitable[None]], items: Iterable[T], most: int) -> None:
    """Do `work` for each item in order, at most `most` at once.  Stops at the first error and raises it."""
    remaining = iter(items)

    async def work_through_items() -> None:
        for item in remaining:
            await work(item)

    try:
        async with asyncio.TaskGroup() as working:
            for _ in range(most):
                working.create_task(work_through_items())
    except ExceptionGroup as group:
        raise group.exceptions[0] from None


class Cancelled(Exception):
    """The work was cancelled from outside."""


async def run_cancellable(work: Callable[..., T], *arguments: object) -> T:
    """Run `work` in a thread, with a first argument that it calls now and then.

    This argument is a function that raises Cancelled once the caller of run_cancellable() is cancelled.
    """
    end = threading.Event()

    def stopped() -> None:
        if end.is_set():
            raise Cancelled

    running = asyncio.ensure_future(run_in_thread(work, stopped, *arguments))
    try:
        return await shielded(running)
    except asyncio.CancelledError:
        end.set()
        await asyncio.wait([running])
        raise
