"""What processes share: of one process, and of real ones that are forked and killed."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from proxy.server.fork import Parent
from storage.shared import WINDOW, Bell, Holdings, SharedState, SharedTable
from tests.forks import Forks, forking


@pytest.fixture
async def forks() -> AsyncIterator[Forks]:
    async with forking() as forks:
        yield forks


class Pair(msgspec.Struct, array_like=True):
    name: str = ""
    number: float = 0.0


# The table


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (int, 0),
        (int, -(1 << 40)),
        (float, 0.1),
        (bool, True),
        (Pair, Pair("é", 2.5)),
        (dict[int, int], {7: 1}),
    ],
)
def test_what_is_written_is_read(kind: Any, value: object) -> None:
    table = SharedTable()
    key = table.key("a", 1)
    assert table.get(key, kind) is None
    table.put(key, value)
    table.put(table.key("a", 2), "another")
    assert table.get(key, kind) == value
    table.put(key, value)
    assert sorted(table) == sorted([key, table.key("a", 2)])
    table.discard(key)
    table.discard(key)
    assert table.get(key, kind) is None
    assert table.get(table.key("a", 2), str) == "another"


def test_parts_of_a_key_do_not_run_together() -> None:
    table = SharedTable()
    keys = {table.key(*parts) for parts in [("a", "b"), ("ab",), ("a", "b", ""), ("a,b",), (1,), ("1",)]}
    assert len(keys) == 6
    assert table.key("a") != SharedTable().key("a"), "nobody outside can tell a key"


def test_a_full_table_drops_what_was_written_least_recently() -> None:
    table = SharedTable(records=WINDOW, size=16)
    keys = [table.key(number) for number in range(WINDOW + 10)]
    for key in keys[:WINDOW]:
        table.put(key, key)
    table.put(keys[0], 5)
    for key in keys[WINDOW:]:
        table.put(key, key)
    assert sorted(table) == sorted([keys[0], *keys[11:]])
    assert table.get(keys[0], int) == 5
    assert [table.get(key, int) for key in keys[11:]] == keys[11:]


def test_a_value_that_is_too_long_changes_nothing() -> None:
    table = SharedTable(size=16)
    key = table.key("a")
    table.put(key, "x" * 13)
    with pytest.raises(ValueError, match="15 bytes is too long"):
        table.put(key, "y" * 14)
    assert table.get(key, str) == "x" * 13


async def test_changes_of_several_processes_are_not_lost(forks: Forks) -> None:
    table = forks.shared.upstreams
    key = table.key("count")

    async def count(parent: Parent) -> int:
        for _ in range(200):
            with table.lock, table.lock:
                table.put(key, (table.get(key, int) or 0) + 1)
        return 0

    assert await forks.run(count, 4) == [0] * 4
    assert table.get(key, int) == 800


async def test_a_process_that_is_killed_releases_the_lock(forks: Forks) -> None:
    table = forks.shared.upstreams
    key = table.key("a")

    async def hold(parent: Parent) -> int:
        with table.lock:
            table.put(key, "whole")
            parent.report("ready")
            signal.pause()
        return 0

    process = await forks.start(hold)
    with pytest.raises(BlockingIOError):
        fcntl.lockf(forks.shared.descriptors()[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    await forks.kill(process)
    assert table.get(key, str) == "whole"


class Deadly:
    """Kills the process that assigns to it."""

    def __setitem__(self, at: int, value: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("before", [None, "before"])
async def test_a_record_that_was_being_written_does_not_exist(forks: Forks, before: str | None) -> None:
    table = forks.shared.upstreams
    key = table.key("a")
    if before is not None:
        table.put(key, before)

    async def write(parent: Parent) -> int:
        table._written = Deadly()  # type: ignore[assignment]
        table.put(key, "after")
        return 0

    assert await forks.run(write) == [-signal.SIGKILL]
    assert table.get(key, str) is None
    table.put(key, "again")
    assert table.get(key, str) == "again"


# Who holds what


def test_one_more_only_below_the_limit() -> None:
    held = Holdings()
    a, b = held.key("a"), held.key("b")
    assert [held.take(a, 2) for _ in range(3)] == [True, True, False]
    assert held.take(b, 1)
    held.release(a)
    assert held.take(a, 2)
    assert [held.add(a), held.add(a)] == [3, 4], "it is counted beyond any limit"
    for _ in range(9):
        held.release(a)
    assert (held.held(a), held.held(b)) == (0, 1)


def test_nothing_is_kept_of_what_is_not_held() -> None:
    table = SharedTable(size=64)
    held = Holdings(table)
    for number in range(1000):
        held.add(held.key(number))
        held.release(held.key(number))
    assert list(table) == []


async def test_what_processes_hold_adds_up_until_they_are_dead(forks: Forks) -> None:
    held = forks.shared.slots
    key, other = held.key("a"), held.key("other")

    async def hold(parent: Parent) -> int:
        held.add(key)
        held.add(key)
        held.add(other)
        parent.report("ready")
        signal.pause()
        return 0

    first, second = [await forks.start(hold) for _ in range(2)]
    assert held.add(key) == 5
    assert not held.take(key, 5)
    await forks.kill(first)
    assert (held.held(key), held.held(other)) == (3, 1)
    assert held.take(key, 5)
    await forks.kill(second)
    assert (held.held(key), held.held(other)) == (2, 0)


async def test_many_processes_never_hold_more_than_the_limit(forks: Forks) -> None:
    held = forks.shared.slots
    key, inside = held.key("a"), held.key("inside")

    async def work(parent: Parent) -> int:
        got = most = 0
        while got < 100:
            if held.take(key, 2):
                got += 1
                most = max(most, held.add(inside))
                held.release(inside)
                held.release(key)
        return most

    assert set(await forks.run(work, 3)) <= {1, 2}
    assert held.held(key) == 0


# The bell


async def test_a_bell_wakes_all_who_listen() -> None:
    bell = Bell()
    with bell.listen() as first, bell.listen() as second:
        assert not first.is_set()
        bell.ring()
        assert first.is_set() and second.is_set()
        first.clear()
    bell.ring()
    assert not first.is_set()


async def test_a_bell_wakes_those_who_listen_in_other_processes(forks: Forks) -> None:
    bell = forks.shared.bell

    async def hear(parent: Parent) -> int:
        with bell.listen() as one, bell.listen() as two:
            parent.report("ready")
            await one.wait()
            await two.wait()
        return 0

    processes = [await forks.start(hear) for _ in range(2)]
    with bell.listen() as rung:
        for _ in range(3):
            bell.ring()
            await rung.wait()
            rung.clear()
    assert [await each.wait() for each in processes] == [0, 0]


async def test_what_one_process_has_alone_needs_no_descriptor() -> None:
    before = list(Path("/proc/self/fd").iterdir())
    alone = SharedState()
    assert len(list(Path("/proc/self/fd").iterdir())) == len(before)
    assert alone.descriptors() == []
    alone.forget(os.getpid())
    alone.close()
