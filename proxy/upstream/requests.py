"""Requests to one remote registry: credentials, rate limits, metrics, and errors made from responses.

This module knows no endpoints; they are in client.py and upload.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import aiohttp
import structlog
from yarl import URL

from proxy.config.quantities import seconds_until
from proxy.telemetry.metrics import Metrics
from proxy.upstream.anonymous import AnonymousTokens
from proxy.upstream.breaker import HostState
from proxy.upstream.connect import Connect
from proxy.upstream.credentials import Credentials
from proxy.upstream.encoding import decoded
from proxy.upstream.errors import ERROR_LIMIT, Interrupted, error_from_response, result_of
from proxy.upstream.listing_memory import ListingMemory, ignore
from proxy.upstream.messages import PeerLink, UpstreamRequest, accepted, authorization_of
from proxy.upstream.ratelimit import DEFAULT_BLOCK, Budgets
from proxy.upstream.redirects import RedirectMemory
from proxy.upstream.refusals import Refusals
from proxy.upstream.shared_limits import KnownUpstream
from proxy.upstream.tokens import TokenCache, TokenResponse
from proxy.upstream.transport import READING, RETRIES, Transport
from storage.errors import OriginDenied, OriginForbidden, RegistryError, TooManyRequests, Unavailable
from storage.limits import RateLimit
from storage.oci import MANIFEST_LIMIT
from storage.shared import SharedState

log = structlog.get_logger()


@dataclass(frozen=True)
class UpstreamSettings:
    """How to use one upstream.

    url: ends before /v2
    token_realms: hosts that may issue tokens, besides the upstream's own
    reserve: returns how many requests of a rate limit are reserved for content that is not cached yet
    bandwidth: limits the transfer of blobs; several upstreams may share it
    listings: limits the memory for listings; several upstreams may share it
    pushed_to: requests that read use the token for pushing.  That saves a token, and some registries show
        a repository that does not exist yet only to clients that may push.
    shared: where all processes of a server find what is known of the upstream
    """

    url: str
    connect: Connect = field(default_factory=Connect)
    token_realms: tuple[str, ...] = ()
    reserve: Callable[[int], float] = lambda limit: 0
    bandwidth: RateLimit = field(default_factory=RateLimit)
    pushed_to: bool = False
    shared: SharedState = field(default_factory=SharedState)
    listings: ListingMemory = field(default_factory=ListingMemory)


class RequestSender:
    """Sends requests to one remote registry, with the credentials that have the most requests left.

    It is made inside a running event loop, with at least one of `credentials`.
    """

    def __init__(
        self,
        name: str,
        settings: UpstreamSettings,
        credentials: Sequence[Credentials],
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        home = URL(settings.url)
        self.name, self.home = name, home
        self.host = home.host_port_subcomponent or ""
        self.reserve = settings.reserve
        self._settings = settings
        self._url = settings.url.rstrip("/")
        self._metrics = metrics
        self._clock = clock
        self._bandwidth = settings.bandwidth
        self._pushed_to = settings.pushed_to
        self._label = label = metrics.label(name)
        self._traffic = metrics.traffic(label)
        self.transport = Transport(
            name,
            settings.connect,
            home,
            changed=self._changed,
            retried=metrics.retries.labels(label).inc,
            expires=lambda when: metrics.upstream_expiry.labels(*self._labels).set(when),
            clock=clock,
            shared=settings.shared,
        )
        self._health = self.transport.breaker(home)
        metrics.open.labels(label, self._host_label(self.host)).set(not self._health.closed)
        self._caller = False
        self._link: PeerLink | None = None
        self._elsewhere = AnonymousTokens(
            self._fetch, plain_http=settings.connect.plain_http, clock=clock, on_fetch=self._count_token
        )
        self._use(credentials)
        self._refusals = Refusals(name, metrics, clock, settings.shared.upstreams, self._accounts)

    @property
    def _labels(self) -> tuple[str, str]:
        return self._label, self._host_label(self.host)

    def _host_label(self, host: str) -> str:
        return host if self._label == self.name else self._label

    def _count_token(self, result: str) -> None:
        self._metrics.tokens.labels(self._label, result).inc()

    def _use(self, credentials: Sequence[Credentials]) -> None:
        table = None if self._caller else self._settings.shared.upstreams
        self._accounts = [each.account for each in credentials]
        accounts = [(self.name, self._url, each) for each in self._accounts]
        self._redirects = RedirectMemory(self._clock)
        self.budgets = Budgets(accounts, self._clock, table)
        self._tokens = [
            TokenCache(
                self.host,
                each,
                self._fetch,
                allowed_realms=self._settings.token_realms,
                plain_http=self._settings.connect.plain_http,
                clock=self._clock,
                on_fetch=self._count_token,
                on_login=partial(self._answered, number),
            )
            for number, each in enumerate(credentials)
        ]

    def _answered(self, credential: int, host: str, status: int) -> None:
        if not self._caller:
            self._refusals.answered(credential, host, status)

    def as_caller(self, credentials: Credentials) -> RequestSender:
        """A sender with a client's credentials, over the same connections.  Close it before this one."""
        caller = copy(self)
        caller._caller = True
        caller.reserve = lambda limit: 0
        caller._use([credentials])
        return caller

    def as_peer(self, link: PeerLink) -> RequestSender:
        """A sender of requests to another replica, over the same connections, which follow no redirects."""
        peer = copy(self)
        peer._link = link
        return peer

    @property
    def known(self) -> KnownUpstream:
        """What is known of the upstream."""
        budgets = list(zip(self._accounts, self.budgets, strict=True))
        return KnownUpstream(self._url, self._health, budgets, self._record_limit)

    # Health

    def _changed(self, host: str, error: RegistryError | None) -> None:
        self._metrics.open.labels(self._label, self._host_label(host)).set(error is not None)
        if error is not None:
            log.warning("upstream.opened", namespace=self.name, host=host, error=str(error))
        else:
            log.info("upstream.closed", namespace=self.name, host=host)

    @property
    def healthy(self) -> bool:
        """Whether the breaker of the upstream's own host is closed."""
        return self._health.closed

    @property
    def probe_due(self) -> bool:
        """Whether the upstream has failed and it is time to probe it."""
        return self._health.due

    def state(self) -> list[HostState]:
        """The state of each host: the upstream itself first, then those it has redirected to."""
        return [
            each.state(self._url, host, self.budgets.state(), self._refusals.state())
            if each is self._health
            else each.state(self._url, host)
            for host, each in self.transport.breakers()
        ]

    async def probe(self) -> None:
        """Send one request, which updates `healthy`."""
        with suppress(RegistryError):
            (await self.transport.send("GET", URL(f"{self._url}/v2/"), {})).release()

    # Requests

    def url(self, path: str) -> URL:
        """The URL of `path` under /v2/."""
        return URL(f"{self._url}/v2/{path}", encoded=True)

    async def send(self, request: UpstreamRequest) -> aiohttp.ClientResponse:
        """Send a request with the first credentials that work.  Raises the error that the response means."""
        denied: OriginDenied | None = None
        for number in self.budgets.take_turn():
            try:
                return await self._send_as(number, request)
            except TooManyRequests as error:
                seconds = self.budgets[number].refused(error.retry_after)
                log.warning("upstream.limited", namespace=self.name, host=self.host, credential=number,
                            seconds=round(seconds))  # fmt: skip
            except OriginDenied as error:
                denied = error
            if not request.repeatable:
                break
        # Credentials that are blocked by a rate limit might have been accepted.
        if denied is not None and not self.budgets.blocked_for:
            raise denied
        seconds = math.ceil(self.budgets.blocked_for)
        raise TooManyRequests(f"{self.name} limits our requests", retry_after=seconds)

    async def _send_as(self, number: int, request: UpstreamRequest) -> aiohttp.ClientResponse:
        tokens = self._tokens[number]
        url, scope = request.url, request.scope(self._pushed_to)
        # The location of an upload on another host is signed: that host must not get our credentials.
        ours = url.origin() == self.home.origin()
        authorization = await tokens.authorization(scope) if ours else await self._foreign(request, url)
        tries: dict[URL, int] = {}  # left, by origin
        while True:
            response = await self._send_once(request, authorization)
            if response.status not in (401, 403) or not request.repeatable:
                break
            origin = response.url.origin()
            used = authorization_of(response)
            # One renewal of refused credentials; the first challenge does not count.
            left = tries.setdefault(origin, 1 if used or authorization else 2)
            if not left:
                break
            tries[origin] -= 1
            direct = origin == url.origin()
            renewed = await self._renewed(tokens if ours and direct else None, request, response, scope, used)
            if renewed is None and (direct or not ours):
                break
            if direct:
                authorization = renewed
            # Else the redirect is followed anew: with a token, or to a newly signed URL if that has expired.
            response.release()
        home = ours and response.url.origin() == url.origin()
        if home and self.budgets[number].read(response.headers) and not self._caller:
            self._record_limit(number)
        # A list of all repositories is refused to almost everybody.
        if home and tokens.logged_in and authorization_of(response) and request.kind != "catalog":
            self._answered(number, self.host, response.status)
        if response.status in request.granted:
            return response
        error = await self._refused(response, request, home)
        denied = self._caller and home and type(error) is OriginDenied
        if denied and accepted(response.status, authorization):
            raise OriginForbidden(str(error), public=error.public)
        raise error

    async def _refused(
        self, response: aiohttp.ClientResponse, request: UpstreamRequest, home: bool
    ) -> RegistryError:
        content = b""
        if request.method not in READING:
            with suppress(RegistryError):  # then only its status is used
                raw = await self.transport.read(response, ERROR_LIMIT)
                content = self._decoded(response, raw, ERROR_LIMIT)
        error = error_from_response(self.name, response, request.repository, request.kind, content)
        if isinstance(error, TooManyRequests) and not home:
            # The limit is the CDN's, not that of these credentials.
            error = Unavailable(str(error), retry_after=error.retry_after)
        if request.repeatable:
            response.release()
        else:
            response.close()  # more of the request's body may be under way
        return error

    def _record_limit(self, number: int) -> None:
        labels = self._label, self._host_label(self.host), str(number)
        budget = self.budgets[number]
        if budget.remaining is not None:
            self._metrics.ratelimit_remaining.labels(*labels).set(budget.remaining)
        if budget.limit is not None:
            self._metrics.ratelimit_limit.labels(*labels).set(budget.limit)

    async def _foreign(self, request: UpstreamRequest, url: URL) -> str | None:
        """The Authorization for a URL that is not on the upstream's own host."""
        return await self._elsewhere.authorization(url) if request.method in READING else None

    async def _renewed(
        self,
        tokens: TokenCache | None,
        request: UpstreamRequest,
        response: aiohttp.ClientResponse,
        scope: str,
        used: str | None,
    ) -> str | None:
        """The Authorization to try after a refusal: by `tokens`, or anonymous if another host refused."""
        challenges = response.headers.getall("WWW-Authenticate", ())
        try:
            if tokens is not None:
                return await tokens.renew(scope, challenges, used)
            if request.method in READING:
                return await self._elsewhere.renew(response.url, challenges, used)
            return None
        except BaseException:
            response.release()
            raise

    async def _send_once(self, request: UpstreamRequest, authorization: str | None) -> aiohttp.ClientResponse:
        begun, status = time.monotonic(), 0
        self._traffic.count_request()
        headers = dict(request.headers)
        if authorization:
            headers["Authorization"] = authorization
        try:
            if self._link is not None:
                headers.update(self._link.headers())
                return await self._ask_peer(self._link, request, headers)
            response = await self.transport.follow(
                request.method, request.url, headers, request.body, partial(self._foreign, request),
                self._redirects if request.method == "GET" and request.kind == "blob" else None,
            )  # fmt: skip
            status = response.status
            return response
        finally:
            seconds = time.monotonic() - begun
            self._metrics.upstream.labels(self._label, request.kind, str(status)).observe(seconds)
            self._metrics.upstream_seconds.labels(*self._labels).observe(seconds)
            self._metrics.upstream_requests.labels(*self._labels, result_of(status)).inc()
            log.debug(
                "upstream.asked", namespace=self.name, method=request.method, path=request.url.path,
                status=status, seconds=round(seconds, 4),
            )  # fmt: skip

    async def _ask_peer(
        self, link: PeerLink, request: UpstreamRequest, headers: Mapping[str, str]
    ) -> aiohttp.ClientResponse:
        response = await self.transport.send(request.method, request.url, headers)
        try:
            link.check(response.headers)
        except BaseException:
            response.close()
            raise
        return response

    # Responses

    async def received(self, number: int) -> None:
        """Count `number` bytes of a blob, and wait as long as the bandwidth demands."""
        self._traffic.count_received(number)
        await self._bandwidth.take(number)

    async def document(
        self, request: UpstreamRequest, limit: int, take: Callable[[int], None] = ignore
    ) -> tuple[aiohttp.ClientResponse, bytes]:
        """A response and its decoded body, a small document; `take` is as in Transport.read().

        If it breaks off, the request is sent again.  Raises as send() and read() do.
        """
        for left in range(RETRIES, -1, -1):
            async with await self.send(request) as response:
                try:
                    raw = await self.transport.read(response, limit, take)
                    break
                except Interrupted:
                    if not left:
                        raise
        content = self._decoded(response, raw, limit)
        take(max(0, len(content) - len(raw)))
        return response, content

    def _decoded(self, response: aiohttp.ClientResponse, content: bytes, limit: int) -> bytes:
        self._traffic.count_received(len(content))
        return decoded(self.name, response, content, limit)

    async def _fetch(
        self, method: str, url: URL, *, headers: Any, form: Any = None
    ) -> TokenResponse:  # tokens.Fetch
        self._traffic.count_request()
        response, content = await self.transport.exchange(method, url, headers, form, MANIFEST_LIMIT)
        seconds = seconds_until(response.headers, time.time)
        if response.status == 429 and seconds is None:
            seconds = DEFAULT_BLOCK  # the window of the registry's limit does not apply to the realm's
        return TokenResponse(response.status, self._decoded(response, content, MANIFEST_LIMIT), seconds)

    async def close(self) -> None:
        for each in self._tokens:
            await each.close()
        if not self._caller:
            await self._elsewhere.close()
            await self.transport.close()
