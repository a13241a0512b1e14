"""Connections of clients: what is not HTTP is answered in JSON; who hogs or dawdles is let go.

A connection that has begun a request must finish its head in time, a fresh one counts as having begun.
Between requests it may idle for a while.  aiohttp bounds the size of the head by itself.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import structlog
from aiohttp import web

from proxy.web.responses import error_answer

log = structlog.get_logger()

ServerHandler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


ON_ITS_WAY = 1.0  # seconds that a request begun may take to arrive, once the server is to end


@dataclass(frozen=True)
class Manners:
    """What is asked of clients; times in seconds."""

    connections_per_address: int = 1000
    request_timeout: float = 30.0
    idle_timeout: float = 75.0


class Connection(web.RequestHandler):
    __slots__ = ("address", "begun")

    def __init__(self, manager: web.Server, **options: Any) -> None:
        super().__init__(manager, **options)
        # Since when it owes us the head of a request; None while it does not.
        self.begun: float | None = None
        self.address: str | None = None  # None until it has come in

    def enter(self, peer: object) -> bool:
        """Whether it may.  By TLS that is asked before its handshake, which may never be finished.

        It is to leave() if connection_made() does not follow.
        """
        self.address = str(peer[0]) if isinstance(peer, tuple) else ""
        return cast(Listener, self._manager).admit(self.address)

    def leave(self) -> None:
        if (manager := cast(Listener | None, self._manager)) is not None:
            manager.leave(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.begun = self._loop.time()
        if self.address is None and not self.enter(transport.get_extra_info("peername")):
            self.force_close()

    def connection_lost(self, exc: BaseException | None) -> None:
        self.leave()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.begun is None and not self.answering:
            self.begun = self._loop.time()
        super().data_received(data)

    @property
    def answering(self) -> bool:
        return self._request_in_progress

    def dismiss(self) -> None:
        """Close it, with nothing under way; by TLS without waiting until the client has said goodbye."""
        transport = self.transport
        self.force_close()
        if transport is not None and transport.get_extra_info("sslcontext") is not None:
            transport.abort()

    async def shutdown(self, timeout: float | None = 15.0) -> None:
        # aiohttp waits so long for the handler, then once more, and only then cancels it.
        await super().shutdown(None if timeout is None else timeout / 2)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            raise ConnectionResetError("part of an answer was sent already")
        log.debug("request.malformed", client=request.remote, status=status, error=str(exc)[:300])
        text = (message or "the request cannot be served").splitlines()[0][:200]
        response = error_answer("UNSUPPORTED" if status < 500 else "UNKNOWN", text, status)
        response.force_close()
        return response


class Listener(web.Server):
    """A web.Server with manners.  Cancellation tells a handler that its client has left.

    One that is `encrypted` answers nothing that comes in plain.
    """

    def __init__(
        self, handler: ServerHandler, manners: Manners, *, encrypted: bool = False, **options: Any
    ) -> None:
        super().__init__(
            self._handle,
            handler_cancellation=True,
            access_log=None,
            keepalive_timeout=manners.idle_timeout,
            **options,
        )
        self._answer = handler
        self._encrypted = encrypted
        self._manners = manners
        self._addresses: Counter[str] = Counter()
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
            connection.close()  # when it has its answer
            self._settle()
        if self._encrypted and not request.secure:
            response = error_answer("UNSUPPORTED", "this port is for https, and was asked by http", 400)
            response.force_close()
            return response
        return await self._answer(request)

    def admit(self, address: str) -> bool:
        """Count it in; whether it may stay."""
        most = self._manners.connections_per_address
        self._addresses[address] += 1
        if self._addresses[address] == most + 1:
            log.warning("client.refused", client=address, connections=most)
        return self._addresses[address] <= most

    def leave(self, connection: Connection) -> None:
        address = connection.address or ""
        self._addresses[address] -= 1
        if not self._addresses[address]:
            del self._addresses[address]
        connection.begun = None
        self._settle()

    def _sweep(self) -> None:
        """Look at all now and then: a timer for each request would cost more than most requests do."""
        limit = self._manners.request_timeout
        now = self._loop.time()
        for connection in cast(list[Connection], self.connections):
            if connection.begun is not None and now - connection.begun > limit:
                connection.dismiss()
        self._sweeper = self._loop.call_later(limit / 4, self._sweep)

    # The end

    def pre_shutdown(self) -> None:
        """Close what is idle, now that nobody is accepted; a request on its way is still answered."""
        self._closing = True
        for connection in cast(list[Connection], self.connections):
            if connection.answering:
                connection.close()
            elif connection.begun is None:
                connection.dismiss()  # close() would leave it open, with nobody to read it
        self._settle()

    def _settle(self) -> None:
        owing = any(each.begun is not None for each in cast(list[Connection], self.connections))
        if self._closing and not owing:
            self._settled.set()

    async def shutdown(self, timeout: float | None = None) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(ON_ITS_WAY if timeout is None else min(timeout, ON_ITS_WAY)):
                await self._settled.wait()
        await super().shutdown(timeout)
