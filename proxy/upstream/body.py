"""A request's body that is written while it is sent, no faster than it leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any


class StreamedBody:
    """For one request.  At most two of its chunks are held, so who writes waits for who reads.

    `watch` is told True when something is to leave, and False when there is nothing to wait for: whoever
    sends it bounds the one, and the other is nobody's fault there.
    """

    def __init__(self) -> None:
        self.watch: Callable[[bool], None] = lambda leaving: None
        self.sent = False  # all of it
        self._slot: asyncio.Queue[bytes] = asyncio.Queue(1)

    async def put(self, chunk: bytes, sending: asyncio.Future[Any]) -> None:
        """Once `sending`, the request, has ended nobody takes it, and nobody waits."""
        if chunk:
            await self._put(chunk, sending)

    async def end(self, sending: asyncio.Future[Any]) -> None:
        """That was all."""
        await self._put(b"", sending)

    async def _put(self, chunk: bytes, sending: asyncio.Future[Any]) -> None:
        if not self._slot.full():
            self._slot.put_nowait(chunk)
            return
        putting = asyncio.ensure_future(self._slot.put(chunk))
        try:
            await asyncio.wait({putting, sending}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            putting.cancel()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            self.watch(False)
            chunk = await self._slot.get()
            self.sent = not chunk
            self.watch(True)
            if self.sent:
                return
            yield chunk
