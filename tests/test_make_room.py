"""Who is asked for room over a socket is the one who makes it."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proxy.server import make_room as module
from storage.disk import health
from tests.events import Ear
from tests.test_start import fail_to_accept


@pytest.fixture
async def socket() -> AsyncIterator[Path]:
    with tempfile.TemporaryDirectory() as directory:  # a socket's path has to be short
        yield Path(directory) / "keeper.sock"


async def test_who_asks_waits_until_room_was_made(socket: Path) -> None:
    asked: list[int] = []
    gate, begun = asyncio.Event(), asyncio.Event()

    async def make_room(coming: int) -> None:
        asked.append(coming)
        begun.set()
        await gate.wait()

    close = await module.serve(socket, make_room)
    asking = asyncio.create_task(module.ask(socket)(7))
    await begun.wait()
    assert not asking.done()
    gate.set()
    await asking
    assert asked == [7]
    await close()
    assert not socket.exists()


async def test_where_nobody_keeps_house_nothing_happens(socket: Path) -> None:
    await module.ask(socket)(7)


async def test_who_asks_does_not_wait_for_ever(socket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.01)
    held = asyncio.Event()

    async def make_room(coming: int) -> None:
        await held.wait()

    close = await module.serve(socket, make_room)
    await module.ask(socket)(7)
    await close()


async def test_what_is_no_number_is_not_answered(socket: Path) -> None:
    async def make_room(coming: int) -> None:
        raise AssertionError

    close = await module.serve(socket, make_room)
    reader, writer = await asyncio.open_unix_connection(str(socket))
    writer.write(b"much\n")
    assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()
    await close()


async def test_who_comes_later_takes_over_and_who_goes_leaves_it_to_him(socket: Path) -> None:
    asked: list[str] = []

    def named(name: str) -> health.MakeRoom:
        async def make_room(coming: int) -> None:
            asked.append(name)

        return make_room

    first = await module.serve(socket, named("first"))
    await module.ask(socket)(1)
    second = await module.serve(socket, named("second"))
    await first()
    await module.ask(socket)(1)
    await second()
    assert asked == ["first", "second"]


@pytest.mark.errors("accept.failed")
async def test_without_descriptors_who_asks_waits(socket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def make_room(coming: int) -> None:
        made.append(coming)

    made: list[int] = []
    ear = Ear()
    allow = fail_to_accept(monkeypatch, 24)
    close = await module.serve(socket, make_room)
    asking = asyncio.create_task(module.ask(socket)(7))
    assert (await ear.heard("accept.failed"))["error"] == os.strerror(24)
    assert made == []
    allow.set()
    await asking
    assert made == [7]
    await close()
