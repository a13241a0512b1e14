"""Requests of other replicas: they name repositories in full, and were authorized where they arrived."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Protocol

from aiohttp import web

from proxy.telemetry.exchange import Exchange
from proxy.web.responses import JSON
from proxy.web.routes import Endpoint, Route
from storage.concurrency import uninterrupted
from storage.errors import NameUnknown, RegistryError, Unavailable

STORED_ONLY = "only-if-cached"  # RFC 9111, section 5.2.1.7
FAILED = 424  # RFC 4918, section 11.4: not this server has failed, but what it depends on


class OtherReplicas(Protocol):
    """The other replicas of the fleet."""

    async def sender(self, headers: Mapping[str, str]) -> str | None:
        """The URL of the replica that has sent a request with these headers; None: it is of a client."""

    def admit(self, peer: str, namespace: str, repository: str, digest: str | None) -> None:
        """Raise Misdirected if this replica does not answer that one."""

    def hear(self, namespace: str, headers: Mapping[str, str]) -> None:
        """Learn what another replica tells."""

    def headers(self, namespace: str = "") -> Mapping[str, str]:
        """Those of a response to another replica."""


class PeerRequests:
    """Recognizes requests of `peers`.  `is_cache` tells which namespaces are caches."""

    def __init__(self, peers: OtherReplicas, is_cache: Callable[[str], bool]) -> None:
        self._peers = peers
        self._is_cache = is_cache

    async def recognize(self, request: web.BaseRequest, exchange: Exchange) -> None:
        """Record in `exchange` if another replica has sent it."""
        if request.method in ("GET", "HEAD") and (peer := await self._peers.sender(request.headers)):
            exchange.peer = exchange.user = peer
            exchange.tell = self._peers.headers
            exchange.stored_only = request.headers.get("Cache-Control") == STORED_ONLY

    def name(self, request: web.BaseRequest, route: Route, exchange: Exchange) -> str:
        """The full name of the repository.  Raises NameUnknown, Misdirected."""
        namespace, _, repository = route.name.partition("/")
        if not self._is_cache(namespace):
            raise NameUnknown(f"{namespace[:80]!r} is no cache of this replica")
        exchange.namespace, exchange.repository = namespace, repository
        exchange.reference = str(route.reference)
        exchange.tell = partial(self._peers.headers, namespace)
        if not exchange.stored_only:  # else nothing is waited for
            digest = str(route.reference) if route.kind is Endpoint.BLOB else None
            self._peers.admit(exchange.peer, namespace, repository, digest)
        self._peers.hear(namespace, request.headers)
        return route.name


class OperationRequests:
    """Has `answer` answer the requests for operations of other replicas, and `handle` all others.

    path: of those requests
    answer: gives the status and the body of an answer to a body
    """

    def __init__(
        self,
        peers: OtherReplicas,
        path: str,
        answer: Callable[[bytes], Awaitable[tuple[int, bytes]]],
        handle: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
    ) -> None:
        self._peers = peers
        self._path = path
        self._answer = answer
        self._handle = handle

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        asked = request.rel_url.raw_path == self._path and request.method == "POST"
        if not asked or await self._peers.sender(request.headers) is None:
            return await self._handle(request)
        # An operation continues without the replica that asks.
        status, body = await uninterrupted(self._answer(await request.read()))
        return web.Response(status=status, body=body, content_type=JSON, headers=self._peers.headers())


def check_confirmed(method: str, exchange: Exchange) -> None:
    """Raise Unavailable if another replica would take for news what the upstream has not confirmed.

    A GET of a manifest is answered: who sends it knows of none.
    """
    if exchange.peer and exchange.result == "stale" and (method == "HEAD" or exchange.kind != "manifest"):
        raise Unavailable(f"the upstream of {exchange.namespace} cannot be asked now")


def status_for(error: RegistryError, exchange: Exchange) -> int:
    """The status of an error.  A replica whose upstream fails is to be told from one that fails itself."""
    return FAILED if exchange.peer and isinstance(error, Unavailable) else error.status
