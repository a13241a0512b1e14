"""A request's body that is written while it is sent, no faster than it is read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any


class StreamedBody:
    """The body of one request, written while it is sent.

    It buffers at most two chunks, so the writer waits for the reader.
    """

    def __init__(self) -> None:
        self.sent = False  # all of it
        self._watch: Callable[[bool], None] = _ignore
        self._slot: asyncio.Queue[bytes] = asyncio.Queue(1)

    @contextmanager
    def watched(self, watch: Callable[[bool], None]) -> Iterator[None]:
        """Inside, `watch` is called with True when a chunk is to be sent, with False when none is there.

        So the sender can limit the time that a chunk takes, but not the time that the writer takes.
        """
        self._watch = watch
        try:
            yield
        finally:
            self._watch = _ignore

    async def put(self, chunk: bytes, sending: asyncio.Future[Any]) -> None:
        """Append a chunk; returns at once if `sending`, the request, has ended."""
        if chunk:
            await self._put(chunk, sending)

    async def end(self, sending: asyncio.Future[Any]) -> None:
        """Mark the end of the body."""
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
            self._watch(False)
            chunk = await self._slot.get()
            self.sent = not chunk
            self._watch(True)
            if self.sent:
                return
            yield chunk


def _ignore(sending: bool) -> None:
    pass
