"""TLS before a server that has none: `python -m tests.clients.front CERTIFICATE PORT`.

Listens at a free port of 127.0.0.1, which it prints, with the certificate and key in that file, and passes
all on to PORT.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import sys


async def front(certificate: str, port: int) -> None:
    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, there = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(reader, there), pump(back, writer))

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=context)
    print(f"listening at {server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(front(sys.argv[1], int(sys.argv[2])))
