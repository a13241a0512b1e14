"""The admin listener: metrics and health.  Not for clients that pull."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from proxy.telemetry import Metrics


def application(metrics: Metrics, state: Callable[[], Mapping[str, str]]) -> web.Application:
    """`state` tells `status`, "ready", "degraded" or "draining", and what more there is to say."""

    async def exposition(request: web.Request) -> web.Response:
        return web.Response(body=metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def healthz(request: web.Request) -> web.Response:
        return _json({"status": "alive"})

    async def readyz(request: web.Request) -> web.Response:
        # A degraded server still serves, uncached: only one that is leaving is not ready.
        found = state()
        return _json(found, 503 if found["status"] == "draining" else 200)

    @web.middleware
    async def in_json(
        request: web.Request, handler: Callable[[web.Request], web.StreamResponse]
    ) -> web.StreamResponse:
        try:
            return await handler(request)  # type: ignore[misc, no-any-return]
        except web.HTTPException as error:
            answer = _json({"error": error.reason}, error.status)
            if isinstance(error, web.HTTPMethodNotAllowed):
                answer.headers["Allow"] = error.headers["Allow"]
            return answer

    admin = web.Application(middlewares=[in_json])  # type: ignore[list-item]
    admin.router.add_get("/metrics", exposition)
    admin.router.add_get("/healthz", healthz)
    admin.router.add_get("/readyz", readyz)
    return admin


def _json(value: Mapping[str, str], status: int = 200) -> web.Response:
    return web.Response(
        status=status, body=msgspec.json.encode(value), headers={"Content-Type": "application/json"}
    )
