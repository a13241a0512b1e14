"""Processes that are forked from a test, as those of a server are from its supervisor."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager

from proxy.server.fork import ForkedProcess, Parent, fork
from storage.shared import SharedState

Work = Callable[[Parent], Coroutine[None, None, int]]


class Forks:
    """Starts processes that have `shared`, and ends those that are left."""

    def __init__(self, shared: SharedState) -> None:
        self.shared = shared
        self._started: list[ForkedProcess] = []

    async def start(self, work: Work) -> ForkedProcess:
        """Run `work` until it reports, or ends; its result is the exit status."""
        process = fork(lambda parent: asyncio.run(work(parent)), self.shared.descriptors())
        self._started.append(process)
        await process.message()
        return process

    async def run(self, work: Work, times: int = 1) -> list[int]:
        """The exit statuses of as many processes, at the same time."""
        return await asyncio.gather(
            *[each.wait() for each in await asyncio.gather(*[self.start(work) for _ in range(times)])]
        )

    async def kill(self, process: ForkedProcess) -> None:
        """Kill it, and do what a supervisor does then."""
        process.send_signal(signal.SIGKILL)
        assert await process.wait() == -signal.SIGKILL
        self.shared.forget(process.pid)

    async def end(self) -> None:
        for each in self._started:
            each.send_signal(signal.SIGKILL)
            await each.wait()
        await asyncio.sleep(0)  # their connections are closed in the next turn of the loop


@asynccontextmanager
async def forking() -> AsyncIterator[Forks]:
    forks = Forks(SharedState(forks=True))
    try:
        yield forks
    finally:
        await forks.end()
        forks.shared.close()
