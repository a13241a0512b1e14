"""Extensions that see the requests of clients before these are served."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web

from proxy.extensions.extension import Extension
from proxy.extensions.protocols import ClientRequest, RequestRefusal, ResponseHeaders
from proxy.telemetry.exchange import Exchange
from storage.errors import Denied, RegistryError


class TooSoon(RegistryError):
    """A middleware refuses a request that may be tried again later."""

    code, status = "TOOMANYREQUESTS", 429


class Middleware:
    """Asks `extensions` one after the other, as long as none refuses."""

    def __init__(self, extensions: Sequence[Extension]) -> None:
        self._extensions = extensions

    def __bool__(self) -> bool:
        return bool(self._extensions)

    async def ask(self, request: web.BaseRequest, exchange: Exchange) -> None:
        """Note in the exchange the headers to add.  Raises Denied, TooSoon; ExtensionFailed if one fails."""
        if not self._extensions:
            return
        headers: dict[str, str] = {}
        for name, value in request.headers.items():
            key = name.lower()
            headers[key] = f"{headers[key]}, {value}" if key in headers else value
        asked = ClientRequest(
            method=request.method,
            path=request.rel_url.raw_path,
            query=request.rel_url.raw_query_string,
            headers=headers,
            client=request.remote or "",
        )
        for each in self._extensions:
            found = await each.call("handle", asked, gives=(RequestRefusal, ResponseHeaders, type(None)))
            if isinstance(found, ResponseHeaders):
                exchange.added += tuple(found.headers.items())
            elif found is not None:
                if found.retry_after is not None:
                    raise TooSoon(found.message, retry_after=found.retry_after)
                raise Denied(found.message)
