"""The failures of disks as several disks and several processes know them."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from structlog.testing import LogCapture

from proxy.server.fork import Parent
from storage.disk.health import DiskHealth
from storage.disk.troubles import DISK, Trouble, Troubles
from storage.shared import SharedTable
from tests.conftest import Clock
from tests.forks import Forks, forking

FULL, BROKEN = os.strerror(errno.ENOSPC), os.strerror(errno.EIO)


def trouble(path: str = "/a/x", size: int = 0, kind: str = DISK, cause: str = FULL) -> Trouble:
    return Trouble(kind, 1, path.rpartition("/")[0], path, cause, size, 0.0)


def told(events: LogCapture) -> list[tuple[str, str]]:
    return [(each["event"].removeprefix("disk."), each["cause"]) for each in events.entries]


def test_the_first_path_and_the_largest_size_are_kept() -> None:
    troubles = Troubles()
    assert troubles.add(trouble("/a/first", 5))
    assert not troubles.add(trouble("/b/second", 9))
    assert not troubles.add(trouble("/c/third", 7))
    assert [(each.root, each.path, each.size) for each in troubles] == [("/a", "/a/first", 9)]
    assert troubles.add(trouble("/a/x", kind="blobs", cause=BROKEN))
    assert troubles.add(trouble("/b/x", kind="blobs", cause=BROKEN))  # another store
    assert troubles.add(trouble("/b/x", kind="records", cause=BROKEN))
    removed = troubles.remove(lambda each: each.kind == "blobs")
    assert sorted(each.root for each in removed) == ["/a", "/b"]
    assert {each.kind for each in troubles} == {DISK, "records"}


def test_the_longest_paths_fit() -> None:
    troubles = Troubles()
    path = "/é" * 1000 + "/" + "x" * 90
    assert troubles.add(trouble(path))
    assert [each.path for each in troubles] == [path]


@pytest.mark.errors("disk.failed")
def test_disks_on_one_device_are_full_together(tmp_path: Path, clock: Clock, events: LogCapture) -> None:
    shared = Troubles()
    cache, private = (DiskHealth(tmp_path / name, clock, shared) for name in ("cache", "private"))
    for name in ("cache", "private"):
        (tmp_path / name).mkdir()
    for each in (cache, private, cache):
        each.failed("blobs", tmp_path / "cache" / "x", OSError(errno.ENOSPC, FULL))
    assert told(events) == [("failed", FULL)]
    assert cache.troubles() == private.troubles() == [f"{tmp_path / 'cache' / 'x'}: {FULL}"]
    private.worked("records")
    assert told(events)[1:] == [("recovered", FULL)]
    assert cache.troubles() == []


@pytest.mark.errors("disk.failed")
def test_another_failure_is_of_one_store(tmp_path: Path, clock: Clock, events: LogCapture) -> None:
    shared = Troubles()
    cache, private = (DiskHealth(tmp_path / name, clock, shared) for name in ("cache", "private"))
    for each in (cache, private):
        each.failed("blobs", tmp_path / "x", OSError(errno.EIO, BROKEN), 10)
    assert told(events) == [("failed", BROKEN)] * 2
    cache.worked("records", 100)
    cache.worked("blobs", 9)
    assert len(cache.troubles()) == len(private.troubles()) == 1
    cache.worked("blobs", 10)
    assert (cache.troubles(), len(private.troubles())) == ([], 1)
    assert told(events)[2:] == [("recovered", BROKEN)]


def test_of_many_threads_one_adds_and_one_removes() -> None:
    troubles = Troubles(SharedTable(records=64, size=1000))
    with ThreadPoolExecutor(8) as pool:
        for number in range(50):
            added = pool.map(lambda _, number=number: troubles.add(trouble(size=number)), range(16))
            assert sum(added) == 1
            removed = pool.map(lambda _: len(troubles.remove(lambda each: True)), range(16))
            assert sum(removed) == 1


@pytest.fixture
async def forks() -> AsyncIterator[Forks]:
    async with forking() as forks:
        yield forks


@pytest.mark.clients
async def test_of_many_processes_one_adds_and_one_removes(forks: Forks) -> None:
    troubles = Troubles(forks.shared.disks)

    async def add(parent: Parent) -> int:
        parent.report("ready")
        return int(troubles.add(trouble()))

    async def remove(parent: Parent) -> int:
        parent.report("ready")
        return len(troubles.remove(lambda each: True))

    for work in (add, remove):
        assert sum(await forks.run(work, times=6)) == 1
    assert list(troubles) == []
