"""Connections of clients, with limits on their number and on their time.

A connection that has begun a request must complete the request's head in time; a new connection counts as
having begun one.  Between requests it may idle for a while.  A client that takes nothing of a response is cut
off: by send_blob() while it sends a blob, by the Listener in other cases.  aiohttp limits the size of the
head.  Malformed HTTP is answered with an error in JSON, without any of its bytes: they may be a password.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import structlog
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import _ErrInfo

from proxy.connections.transports import abort
from proxy.web.backlog import Backlog, ClientProgress
from proxy.web.hits import Hits
from proxy.web.responses import error_response
from proxy.web.send import reset
from storage.shared import Holdings

log = structlog.get_logger()

LONGEST_HEADER = 64 << 10  # bytes of a header's line: clients request thousands of ranges at once
LONGEST_HEAD = 256 << 10  # bytes of the head of a request
PIECE = 64 << 10  # bytes of a large body that are handed to the transport at once
MOST_WAITING = 64 << 20  # bytes of large bodies that may wait for slow clients
LINGER = 2.0  # seconds in which the rest of a refused request may arrive
ENDED = 0.2  # seconds before the end of a shutdown in which requests that are still answered are ended
ON_ITS_WAY = 1.0  # seconds in which the head of a request must arrive after the server began to stop
TOLD = 1000  # addresses whose mistakes are remembered, to be logged once
_HELLO = "HTTPS traffic on an HTTP port"  # in the error of aiohttp for a TLS handshake

ServerHandler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits on the connections of clients; times in seconds."""

    connections_per_address: int = 1000
    request_timeout: float = 30.0
    idle_timeout: float = 75.0
    client_timeout: float = math.inf  # for taking nothing of a response


