"""Spans of the requests to the admin listener, by the HTTP semantic conventions of OpenTelemetry."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from proxy.admin.api.routes import Handler
from proxy.telemetry.request_span import ABANDONED, AGENT, begin, end_with, named
from proxy.telemetry.tracing import Tracer, TraceSpan, current_span


def traced_by(tracer: Tracer, untraced: tuple[str, ...]) -> Any:
    """A middleware that makes a span of each request, but for those whose path is `untraced`."""

    @web.middleware
    async def traced(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path in untraced:
            return await handler(request)
        before, status = current_span.get(), ABANDONED
        span = begin(tracer, request)
        try:
            response = await handler(request)
            status = response.status
            return response
        finally:
            current_span.set(before)  # a connection has many requests
            if span.recorded:
                _end(span, request, status)

    return traced


def _end(span: TraceSpan, request: web.Request, status: int) -> None:
    resource = request.match_info.route.resource  # None if the path leads nowhere
    route = None if resource is None else resource.canonical
    span.name(named(request.method, route))
    found = {
        "http.route": route,
        "client.address": request.remote,
        "user_agent.original": request.headers.get("User-Agent", "")[:AGENT],
    }
    span.set({name: value for name, value in found.items() if value})
    end_with(span, status)
