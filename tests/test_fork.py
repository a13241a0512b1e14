"""A process forked from a running event loop: what it reports, how it ends, and what it keeps open."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from proxy.server.fork import ForkedProcess, Parent, fork


async def outcome(work: Callable[[Parent], int], *keep: int) -> tuple[str, int]:
    """What it reported, and its status."""
    process = fork(work, keep)
    message = await process.message()
    return message, await process.wait()


def report(message: str, status: int = 0) -> Callable[[Parent], int]:
    def work(parent: Parent) -> int:
        parent.report(message)
        return status

    return work


@pytest.mark.parametrize("message", ["ready", "two\nlines, and more: é", "x" * 50_000])
async def test_a_message_arrives_whole(message: str) -> None:
    assert await outcome(report(message)) == (message, 0)


@pytest.mark.parametrize("status", [0, 1, 77])
async def test_the_result_is_the_status(status: int) -> None:
    assert await outcome(lambda parent: status) == ("", status)
    assert await outcome(lambda parent: sys.exit(status)) == ("", status)


async def test_an_exception_is_status_1() -> None:
    assert await outcome(lambda parent: 1 // 0) == ("", 1)


async def test_a_signal_is_a_negative_status() -> None:
    def work(parent: Parent) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    assert await outcome(work) == ("", -signal.SIGKILL)


async def test_it_runs_an_event_loop_of_its_own() -> None:
    async def serve(parent: Parent) -> int:
        await asyncio.sleep(0)
        parent.report("ready")
        return 3

    assert await outcome(lambda parent: asyncio.run(serve(parent))) == ("ready", 3)


def wait_for_parent(parent: Parent) -> int:
    async def wait() -> int:
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(parent.fileno(), ended.set)
        parent.report("ready")
        await ended.wait()
        return 0

    return asyncio.run(wait())


async def test_it_notices_the_end_of_its_parent() -> None:
    processes = [fork(wait_for_parent, ()) for _ in range(3)]
    # None holds another's connection open.
    for process in processes:
        assert await process.message() == "ready"
    for process in processes:
        process.leave()
        assert await process.wait() == 0


async def test_only_what_is_kept_stays_open() -> None:
    def work(parent: Parent) -> int:
        found = {int(each.name) for each in Path("/proc/self/fd").iterdir()}
        parent.report(json.dumps(sorted(each for each in found if Path(f"/proc/self/fd/{each}").exists())))
        return 0

    with socket.socket() as kept, socket.socket() as other:
        message, status = await outcome(work, kept.fileno())
        files = set(json.loads(message))
        assert status == 0
        assert {0, 1, 2, kept.fileno()} <= files
        assert other.fileno() not in files
        assert len(files) == 5  # and the connection


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_its_signals_do_not_reach_the_parent(number: signal.Signals) -> None:
    heard = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(number, heard.set)
    try:

        def work(parent: Parent) -> int:
            os.kill(os.getpid(), number)
            return 0

        assert await outcome(work) == ("", -number)
        await asyncio.sleep(0)
        assert not heard.is_set()
        os.kill(os.getpid(), number)  # its own still do
        await heard.wait()
    finally:
        loop.remove_signal_handler(number)


async def test_a_signal_to_one_that_has_ended_is_dropped() -> None:
    process: ForkedProcess = fork(lambda parent: 0, ())
    await process.message()
    await process.wait()
    process.send_signal(signal.SIGKILL)
