"""What a tag stood for, and how two images differ."""

from __future__ import annotations

from aiohttp import web

from proxy.admin.operations import Operations
from proxy.ui.answers import Answer, tried
from proxy.ui.rendering import Renderer


class HistoryScreen:
    """The history of a tag, and the difference of any two images."""

    def __init__(self, operations: Operations, renderer: Renderer) -> None:
        self._operations = operations
        self._renderer = renderer

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/history", self._history), web.get("/diff", self._diff)]

    async def _history(self, request: web.Request) -> web.Response:
        ref = request.query.get("ref", "").strip()
        answer = await tried(self._operations.history(ref)) if ref else Answer(None)
        return self._renderer.page(
            request,
            "history.html",
            "History",
            status=answer.status,
            ref=ref,
            found=answer.found,
            fault=answer.fault,
        )

    async def _diff(self, request: web.Request) -> web.Response:
        ref, other = (request.query.get(name, "").strip() for name in ("ref", "other"))
        answer = await tried(self._operations.diff(ref, other)) if ref else Answer(None)
        return self._renderer.page(
            request,
            "diff.html",
            "Difference",
            status=answer.status,
            ref=ref,
            other=other,
            found=answer.found,
            fault=answer.fault,
        )
