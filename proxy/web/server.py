"""The OCI distribution API over any Registry.

The server knows HTTP and the specification, but not whether the registry is a cache, a store or an upstream.
Every response is JSON or the exact bytes of content, and every request is logged in one line.
There is no router: a grammar (routes.py) parses the path, and a table selects the handler of a method.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from itertools import count
from typing import TYPE_CHECKING, Protocol

import structlog
from aiohttp import web

from proxy.access.authentication import authorization, dated_user
from proxy.access.authorization import Authorizer
from proxy.config.quantities import parse_moment
from proxy.telemetry.ended import EndedRequests
from proxy.telemetry.exchange import Exchange, current_exchange
from proxy.telemetry.loops import HEADER, passed_by
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.request_log import RequestLog
from proxy.telemetry.request_span import begin
from proxy.telemetry.tracing import NoTracer, Tracer
from proxy.web.actions import access_request, action_of
from proxy.web.directions import LONGEST, Directions
from proxy.web.events import EventReporter, RequestEvents
from proxy.web.hits import HitMemory, Hits
from proxy.web.middleware import Middleware
from proxy.web.peers import PeerRequests, status_for
from proxy.web.pull import Past, Pull
from proxy.web.push import Push
from proxy.web.redirects import Redirects
from proxy.web.responses import (
    JSON,
    RequestRefused,
    cache_headers,
    content,
    error_response,
)
from proxy.web.routes import Endpoint, Route, parse
from proxy.web.send import LEFT
from proxy.web.token_endpoint import TokenEndpoint, nobodys_token, oauth_error
from storage.errors import (
    BlobUnknown,
    CodingUnsupported,
    LoopDetected,
    ManifestBlobUnknown,
    ManifestUnknown,
    NameInvalid,
    NameUnknown,
    OriginDenied,
    RegistryError,
    TagInvalid,
    Throttled,
    TooManyRequests,
    Unauthorized,
    Unavailable,
    Unsupported,
)
from storage.registry import Registry

if TYPE_CHECKING:  # it needs a library for tokens
    from proxy.access.token_exchange import TokenExchange

log = structlog.get_logger()

READING = ("GET", "HEAD")
UNEXPECTED = "the server has failed; its log says how, at request.failed with the id"
SOON = 1  # second after which clients are asked to repeat what another host may answer at once
_UNKNOWN: dict[Endpoint, type[RegistryError]] = {
    Endpoint.BLOB: BlobUnknown,
    Endpoint.MANIFEST: ManifestUnknown,
    Endpoint.REFERRERS: ManifestUnknown,
}


EndpointHandler = Callable[[web.BaseRequest, Route, str, Exchange], Awaitable[web.StreamResponse]]


class Qualify(Protocol):
    """Finds the full name of the repository that a request means.  Raises NameUnknown."""

    def __call__(self, name: str, *, ns: str | None, host: str | None, prefix: str) -> str: ...


class DistributionAPI:
    """The distribution API of a registry, as a handler for web.Server.

    deny_bypass: answer 403 if the origin refuses this server, so that clients do not ask the origin directly,
        and ask them to wait as long as it takes
    client_timeout: seconds after which a client is cut off that takes nothing of a blob, or sends nothing
    served: is called with each request that has ended, and its status
    reporter: receives the events of what requests do to content
    authorizer: decides what clients may do; without one everything is permitted
    directions: says in errors where clients push and log in instead
    hit_memory: holds what `hits` answers; without it there are none
    past: gives what a tag stood for at a time
    peers: recognizes requests of other replicas; without it all are of clients
    redirects: tells which blobs clients may be led to the bucket for; without it none
    tokens: issues the tokens of this server's own token endpoint; without it there is none
    tracer: traces requests; without one nothing is traced
    middleware: sees each request of a client; with any there are no `hits`
    server: the id of this server, by which it recognizes requests that it has caused itself
    """

    def __init__(
        self,
        registry: Registry,
        qualify: Qualify,
        metrics: Metrics,
        *,
        deny_bypass: bool = False,
        client_timeout: float = math.inf,
        served: Callable[[Exchange, int], None] | None = None,
        reporter: EventReporter | None = None,
        clock: Callable[[], float] = time.time,
        authorizer: Authorizer | None = None,
        directions: Directions | None = None,
        request_log: RequestLog | None = None,
        hit_memory: HitMemory | None = None,
        peers: PeerRequests | None = None,
        redirects: Redirects | None = None,
        past: Past | None = None,
        tokens: TokenExchange | None = None,
        tracer: Tracer | None = None,
        middleware: Middleware | None = None,
        server: str = "",
    ) -> None:
        self._peers, self._tracer = peers, tracer or NoTracer()
        self._registry, self._middleware = registry, middleware or Middleware(())
        self._qualify, self._deny_bypass = qualify, deny_bypass
        self._events = RequestEvents(reporter, clock)
        self._authorizer, self._directions, self._server = authorizer, directions, server
        start = secrets.token_hex(4)
        self._ids = (f"{start}-{number:x}" for number in count(1))
        pull = Pull(registry, authorizer, client_timeout, redirects, past)
        push = Push(registry, self._full_name, metrics, client_timeout, self._events)
        self._handlers = self._table(pull, push)
        if tokens is not None and authorizer is not None:
            self._handlers[Endpoint.TOKEN] = TokenEndpoint(authorizer, tokens, qualify, metrics).handlers
        self._ended = EndedRequests(metrics, served, request_log or RequestLog())
        # Events of pulls need the whole request, and middleware sees each.
        self.hits: Hits | None = None
        if hit_memory is not None and not self._events.pulls and not self._middleware:
            self.hits = Hits(registry, authorizer, self._ended, self._ids, hit_memory, self._tracer)

    def _table(self, pull: Pull, push: Push) -> dict[Endpoint, dict[str, EndpointHandler]]:
        return {
            Endpoint.BASE: _get_and_head(self._base),
            Endpoint.MANIFEST: {
                **_get_and_head(pull.manifest),
                "PUT": push.push_manifest,
                "DELETE": push.delete_manifest,
            },
            Endpoint.BLOB: {**_get_and_head(pull.blob), "DELETE": push.delete_blob},
            Endpoint.TAGS: _get_and_head(pull.tags),
            Endpoint.REFERRERS: _get_and_head(pull.referrers),
            Endpoint.CATALOG: _get_and_head(pull.catalog),
            Endpoint.UPLOADS: {"POST": push.start},
            Endpoint.UPLOAD: {
                **_get_and_head(push.status),
                "PATCH": push.append,
                "PUT": push.finish,
                "DELETE": push.cancel,
            },
            Endpoint.TOKEN: {"GET": nobodys_token, "POST": nobodys_token},
        }

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer a request.  Raises nothing but cancellation."""
        begun = time.perf_counter()
        agent = request.headers.get("User-Agent", "")
        exchange = Exchange(next(self._ids), method=request.method, client=request.remote or "", agent=agent)
        current_exchange.set(exchange)
        exchange.span = begin(self._tracer, request)
        status = 499  # as nginx says: the client left before the response
        connection = request.get_extra_info("socket")
        try:
            response = await self._answer(request, exchange)
            if not response.prepared:
                response.headers.update((*exchange.added, ("X-Request-Id", exchange.id)))
            if exchange.detail != LEFT:
                status = response.status
            if request.method == "HEAD":
                exchange.bytes = 0
            return response
        except asyncio.CancelledError:
            exchange.detail = LEFT if connection is None or connection.fileno() < 0 else "server stopped"
            raise
        finally:
            first = None if exchange.begun_at is None else exchange.begun_at - begun
            self._ended.add(request.method, exchange, status, time.perf_counter() - begun, first)

    async def _answer(self, request: web.BaseRequest, exchange: Exchange) -> web.StreamResponse:
        kind = Endpoint.BASE
        try:
            try:
                route = parse(request.rel_url.raw_path)
            except TagInvalid as error:
                # An invalid tag cannot exist: the conformance suite asks for one, and wants a 404.
                raise ManifestUnknown(str(error)) if request.method in READING else error from None
            kind = route.kind
            exchange.kind = kind.value
            name = ""
            exchange.passed = passed_by(",".join(request.headers.getall(HEADER, ())))
            if route.name and self._server in exchange.passed:
                raise LoopDetected("the request comes from this server: an upstream leads back to it")
            if self._peers is not None:
                await self._peers.recognize(request, exchange)
            if not exchange.peer:
                await self._middleware.ask(request, exchange)
            handler = self._handler(route.kind, request.method)
            if route.name:
                name = await self._permitted_name(request, route, exchange)
            if request.method in ("POST", "PUT", "PATCH"):
                _check_coding(request)
            response = await handler(request, route, name, exchange)
            if self._events.pulls and request.method in READING and not exchange.peer:
                self._events.report_pull(request, route, exchange, response.status)
            return response
        except Unauthorized as error:
            shown = kind is Endpoint.TOKEN or bool(authorization(request))
            exchange.refused = shown and not exchange.user
            return self._error(kind, self._directed(request, error, exchange.namespace), exchange)
        except RegistryError as error:
            exchange.refused = isinstance(error, Throttled)
            return self._error(kind, error, exchange)
        except RequestRefused as refused:
            return self._error(kind, refused.error, exchange, refused.headers)
        except Exception:
            log.exception("request.failed", id=exchange.id, method=request.method, path=request.path[:300])
            return self._error(kind, RegistryError(f"{UNEXPECTED} {exchange.id}"), exchange)

    def _handler(self, kind: Endpoint, method: str) -> EndpointHandler:
        """Raises RequestRefused."""
        handlers = self._handlers[kind]
        if (handler := handlers.get(method)) is None:
            unsupported = Unsupported(f"{method} is not supported for this endpoint ({kind.value})")
            raise RequestRefused(unsupported, {"Allow": ", ".join(handlers)})
        return handler

    async def _permitted_name(self, request: web.BaseRequest, route: Route, exchange: Exchange) -> str:
        """The full name of the repository, if the client may do there what it wants."""
        if exchange.peer and self._peers is not None:
            return self._peers.name(request, route, exchange)
        exchange.reference = route.upload or str(route.reference or "")
        name = self._directed_name(request, route)
        exchange.namespace, _, exchange.repository = name.partition("/")
        exchange.ns = request.query.get("ns")
        exchange.as_of = _as_of(request, route)
        if self._authorizer is not None:
            await self._authorizer.permit(request, access_request(request, route, name), exchange)
        if request.method not in READING:
            self._check_action(request, route, exchange.namespace)
        return name

    def _full_name(self, request: web.BaseRequest, route: Route, name: str) -> str:
        """The full name of what the client calls `name`.  Raises NameUnknown, NameInvalid."""
        return self._qualify(
            name, ns=request.query.get("ns"), host=request.headers.get("Host"), prefix=route.prefix
        )

    # Directions

    def _directed_name(self, request: web.BaseRequest, route: Route) -> str:
        """The full name of the repository.  Raises NameUnknown; for a push it says what takes it."""
        try:
            return self._full_name(request, route, route.name)
        except NameUnknown as error:
            if self._directions is None or action_of(route, request.method) != "push":
                raise
            cause, _, _ = str(error).partition(": ")
            where = self._directions.push(_host(request), route.name)
            raise NameUnknown(f"{cause}: {where}") from None

    def _check_action(self, request: web.BaseRequest, route: Route, namespace: str) -> None:
        """Raise Unsupported if the namespace is a cache, which clients only pull from."""
        if self._directions is None or namespace in self._directions.stores:
            return
        if action_of(route, request.method) == "delete":
            raise Unsupported(f"{namespace} is a cache: an operator deletes from it, by entrepot purge")
        where = self._directions.push(_host(request), route.name)
        raise Unsupported(f"{route.name} belongs to {namespace}, a cache, which takes no pushes: {where}")

    def _directed(self, request: web.BaseRequest, error: Unauthorized, namespace: str) -> Unauthorized:
        """The error with how docker logs in."""
        if self._directions is None or self._authorizer is None:
            return error
        asks = self._authorizer.asks(request)
        how = self._directions.login(_host(request), namespace, asks)
        return Unauthorized(f"{error}: {how}", challenges=error.challenges)

    async def _base(
        self, request: web.BaseRequest, route: Route, name: str, exchange: Exchange
    ) -> web.StreamResponse:
        # no-store: what another cache kept would hide that a login is asked for now, or that nobody answers.
        response = content(b"{}", {"Content-Type": JSON, "Cache-Control": "no-store", **exchange.tell()})
        if self._authorizer is not None and not exchange.peer:
            for challenge in await self._authorizer.ping(request, route.prefix, exchange):
                response.headers.add("WWW-Authenticate", challenge)
        return response

    # Errors and logs

    def _error(
        self,
        kind: Endpoint,
        error: RegistryError,
        exchange: Exchange,
        more: Mapping[str, str] | None = None,
    ) -> web.Response:
        code, status = error.code, status_for(error, exchange)
        if isinstance(error, OriginDenied) and not self._deny_bypass and not exchange.peer:
            unknown = _UNKNOWN.get(kind, NameUnknown)
            code, status = unknown.code, unknown.status
        exchange.detail, exchange.reason = code, str(error)
        if error.remembered:
            exchange.result = "negative"
        # no-store: caches may keep a 404 by default (RFC 9110 §15.1), though the tag is pushed meanwhile.
        headers = {
            "Content-Type": JSON,
            "Cache-Control": "no-store",
            **cache_headers(exchange),
            **(more or {}),
        }
        if not error.remembered:
            exchange.result = "error"
        if error.retry_after is not None or isinstance(error, TooManyRequests):
            headers["Retry-After"] = str(self._retry_after(error))
        if status == Unsupported.status:
            headers.setdefault("Allow", ", ".join(READING))
        missing = error.missing if isinstance(error, ManifestBlobUnknown) else ()
        details = [{"digest": each} for each in missing]
        also = oauth_error(error) if kind is Endpoint.TOKEN else {}
        response = error_response(code, error.public, status, headers, details or [None], also)
        if isinstance(error, Unauthorized):
            for challenge in error.challenges:
                response.headers.add("WWW-Authenticate", challenge)
        return response

    def _retry_after(self, error: RegistryError) -> int:
        seconds = max(1, math.ceil(error.retry_after or 0))
        # stargz and SOCI repeat a request several times, each after up to twice this time, before they ask
        # the next host, which may be the upstream.
        may_ask_elsewhere = isinstance(error, Unavailable) and not self._deny_bypass
        return min(seconds, SOON) if may_ask_elsewhere else seconds


def _as_of(request: web.BaseRequest, route: Route) -> float | None:
    """The time at which the client wants tags as they were, by the path or by its user; None for now."""
    if not (text := route.as_of or dated_user(request)):
        return None
    try:
        when = parse_moment(text)
    except ValueError as error:
        raise NameInvalid(f"{text[:50]!r} is no date: {error}") from None
    if request.method not in READING:
        raise Unsupported("the past cannot be changed: push and delete without a date")
    return when


def _get_and_head(handler: EndpointHandler) -> dict[str, EndpointHandler]:
    return dict.fromkeys(READING, handler)


def _check_coding(request: web.BaseRequest) -> None:
    """Raise RequestRefused if the body is encoded: a digest is that of the bytes which are sent."""
    codings = ",".join(request.headers.getall("Content-Encoding", ())).split(",")
    if any(each.strip().lower() not in ("", "identity") for each in codings):
        error = CodingUnsupported("the body has a Content-Encoding: send it without one")
        raise RequestRefused(error, {"Accept-Encoding": "identity"})  # RFC 9110, section 12.5.3


def _host(request: web.BaseRequest) -> str:
    """The server as the client calls it."""
    return request.headers.get("Host", "this server")[:LONGEST]
