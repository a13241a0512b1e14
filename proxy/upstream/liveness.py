"""Whether a server that is silent about a request is there at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import aiohttp

ANSWERED = 2  # times the silence before it: how long a ping may take


@asynccontextmanager
async def answering(
    bound: asyncio.Timeout, silence: float | None, ping: Callable[[], Awaitable[object]]
) -> AsyncIterator[None]:
    """End `bound` early for a wait in the block whose server is not there.

    If that takes `silence` seconds, `ping` asks the server something simple.  A server that does not answer
    that either, within ANSWERED times as long, is not there.  One that does is asked again, each time after
    twice as long.
    """
    if silence is None:
        yield
        return
    loop, tasks = asyncio.get_running_loop(), list[asyncio.Task[None]]()

    async def ask() -> None:
        pause = silence
        try:
            while True:
                async with asyncio.timeout(ANSWERED * silence):
                    await ping()
                pause *= 2
                await asyncio.sleep(pause)
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


@asynccontextmanager
async def coming(
    patience: float, silence: float | None, ping: Callable[[], Awaitable[object]]
) -> AsyncIterator[None]:
    """Limit a wait for more of a response to `patience` seconds, less if its server is not there."""
    async with asyncio.timeout(patience) as bound, answering(bound, silence, ping):
        yield
