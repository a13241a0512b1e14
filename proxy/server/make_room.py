"""Requests of the workers to the housekeeping process to make room on the disk, over a unix socket.

A request is one line with the number of bytes to come.  The answer is an empty line, once eviction is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from storage.disk.health import MakeRoom

PATIENCE = 10.0  # seconds that a fill waits for room; after that it continues uncached


def ask(socket: Path) -> MakeRoom:
    """A function that asks the process at `socket`.  It does nothing if no process serves that."""

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
    """Serve requests at `socket`.  Returns a function that ends this."""
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

    # Under another name first: a former process that drains still serves the old socket.
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
