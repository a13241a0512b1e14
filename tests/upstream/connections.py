"""HTTP/1.1 on loopback sockets, honest or not, as the answer wants it."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from functools import partial
from http.client import responses

from multidict import CIMultiDict, CIMultiDictProxy

from tests.upstream.faults import HangUp, Interruption
from tests.upstream.messages import Answer, Request, parse_request

_PIECE = 64 * 1024  # bytes written at a time


class Connections:
    """Two listening sockets, the registry's and the CDN's, and whoever is connected to them."""

    def __init__(self, decide: Callable[[Request], Answer]) -> None:
        self.ports = [0, 0]
        self.bytes_sent = 0  # of the answers that are counted, as handed to the kernel
        self.errors: list[Exception] = []  # of the fake itself, or of functions that tests gave it
        self._decide = decide
        self._open = False
        self._servers: list[asyncio.Server] = []
        self._conversations: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def start(self) -> None:
        """Listens; after `stop` on the same ports as before."""
        self._open = True
        for place in (0, 1):
            accept = partial(self._accept, bool(place))
            server = await asyncio.start_server(accept, "127.0.0.1", self.ports[place])
            self.ports[place] = server.sockets[0].getsockname()[1]
            self._servers.append(server)

    async def stop(self) -> None:
        """Refuses connections from now on and drops those that are open, held at a gate or not."""
        self._open = False
        servers, self._servers = self._servers, []
        for server in servers:
            server.close()
        conversations = dict(self._conversations)
        for task, writer in conversations.items():
            task.cancel()
            writer.transport.abort()
        await asyncio.gather(*conversations, return_exceptions=True)
        for server in servers:
            await server.wait_closed()
        # A transport closes its socket in the turn of the loop after the one in which it is told to.
        await asyncio.sleep(0)

    def _accept(self, cdn: bool, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._open:  # accepted by the loop before stop(), handed over after it
            writer.transport.abort()
            return
        task = asyncio.create_task(self._converse(cdn, reader, writer))
        self._conversations[task] = writer
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._conversations[task]
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self.errors.append(error)

    async def _converse(self, cdn: bool, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.set_write_buffer_limits(0)  # drain() means: the kernel has it
        try:
            while await self._exchange(cdn, reader, writer):
                pass
        except HangUp as hang_up:
            if hang_up.reset:
                await _reset(writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client went away
        finally:
            writer.close()

    async def _exchange(self, cdn: bool, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer; False when the connection ends with it.  RFC 9112."""
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").rstrip("\r\n").split("\r\n")
        method, target, version = first.split(" ")
        headers = CIMultiDict[str]()
        for line in lines:
            name, _, value = line.partition(":")
            headers.add(name, value.strip())
        body = await _body(reader, headers)
        request = parse_request(method, target, CIMultiDictProxy(headers), cdn, body)
        answer = self._decide(request)
        await self._send(writer, request, answer)
        keep = version == "HTTP/1.1" and headers.get("Connection", "").lower() != "close"
        return keep and not answer.hang_up

    async def _send(self, writer: asyncio.StreamWriter, request: Request, answer: Answer) -> None:
        bodiless = request.method == "HEAD" or answer.status == 304
        stops = sorted(answer.interruptions, key=lambda each: -1 if each.after is None else each.after)
        while stops and (bodiless or stops[0].after is None):
            await stops.pop(0).interrupt()
        chunked = answer.chunked and "Content-Length" not in answer.headers
        if chunked:
            answer.headers["Transfer-Encoding"] = "chunked"
        elif answer.status != 304:
            answer.headers.setdefault("Content-Length", str(len(answer.content)))
        lines = [f"HTTP/1.1 {answer.status} {responses.get(answer.status, 'Unknown')}"]
        lines += [f"{name}: {value}" for name, value in answer.headers.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape"))
        await writer.drain()
        if not bodiless:
            await self._send_body(writer, answer, stops, chunked)

    async def _send_body(
        self, writer: asyncio.StreamWriter, answer: Answer, stops: list[Interruption], chunked: bool
    ) -> None:
        position = 0
        for stop in [*stops, None]:
            end = len(answer.content) if stop is None or stop.after is None else stop.after
            while part := answer.content[position : min(end, position + _PIECE)]:
                writer.write(b"%x\r\n%b\r\n" % (len(part), part) if chunked else part)
                await writer.drain()
                position += len(part)
                self.bytes_sent += len(part) if answer.counted else 0
            if stop is not None:
                await stop.interrupt()
        if chunked:
            writer.write(b"0\r\n\r\n")
            await writer.drain()


async def _body(reader: asyncio.StreamReader, headers: CIMultiDict[str]) -> bytes:
    """RFC 9112 §6 and §7.1."""
    if headers.get("Transfer-Encoding", "").lower() != "chunked":
        return await reader.readexactly(int(headers.get("Content-Length", "0")))
    body = b""
    while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    await reader.readuntil(b"\r\n")
    return body


async def _reset(writer: asyncio.StreamWriter) -> None:
    """Ends the connection by RST, after the last byte written has left the machine's send queue.

    A reset discards what is queued, and the receiver would see fewer bytes than were written.  With this
    low-water mark the socket becomes writable only when nothing is unsent; the loop watches a duplicate, the
    transport's own descriptor being taken.
    """
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 1)
    loop, left = asyncio.get_running_loop(), asyncio.Event()
    with connection.dup() as twin:
        loop.add_writer(twin.fileno(), left.set)
        try:
            await left.wait()
        finally:
            loop.remove_writer(twin.fileno())
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
