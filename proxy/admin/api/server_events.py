"""Results that follow each other, as server-sent events:
https://html.spec.whatwg.org/multipage/server-sent-events.html.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress

import msgspec
from aiohttp import web

EVENTS = "text/event-stream"
SILENCE = 15.0  # seconds without an event after which a comment shows whether the client is still there
STALLED = 60.0  # seconds without progress of a client, after which it is left
RETRY = 2000  # milliseconds after which a browser asks again, when a stream has ended
_HEADERS = {"Content-Type": EVENTS, "Cache-Control": "no-store", "X-Accel-Buffering": "no"}


async def send_events(
    request: web.Request,
    results: AsyncIterator[object],
    silence: float = SILENCE,
    longest: float = math.inf,
) -> web.StreamResponse:
    """Send each result as JSON, until there are no more, the client has left or `longest` seconds are over.

    Raises the error of a result if there is none before it: then the response has not begun.
    """
    response = web.StreamResponse(headers=_HEADERS)
    loop = asyncio.get_running_loop()
    end = loop.time() + longest
    async with aclosing(results):  # type: ignore[type-var]
        coming = asyncio.ensure_future(anext(results, None))
        try:
            with suppress(ConnectionError, TimeoutError):
                while loop.time() < end:
                    await asyncio.wait({coming}, timeout=silence)
                    if not coming.done():
                        await _write(request, response, b":\n\n")
                    elif (found := coming.result()) is not None:
                        await _write(request, response, b"data: " + msgspec.json.encode(found) + b"\n\n")
                        coming = asyncio.ensure_future(anext(results, None))
                    else:
                        break
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
    if not response.prepared:
        await response.prepare(request)
    with suppress(ConnectionError):
        await response.write_eof()
    return response


async def _write(request: web.Request, response: web.StreamResponse, event: bytes) -> None:
    if not response.prepared:
        await response.prepare(request)
        await response.write(b"retry: %d\n\n" % RETRY)
    async with asyncio.timeout(STALLED):
        await response.write(event)
