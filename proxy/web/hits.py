"""Hits: answers to requests whose bytes were seen before, without parsing them again.

Clients of one kind send the same bytes again and again.  What the head of a request led to when it was served
in the usual way is remembered: whose access it needs, what is served, and the headers of the response.  When
the same bytes come again, the access and the content are checked, by what the usual way would ask, and the
response is written at once.

Everything else, and every doubt, is left to the usual way: a request with a condition, a range or a body; a
response other than 200; a tag that is no longer fresh; content that changed, is missing, or whose use has to
be recorded.  So both ways give the same bytes, log lines and counts, and tests/test_hits.py compares them.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from aiohttp import HttpVersion11, web
from aiohttp.helpers import rfc822_formatted_time

from proxy.access.authorization import Authorizer
from proxy.telemetry.ended import EndedRequests
from proxy.telemetry.exchange import Exchange, current_exchange
from proxy.telemetry.request_span import described
from proxy.telemetry.tracing import NO_SPAN, Attributes, Tracer
from proxy.web.responses import cache_headers, freshness
from proxy.web.routes import Endpoint, Route, parse
from storage.errors import RegistryError
from storage.oci import Digest, Tag
from storage.registry import Held, Registry, everything

LONGEST = 8 << 10  # bytes of a head that is remembered
SEEN = 4096  # heads that came once; only what comes again is remembered
OVERHEAD = 4096  # bytes, about, that remembering takes besides the head and the content
CLIENT = 200  # bytes, about, that it takes to remember that an address has access by a head
# A request with one of them is not the same each time, or not for this server alone to decide.
_DIFFERENT = (
    *("If-Match", "If-None-Match", "If-Modified-Since", "If-Unmodified-Since", "If-Range", "Range"),
    *("Content-Length", "Transfer-Encoding", "Expect", "Upgrade", "traceparent"),
)
_ID = "X-Request-Id"
_NO_HEADERS: Mapping[str, str] = {}


@dataclass(slots=True)
class _Answer:
    """What the bytes of a head lead to.

    exchange: that of each request in turn
    headers: those of the response; the values of those that change are of a response before
    tagged: whether what is served is named by a tag
    size: bytes that this takes, about
    granted: whether the credentials in the head still grant access to the addresses in `clients`; None if
        everybody has access
    """

    method: str
    exchange: Exchange
    held: Held
    body: bytes
    headers: list[tuple[str, str]]
    tagged: bool
    size: int
    granted: Callable[[], bool] | None
    described: Attributes  # of the span of a request
    clients: set[str] = field(default_factory=set)
    _state: object = None  # what the two parts were made for
    _before: bytes = b""  # the part of the response's head before the id of the request
    _after: bytes = b""

    def changing(self, date: str) -> dict[str, str]:
        """The headers of the response that depend on the time, but for the id."""
        return {
            "Date": date,
            **cache_headers(self.exchange),
            **({"Cache-Control": freshness(self.exchange)} if self.tagged else {}),
        }

    def response(self) -> bytes:
        """The response to the present exchange."""
        age, ttl, date = self.exchange.age, self.exchange.ttl, rfc822_formatted_time()
        state = (
            date,
            None if age is None else int(age),
            None if ttl is None else (int(ttl), int(ttl + (age or 0.0))),
        )
        if state != self._state:
            self._render(self.changing(date))
            self._state = state
        return b"".join((self._before, self.exchange.id.encode(), self._after, self.body))

    def _render(self, changing: Mapping[str, str]) -> None:
        self.headers = [(name, changing.get(name, value)) for name, value in self.headers]
        lines = [f"{name}: {value}\r\n" for name, value in self.headers]
        at = [name for name, _ in self.headers].index(_ID)
        self._before = "".join(("HTTP/1.1 200 OK\r\n", *lines[:at], f"{_ID}: ")).encode()
        self._after = "".join(("\r\n", *lines[at + 1 :], "\r\n")).encode()


_Key = tuple[object, bytes]  # who answers, and the head of a request


class HitMemory:
    """What heads of requests led to, in at most `size` bytes; the least recently used is dropped.

    One for all listeners of a process; to each, the same bytes may mean something else.
    """

    def __init__(self, size: int) -> None:
        self._room = size
        self._known: OrderedDict[_Key, _Answer] = OrderedDict()
        self._seen: OrderedDict[int, None] = OrderedDict()

    def get(self, key: _Key) -> _Answer | None:
        return self._known.get(key)

    def use(self, key: _Key) -> None:
        """Drop it after all others."""
        self._known.move_to_end(key)

    def came_before(self, key: _Key) -> bool:
        """Whether it was asked for before, as far as that is remembered; it is from now on."""
        mark = hash(key)
        if key in self._known or mark in self._seen:
            return True
        self._seen[mark] = None
        if len(self._seen) > SEEN:
            self._seen.popitem(last=False)
        return False

    def put(self, key: _Key, answer: _Answer) -> None:
        if key in self._known:  # another connection was as quick
            self.forget(key)
        self._known[key] = answer
        self._take(answer.size)

    def grant(self, answer: _Answer, client: str) -> None:
        """Remember that it grants access to `client` too."""
        answer.clients.add(client)
        answer.size += CLIENT
        self._take(CLIENT)

    def forget(self, key: _Key) -> None:
        self._room += self._known.pop(key).size

    def _take(self, size: int) -> None:
        self._room -= size
        while self._room < 0:
            self._room += self._known.popitem(last=False)[1].size


class Hits:
    """Answers requests whose heads are in `memory`, for one listener.

    ids: those of the requests of this server
    answered: how many requests were answered here
    """

    def __init__(
        self,
        registry: Registry,
        authorizer: Authorizer | None,
        ended: EndedRequests,
        ids: Iterator[str],
        memory: HitMemory,
        tracer: Tracer,
    ) -> None:
        self._registry = registry
        self._authorizer = authorizer
        self._ended = ended
        self._ids = ids
        self._memory = memory
        self._tracer = tracer
        self.answered = 0

    def answer(self, head: bytes, client: str, write: Callable[[bytes], None]) -> bool:
        """Write the response to a request of these bytes, and return whether it is known."""
        key = (self, head)
        if (known := self._memory.get(key)) is None:
            return False
        begun = time.perf_counter()
        if known.granted is not None:
            if client not in known.clients:
                return False
            if not known.granted():
                self._memory.forget(key)
                return False
        try:
            validity = known.held.validity()
        except RegistryError:
            validity = None
        exchange = known.exchange
        if validity is None or validity.result != exchange.result:
            self._memory.forget(key)
            return False
        self._memory.use(key)
        exchange.id, exchange.client = next(self._ids), client
        exchange.span = self._tracer.request(_NO_HEADERS)
        if exchange.span.recorded:
            exchange.span.set(known.described)
        exchange.age, exchange.ttl = validity.age, validity.ttl
        write(known.response())
        self.answered += 1
        self._ended.add(known.method, exchange, 200, time.perf_counter() - begun)
        return True

    async def learn(self, head: bytes, request: web.BaseRequest, response: web.StreamResponse) -> None:
        """Remember what a request of these bytes led to, whose response has just been sent.

        Called in the context of its exchange.
        """
        exchange = current_exchange.get(None)
        if exchange is None or len(head) > LONGEST:
            return
        memory, key = self._memory, (self, head)
        if not _repeatable(request, response, exchange) or not memory.came_before(key):
            return
        known = memory.get(key)
        if known is None:
            granted = await self._granted(request, f"{exchange.namespace}/{exchange.repository}")
            known = self._make(head, request, response, exchange, granted)
            if known is None:
                return
            memory.put(key, known)
        remembered = memory.get(key) is known
        if remembered and known.granted is not None and exchange.client not in known.clients:
            memory.grant(known, exchange.client)

    async def _granted(self, request: web.BaseRequest, name: str) -> Callable[[], bool] | None:
        if self._authorizer is None or self._authorizer.is_public(name):
            return None
        return await self._authorizer.renewal(request, name)

    def _make(
        self,
        head: bytes,
        request: web.BaseRequest,
        response: web.StreamResponse,
        exchange: Exchange,
        granted: Callable[[], bool] | None,
    ) -> _Answer | None:
        route, name = parse(request.rel_url.raw_path), f"{exchange.namespace}/{exchange.repository}"
        held = self._hold(route, name)
        if held is None or held.descriptor != exchange.content:
            return None
        body = held.content if request.method == "GET" else b""
        if body is None or len(body) != exchange.bytes:
            return None
        known = _Answer(
            request.method,
            replace(exchange, visible=everything, span=NO_SPAN),  # neither connection nor trace is kept
            held,
            body,
            list(response.headers.items()),
            isinstance(route.reference, Tag),
            OVERHEAD + len(head) + len(held.content or b""),
            granted,
            described(request),
        )
        return known if _explains(known, response) else None

    def _hold(self, route: Route, name: str) -> Held | None:
        try:
            if route.kind is Endpoint.BLOB and isinstance(route.reference, Digest):
                return self._registry.hold_blob(name, route.reference)
            if route.kind is Endpoint.MANIFEST and route.reference is not None:
                return self._registry.hold_manifest(name, route.reference)
        except RegistryError:  # it has just been removed
            pass
        return None


def _repeatable(request: web.BaseRequest, response: web.StreamResponse, exchange: Exchange) -> bool:
    """Whether the same bytes lead to the same response while content and access are the same."""
    return (
        response.status == 200
        and exchange.result in ("hit", "")
        and not exchange.detail
        and not exchange.warning
        and not exchange.verdicts
        and exchange.as_of is None
        and not exchange.upstream_requests
        and not exchange.peer
        and exchange.content is not None
        and request.version == HttpVersion11
        and response.keep_alive is True
        and request.headers.get("Connection", "keep-alive").lower() == "keep-alive"
        and not any(name in request.headers for name in _DIFFERENT)
    )


def _explains(known: _Answer, response: web.StreamResponse) -> bool:
    """Whether the response that was sent has the headers that change as `known` makes them, and no others."""
    sent = response.headers
    changing = known.changing(sent.get("Date", ""))
    return (
        all(sent.getall(name, []) == [value] for name, value in changing.items())
        and all(name in changing for name in ("Age", "Cache-Status") if name in sent)
        and sent.getall(_ID, []) == [known.exchange.id]
    )
