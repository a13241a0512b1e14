"""The policy: what it says of an image, what waits for approval, exceptions, and what it refused."""

from __future__ import annotations

from aiohttp import web

from proxy.admin.operations import Operations
from proxy.ui.answers import Answer, tried
from proxy.ui.rendering import Renderer

SHOWN = 50  # refusals


class PolicyScreen:
    """Verdicts, approvals and exceptions."""

    def __init__(self, operations: Operations, renderer: Renderer) -> None:
        self._operations = operations
        self._renderer = renderer

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/policy", self._show)]

    async def _show(self, request: web.Request) -> web.Response:
        ref = request.query.get("ref", "").strip()
        answer = await tried(self._operations.policy(ref)) if ref else Answer(None)
        acts = await tried(self._operations.audit("policy", SHOWN))
        return self._renderer.page(
            request,
            "policy.html",
            "Policy",
            status=answer.status,
            ref=ref,
            verdict=answer.found,
            fault=answer.fault,
            held=await self._operations.held(),
            overrides=await self._operations.overrides(),
            recorded=acts.found is not None,
            refusals=[each for each in acts.found or [] if each.kind in ("policy", "override") and each.rule],
        )
