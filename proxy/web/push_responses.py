"""The responses to pushes.  Locations are relative, so that they are right behind any proxy."""

from __future__ import annotations

from aiohttp import web

from proxy.access.client_address import absolute
from proxy.telemetry.exchange import Exchange
from proxy.web.responses import COMMON, HARBOR, cache_headers, empty
from proxy.web.routes import Endpoint, Route, build_location
from storage.oci import Digest
from storage.registry import Upload

# The User-Agent of programs that give no name of their own; npm's request sends none, aiohttp Python/.
_NAMELESS = ("Go-http-client/", "python-requests/", "Python/", "curl/")
_UNRESOLVING = (*_NAMELESS, "docker-registry-client-async/", HARBOR)


def session_headers(
    request: web.BaseRequest, route: Route, upload: Upload, exchange: Exchange
) -> dict[str, str]:
    """The state of an upload, and where it continues."""
    session = Route(Endpoint.UPLOAD, route.name, None, route.prefix, upload.id)
    location = build_location(session, exchange.ns)
    url = absolute(request, location)
    return {
        **COMMON,
        **cache_headers(exchange),
        "Location": location if _resolves(exchange, url) else url,
        # Ollama takes this one first, and does not resolve it.
        "Docker-Upload-Location": url,
        # Also for an empty upload: the header cannot express an empty range, and clients expect this one.
        "Range": f"0-{max(0, upload.offset - 1)}",
        "Docker-Upload-UUID": upload.id,
    }


def created(
    request: web.BaseRequest, route: Route, kind: Endpoint, digest: Digest, exchange: Exchange
) -> web.Response:
    """201: the blob or the manifest is stored."""
    location = build_location(Route(kind, route.name, digest, route.prefix), exchange.ns)
    headers = {"Location": location, "Docker-Content-Digest": str(digest), "Content-Length": "0"}
    return empty(201, {**COMMON, **cache_headers(exchange), **headers})


def deleted(exchange: Exchange) -> web.Response:
    """202: it is deleted."""
    return empty(202, {**COMMON, **cache_headers(exchange), "Content-Length": "0"})


def _resolves(exchange: Exchange, url: str) -> bool:
    """Whether this client may get a relative Location, which is the right one behind any proxy.

    Small clients do not resolve it: Charliecloud, nokia/docker-registry-client, container-image-builder.  Nor
    does Harbor, where the URL of this server has a path.
    Where the scheme of `url` is not https, a proxy that does not say so may be in front.
    """
    unresolving = not exchange.agent or exchange.agent.startswith(_UNRESOLVING)
    return not (unresolving and url.startswith("https:"))
