"""Requests of the workers to the housekeeping process to make room on the disk, over a unix socket.

A request is one line with the number of bytes to come.  The answer is an empty line, once eviction is done.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from pathlib import Path

from proxy.web.sockets import accept, bind_unix
from storage.disk.health import MakeRoom

PATIENCE = 10.0  # seconds that a fill waits for room; after that it continues uncached


def ask(path: Path) -> MakeRoom:
    """A function that asks the process at the socket `path`.  It does nothing if no process serves that."""

    async def make_room(coming: int) -> None:
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(PATIENCE):
                reader, writer = await asyncio.open_unix_connection(str(path))
                try:
                    writer.write(b"%d\n" % coming)
                    await reader.readline()
                finally:
                    writer.close()

    return make_room


async def serve(path: Path, make_room: MakeRoom) -> Callable[[], Awaitable[None]]:
    """Serve requests at the socket `path`.  Returns a function that ends this."""
    # Under another name first: a former process that drains still serves the old socket.
    fresh = path.with_name(f"{path.name}.new")
    listening = bind_unix(fresh)
    ours = fresh.stat().st_ino
    fresh.replace(path)
    tasks: set[asyncio.Task[None]] = set()

    def begin(work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def accept_all() -> None:
        async for client, _ in accept(listening):
            begin(answer(client))

    async def answer(client: socket.socket) -> None:
        reader, writer = await asyncio.open_unix_connection(sock=client)
        try:
            with suppress(OSError, ValueError):
                await make_room(int(await reader.readline()))
                writer.write(b"\n")
        finally:
            writer.close()

    begin(accept_all())

    async def close() -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        listening.close()
        with suppress(FileNotFoundError):
            if path.stat().st_ino == ours:
                path.unlink()

    return close
