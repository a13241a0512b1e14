"""What every answer of the distribution API has: headers, errors as JSON, how fresh it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from aiohttp import web
from multidict import CIMultiDict

from proxy.telemetry.exchange import Exchange
from storage.errors import RegistryError

JSON = "application/json"
_IMMUTABLE = {whose: f"{whose}, max-age=31536000, immutable" for whose in ("public", "private")}
ALL = {"Docker-Distribution-Api-Version": "registry/2.0", "Server": "entrepot"}


class RequestRefused(Exception):
    """An error with headers that belong to its answer."""

    def __init__(self, error: RegistryError, headers: Mapping[str, str]) -> None:
        super().__init__(str(error))
        self.error = error
        self.headers = headers


def error_answer(
    code: str,
    message: str,
    status: int,
    headers: Mapping[str, str] | None = None,
    details: Iterable[Any] = (None,),
) -> web.Response:
    """One error for each of `details`.  distribution-spec, "Error Codes"."""
    errors = [{"code": code, "message": message, "detail": each} for each in details]
    return content(msgspec.json.encode({"errors": errors}), {"Content-Type": JSON, **(headers or {})}, status)


def content(body: bytes, headers: Mapping[str, str], status: int = 200) -> web.Response:
    # By body=, never text= or json_response: those append a charset to the media type.  On HEAD a Response,
    # other than a StreamResponse, sends no body.
    return web.Response(status=status, body=body, headers=CIMultiDict({**ALL, **headers}))


def empty(status: int, headers: Mapping[str, str]) -> web.Response:
    return web.Response(status=status, headers=headers)


def immutable(now: Exchange) -> str:
    """Cache-Control for what never changes."""
    return _IMMUTABLE[_whose(now)]


def freshness(now: Exchange, untold: float = 31536000) -> str:
    """Cache-Control for what may change; `untold` is its lifetime, in seconds, where no `ttl` is known."""
    ttl = untold if now.ttl is None else now.ttl
    if now.result in ("hit", "miss", "revalidated") and ttl > 0:
        # A client takes Age off.
        return f"{_whose(now)}, max-age={int(ttl + (now.age or 0))}"
    return "no-cache"


def _whose(now: Exchange) -> str:
    return "public" if now.shared else "private"


def cache_headers(now: Exchange) -> dict[str, str]:
    """Age (RFC 9111 §5.1) and Cache-Status (RFC 9211 §2); neither where no cache was asked."""
    headers = {} if now.ns is None else {"OCI-Namespace": now.ns}  # distribution-spec, "Registry Proxying"
    result = now.result or ("miss" if now.upstream_requests else "")
    if not result:
        return headers
    status = "hit" if result in ("hit", "negative") else f"fwd={'miss' if result == 'miss' else 'stale'}"
    if result == "stale" and not now.upstream_requests:
        status = "hit"
    if now.ttl is not None:
        status += f"; ttl={int(now.ttl)}"
    if detail := result if result in ("revalidated", "negative") else now.detail:
        status += f"; detail={detail}"
    headers["Cache-Status"] = f"entrepot; {status}"
    # Age on what the origin has just said would deny that it did.
    if result in ("hit", "stale") and now.age is not None:
        headers["Age"] = str(max(0, int(now.age)))
    return headers
