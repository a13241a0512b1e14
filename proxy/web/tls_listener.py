"""Accepting connections, with TLS or without.  With TLS they are counted before their handshake.

asyncio's own servers keep one TLS context forever, and report a connection only after its handshake: no limit
would apply to connections that never complete it.
"""

from __future__ import annotations

import asyncio
import socket

import structlog
from aiohttp import web

from proxy.web.kernel_tls import OP_ENABLE_KTLS
from proxy.web.listener import ON_ITS_WAY, Connection
from proxy.web.sockets import accept
from proxy.web.tls import Certificates, client_address, log_failure
from proxy.web.tls_transport import TLSTransport, shake_hands

log = structlog.get_logger()

HANDSHAKE = b"\x16"  # RFC 8446 §5.1: the content type with which every connection begins


class PlainSite(web.BaseSite):
    """Serves a listening socket without TLS."""

    _scheme = "http"

    def __init__(self, runner: web.BaseRunner, listening: socket.socket) -> None:
        super().__init__(runner)
        listening.setblocking(False)
        self._listening = listening
        self._handshakes: set[asyncio.Task[None]] = set()

    @property
    def name(self) -> str:
        address = self._listening.getsockname()  # of a unix socket a path
        return f"{self._scheme}://" + (
            address if isinstance(address, str) else ":".join(map(str, address[:2]))
        )

    async def start(self) -> None:
        await super().start()
        self._accepting = asyncio.create_task(self._accept())

    async def stop(self) -> None:
        """Stop accepting.  Accepted connections may complete their handshake, and are served."""
        self._accepting.cancel()
        await asyncio.wait((self._accepting,))
        self._listening.close()  # new clients go to their next host while transfers in flight end
        if self._handshakes:
            await asyncio.wait(self._handshakes, timeout=ON_ITS_WAY)
        for task in self._handshakes:
            task.cancel()
        await asyncio.gather(*self._handshakes, return_exceptions=True)
        await super().stop()

    async def _accept(self) -> None:
        async for client, peer in accept(self._listening):
            task = asyncio.create_task(self._receive(client, peer))
            self._handshakes.add(task)
            task.add_done_callback(self._handshakes.discard)

    async def _receive(self, client: socket.socket, peer: object) -> None:
        """Serve a client, or close the connection."""
        assert self._runner.server is not None
        connection = self._runner.server()
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: connection, client)
        except BaseException as error:
            client.close()
            if not isinstance(error, OSError):
                raise


class TLSSite(PlainSite):
    """Serves a listening socket with TLS.

    handshake, goodbye: seconds that the handshake and the closing of a connection may take
    """

    _scheme = "https"

    def __init__(
        self,
        runner: web.BaseRunner,
        listening: socket.socket,
        certificates: Certificates,
        *,
        handshake: float,
        goodbye: float,
    ) -> None:
        super().__init__(runner, listening)
        self._certificates = certificates
        self._handshake = handshake
        self._goodbye = goodbye

    async def _receive(self, client: socket.socket, peer: object) -> None:
        """Make the handshake with a client and serve it, or close the connection."""
        assert self._runner.server is not None
        connection = self._runner.server()
        client_address.set(str(peer[0]) if isinstance(peer, tuple) else "")
        try:
            if isinstance(connection, Connection) and not connection.enter(peer):
                raise ConnectionRefusedError
            async with asyncio.timeout(self._handshake):
                await self._shake_hands(client, connection)
        except BaseException as error:
            client.close()  # a transport, if there is one, has released the socket already
            if isinstance(connection, Connection):
                connection.leave()
            if isinstance(error, TimeoutError):
                late = "the client did not complete the handshake in time (limits.request_timeout)"
                log.info("handshake.failed", client=client_address.get(), error=late)
            if not isinstance(error, OSError):
                raise

    async def _shake_hands(self, client: socket.socket, connection: web.RequestHandler) -> None:
        """Make the handshake.  Raises OSError."""
        loop = asyncio.get_running_loop()
        if await _first(client) == HANDSHAKE:
            context = self._certificates.context()
            if context.options & OP_ENABLE_KTLS:
                tls = await shake_hands(client, context, log_failure)
                try:
                    TLSTransport(tls, connection, self._goodbye)
                except BaseException:
                    tls.close()
                    raise
                return
            await loop.connect_accepted_socket(
                lambda: connection,
                client,
                ssl=context,
                ssl_handshake_timeout=self._handshake,
                ssl_shutdown_timeout=self._goodbye,
            )
        elif isinstance(connection, Connection):
            # Plain HTTP: Listener answers with an error that says to use https.
            await loop.connect_accepted_socket(lambda: connection, client)
        else:
            raise ConnectionRefusedError


async def _first(client: socket.socket) -> bytes:
    """Return the first byte, without consuming it."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(client, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(client)
    return client.recv(1, socket.MSG_PEEK)
