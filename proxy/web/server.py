"""The OCI distribution API over any Registry.

The server knows HTTP and the specification; which registry answers, a cache, a store or an upstream, it
cannot tell.  Everything is answered in JSON or in the exact bytes of content, and logged in one line.
There is no router: one grammar (routes.py) reads the path, and one table the method.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from itertools import count
from typing import Protocol

import structlog
from aiohttp import web

from proxy.access.authorization import AccessRequest, Authorizer
from proxy.access.visibility import Probe
from proxy.config.access import Action
from proxy.telemetry.exchange import Exchange, exchange
from proxy.telemetry.metrics import Metrics
from proxy.web.events import EventReporter, RequestEvents
from proxy.web.pull import Pull
from proxy.web.push import Push
from proxy.web.responses import (
    JSON,
    RequestRefused,
    cache_headers,
    content,
    error_answer,
)
from proxy.web.routes import Endpoint, Route, parse
from proxy.web.send import LEFT
from storage.errors import (
    BlobUnknown,
    ManifestBlobUnknown,
    ManifestUnknown,
    NameUnknown,
    OriginDenied,
    RegistryError,
    TagInvalid,
    TooManyRequests,
    Unauthorized,
    Unsupported,
)
from storage.oci import Digest
from storage.registry import Registry

log = structlog.get_logger()

READING = ("GET", "HEAD")
_UNKNOWN: dict[Endpoint, type[RegistryError]] = {
    Endpoint.BLOB: BlobUnknown,
    Endpoint.MANIFEST: ManifestUnknown,
    Endpoint.REFERRERS: ManifestUnknown,
}


EndpointHandler = Callable[[web.BaseRequest, Route, str, Exchange], Awaitable[web.StreamResponse]]


class Qualify(Protocol):
    """The full name of a repository, by all that a request says of it.  Raises NameUnknown."""

    def __call__(self, name: str, *, ns: str | None, host: str | None, prefix: str) -> str: ...


class DistributionAPI:
    """`deny_bypass`: say 403 where the origin refuses us, so that clients do not ask it themselves.

    A client that takes nothing of a blob for `client_timeout` seconds is cut off.
    `served` is told of each request that has ended, with its status, `reporter` of what was done to content.
    Without an `authorizer`, everybody may do all.
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
    ) -> None:
        self._registry = registry
        self._qualify = qualify
        self._metrics = metrics
        self._deny_bypass = deny_bypass
        self._served = served
        self._events = RequestEvents(reporter, clock)
        pull = Pull(registry, authorizer, client_timeout)
        pushing = Push(registry, self._full_name, metrics, client_timeout, self._events)
        self._authorizer = authorizer
        start = secrets.token_hex(4)
        self._ids = (f"{start}-{number:x}" for number in count(1))
        self._handlers: dict[Endpoint, dict[str, EndpointHandler]] = {
            Endpoint.BASE: _reading(self._base),
            Endpoint.MANIFEST: {
                **_reading(pull.manifest),
                "PUT": pushing.push_manifest,
                "DELETE": pushing.delete_manifest,
            },
            Endpoint.BLOB: {**_reading(pull.blob), "DELETE": pushing.delete_blob},
            Endpoint.TAGS: _reading(pull.tags),
            Endpoint.REFERRERS: _reading(pull.referrers),
            Endpoint.CATALOG: _reading(pull.catalog),
            Endpoint.UPLOADS: {"POST": pushing.start},
            Endpoint.UPLOAD: {
                **_reading(pushing.status),
                "PATCH": pushing.append,
                "PUT": pushing.finish,
                "DELETE": pushing.cancel,
            },
        }

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """The handler for web.Server; raises nothing but cancellation."""
        begun = time.perf_counter()
        now = Exchange(next(self._ids), client=request.remote or "")
        exchange.set(now)
        status = 499  # nginx's word for: the client left before it was answered
        connection = request.get_extra_info("socket")
        try:
            response = await self._answer(request, now)
            if not response.prepared:
                response.headers["X-Request-Id"] = now.id
            if now.detail != LEFT:
                status = response.status
            if request.method == "HEAD":
                now.bytes = 0
            return response
        except asyncio.CancelledError:
            now.detail = LEFT if connection is None or connection.fileno() < 0 else "server stopped"
            raise
        finally:
            self._log(request, now, status, time.perf_counter() - begun)

    async def _answer(self, request: web.BaseRequest, now: Exchange) -> web.StreamResponse:
        kind = Endpoint.BASE
        try:
            try:
                route = parse(request.rel_url.raw_path)
            except TagInvalid as error:
                # What cannot exist is not there: the conformance suite asks for such a tag, and wants a 404.
                raise ManifestUnknown(str(error)) if request.method in READING else error from None
            kind = route.kind
            now.kind = kind.value
            name = ""
            handlers = self._handlers[route.kind]
            handler = handlers.get(request.method)
            if handler is None:
                unsupported = Unsupported(f"{request.method} is not for {route.kind.value}")
                raise RequestRefused(unsupported, {"Allow": ", ".join(handlers)})
            if route.name:
                now.reference = str(route.reference or route.upload)
                name = self._full_name(request, route, route.name)
                now.namespace, _, now.repository = name.partition("/")
                now.ns = request.query.get("ns")
                if self._authorizer is not None and not self._authorizer.is_public(name):
                    await self._authorizer.permit(request, _wanted(request, route, name), now)
            response = await handler(request, route, name, now)
            if self._events.pulls and request.method in READING:
                self._events.report_pull(request, route, now, response.status)
            return response
        except RegistryError as error:
            return self._error(kind, error, now)
        except RequestRefused as refused:
            return self._error(kind, refused.error, now, refused.headers)
        except Exception as error:
            log.exception("request.failed", method=request.method, path=request.path[:300])
            return self._error(kind, RegistryError(type(error).__name__), now)

    def _full_name(self, request: web.BaseRequest, route: Route, name: str) -> str:
        """What the client calls `name`.  Raises NameUnknown, NameInvalid."""
        return self._qualify(
            name, ns=request.query.get("ns"), host=request.headers.get("Host"), prefix=route.prefix
        )

    # The endpoints, in the order of the specification's table

    async def _base(
        self, request: web.BaseRequest, route: Route, name: str, now: Exchange
    ) -> web.StreamResponse:
        challenges = (
            () if self._authorizer is None else await self._authorizer.ping(request, route.prefix, now)
        )
        answer = content(b"{}", {"Content-Type": JSON})
        for challenge in challenges:
            answer.headers.add("WWW-Authenticate", challenge)
        return answer

    # What goes wrong, and what is written down

    def _error(
        self,
        kind: Endpoint,
        error: RegistryError,
        now: Exchange,
        more: Mapping[str, str] | None = None,
    ) -> web.Response:
        code, status = error.code, error.status
        if isinstance(error, OriginDenied) and not self._deny_bypass:
            unknown = _UNKNOWN.get(kind, NameUnknown)
            code, status = unknown.code, unknown.status
        now.detail = code
        if error.remembered:
            now.result = "negative"
        # no-store: a 404 may be kept without being told to (RFC 9110 §15.1), and the tag be pushed meanwhile.
        headers = {"Content-Type": JSON, "Cache-Control": "no-store", **cache_headers(now), **(more or {})}
        if not error.remembered:
            now.result = "error"
        if error.retry_after is not None or isinstance(error, TooManyRequests):
            headers["Retry-After"] = str(max(1, math.ceil(error.retry_after or 0)))
        if status == Unsupported.status:
            headers.setdefault("Allow", ", ".join(READING))
        missing = error.missing if isinstance(error, ManifestBlobUnknown) else ()
        details = [{"digest": each} for each in missing]
        answer = error_answer(code, str(error), status, headers, details or [None])
        if isinstance(error, Unauthorized):
            for challenge in error.challenges:
                answer.headers.add("WWW-Authenticate", challenge)
        return answer

    def _log(self, request: web.BaseRequest, now: Exchange, status: int, seconds: float) -> None:
        self._metrics.requests.labels(now.namespace, now.kind, now.result or "none").inc()
        if now.bytes:
            self._metrics.sent.labels(now.namespace).inc(now.bytes)
        if self._served is not None:
            self._served(now, status)
        log.info(
            "request.served",
            id=now.id,
            client=request.remote,
            method=request.method,
            kind=now.kind,
            user=now.user,
            namespace=now.namespace,
            repository=now.repository,
            reference=now.reference,
            status=status,
            result=now.result,
            detail=now.detail,
            upstream_requests=now.upstream_requests,
            bytes=now.bytes,
            received=now.received,
            seconds=round(seconds, 6),
            agent=request.headers.get("User-Agent", "")[:200],
        )


def _reading(handler: EndpointHandler) -> dict[str, EndpointHandler]:
    return dict.fromkeys(READING, handler)


def _wanted(request: web.BaseRequest, route: Route, name: str) -> AccessRequest:
    named = bool(route.prefix) or "ns" in request.query
    content, probe = _probe(route, name.partition("/")[2])
    return AccessRequest(_action(route, request.method), name, route.name, named, content, probe)


def _action(route: Route, method: str) -> Action:
    if route.kind in (Endpoint.UPLOADS, Endpoint.UPLOAD):
        return "push"
    return "pull" if method in ("GET", "HEAD") else "delete" if method == "DELETE" else "push"


def _probe(route: Route, repository: str) -> tuple[str, Probe]:
    """What the upstream is asked to know whether a caller may have what it wants."""
    reference = route.reference
    if reference is None:
        return "tags", lambda registry: registry.tags(repository)
    if route.kind is Endpoint.BLOB and isinstance(reference, Digest):
        return f"blob {reference}", lambda registry: registry.resolve_blob(repository, reference)
    return f"manifest {reference}", lambda registry: registry.resolve_manifest(repository, reference)
