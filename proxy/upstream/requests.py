"""One registry across the network, asked: with whichever credentials, counted, its refusals translated.

Knows no endpoint: what is asked for, and what an answer says, is the business of reading.py and client.py.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp
import msgspec
import structlog
from yarl import URL

from proxy.config.quantities import seconds_until
from proxy.telemetry.metrics import Metrics
from proxy.upstream.body import StreamedBody
from proxy.upstream.breaker import HostState
from proxy.upstream.credentials import Credentials
from proxy.upstream.errors import ERROR_LIMIT, error_from_response
from proxy.upstream.ratelimit import UNTOLD, Budgets
from proxy.upstream.tokens import Answer, TokenCache
from proxy.upstream.transport import Connect, Transport
from storage.concurrency import RateLimit
from storage.errors import (
    ManifestUnknown,
    OriginDenied,
    OriginFailed,
    RegistryError,
    TooManyRequests,
    Unavailable,
)
from storage.oci import MANIFEST_LIMIT

log = structlog.get_logger()

LISTING_LIMIT = 16 << 20  # bytes of one page
PAGES = 1000
_READING = ("GET", "HEAD")


@dataclass(frozen=True)
class Settings:
    """`url` ends before /v2; `token_realms` are hosts that may be asked for tokens besides its own.

    Blobs keep to `bandwidth`, which several upstreams may share.
    `reserve` says how much of a rate limit is kept for what is not known yet; nothing, if it says 0.
    Where it is `pushed_to`, reading asks for the same token as pushing: it spares another one, and there are
    registries that show a repository that is not there yet to nobody who may only pull.
    """

    url: str
    connect: Connect = field(default_factory=Connect)
    token_realms: tuple[str, ...] = ()
    reserve: Callable[[int], float] = lambda limit: 0
    bandwidth: RateLimit = field(default_factory=RateLimit)
    pushed_to: bool = False


@dataclass(frozen=True, slots=True)
class UpstreamRequest:
    """`kind` is what it is counted as; `granted` are the statuses of an answer with what was asked for.

    `also` are scopes that a token must allow besides what the method needs in `repository`.
    """

    method: str
    url: URL
    kind: str
    repository: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | StreamedBody | None = None
    also: str = ""
    granted: Collection[int] = (200, 206)

    def scope(self, pushed_to: bool) -> str:
        """Token specification, "Requesting a Token"; the actions that Distribution's servers ask for."""
        actions = "pull" if self.method in _READING and not pushed_to else "pull,push"
        # Who cancels an upload shows the token that it was begun with; Distribution's then ask for another.
        if self.method == "DELETE" and self.kind != "upload":
            actions = "delete"
        ours = f"repository:{self.repository}:{actions}" if self.repository else ""
        return " ".join(filter(None, (ours, self.also)))

    @property
    def repeatable(self) -> bool:
        """Whether it can be sent once more: a body that was written while it was sent is gone."""
        return not isinstance(self.body, StreamedBody)


