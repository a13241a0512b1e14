"""The admin listener: metrics, health, and the admin API.

Metrics and health need no token.  The API needs the token, if one is configured.  Without a token it
answers on a loopback listener only, to users of this machine.  A page in a browser of this machine could
send requests too, so without a token all that a foreign page can send is refused.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import math
import re
import warnings
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

import structlog
from aiohttp import web
from aiohttp_cache import MemoryCache, cache_middleware

from proxy.admin.api.audited import ADMITTED, recorded_by
from proxy.admin.api.bundle_routes import ARCHIVES, BundleRoutes
from proxy.admin.api.routes import Api, Handler, in_json, with_warnings
from proxy.admin.api.traced import traced_by
from proxy.admin.fleet import Fleet
from proxy.admin.local_operations import LocalOperations
from proxy.admin.notices import heard
from proxy.namespaces.references import FieldInvalid
from proxy.telemetry.audit import AuditLog
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.tracing import NoTracer, Tracer
from proxy.web.listener import ConnectionLimits, Listener
from storage.concurrency import Cancelled
from storage.errors import RegistryError

log = structlog.get_logger()

OPEN = ("/metrics", "/healthz", "/readyz")
PAGES, ENTRANCES = "/ui/", ("/", "/ui")  # the web page, and the paths that lead to it
MANUAL = "/docs"  # leads to the documentation, which is below it
ANSWERED = 1.0  # seconds in which an operation that is cancelled must end and be answered
SUMMARIES = 100  # answers that are kept
SAFE = ("application/json", *ARCHIVES)  # media types that no page can send to another host unasked
_AUTHORITY = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]]+))(?::[0-9]{1,5})?")

_IDENTITY = ("", "identity")

State = Callable[[], Awaitable[Mapping[str, str]]]


async def nothing_to_observe() -> None:
    """For those without states to observe."""


def application(
    metrics: Metrics,
    state: State,
    operations: LocalOperations,
    fleet: Fleet | None = None,
    *,
    token: str | None,
    loopback: bool,
    audit: AuditLog | None = None,
    pages: web.Application | None = None,
    manual: web.Application | None = None,
    observe: Callable[[], Awaitable[None]] = nothing_to_observe,
    summaries: Summaries | None = None,
    tracer: Tracer | None = None,
) -> web.Application:
    """The application of the admin listener.  It closes `operations`.

    `state` gives `status`, which is "ready", "degraded" or "draining", and further details.  `loopback`
    says that only this machine reaches the listener.  `audit` records changes.  `pages` admits by itself;
    `manual`, the documentation, is for everybody.
    `observe` brings metrics up to date before they are shown.  `fleet` does the operations for all
    replicas; `summaries` are the answers that are kept; `tracer` traces requests, but for those of OPEN.
    """
    tracing = traced_by(tracer or NoTracer(), OPEN)
    admin = web.Application(middlewares=[tracing, *_middlewares(token, loopback, audit, pages, manual)])
    kept = _kept(admin, summaries)
    _close_with(admin, operations, fleet)
    for method, path, handler in (
        *_open_routes(metrics, state, observe),
        *Api(fleet or operations, kept.forget).routes(),
        *BundleRoutes(operations.exports, operations.imports, kept.forget).routes(),
    ):
        if method == "GET":
            admin.router.add_get(path, handler)  # and HEAD
        else:
            admin.router.add_route(method, path, handler)
    return _with_pages(admin, pages, manual)


def _open_routes(
    metrics: Metrics, state: State, observe: Callable[[], Awaitable[None]]
) -> Iterator[tuple[str, str, Handler]]:
    async def exposition(request: web.Request) -> web.Response:
        await observe()
        return _shown(metrics, request)

    async def readyz(request: web.Request) -> web.Response:
        found = await state()  # a degraded server still serves, uncached; only a draining one is not ready
        return in_json(found, 503 if found["status"] == "draining" else 200)

    for path, handler in zip(OPEN, (exposition, _alive, readyz), strict=True):
        yield "GET", path, handler


def _close_with(admin: web.Application, operations: LocalOperations, fleet: Fleet | None) -> None:
    admin.on_shutdown.append(lambda app: (fleet or operations).end_streams())
    admin.on_cleanup.append(lambda app: operations.close())


def _with_pages(
    admin: web.Application, pages: web.Application | None, manual: web.Application | None
) -> web.Application:
    if pages is not None:
        for path in ENTRANCES:
            admin.router.add_get(path, _leading(PAGES))
        admin.add_subapp(PAGES, pages)
    if manual is not None:
        admin.router.add_get(MANUAL, _leading(MANUAL + "/"))
        admin.add_subapp(MANUAL, manual)
    return admin


def _leading(path: str) -> Handler:
    async def lead(request: web.Request) -> web.Response:
        # The path is relative: this listener may be below a path of another server.
        return web.Response(status=302, headers={"Location": path.lstrip("/")})

    return lead


async def _alive(request: web.Request) -> web.Response:
    return in_json({"status": "alive"})


def _shown(metrics: Metrics, request: web.Request) -> web.Response:
    body, media_type = metrics.exposition(request.headers.get("Accept", ""))
    return web.Response(body=body, headers={"Content-Type": media_type, "Vary": "Accept"})


def _kept(admin: web.Application, summaries: Summaries | None) -> Summaries:
    """The summaries, which the middleware of the cache keeps."""
    summaries = summaries or Summaries()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", web.NotAppKeyWarning)  # the middleware looks for this name
        admin["cache"] = summaries
    return summaries


class AdminRunner(web.AppRunner):
    """Runs the application behind a Listener, with the limits of the clients' one.

    Operations that still run `drain` seconds after the shutdown has begun are cancelled; their clients are
    answered 503.
    """

    def __init__(
        self, app: web.Application, limits: ConnectionLimits, *, encrypted: bool, drain: float
    ) -> None:
        super().__init__(app, access_log=None, shutdown_timeout=drain + ANSWERED)
        self._limits = limits
        self._encrypted = encrypted
        self._drain = drain
        self._running: set[asyncio.Task[Any]] = set()
        self._stopping: asyncio.TimerHandle | None = None
        self._stopped = False

    async def _make_server(self) -> web.Server:
        await super()._make_server()  # starts the application; its server has no connections

        # Around the application, whose middlewares do not see what it refuses before they run.
        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            assert isinstance(request, web.Request)
            return await self._handled(request)

        return Listener(
            handle,
            self._limits,
            encrypted=self._encrypted,
            refusal=lambda code, sentence, status: _error(status, sentence, code),
            handler_cancellation=False,  # an operation continues without its client
            request_factory=self.app._make_request,
        )

    async def _handled(self, request: web.Request) -> web.StreamResponse:
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            return await errors_in_json(request, self.app._handle)
        except asyncio.CancelledError:
            if not self._stopped:
                raise
            task.uncancel()
            return _error(503, "the server is shutting down: the operation was stopped", "UNAVAILABLE")
        finally:
            self._running.discard(task)

    async def shutdown(self) -> None:
        await super().shutdown()
        self._stopping = asyncio.get_running_loop().call_later(self._drain, self._stop_operations)

    def _stop_operations(self) -> None:
        self._stopped = True
        for task in self._running:
            task.cancel()

    async def cleanup(self) -> None:
        await super().cleanup()
        if self._stopping is not None:
            self._stopping.cancel()


def _middlewares(
    token: str | None,
    loopback: bool,
    audit: AuditLog | None,
    pages: web.Application | None,
    manual: web.Application | None,
) -> list[Any]:
    unguarded = OPEN if pages is None else (*OPEN, *ENTRANCES)
    unguarded = unguarded if manual is None else (*unguarded, MANUAL)
    own = {each for each in (pages, manual) if each is not None}

    @web.middleware
    async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path not in unguarded and own.isdisjoint(request.match_info.apps):
            check(request, token, loopback)
            request[ADMITTED] = True
        return await handler(request)

    # The cache comes last, behind the check of the token.
    audited = [] if audit is None else [recorded_by(audit)]
    return [*audited, warned, errors_in_json, guarded, cache_middleware]


class Summaries(MemoryCache):
    """Keeps costly answers for some seconds.  They are the same for all callers."""

    def __init__(self) -> None:
        super().__init__()
        self._generation = 0

    async def make_key(self, request: web.Request) -> str:
        return f"{self._generation} {request.method} {request.rel_url.raw_path_qs}"

    async def set(self, key: str, value: dict[str, object], expires: int = 0) -> None:
        if len(self._cache) >= SUMMARIES:
            self._cache.clear()  # expired answers are otherwise dropped only when they are requested again
        await super().set(key, value, expires)

    def forget(self) -> None:
        # 1. A summary is begun.  2. Something is purged, and this is called.  3. The summary is stored, under
        # the key that it had when it was begun: no later request finds it.
        self._generation += 1
        self._cache.clear()


def check(request: web.Request, token: str | None, loopback: bool) -> None:
    """Raise HTTPException for a request that may not use the API."""
    if token is not None:
        kind, _, credential = request.headers.get("Authorization", "").partition(" ")
        # As bytes: compare_digest accepts only ASCII text.
        same = hmac.compare_digest(credential.strip().encode("utf-8", "replace"), token.encode())
        if kind.lower() != "bearer" or not same:
            headers = {"WWW-Authenticate": 'Bearer realm="entrepot"'}
            wrong = "does not accept this token: it is not" if credential else "needs the token:"
            raise web.HTTPUnauthorized(reason=f"the admin API {wrong} admin_token", headers=headers)
    elif not loopback:
        raise web.HTTPForbidden(
            reason="other machines reach this listener, and no token is configured: set admin_token"
        )
    else:
        check_page(request)
    check_body(request)
    if request.method not in ("GET", "HEAD", "OPTIONS") and request.content_type not in SAFE:
        # A page can send forms and plain text to any host unasked, but not these.
        raise web.HTTPUnsupportedMediaType(reason="expected Content-Type: application/json")


def check_body(request: web.Request) -> None:
    """Refuse a body whose size is not known before it is read."""
    if request.headers.get("Content-Encoding", "").lower() not in _IDENTITY:
        raise web.HTTPUnsupportedMediaType(reason="expected a body without Content-Encoding")


def check_page(request: web.Request) -> None:
    """Refuse a request that a foreign page makes a browser send."""
    host = request.headers.get("Host", "")
    found = _AUTHORITY.fullmatch(host)
    # A page of evil.example is of the same origin once that name resolves to this machine.
    if found is None or not _is_here(found[1] or found[2]):
        raise web.HTTPForbidden(reason="without admin_token, Host must be localhost or an IP address")
    origin = request.headers.get("Origin")
    if origin is not None and origin.lower() != f"{request.scheme}://{host}".lower():
        raise web.HTTPForbidden(
            reason="without admin_token, requests from pages of another origin are refused"
        )


def _is_here(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


@web.middleware
async def warned(request: web.Request, handler: Handler) -> web.StreamResponse:
    with heard():
        response = await handler(request)
        return response if response.prepared else with_warnings(response)


@web.middleware
async def errors_in_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        answer = _error(error.status, error.reason, _CODES.get(error.status, "UNKNOWN"))
        for name in ("Allow", "WWW-Authenticate"):
            if name in error.headers:
                answer.headers[name] = error.headers[name]
        return answer
    except FieldInvalid as error:
        return _error(400, str(error), "FIELD_INVALID", field=error.field)
    except RegistryError as error:
        answer = _error(error.status, str(error), error.code)
        if error.retry_after is not None:
            answer.headers["Retry-After"] = str(math.ceil(error.retry_after))
        return answer
    except Cancelled:
        return _error(503, "the server is shutting down: the operation was stopped", "UNAVAILABLE")
    except Exception as error:
        log.exception("admin.failed", method=request.method, path=request.path[:300], error=str(error))
        return _error(500, "internal error: see the log", "UNKNOWN")


_CODES = {
    401: "UNAUTHORIZED",
    403: "DENIED",
    404: "PATH_UNKNOWN",
    405: "UNSUPPORTED",
    413: "TOO_LARGE",
    415: "UNSUPPORTED",
    417: "UNSUPPORTED",
}


def _error(status: int, sentence: str, code: str, **more: str) -> web.Response:
    return in_json({"error": sentence, "code": code, **more}, status)
