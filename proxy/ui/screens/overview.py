"""The first screen: what is degraded, what is saved, what is stored, how upstreams are."""

from __future__ import annotations

from aiohttp import web

from proxy.admin.api.app import State
from proxy.admin.operations import Operations
from proxy.ui.rendering import Renderer


class OverviewScreen:
    """The state of the server, and what it saves."""

    def __init__(self, operations: Operations, state: State, renderer: Renderer) -> None:
        self._operations = operations
        self._state = state
        self._renderer = renderer

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/", self._show)]

    async def _show(self, request: web.Request) -> web.Response:
        state = await self._state()
        stats = await self._operations.stats()
        return self._renderer.page(request, "overview.html", "Overview", state=state, stats=stats)
