"""Where connections come in by TLS: accepted, counted, and let in once they have shaken hands.

asyncio's own way in would do that with one context for ever, and tells of a connection only when it has
shaken hands: those that never do would be bounded by nothing.
"""

from __future__ import annotations

import asyncio
import socket

import structlog
from aiohttp import web

from proxy.web.listener import ON_ITS_WAY, Connection
from proxy.web.tls import Certificates, client_address

log = structlog.get_logger()

HANDSHAKE = b"\x16"  # RFC 8446 §5.1: the content type with which every connection begins
PAUSE = 1.0  # seconds before the next is accepted, where there is nothing to do it with, such as descriptors


class TLSSite(web.BaseSite):
    """At a socket that listens.  In seconds, a handshake may take `handshake`, the last bytes `goodbye`."""

    def __init__(
        self,
        runner: web.BaseRunner,
        listening: socket.socket,
        certificates: Certificates,
        *,
        handshake: float,
        goodbye: float,
    ) -> None:
        super().__init__(runner)
        self._listening = listening
        self._certificates = certificates
        self._handshake = handshake
        self._goodbye = goodbye
        self._greetings: set[asyncio.Task[None]] = set()

    @property
    def name(self) -> str:
        host, port = self._listening.getsockname()[:2]
        return f"https://{host}:{port}"

    async def start(self) -> None:
        await super().start()
        self._accepting = asyncio.create_task(self._accept())

    async def stop(self) -> None:
        """Accept nobody more; who was accepted may finish its handshake, to be served like the others."""
        self._accepting.cancel()
        await asyncio.wait((self._accepting,))
        if self._greetings:
            await asyncio.wait(self._greetings, timeout=ON_ITS_WAY)
        for task in self._greetings:
            task.cancel()
        await asyncio.gather(*self._greetings, return_exceptions=True)
        await super().stop()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, peer = await loop.sock_accept(self._listening)
            except ConnectionError:
                continue  # it has left already
            except OSError as error:
                log.error("accept.failed", error=error.strerror)
                await asyncio.sleep(PAUSE)
                continue
            task = asyncio.create_task(self._receive(client, peer))
            self._greetings.add(task)
            task.add_done_callback(self._greetings.discard)
            await asyncio.sleep(0)  # sock_accept() waits for nothing while more of them stand in line

    async def _receive(self, client: socket.socket, peer: object) -> None:
        """Let it in, or close it."""
        assert self._runner.server is not None
        connection = self._runner.server()
        client_address.set(str(peer[0]) if isinstance(peer, tuple) else "")
        try:
            if isinstance(connection, Connection) and not connection.enter(peer):
                raise ConnectionRefusedError
            async with asyncio.timeout(self._handshake):
                await self._greet(client, connection)
        except BaseException as error:
            client.close()  # where there is a transport, that has let go of it already
            if isinstance(connection, Connection):
                connection.leave()
            if not isinstance(error, OSError):
                raise

    async def _greet(self, client: socket.socket, connection: web.RequestHandler) -> None:
        """Raises OSError."""
        loop = asyncio.get_running_loop()
        if await _first(client) == HANDSHAKE:
            await loop.connect_accepted_socket(
                lambda: connection,
                client,
                ssl=self._certificates.context(),
                ssl_handshake_timeout=self._handshake,
                ssl_shutdown_timeout=self._goodbye,
            )
        elif isinstance(connection, Connection):
            # Its request is answered that it should come by TLS: Listener does that.
            await loop.connect_accepted_socket(lambda: connection, client)
        else:
            raise ConnectionRefusedError


async def _first(client: socket.socket) -> bytes:
    """The first byte, which stays to be read."""
    loop = asyncio.get_running_loop()
    come = asyncio.Event()
    loop.add_reader(client, come.set)
    try:
        await come.wait()
    finally:
        loop.remove_reader(client)
    return client.recv(1, socket.MSG_PEEK)