class RequestSender:
    """Needs a running event loop.  Of `credentials` there is at least one."""

    def __init__(
        self,
        name: str,
        settings: Settings,
        credentials: Sequence[Credentials],
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        home = URL(settings.url)
        self.name = name
        self.home = home
        self.host = home.host_port_subcomponent or ""
        self.reserve = settings.reserve
        self._settings = settings
        self._url = settings.url.rstrip("/")
        self._metrics = metrics
        self._clock = clock
        self._bandwidth = settings.bandwidth
        self._pushed_to = settings.pushed_to
        self._traffic = metrics.traffic(name)
        self.transport = Transport(
            name,
            settings.connect,
            home,
            changed=self._changed,
            retried=metrics.retries.labels(name).inc,
            clock=clock,
        )
        metrics.open.labels(name, self.host).set(0)
        self._health = self.transport.breaker(home)
        self._caller = False
        self._show(credentials)

    def _show(self, credentials: Sequence[Credentials]) -> None:
        self.budgets = Budgets(len(credentials), self._clock)
        self._tokens = [
            TokenCache(
                self.host,
                each,
                self._fetch,
                allowed_realms=self._settings.token_realms,
                plain_http=self._settings.connect.plain_http,
                clock=self._clock,
                on_fetch=lambda result: self._metrics.tokens.labels(self.name, result).inc(),
            )
            for each in credentials
        ]

    def as_caller(self, credentials: Credentials) -> RequestSender:
        """The same, by the same connections, with credentials that are not ours.  To be closed before it."""
        caller = copy(self)
        caller._caller = True
        caller.reserve = lambda limit: 0
        caller._show([credentials])
        return caller

    # Health

    def _changed(self, host: str, error: RegistryError | None) -> None:
        self._metrics.open.labels(self.name, host).set(error is not None)
        if error is not None:
            log.warning("upstream.opened", namespace=self.name, host=host, error=str(error))
        else:
            log.info("upstream.closed", namespace=self.name, host=host)

    @property
    def well(self) -> bool:
        """As far as is known, it answers."""
        return self._health.closed

    @property
    def due(self) -> bool:
        """It did not answer, and it is time to find out whether it does."""
        return self._health.due

    def state(self) -> list[HostState]:
        """Of the upstream itself first, then of where it has sent us."""
        return [
            each.state(self._url, host, self.budgets.state() if each is self._health else [])
            for host, each in self.transport.breakers()
        ]

    async def probe(self) -> None:
        """Find out; `well` tells."""
        with suppress(RegistryError):
            (await self.transport.send("GET", URL(f"{self._url}/v2/"), {})).release()

    # Asking

    def to(self, path: str) -> URL:
        """The URL of what is at `path` under /v2/."""
        return URL(f"{self._url}/v2/{path}", encoded=True)

    async def send(self, question: UpstreamRequest) -> aiohttp.ClientResponse:
        """A response with content, with whichever credentials.  Raises what its status says, translated."""
        denied: OriginDenied | None = None
        for number in self.budgets.take_turn():
            try:
                return await self._ask_as(number, question)
            except TooManyRequests as error:
                seconds = self.budgets[number].refused(error.retry_after)
                log.warning("upstream.limited", namespace=self.name, host=self.host, credential=number,
                            seconds=round(seconds))  # fmt: skip
            except OriginDenied as error:
                denied = error
            if not question.repeatable:
                break
        # Whoever is blocked might have been let in.
        if denied is not None and not self.budgets.blocked_for:
            raise denied
        seconds = math.ceil(self.budgets.blocked_for)
        raise TooManyRequests(f"{self.name} limits our requests", retry_after=seconds)

    async def _ask_as(self, number: int, question: UpstreamRequest) -> aiohttp.ClientResponse:
        tokens = self._tokens[number]
        url, scope = question.url, question.scope(self._pushed_to)
        # Where an upload goes on elsewhere, its location is signed: who we are is not for that host.
        ours = url.origin() == self.home.origin()
        authorization = await tokens.authorization(scope) if ours else None
        # One renewal of what was refused; learning first what is wanted does not count.
        tries = (1 if authorization else 2) if ours and question.repeatable else 0
        while True:
            response = await self._timed(question, authorization)
            if response.status not in (401, 403) or not tries:
                break
            tries -= 1
            if response.url.origin() == url.origin():
                renewed = await self._renewed(tokens, response, scope, authorization)
                if renewed is None:
                    break
                authorization = renewed
            # Else a signed URL has lapsed: from the start there is a fresh one.
            response.release()
        home = ours and response.url.origin() == url.origin()
        if home and self.budgets[number].read(response.headers) and not self._caller:
            self._tell(number)
        if response.status in question.granted:
            return response
        raise await self._refused(response, question, home)

    async def _refused(
        self, response: aiohttp.ClientResponse, question: UpstreamRequest, home: bool
    ) -> RegistryError:
        content = b""
        if question.method not in _READING:
            with suppress(RegistryError):  # then its status has to do
                content = await self.content(response, ERROR_LIMIT)
        error = error_from_response(self.name, response, question.repository, question.kind, content)
        if isinstance(error, TooManyRequests) and not home:
            # A CDN's limit has nothing to do with these credentials.
            error = Unavailable(str(error), retry_after=error.retry_after)
        if question.repeatable:
            response.release()
        else:
            response.close()  # of its body there may be more on its way
        return error

    def _tell(self, number: int) -> None:
        labels = self.name, self.host, str(number)
        budget = self.budgets[number]
        if budget.remaining is not None:
            self._metrics.ratelimit_remaining.labels(*labels).set(budget.remaining)
        if budget.limit is not None:
            self._metrics.ratelimit_limit.labels(*labels).set(budget.limit)

    async def _renewed(
        self, tokens: TokenCache, response: aiohttp.ClientResponse, scope: str, used: str | None
    ) -> str | None:
        try:
            return await tokens.renew(scope, response.headers.getall("WWW-Authenticate", ()), used)
        except BaseException:
            response.release()
            raise

    async def _timed(self, question: UpstreamRequest, authorization: str | None) -> aiohttp.ClientResponse:
        begun, status = time.monotonic(), 0
        self._traffic.asked()
        headers = dict(question.headers)
        if authorization:
            headers["Authorization"] = authorization
        try:
            response = await self.transport.follow(question.method, question.url, headers, question.body)
            status = response.status
            return response
        finally:
            seconds = time.monotonic() - begun
            self._metrics.upstream.labels(self.name, question.kind, str(status)).observe(seconds)
            log.debug(
                "upstream.asked", namespace=self.name, method=question.method, path=question.url.path,
                status=status, seconds=round(seconds, 4),
            )  # fmt: skip

    # Answers

    async def took(self, number: int) -> None:
        """So many bytes of a blob have come."""
        self._traffic.took(number)
        await self._bandwidth.take(number)

    async def content(self, response: aiohttp.ClientResponse, limit: int) -> bytes:
        """The body of a small document, decoded.  Raises OriginFailed, OriginTimeout."""
        content = await self.transport.read(response, limit)
        self._traffic.took(len(content))
        encoding = encoding_of(response)
        if not encoding:
            return content
        if encoding in ("gzip", "x-gzip", "deflate"):
            try:
                decoder = zlib.decompressobj(wbits=47 if "gzip" in encoding else zlib.MAX_WBITS)
                decoded = decoder.decompress(content, limit + 1)
            except zlib.error:
                raise OriginFailed(f"{self.name} sent a body that is not {encoding}") from None
            if len(decoded) <= limit and decoder.eof:
                return decoded
        raise OriginFailed(f"{self.name} sent a body in {encoding} though identity was asked for")

    async def pages(self, question: UpstreamRequest) -> AsyncIterator[Any]:
        """The pages of a listing, as plain JSON values.  distribution-spec, "Content Discovery"."""
        asked: UpstreamRequest | None = question
        for _ in range(PAGES):
            if asked is None:
                return
            async with await self.send(asked) as response:
                content = await self.content(response, LISTING_LIMIT)
                link = response.links.get("next")
            try:
                yield msgspec.json.decode(content)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                # Some registries without a referrers API answer with a page for people.
                nonsense = ManifestUnknown if question.kind == "referrers" else OriginFailed
                raise nonsense(f"{self.name} answered {question.url.path} with no JSON") from None
            asked = replace(question, url=URL(str(link["url"]))) if link else None
            if asked is not None and asked.url.origin() != self.home.origin():
                raise OriginFailed(f"{self.name} lists on at another host, {asked.url.host}")
        raise OriginFailed(f"{self.name} lists more than {PAGES} pages of {question.url.path}")

    async def _fetch(
        self, method: str, url: URL, *, headers: Any, form: Any = None
    ) -> Answer:  # tokens.Fetch
        self._traffic.asked()
        response = await self.transport.send(method, url, headers, form)
        async with response:
            content = await self.content(response, MANIFEST_LIMIT)
            seconds = seconds_until(response.headers, time.time)
            if response.status == 429 and seconds is None:
                seconds = UNTOLD  # the window of the registry's limit says nothing of this one
            return Answer(response.status, content, seconds)

    async def close(self) -> None:
        for each in self._tokens:
            await each.close()
        if not self._caller:
            await self.transport.close()


def encoding_of(response: aiohttp.ClientResponse) -> str:
    """The content's coding; "" is the identity."""
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    return "" if encoding == "identity" else encoding
