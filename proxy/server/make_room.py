"""Room for what is coming in: who keeps house makes it, in a process of its own, and is asked over a socket.

One line each way: how many bytes are coming, and, when all is done that can be, an empty one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from storage.disk.health import MakeRoom

PATIENCE = 10.0  # seconds that a fill waits for room; without, it goes on uncached


def ask(socket: Path) -> MakeRoom:
    """To be called where another process serves `socket`; where it does not, nothing happens."""

    async def make_room(coming: int) -> None:
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(PATIENCE):
                reader, writer = await asyncio.open_unix_connection(str(socket))
                try:
                    writer.write(b"%d\n" % coming)
                    await reader.readline()
                finally:
                    writer.close()

    return make_room


async def serve(socket: Path, make_room: MakeRoom) -> Callable[[], Awaitable[None]]:
    """Answer those who ask; what it returns ends it."""
    serving: set[asyncio.Task[None]] = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(OSError, ValueError):
                await make_room(int(await reader.readline()))
                writer.write(b"\n")
        finally:
            writer.close()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(answer(reader, writer))
        serving.add(task)
        task.add_done_callback(serving.discard)

    # Under a name of its own first: a former keeper that drains still has the old one open.
    fresh = socket.with_name(f"{socket.name}.new")
    fresh.unlink(missing_ok=True)
    server = await asyncio.start_unix_server(connected, str(fresh))
    ours = fresh.stat().st_ino
    fresh.replace(socket)

    async def close() -> None:
        server.close()
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
        with suppress(FileNotFoundError):
            if socket.stat().st_ino == ours:
                socket.unlink()

    return close
