"""Transfers from upstreams, as they come: a page that needs no JavaScript, and its changes as events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import aclosing

from aiohttp import web

from proxy.admin.activity_reports import FillsNow
from proxy.admin.api.server_events import send_events
from proxy.admin.models import FillRow
from proxy.admin.operations import Operations
from proxy.ui.jobs import Jobs
from proxy.ui.rendering import Renderer

FINEST = 5.0  # permille of a bar: half a pixel
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
        (now,) = [each async for each in self._operations.watch(once=True)]
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


def bars(fills: Sequence[FillRow]) -> list[list[tuple[str, float, float]]]:
    """The bar of each fill: what is there and what is coming; start and width in permille."""
    return [_bar(each) if each.size > 0 else [] for each in fills]


def _bar(fill: FillRow) -> list[tuple[str, float, float]]:
    return [
        (kind, start, max(FINEST, stop - start))
        for kind, spans in (("coming", fill.coming), ("there", fill.extents))
        for start, stop in _joined(
            (1000 * each.start / fill.size, 1000 * each.stop / fill.size) for each in spans
        )
    ]


def _joined(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The spans, of which those that nobody could tell apart are one."""
    found: list[tuple[float, float]] = []
    for start, stop in sorted(spans):
        if found and start - found[-1][1] < FINEST:
            found[-1] = found[-1][0], max(stop, found[-1][1])
        else:
            found.append((start, stop))
    return found
