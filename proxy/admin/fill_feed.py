"""The fills as they come, for those that watch them: one look each second at all processes, for all of these.

Progress is no event, since it is continuous.  Nobody looks while nobody watches.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from proxy.admin.activity_reports import FillsNow
from storage.errors import Unavailable

INTERVAL = 1.0  # seconds between two looks
MOST = 50  # that watch at once; each holds a connection
RETRY = 30.0  # seconds after which one more may try


class FillFeed:
    """Passes on what `look` returns to all that follow.  Must be closed, which ends what they follow.

    `rest` waits for the next look.
    """

    def __init__(
        self,
        look: Callable[[], Awaitable[FillsNow]],
        rest: Callable[[], Awaitable[object]] = lambda: asyncio.sleep(INTERVAL),
    ) -> None:
        self._look = look
        self._rest = rest
        self._followers = 0
        self._looking: asyncio.Task[None] | None = None
        self._latest: FillsNow | None = None
        self._news = asyncio.Event()
        self._closed = False

    async def follow(self, once: bool = False) -> AsyncIterator[FillsNow]:
        """What is known now, and unless it is asked for `once`, what changes.

        Who is slow misses what is outdated.  Raises Unavailable if too many follow.
        """
        if once:
            yield await self._look()
            return
        if self._followers >= MOST:
            raise Unavailable(f"{MOST} others watch the transfers already", retry_after=RETRY)
        self._followers += 1
        try:
            if self._looking is None and not self._closed:
                self._looking = asyncio.create_task(self._run())
            seen: FillsNow | None = None
            while not self._closed:
                if self._latest is not None and self._latest is not seen:
                    seen = self._latest
                    yield seen
                else:
                    await self._change()
        finally:
            self._followers -= 1
            if not self._followers:
                await self._stop()

    async def _change(self) -> None:
        """Wait for a change.  Raises the error of a look that failed."""
        news, looking = self._news, self._looking
        assert looking is not None
        waiting = asyncio.ensure_future(news.wait())
        try:
            await asyncio.wait({waiting, looking}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        if looking.done() and not self._closed:
            looking.result()

    async def _run(self) -> None:
        while True:
            found = await self._look()
            if self._latest is None or (found.fills, found.ended) != (self._latest.fills, self._latest.ended):
                self._latest = found
                self._tell()
            await self._rest()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def _stop(self) -> None:
        looking, self._looking, self._latest = self._looking, None, None
        if looking is not None:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)

    async def close(self) -> None:
        self._closed = True
        self._tell()
        await self._stop()
