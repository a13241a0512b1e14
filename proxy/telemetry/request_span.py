"""The span of a client's request, by the HTTP semantic conventions of OpenTelemetry.

https://opentelemetry.io/docs/specs/semconv/http/http-spans/, version 1.40: what is stable of it.
"""

from __future__ import annotations

from collections.abc import Mapping

from aiohttp import web
from yarl import URL

from proxy.telemetry.exchange import UNKNOWN, Exchange
from proxy.telemetry.tracing import Attributes, Tracer, TraceSpan, current_span

ABANDONED = 499  # the status of a request whose response was not completed
PATH, AGENT = 1000, 200  # characters of a path, and of a User-Agent
# By kind of request.
ROUTES = {
    "base": "/v2/",
    "token": "/token",
    "manifest": "/v2/{name}/manifests/{reference}",
    "blob": "/v2/{name}/blobs/{digest}",
    "tags": "/v2/{name}/tags/list",
    "referrers": "/v2/{name}/referrers/{digest}",
    "catalog": "/v2/_catalog",
    "uploads": "/v2/{name}/blobs/uploads/",
    "upload": "/v2/{name}/blobs/uploads/{upload}",
}
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE"))
# Of a query; of other parameters it is not known that they are no secrets.
_PARAMETERS = frozenset(("ns", "n", "last", "digest", "mount", "from", "artifactType"))


def begin(tracer: Tracer, request: web.BaseRequest) -> TraceSpan:
    """Begin the span of a request, which is the current one from now on."""
    span = tracer.request(request.headers)
    current_span.set(span)
    if span.recorded:
        span.set(described(request))
    return span


def described(request: web.BaseRequest) -> Attributes:
    """What the head of a request says."""
    method, version = request.method, request.version
    attributes: dict[str, str | int] = {
        "http.request.method": method if method in _METHODS else "_OTHER",
        "url.path": request.rel_url.raw_path[:PATH],
        "url.scheme": request.scheme,
        "network.protocol.version": f"{version.major}.{version.minor}",
    }
    if method not in _METHODS:
        attributes["http.request.method_original"] = method[:AGENT]
    parameters = request.rel_url.raw_query_string.split("&")
    if query := "&".join(each for each in parameters if each.partition("=")[0] in _PARAMETERS):
        attributes["url.query"] = query[:PATH]
    try:
        server = URL(f"//{request.headers.get('Host', '')}")
        if server.host:
            attributes["server.address"] = server.host
            attributes["server.port"] = server.explicit_port or (443 if request.secure else 80)
    except ValueError:  # the client sent something else
        pass
    return attributes


def named(method: str, route: str | None) -> str:
    """The name of the span of a request; `route` is its path, with names for what differs."""
    return " ".join(filter(None, (method if method in _METHODS else "HTTP", route)))


def exemplar(span: TraceSpan) -> Mapping[str, str] | None:
    """The labels of an exemplar of the metrics, by which a trace is found; None of one that is not sent."""
    return {"trace_id": span.trace_id, "span_id": span.span_id} if span.recorded else None


def end(method: str, exchange: Exchange, status: int) -> None:
    """End the span of a request, with what came of it."""
    span = exchange.span
    if not span.recorded:
        return
    route = ROUTES.get(exchange.kind)
    span.name(named(method, route))
    found = {
        "http.route": route,
        "client.address": exchange.client,
        "user_agent.original": (exchange.agent or "")[:AGENT],
        "entrepot.request.id": exchange.id,
        "entrepot.namespace": "" if exchange.namespace == UNKNOWN else exchange.namespace,
        "entrepot.repository": exchange.repository,
        "entrepot.reference": exchange.reference,
        "entrepot.digest": exchange.digest,
        "entrepot.result": exchange.result,
        "entrepot.peer": exchange.peer,
        "entrepot.error.code": exchange.detail,
    }
    span.set({name: value for name, value in found.items() if value})
    span.set({"entrepot.upstream_requests": exchange.upstream_requests, "entrepot.sent": exchange.bytes})
    end_with(span, status, exchange.detail if status == ABANDONED else exchange.reason or "")


def end_with(span: TraceSpan, status: int, reason: str = "") -> None:
    """End the span of a request that was answered with this status, or ABANDONED."""
    if status == ABANDONED:
        span.set({"error.type": "abandoned"})
        span.end(reason or "abandoned")
        return
    span.set({"http.response.status_code": status})
    if status >= 500:  # a status below is an answer, not a failure of the server
        span.set({"error.type": str(status)})
    span.end(reason or str(status) if status >= 500 else "")
