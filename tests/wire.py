"""HTTP/1.1 by hand, for tests in which the very bytes matter."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from typing import NamedTuple

from multidict import CIMultiDict
from yarl import URL

PATIENCE = 20.0  # seconds; only a server that hangs takes them


class Reply(NamedTuple):
    status: int
    headers: CIMultiDict[str]
    body: bytes


class Wire:
    """One connection.  Whatever takes longer than PATIENCE raises TimeoutError."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, text: bytes) -> None:
        self.writer.write(text)
        await self.writer.drain()

    async def ask(self, method: str, target: str, *lines: str, body: bytes = b"") -> Reply:
        head = [f"{method} {target} HTTP/1.1", "Host: cache.test", *lines]
        head += [f"Content-Length: {len(body)}"] if body else []
        await self.send("\r\n".join([*head, "", ""]).encode("latin-1") + body)
        return await self.reply(method)

    async def head(self) -> tuple[int, CIMultiDict[str]]:
        """Status and headers; the body is still to be read."""
        async with asyncio.timeout(PATIENCE):
            first, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = CIMultiDict[str]()
        for line in filter(None, lines):
            name, _, value = line.partition(": ")
            headers.add(name, value)
        return int(first.split(" ")[1]), headers

    async def reply(self, method: str = "GET") -> Reply:
        """RFC 9112 §6.3."""
        status, headers = await self.head()
        if method == "HEAD" or status == 304:
            return Reply(status, headers, b"")
        if headers.get("Transfer-Encoding") == "chunked":
            return Reply(status, headers, await self._chunks())
        if "Content-Length" in headers:
            return Reply(status, headers, await self.read(int(headers["Content-Length"])))
        return Reply(status, headers, await self.rest())

    async def read(self, size: int) -> bytes:
        async with asyncio.timeout(PATIENCE):
            return await self.reader.readexactly(size)

    async def rest(self) -> bytes:
        """Everything until the server closes.  Raises ConnectionResetError where it breaks off."""
        async with asyncio.timeout(PATIENCE):
            return await self.reader.read()

    async def _chunks(self) -> bytes:
        body = b""
        while True:
            async with asyncio.timeout(PATIENCE):
                size = int(await self.reader.readline(), 16)
            chunk = await self.read(size + 2)
            if size == 0:
                return body
            body += chunk[:-2]


@cache
def anybody() -> ssl.SSLContext:
    """For a client whose concern is the bytes, not from whom they are."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # which loads no authorities: that takes 10 ms
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


@asynccontextmanager
async def connect(
    url: str, buffer: int | None = None, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Wire]:
    """A connection to `url`'s host; `buffer` bytes are taken from the network before somebody reads.

    By https any certificate will do, unless `tls` says otherwise.
    """
    to = URL(url)
    if to.scheme == "https" and tls is None:
        tls = anybody()
    client = socket.socket()
    if buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, (to.host, to.port))
    reader, writer = await asyncio.open_connection(
        sock=client, limit=buffer or 1 << 16, ssl=tls, server_hostname=to.host if tls else None
    )
    try:
        yield Wire(reader, writer)
    finally:
        writer.transport.abort()
        await asyncio.sleep(0)  # the transport closes its socket in the next turn of the loop
