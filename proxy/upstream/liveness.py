"""Whether a server that is silent about a request is there at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import aiohttp


@asynccontextmanager
async def answering(
    bound: asyncio.Timeout, silence: float | None, ping: Callable[[], Awaitable[object]]
) -> AsyncIterator[None]:
    """End `bound` early for a request in the block whose server is not there.

    If that takes `silence` seconds, `ping` asks the server something simple.  A server that does not answer
    that either, within as many seconds, is not there.  One that does may take the rest of the time.
    """
    if silence is None:
        yield
        return
    loop, tasks = asyncio.get_running_loop(), list[asyncio.Task[None]]()

    async def ask() -> None:
        try:
            async with asyncio.timeout(silence):
                await ping()
        except (TimeoutError, aiohttp.ClientError, OSError):
            with suppress(RuntimeError):  # it has expired already
                bound.reschedule(loop.time())

    timer = loop.call_later(silence, lambda: tasks.append(loop.create_task(ask())))
    try:
        yield
    finally:
        timer.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
