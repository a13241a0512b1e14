"""The last lines of the audit log."""

from __future__ import annotations

from aiohttp import web

from proxy.admin.operations import Operations
from proxy.ui.answers import tried
from proxy.ui.rendering import Renderer

SHOWN = 200  # acts


class AuditScreen:
    """Who did what, the latest first."""

    def __init__(self, operations: Operations, renderer: Renderer) -> None:
        self._operations = operations
        self._renderer = renderer

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/audit", self._show)]

    async def _show(self, request: web.Request) -> web.Response:
        match = request.query.get("match", "").strip()
        answer = await tried(self._operations.audit(match, SHOWN))
        return self._renderer.page(
            request, "audit.html", "Audit", match=match, rows=answer.found, fault=answer.fault
        )
