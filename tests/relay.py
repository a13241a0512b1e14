"""A relay before the fake upstream: with TLS, or as an HTTP proxy."""

from __future__ import annotations

import asyncio
import ssl

import trustme


class Relay:
    """Relays connections to the fake upstream: with TLS, or as an HTTP proxy (CONNECT and absolute URLs)."""

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self.port = 0
        self.seen: list[str] = []  # first lines of requests to the proxy
        self.authorizations: list[str] = []
        self._to = port
        self._tls = tls
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Relay:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()
        await asyncio.sleep(0)  # transports close their sockets in the loop's next turn

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        there: asyncio.StreamWriter | None = None
        try:
            first = b"" if self._tls else await self._proxied(reader, writer)
            back, there = await asyncio.open_connection("127.0.0.1", self._to)
            there.write(first)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, there))
                group.create_task(self._pump(back, writer))
        except* (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            for each in (writer, there):
                if each is not None:
                    each.transport.abort()

    async def _proxied(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        """What to say first at the other end."""
        head = await reader.readuntil(b"\r\n\r\n")
        line = head.partition(b"\r\n")[0].decode()
        self.seen.append(line)
        for each in head.decode().split("\r\n"):
            if each.lower().startswith("proxy-authorization:"):
                self.authorizations.append(each.partition(":")[2].strip())
        if line.startswith("CONNECT "):
            self._to = int(line.split(" ")[1].rpartition(":")[2])
            writer.write(b"HTTP/1.1 200 Connected\r\n\r\n")
            return b""
        method, url, version = line.split(" ")
        path = "/" + url.split("/", 3)[3]
        return f"{method} {path} {version}".encode() + head[len(line) :]

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError  # one end is enough: both are closed


def server_side(authority: trustme.CA, *, wants_client: bool = False) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost", "127.0.0.1").configure_cert(context)
    if wants_client:
        context.verify_mode = ssl.CERT_REQUIRED
        authority.configure_trust(context)
    return context
