"""What the audit log says of requests to the admin API."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from proxy.config.audit import AuditKind
from proxy.telemetry.audit import AuditLog

# What a request knows of itself: that it may use the API, and which operation it is, with what arguments.
ADMITTED = web.RequestKey("admitted", bool)
OPERATION = web.RequestKey("operation", str)
ARGUMENTS = web.RequestKey("arguments", dict[str, Any])
LISTED = 20  # members of a list that are recorded
_READING = ("GET", "HEAD", "OPTIONS")
_EXCEPTIONS = ("override", "end_override")


def kind_of(operation: str | None) -> AuditKind:
    """The kind of a change that an operator makes."""
    return "override" if operation in _EXCEPTIONS else "admin"


def recorded_by(audit: AuditLog) -> Any:
    """A middleware around all others: records each request that may change something, or is not admitted."""

    @web.middleware
    async def recorded(request: web.Request, handler: Any) -> web.StreamResponse:
        status = 500
        try:
            response: web.StreamResponse = await handler(request)
            status = response.status
            return response
        except asyncio.CancelledError:
            status = 503  # the server stops
            raise
        finally:
            _record(audit, request, status)

    return recorded


def _record(audit: AuditLog, request: web.Request, status: int) -> None:
    if ADMITTED not in request and status in (401, 403):
        kind: AuditKind = "login"
    elif request.method in _READING:
        return
    else:
        kind = kind_of(request.get(OPERATION))
    audit.administered(
        kind,
        request.remote or "",
        request.headers.get("User-Agent", ""),
        request.method,
        request.get(OPERATION, request.path),
        {name: _shortened(value) for name, value in request.get(ARGUMENTS, {}).items()},
        status,
    )


def _shortened(value: Any) -> Any:
    """A value for one line: of a long list, such as the lines of a lock file, the beginning."""
    if not isinstance(value, list | tuple) or len(value) <= LISTED:
        return value
    return [*value[:LISTED], f"and {len(value) - LISTED} more"]
