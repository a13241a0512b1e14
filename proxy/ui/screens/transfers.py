"""Transfers from upstreams, as they come: a page that needs no JavaScript, and its changes as events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing

from aiohttp import web

from proxy.admin.activity_reports import FillsNow
from proxy.admin.api.server_events import send_events
from proxy.admin.models import FillRow
from proxy.admin.operations import Operations
from proxy.ui.jobs import Jobs
from proxy.ui.rendering import Renderer

LIFE = 600.0  # seconds of a stream, after which a browser begins another, if its session still holds


class TransfersScreen:
    """The fills in flight, those that ended last, and what was asked for on the page."""

    def __init__(self, operations: Operations, jobs: Jobs, renderer: Renderer) -> None:
        self._operations = operations
        self._jobs = jobs
        self._renderer = renderer

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/transfers", self._show), web.get("/events", self._follow)]

    async def _show(self, request: web.Request) -> web.Response:
        async with aclosing(self._operations.watch()) as stream:  # type: ignore[type-var]
            now = await anext(stream, None)
        if now is None:
            raise web.HTTPServiceUnavailable(reason="the server is shutting down")
        kept = [each for each in await self._operations.fills() if each.idle]
        return self._renderer.page(
            request,
            "transfers.html",
            "Transfers",
            now=now,
            bars=bars(now.fills),
            jobs=list(self._jobs),
            kept=kept,
        )

    async def _follow(self, request: web.Request) -> web.StreamResponse:
        return await send_events(request, self._changes(), longest=LIFE)

    async def _changes(self) -> AsyncIterator[str]:
        """The part of the page that changes, each time it does."""
        async with aclosing(self._operations.watch()) as stream:  # type: ignore[type-var]
            coming = asyncio.ensure_future(anext(stream, None))
            now: FillsNow | None = None
            try:
                while True:
                    changed = asyncio.ensure_future(self._jobs.change())
                    try:
                        await asyncio.wait({coming, changed}, return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        changed.cancel()
                    if coming.done():
                        if (now := coming.result()) is None:
                            return
                        coming = asyncio.ensure_future(anext(stream, None))
                    if now is not None:
                        yield self._renderer.part(
                            "transfers_now.html", now=now, bars=bars(now.fills), jobs=list(self._jobs)
                        )
            finally:
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)


def bars(fills: Sequence[FillRow]) -> dict[tuple[str, str | None], list[tuple[str, float, float]]]:
    """The bar of each fill by its digest and replica: what is there and what is coming.

    Start and width are in permille.
    """
    return {
        (each.digest, each.replica): [
            (kind, 1000 * span.start / each.size, max(2.0, 1000 * (span.stop - span.start) / each.size))
            for kind, spans in (("coming", each.coming), ("there", each.extents))
            for span in spans
        ]
        for each in fills
        if each.size > 0
    }
