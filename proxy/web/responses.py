"""Parts of the responses of the distribution API: common headers, errors in JSON, and cache headers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import msgspec
from aiohttp import web
from multidict import CIMultiDict

from proxy.telemetry.exchange import Exchange
from storage.errors import RegistryError

JSON = "application/json"
HARBOR = "harbor-registry-client"  # the User-Agent of Harbor, as a client of other registries
_UNPRINTABLE = re.compile(r"[^ -~]")
_IMMUTABLE = {whose: f"{whose}, max-age=31536000, immutable" for whose in ("public", "private")}
COMMON = {
    "Docker-Distribution-Api-Version": "registry/2.0",
    "Server": "entrepot",
    # Whoever may push chooses media types: a browser is not to take content for HTML.
    "X-Content-Type-Options": "nosniff",
}


class RequestRefused(Exception):
    """An error, and headers for its response."""

    def __init__(self, error: RegistryError, headers: Mapping[str, str]) -> None:
        super().__init__(str(error))
        self.error = error
        self.headers = headers


def error_response(
    code: str,
    message: str,
    status: int,
    headers: Mapping[str, str] | None = None,
    details: Iterable[Any] = (None,),
    also: Mapping[str, str] = MappingProxyType({}),
) -> web.Response:
    """A response with one error for each of `details`.  distribution-spec, "Error Codes"."""
    errors = [{"code": code, "message": message, "detail": each} for each in details]
    body = msgspec.json.encode({"errors": errors, **also})
    return content(body, {"Content-Type": JSON, **(headers or {})}, status)


def content(body: bytes, headers: Mapping[str, str], status: int = 200) -> web.Response:
    # With body=, not text= or json_response: those append a charset to the media type.  For HEAD, a Response
    # sends no body, unlike a StreamResponse.
    return web.Response(status=status, body=body, headers=CIMultiDict({**COMMON, **headers}))


def empty(status: int, headers: Mapping[str, str]) -> web.Response:
    return web.Response(status=status, headers=headers)


def immutable(exchange: Exchange) -> str:
    """Cache-Control for content that never changes."""
    return _IMMUTABLE[_whose(exchange)]


def freshness(exchange: Exchange, default: float = 31536000) -> str:
    """Cache-Control for content that may change; `default` is its lifetime in seconds if `ttl` is unknown."""
    ttl = default if exchange.ttl is None else exchange.ttl
    if exchange.result in ("hit", "miss", "revalidated") and ttl > 0:
        # Clients subtract Age.
        return f"{_whose(exchange)}, max-age={int(ttl + (exchange.age or 0))}"
    return "no-cache"


def _whose(exchange: Exchange) -> str:
    return "public" if exchange.shared else "private"


def cache_headers(exchange: Exchange) -> dict[str, str]:
    """Age (RFC 9111 §5.1) and Cache-Status (RFC 9211 §2), neither if no cache was involved; what is added.

    With a warning also Cache-Control, in place of another: content that may lapse is kept by no other cache.
    """
    headers = {**dict(exchange.added), **exchange.tell()}
    if exchange.ns is not None:
        headers["OCI-Namespace"] = exchange.ns  # distribution-spec, "Registry Proxying"
    if exchange.warning:
        headers.update({"Warning": _warning(exchange.warning), "Cache-Control": "no-cache"})
    result = exchange.result or ("miss" if exchange.upstream_requests else "")
    if not result:
        return headers
    status = "hit" if result in ("hit", "negative") else f"fwd={'miss' if result == 'miss' else 'stale'}"
    if result == "stale" and not exchange.upstream_requests:
        status = "hit"
    if exchange.ttl is not None:
        status += f"; ttl={int(exchange.ttl)}"
    if detail := result if result in ("revalidated", "negative") else exchange.detail:
        status += f"; detail={detail}"
    headers["Cache-Status"] = f"entrepot; {status}"
    # Age on a response that the origin has just confirmed would claim the opposite.
    if result in ("hit", "stale") and exchange.age is not None:
        headers["Age"] = str(max(0, int(exchange.age)))
    return headers


def _warning(message: str) -> str:
    """The value of Warning: distribution-spec, "Warnings"."""
    text = _UNPRINTABLE.sub("?", message).replace("\\", "\\\\").replace('"', '\\"')
    return f'299 - "{text}"'
