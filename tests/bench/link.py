"""A network link before a server: bandwidth shared by all connections, and a delay each way.

`python link.py LISTEN_PORT TARGET_PORT BYTES_PER_SECOND DELAY_SECONDS`
"""

from __future__ import annotations

import asyncio
import sys

CHUNK = 1 << 16
IN_FLIGHT = 64  # chunks of one connection that are on their way in one direction
TICK = 0.002  # seconds that the link may run ahead: shorter sleeps are not kept


class Line:
    """One direction; whoever sends takes turns, a chunk each."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._free_at = 0.0
        self._turn = asyncio.Lock()

    async def send(self, size: int) -> float:
        """Wait until `size` bytes have gone in; the time at which they had."""
        loop = asyncio.get_running_loop()
        async with self._turn:
            self._free_at = max(self._free_at, loop.time()) + size / self._rate
            if (ahead := self._free_at - loop.time()) > TICK:
                await asyncio.sleep(ahead)
            return self._free_at


class Link:
    def __init__(self, target: int, rate: float, delay: float) -> None:
        self._target, self._delay = target, delay
        self._out, self._back = Line(rate), Line(rate)

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(2 * self._delay)  # the round trip of TCP's handshake
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._carry(self._out, reader, far_writer))
                both.create_task(self._carry(self._back, far_reader, writer))
        except* OSError:
            pass  # one end broke its connection: so does the link with the other
        finally:
            writer.close()
            far_writer.close()

    async def _carry(self, line: Line, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(IN_FLIGHT)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._deliver(queue, writer))
            while chunk := await reader.read(CHUNK):
                await queue.put((await line.send(len(chunk)) + self._delay, chunk))
            await queue.put((0.0, b""))

    async def _deliver(self, queue: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due, chunk = await queue.get()
            if not chunk:
                return writer.write_eof()
            if (early := due - loop.time()) > 0:
                await asyncio.sleep(early)
            writer.write(chunk)
            await writer.drain()


async def main(listen: int, target: int, rate: float, delay: float) -> None:
    link = Link(target, rate, delay)
    async with await asyncio.start_server(link.connect, "127.0.0.1", listen, limit=CHUNK) as server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])))
