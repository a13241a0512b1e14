"""Why a pull of a reference does what it does."""

from __future__ import annotations

from aiohttp import web

from proxy.admin.operations import Operations
from proxy.namespaces.references import FieldInvalid
from proxy.ui.rendering import Renderer
from storage.errors import RegistryError


class WhyScreen:
    """A form for any reference, and the explanation of its pull."""

    def __init__(self, operations: Operations, renderer: Renderer) -> None:
        self._operations = operations
        self._renderer = renderer

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/why", self._show)]

    async def _show(self, request: web.Request) -> web.Response:
        ref, why, fault, status = request.query.get("ref", "").strip(), None, "", 200
        if ref:
            try:
                why = await self._operations.why(ref)
            except FieldInvalid as error:
                fault, status = error.cause, 400
            except RegistryError as error:
                fault, status = str(error), error.status
        return self._renderer.page(request, "why.html", "Why", status=status, ref=ref, why=why, fault=fault)