class Connection(web.RequestHandler):
    """A connection of a client, which a Listener serves."""

    __slots__ = (
        *("_alone", "_encrypted", "_head", "_lost", "_malformed", "_ordinary", "_progress", "_socket"),
        *("_whole", "address", "begun"),
    )

    def __init__(self, manager: web.Server, **options: Any) -> None:
        super().__init__(manager, **options)
        # Since when the head of a request is expected; None while none is.
        self.begun: float | None = None
        self.address: str | None = None  # None until enter()
        self._head = 0  # bytes of a request's head that have arrived; 0 when the head is complete
        self._malformed = False
        self._ordinary = False
        self._whole = True  # nothing of another request is in the parser
        self._alone = b""  # the bytes of the request in progress, if it has no body and no other one came
        self._lost = asyncio.Event()
        self._progress = ClientProgress()

    def enter(self, peer: object) -> bool:
        """Count the connection, and return whether it is admitted.

        With TLS this is called before the handshake, which may never complete.  The caller calls leave() if
        connection_made() does not follow.
        """
        self.address = str(peer[0]) if isinstance(peer, tuple) else ""
        return cast(Listener, self._manager).admit(self.address)

    def leave(self) -> None:
        if (manager := cast(Listener | None, self._manager)) is not None:
            manager.leave(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        # An asyncio transport with TLS cannot be asked for these any more once both ends have closed it.
        self._encrypted = transport.get_extra_info("sslcontext") is not None
        self._socket = transport.get_extra_info("socket")
        self.begun = self._loop.time()
        # Its requests are served by their bytes and by the client's address alone.
        as_expected = self._encrypted == cast(Listener, self._manager).encrypted
        self._ordinary = as_expected and not transport.get_extra_info("peercert")
        if self.address is None and not self.enter(transport.get_extra_info("peername")):
            self.force_close()

    def connection_lost(self, exc: BaseException | None) -> None:
        self.leave()
        self._lost.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._malformed:
            return  # the rest of a request that has been refused
        idle = self._whole and self._waiter is not None and not self._waiter.done() and not self._messages
        if idle and self._answered(data):
            return
        if self.begun is None and not self.answering:
            self.begun = self._loop.time()
        expecting = self._waiter is not None  # a head, not a body
        messages = len(self._messages)
        super().data_received(data)
        self._whole = self._is_whole(data, messages + 1)
        self._alone = data if idle and self._whole and data.startswith((b"GET ", b"HEAD ")) else b""
        self._head = self._head + len(data) if expecting and not self._messages else 0
        if self._head > LONGEST_HEAD and self._waiter is not None and not self._waiter.done():
            self._messages.append((_ErrInfo(431, LineTooLong(b"", LONGEST_HEAD), ""), EMPTY_PAYLOAD))
            self._waiter.set_result(None)

    def _answered(self, data: bytes) -> bool:
        """Answer a request that was seen before; return whether it was one."""
        hits, transport = cast(Listener, self._manager).hits, self.transport
        if (
            hits is None
            or transport is None
            or not self._ordinary
            or self._keepalive_handle is None  # the idle connection would stay open
            or self._paused
            or transport.is_closing()
            or transport.get_write_buffer_size()
            or not hits.answer(data, self.address or "", transport.write)
        ):
            return False
        self.begun = None
        self._request_count += 1
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        return True

    def _is_whole(self, data: bytes, messages: int) -> bool:
        """Whether `data` ended where the head of a request without a body does, so that `messages` wait."""
        return (
            len(self._messages) == messages  # first: most data are parts of a body, and long
            and data.find(b"\r\n\r\n") == len(data) - 4
            and self._messages[-1][1] is EMPTY_PAYLOAD
            and not self._upgraded
        )

    @property
    def answering(self) -> bool:
        return self._request_in_progress

    def dismiss(self) -> None:
        """Close a connection without a request in progress; with TLS, without waiting for the client."""
        transport = self.transport
        if transport is not None and self._encrypted:
            if not transport.is_closing():  # after a second close(), abort() does nothing
                transport.close()
            abort(transport)
        self.force_close()

    def stuck(self, now: float, patience: float) -> bool:
        """Whether the client has taken nothing of a response for so long.

        While a handler runs, send_blob() may be about to notice it, and says so in the request's log line.
        """
        if self.transport is None:
            return False
        idle = self._progress.idle(self._socket, now)
        return idle > (patience if self._current_request is None else 3 * patience)

    def cut_off(self, reason: str) -> None:
        """Reset the connection, so that the client does not take a part of a response for all of it."""
        log.info("client.cut_off", client=self.address, reason=reason)
        if self.transport is not None:
            reset(self.transport, self._socket)

    async def _drain_helper(self) -> None:
        if self._drain_waiter is not None and self._drain_waiter.cancelled():
            self._drain_waiter = None  # aiohttp keeps it, and would end each later wait at once
        await super()._drain_helper()

    async def shutdown(self, timeout: float | None = 15.0) -> None:
        # aiohttp waits for the handler, ends the body that the handler reads, and waits as long again.
        if timeout is not None and self.answering:
            whole, timeout = timeout, min(timeout, ENDED)
            self._handler_waiter = self._loop.create_future()
            await asyncio.wait((self._handler_waiter,), timeout=whole - timeout)
            self._handler_waiter = None
        await super().shutdown(None if timeout is None else timeout / 2)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            raise ConnectionResetError("part of a response was sent already")
        code, text = "UNSUPPORTED", "the request is not HTTP/1.1 as RFC 9112 defines it"
        if isinstance(exc, LineTooLong):
            text = f"the request's head, or a line of it, is longer than {exc.args[1]} bytes"
            status = 431 if exc.args[1] >= LONGEST_HEADER else status  # not if the target is too long
        elif status >= 500:
            code, text = "UNKNOWN", "the request cannot be served"
        elif _HELLO in str(exc):
            text = "this port serves plain http, but the client speaks TLS: use http://, or set tls: here"
            cast(Listener, self._manager).note_tls(self.address or "", text)
        # Not the error's text, which has bytes of the request.
        log.debug("request.malformed", client=request.remote, status=status, error=text)
        self._malformed = True
        response = cast(Listener, self._manager).refusal(code, text, status)
        response.force_close()
        return response

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        body = resp.body if isinstance(resp, web.Response) else None
        large = isinstance(body, bytes) and len(body) > PIECE and request.method != "HEAD"
        body = None  # _finish_large() alone holds it
        if large and self.transport is not None:
            return await self._finish_large(request, cast(web.Response, resp), start_time)
        alone, self._alone = self._alone, b""
        result = await super().finish_response(request, resp, start_time)
        manager = cast(Listener | None, self._manager)  # None if the client has left meanwhile
        if alone and self._ordinary and not result[1] and not self._malformed and manager is not None:
            await manager.learn(alone, request, resp)
        if self._paused and not result[1]:
            # aiohttp waits only in large responses: many small ones, requested at once, would pile up.
            await self._drain_helper()
        if self._malformed and self.transport is not None and self.transport.can_write_eof():
            # Closing with unread bytes would reset the connection, and the client could lose the response.
            self.transport.write_eof()
            with suppress(TimeoutError):
                async with asyncio.timeout(LINGER):
                    await self._lost.wait()
        return result

    async def _finish_large(
        self, request: web.BaseRequest, response: web.Response, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send a large body piece by piece: of all at once, the transport would hold a copy."""
        backlog = cast(Listener, self._manager).backlog
        reason = "too much waits for slow clients"
        body = backlog.add(cast(bytes, response.body), self._socket, lambda: self.cut_off(reason))
        response.body = None
        if body is None:
            log.info("client.postponed", client=self.address, waiting=backlog.size)
            refusal = cast(Listener, self._manager).refusal("UNAVAILABLE", "too many clients are slow", 503)
            refusal.headers["Retry-After"] = "1"
            refusal.force_close()
            return await super().finish_response(request, refusal, start_time)
        streamed = web.StreamResponse(status=response.status, headers=response.headers)
        streamed.content_length = size = len(body.content)
        if not response.keep_alive and response.keep_alive is not None:
            streamed.force_close()
        try:
            await streamed.prepare(request)
            for start in range(0, size, PIECE):
                await streamed.write(body.content[start : start + PIECE])
            return await super().finish_response(request, streamed, start_time)
        except ConnectionError:
            return streamed, True
        finally:
            backlog.remove(body)

    def log_exception(self, *args: Any, exc_info: Any = None, **kwargs: Any) -> None:
        """Log an exception that aiohttp has caught: without a traceback if a client caused it."""
        if isinstance(exc_info, HttpProcessingError | web.RequestPayloadError):
            log.debug("request.malformed", error="its body is malformed, or ended early")
        else:
            log.error("request.failed", exc_info=exc_info)


class Listener(web.Server):
    """A web.Server that enforces limits on its connections.

    A handler is cancelled when its client leaves, unless `handler_cancellation` is False.  An `encrypted`
    listener refuses requests without TLS.  `refusal` makes its errors of a code, a sentence and a status.
    All listeners with the same `connections`, those of other processes too, count together.  `hits` answers
    requests that were seen before.
    """

    def __init__(
        self,
        handler: ServerHandler,
        limits: ConnectionLimits,
        *,
        encrypted: bool = False,
        refusal: Callable[[str, str, int], web.Response] = error_response,
        handler_cancellation: bool = True,
        connections: Holdings | None = None,
        hits: Hits | None = None,
        **options: Any,
    ) -> None:
        self.refusal = refusal
        super().__init__(
            self._handle,
            handler_cancellation=handler_cancellation,
            access_log=None,
            keepalive_timeout=limits.idle_timeout,
            max_field_size=LONGEST_HEADER,
            auto_decompress=False,
            **options,
        )
        self.hits = hits
        self._handler = handler
        self.encrypted = encrypted
        self._limits = limits
        self._open = connections or Holdings()
        self.backlog = Backlog(MOST_WAITING, self._loop.time)
        self._told: set[str] = set()
        self._closing = False
        self._settled = asyncio.Event()
        self._sweeper: asyncio.TimerHandle | None = None
        self._sweep()

    def __call__(self) -> web.RequestHandler:
        return Connection(self, loop=self._loop, **self._kwargs)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = cast(Connection, request.protocol)
        connection.begun = None
        if self._closing:
            connection.close()  # after the response
            self._settle()
        if self.encrypted and not request.secure:
            message = "this port serves https, but the request came by plain http: use https://"
            response = self.refusal("UNSUPPORTED", message, 400)
            response.force_close()
            return response
        return await self._handler(request)

    async def learn(self, head: bytes, request: web.BaseRequest, response: web.StreamResponse) -> None:
        """Remember how a request of these bytes was answered."""
        if self.hits is not None:
            await self.hits.learn(head, request, response)

    def admit(self, address: str) -> bool:
        """Count a connection from `address`, and return whether it may stay."""
        most = self._limits.connections_per_address
        number = self._open.add(self._open.key(address))
        if number == most + 1:
            log.warning("client.refused", client=address, connections=most)
        return number <= most

    def note_tls(self, address: str, cause: str) -> None:
        """Log, once for each address, that a client speaks TLS to a port without."""
        if not self.encrypted and address not in self._told and len(self._told) < TOLD:
            self._told.add(address)
            log.info("handshake.failed", client=address, error=cause)

    def leave(self, connection: Connection) -> None:
        self._open.release(self._open.key(connection.address or ""))
        connection.begun = None
        self._settle()

    def _sweep(self) -> None:
        """Close overdue connections, periodically: a timer for each request would cost too much."""
        limit, patience = self._limits.request_timeout, self._limits.client_timeout
        now = self._loop.time()
        for connection in cast(list[Connection], self.connections):
            if connection.begun is not None and now - connection.begun > limit:
                connection.dismiss()
            elif connection.stuck(now, patience):
                connection.cut_off("it took nothing")
        self._sweeper = self._loop.call_later(min(limit, patience) / 4, self._sweep)

    # Shutdown

    def pre_shutdown(self) -> None:
        """Close idle connections, after accepting has stopped; a request that has begun is still answered."""
        self._closing = True
        self.hits = None  # from now on, responses say that the connection is closed
        for connection in cast(list[Connection], self.connections):
            if connection.answering:
                connection.close()
            elif connection.begun is None:
                connection.dismiss()  # close() would leave it open without a reader
        self._settle()

    def _settle(self) -> None:
        expected = any(each.begun is not None for each in cast(list[Connection], self.connections))
        if self._closing and not expected:
            self._settled.set()

    async def shutdown(self, timeout: float | None = None) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(ON_ITS_WAY if timeout is None else min(timeout, ON_ITS_WAY)):
                await self._settled.wait()
        await super().shutdown(timeout)
