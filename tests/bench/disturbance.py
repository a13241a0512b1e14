"""A relay before a registry that disturbs some of its answers.

`python disturbance.py LISTEN_PORT TARGET_PORT SHARE SEED`

Connections are closed without an answer, bodies are cut, by FIN or RST, or stand still, ranges are ignored,
or sent in part, lengths are left out, and requests are refused with 503.  Of the requests with the same path
no two in a row are disturbed: so each can succeed.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
import sys
from random import Random

PIECE = 1 << 16  # bytes
STALL = 4.0  # seconds, twice as long as clients wait for more
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_RANGE = re.compile(rb"\r\nrange:[^\r]*", re.IGNORECASE)
DISTURBANCES = ("closed", "refused", "cut", "reset", "stalled", "whole", "part", "chunked")


class Relay:
    def __init__(self, target: int, share: float, random: Random) -> None:
        self._target, self._share, self._random = target, share, random
        self._disturbed: set[bytes] = set()  # paths of which the last request was

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        source, target = await asyncio.open_connection("127.0.0.1", self._target)
        try:
            while await self._exchange(reader, writer, source, target):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # one of the two has left
        finally:
            writer.close()
            target.close()

    def _choose(self, path: bytes) -> str:
        if path in self._disturbed or self._random.random() >= self._share:
            self._disturbed.discard(path)
            return ""
        self._disturbed.add(path)
        return self._random.choice(DISTURBANCES)

    async def _exchange(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        source: asyncio.StreamReader,
        target: asyncio.StreamWriter,
    ) -> bool:
        """Whether the connection stays open."""
        head = await reader.readuntil(b"\r\n\r\n")
        method, path, _ = head.split(b" ", 2)
        disturbance = self._choose(path)
        if disturbance == "closed":
            return False
        if disturbance == "refused":
            writer.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
            return True
        target.write(_RANGE.sub(b"", head) if disturbance == "whole" else head)
        answer = await source.readuntil(b"\r\n\r\n")
        stated = _LENGTH.search(answer)
        length = int(stated[1]) if stated and method == b"GET" else 0
        if disturbance == "part" and answer.startswith(b"HTTP/1.1 206") and stated:
            sent = self._random.randrange(1, length + 1)
            writer.write(answer.replace(stated[0], b"\r\nContent-Length: %d" % sent))
            return await self._body(writer, source, sent) and sent == length
        if disturbance == "chunked" and length:
            writer.write(_LENGTH.sub(b"\r\nTransfer-Encoding: chunked", answer))
            writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (length, await source.readexactly(length)))
            return True
        writer.write(answer)
        if disturbance not in ("cut", "reset", "stalled") or not length:
            return await self._body(writer, source, length)
        position = self._random.randrange(length)
        await self._body(writer, source, position)
        if disturbance == "stalled":
            await asyncio.sleep(STALL)
            return await self._body(writer, source, length - position)
        if disturbance == "reset":
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
        return False

    async def _body(self, writer: asyncio.StreamWriter, source: asyncio.StreamReader, length: int) -> bool:
        while length:
            piece = await source.readexactly(min(length, PIECE))
            writer.write(piece)
            await writer.drain()
            length -= len(piece)
        return True


async def main() -> None:
    listen, target, share, seed = sys.argv[1:]
    relay = Relay(int(target), float(share), Random(seed))
    server = await asyncio.start_server(relay.connect, "127.0.0.1", int(listen), limit=1 << 20)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
