"""Slots and bandwidth: of one process, of several, and of a server."""

from __future__ import annotations

import asyncio
import errno
import os
import select
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.namespaces.composition import compose
from proxy.namespaces.hooks import Hooks
from proxy.server.fork import Parent
from storage.errors import StorageFailed
from storage.limits import RateLimit, Slots
from storage.oci import Digest
from storage.shared import Holdings, SharedState, SharedTable
from tests.conftest import Serve, configuration
from tests.forks import Forks, forking
from tests.upstream import Hold, Upstream


@pytest.fixture
async def forks() -> AsyncIterator[Forks]:
    async with forking() as forks:
        yield forks


async def test_turns_bound_the_total_and_each_share() -> None:
    turns = Slots(3, {"a": 2})
    inside: list[str] = []
    gate = asyncio.Event()

    async def go(name: str) -> None:
        async with turns.turn(name):
            inside.append(name)
            await gate.wait()

    tasks = [asyncio.create_task(go(name)) for name in ("a", "a", "a", "b", "b")]
    for _ in range(5):
        await asyncio.sleep(0)
    # The third a waits for its share, and does not keep b from the turn that is free.
    assert inside == ["a", "a", "b"]
    gate.set()
    await asyncio.gather(*tasks)
    assert sorted(inside) == ["a", "a", "a", "b", "b"]


async def _turns(loops: int = 20) -> None:
    for _ in range(loops):
        await asyncio.sleep(0)


async def test_who_is_urged_goes_on_without_a_slot() -> None:
    slots = Slots(1)
    gate, urged = asyncio.Event(), [asyncio.Event() for _ in range(3)]
    inside: list[int] = []

    async def go(number: int) -> None:
        async with slots.turn("a", urged=urged[number]):
            inside.append(number)
            await gate.wait()

    tasks = [asyncio.create_task(go(number)) for number in range(3)]
    await _turns()
    assert inside == [0]
    urged[2].set()
    await _turns()
    assert inside == [0, 2]
    gate.set()
    await asyncio.gather(*tasks)
    assert inside == [0, 2, 1]
    async with slots.turn("a"):  # all are given back, and no more than there were
        waiting = asyncio.create_task(go(0))
        urged[0].clear()
        await _turns()
        assert len(inside) == 3
    await waiting


async def test_who_comes_as_a_slot_is_free_does_not_pass_those_who_wait() -> None:
    slots, order = Slots(1), list[int]()

    async def go(number: int) -> None:
        async with slots.turn("a", urged=asyncio.Event()):
            order.append(number)

    async with slots.turn("a"):
        waiting = [asyncio.create_task(go(number)) for number in range(3)]
        await _turns()
    for number in range(3, 6):
        waiting.append(asyncio.create_task(go(number)))
        await _turns(1)
    await asyncio.gather(*waiting)
    assert order == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("freed", [True, False], ids=["as it gets one", "while it waits"])
async def test_who_is_cancelled_while_it_may_be_urged_keeps_no_slot(freed: bool) -> None:
    slots, urged = Slots(1), asyncio.Event()

    async def go() -> None:
        async with slots.turn("a", urged=urged):
            pass

    async with AsyncExitStack() as held:
        await held.enter_async_context(slots.turn("a"))
        waiting = asyncio.create_task(go())
        await _turns()
        if freed:
            await held.aclose()
            await _turns(1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    await _turns()
    async with asyncio.timeout(5), slots.turn("a"):
        pass


async def test_namespaces_with_one_key_share_a_limit() -> None:
    turns = Slots(9, {"*": 1}, key_of=lambda name: name if name == "own" else "*")
    inside: list[str] = []

    async def go(name: str) -> None:
        async with turns.turn(name):
            inside.append(name)

    async with turns.turn("a"):
        waiting = [asyncio.create_task(go(name)) for name in ("b", "a", "own")]
        for _ in range(5):
            await asyncio.sleep(0)
        assert inside == ["own"]
    await asyncio.gather(*waiting)
    assert inside == ["own", "b", "a"]


async def test_a_turn_is_given_back_when_it_fails_or_is_cancelled() -> None:
    turns = Slots(1, {"a": 1})
    with pytest.raises(ValueError, match="x"):
        async with turns.turn("a"):
            raise ValueError("x")
    async with turns.turn("a"):
        waiting = asyncio.create_task(turns.turn("b").__aenter__())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    async with turns.turn("b"):
        pass


async def test_bandwidth_makes_whoever_is_ahead_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    now, slept = [0.0], []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now[0])
    bandwidth = RateLimit(1000)
    for _ in range(10):
        await bandwidth.take(500)
    assert sum(slept) == pytest.approx(5, abs=0.2)
    now[0] = 100.0  # what was not taken meanwhile is not had afterwards
    slept.clear()
    await bandwidth.take(1000)
    assert sum(slept) == pytest.approx(1.0)
    slept.clear()
    await RateLimit(None).take(1 << 40)
    assert slept == []


async def test_so_many_fills_at_once(serve: Serve, upstream: Upstream) -> None:
    digests = [upstream.blob("library/alpine", os.urandom(100_000)) for _ in range(3)]
    holds = [Hold(asyncio.Event(), after=10) for _ in digests]
    for digest, hold in zip(digests, holds, strict=True):
        upstream.next("GET", digest, hold)
    site = await serve(upstream, options={"max_fills": 2, "progress_timeout": "60s"})
    pulls = []
    for digest, hold in zip(digests, holds, strict=True):
        pulls.append(asyncio.create_task(site.get(f"/v2/alpine/blobs/{digest}")))
        if hold is not holds[2]:
            await hold.reached.wait()
    assert len(upstream.log) == 2
    assert not holds[2].reached.is_set()
    # What needs no transfer is not held up.
    image = upstream.image("library/other", "latest")
    assert (await site.get("/v2/other/manifests/latest"))[2] == image.content
    holds[0].gate.set()
    await holds[2].reached.wait()
    holds[1].gate.set()
    holds[2].gate.set()
    for status, _, body in await asyncio.gather(*pulls):
        assert (status, len(body)) == (200, 100_000)


async def test_the_blobs_of_an_upstream_keep_to_its_bandwidth(serve: Serve, upstream: Upstream) -> None:
    content = os.urandom(1_000_000)
    digest = upstream.blob("library/alpine", content)
    site = await serve(upstream, options={"bandwidth": "2MB"})
    begun = asyncio.get_running_loop().time()
    assert (await site.get(f"/v2/alpine/blobs/{digest}"))[2] == content
    assert asyncio.get_running_loop().time() - begun > 0.3


# Shares


class Takers:
    """Holds a slot for each task, until it is cancelled."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.inside: list[str] = []
        self.tasks: dict[str, list[asyncio.Task[None]]] = {}

    async def start(self, share: str, number: int = 1) -> None:
        found = self.tasks.setdefault(share, [])
        found += [asyncio.create_task(self._hold(share)) for _ in range(number)]
        await some_turns()

    async def _hold(self, share: str) -> None:
        async with self.slots.turn("a", share):
            self.inside.append(share)
            try:
                await asyncio.Event().wait()
            finally:
                self.inside.remove(share)

    async def leave(self, share: str) -> None:
        self.tasks[share].pop(0).cancel()
        await some_turns()

    async def close(self) -> None:
        tasks = [task for each in self.tasks.values() for task in each]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize(("total", "each"), [(8, {}), (100, {"a": 8}), (8, {"a": 100})])
async def test_no_share_keeps_out_another(total: int, each: dict[str, int]) -> None:
    takers = Takers(Slots(total, each))
    inside = takers.inside
    await takers.start("one", 16)
    assert inside == ["one"] * 4
    await takers.start("two", 16)
    await takers.start("three", 16)
    assert inside == ["one"] * 4 + ["two"] * 2 + ["three"]
    await takers.start("four", 2)
    assert inside[-1] == "four"
    await takers.start("five")
    assert len(inside) == 8  # all
    await takers.leave("one")
    assert inside[-1] == "five"  # those that hold some wait
    for _ in range(3):
        await takers.leave("one")
    found = Counter(inside)  # who is woken first is not certain
    assert set(found) == {"one", "two", "three", "four", "five"}
    assert max(found.values()) == 2
    await takers.close()


async def test_who_waits_for_a_share_holds_up_no_other() -> None:
    takers = Takers(Slots(2))
    await takers.start("one", 5)
    await takers.start("two")
    assert takers.inside == ["one", "two"]
    await takers.start("")  # without a share
    await takers.leave("two")
    assert takers.inside == ["one", ""]
    await takers.close()


@given(
    total=st.integers(1, 9),
    steps=st.lists(st.tuples(st.sampled_from(["take", "release"]), st.integers(0, 4)), max_size=60),
)
def test_shares_of_what_is_held(total: int, steps: list[tuple[str, int]]) -> None:
    holdings = Holdings()
    shares = [holdings.key("share", number) for number in range(5)]
    all_of_them = holdings.key("all")
    held = [0] * 5
    for step, number in steps:
        free = total - sum(held)
        if step == "take":
            taken = holdings.take(all_of_them, total, shares[number])
            assert taken == (held[number] < free)
            assert taken or held[number] or not free  # none keeps out one that has none
            held[number] += taken
        elif held[number]:
            held[number] -= 1
            holdings.release(all_of_them)
            holdings.release(shares[number])
        assert [holdings.held(each) for each in shares] == held
        assert holdings.held(all_of_them) == sum(held) <= total


@pytest.mark.clients
async def test_ranges_of_one_blob_do_not_hold_up_another(serve: Serve, upstream: Upstream) -> None:
    size = 33 << 20  # more than comes soon
    digests = [upstream.blob("library/alpine", bytes([number]) * size) for number in range(2)]
    gate = asyncio.Event()
    holds = [Hold(gate, after=10) for _ in range(17)]
    for each in holds:
        upstream.next("GET", digests[0], each)
    upstream.next("GET", digests[1], Hold(gate, after=10))
    site = await serve(upstream, options={"max_fills": 4, "progress_timeout": "60s"})

    async def part(digest: str, at: int) -> bytes:
        return (await site.get(f"/v2/alpine/blobs/{digest}", Range=f"bytes={at}-{at + 9999}"))[2]

    begun = asyncio.create_task(part(digests[0], 0))
    await holds[0].reached.wait()
    pulls = [asyncio.create_task(part(digests[0], (17 << 20) + number * 100_000)) for number in range(16)]
    await holds[1].reached.wait()
    await holds[2].reached.wait()
    # Two ranges of it are transferred now, and fourteen wait.
    assert await part(digests[1], 32 << 20) == bytes([1]) * 10_000
    assert len(upstream.log) == 5
    gate.set()
    assert set(await asyncio.gather(begun, *pulls)) == {bytes(10_000)}
    for each in digests:
        await site.app.composition.fills.ended(Digest.parse(each))


# Of several processes


async def some_turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_slot_is_waited_for_until_another_process_leaves_it(forks: Forks) -> None:
    slots = Slots(5, {"a": 1}, forks.shared)

    async def wait(parent: Parent) -> int:
        async def take() -> None:
            async with slots.turn("a"):
                pass

        waiting = asyncio.create_task(take())
        await some_turns()
        if waiting.done():
            return 1
        parent.report("ready")
        await waiting
        return 0

    async with slots.turn("a"):
        processes = [await forks.start(wait) for _ in range(2)]
        async with slots.turn("b"):
            pass
    assert [await each.wait() for each in processes] == [0, 0]


@pytest.mark.parametrize("each", [{"a": 2}, {}])
async def test_the_slots_of_a_process_that_is_killed_are_free(forks: Forks, each: dict[str, int]) -> None:
    slots = Slots(2, each, forks.shared)

    async def hold(parent: Parent) -> int:
        async with slots.turn("a"), slots.turn("a"):
            parent.report("ready")
            await asyncio.Event().wait()
        return 0

    async def take() -> None:
        async with slots.turn("a"):
            pass

    process = await forks.start(hold)
    waiting = [asyncio.create_task(take()) for _ in range(3)]
    await some_turns()
    assert not any(each.done() for each in waiting)
    await forks.kill(process)
    await asyncio.gather(*waiting)
    async with slots.turn("a"), slots.turn("a"):
        pass


async def test_shares_are_those_of_all_processes(forks: Forks) -> None:
    slots = Slots(8, {"a": 4}, forks.shared)

    async def hold(parent: Parent) -> int:
        async with slots.turn("a", "one"), slots.turn("a", "one"):
            parent.report("ready")
            await asyncio.Event().wait()
        return 0

    process = await forks.start(hold)
    takers = Takers(slots)
    await takers.start("one")
    await takers.start("two")
    assert takers.inside == ["two"]
    async with slots.turn("a", "three"):
        await forks.kill(process)
        await takers.start("four")
        assert sorted(takers.inside) == ["four", "one", "two"]
    await takers.close()


async def test_a_process_that_is_killed_while_it_waits_keeps_nobody_waiting(forks: Forks) -> None:
    slots = Slots(1, {}, forks.shared)

    async def wait(parent: Parent) -> int:
        waiting = asyncio.create_task(slots.turn("a").__aenter__())
        await some_turns()
        parent.report("ready")
        await waiting
        return 0

    async with slots.turn("a"):
        process = await forks.start(wait)
        await forks.kill(process)
    async with slots.turn("a"):
        pass


async def test_many_processes_share_slots_and_all_get_their_turns(forks: Forks) -> None:
    slots = Slots(3, {"a": 2}, forks.shared)
    inside = forks.shared.connections

    async def work(parent: Parent) -> int:
        most = {"a": 0, "b": 0}

        async def take(name: str) -> None:
            async with slots.turn(name):
                most[name] = max(most[name], inside.add(inside.key(name)))
                await asyncio.sleep(0)
                inside.release(inside.key(name))

        await asyncio.gather(*[take(name) for name in ("a", "b", "a") * 10])
        return most["a"] * 10 + most["b"]

    statuses = await forks.run(work, 3)
    assert all(1 <= each // 10 <= 2 and 1 <= each % 10 <= 3 for each in statuses), statuses


async def test_without_descriptors_there_is_no_waiting(forks: Forks, monkeypatch: pytest.MonkeyPatch) -> None:
    slots = Slots(1, {}, forks.shared)

    def exhausted(size: int) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(select, "epoll", exhausted)
    async with slots.turn("a"):
        with pytest.raises(StorageFailed, match="other transfers: Too many open files"):
            await slots.turn("a").__aenter__()
    async with slots.turn("a"):
        pass


async def test_processes_of_former_limits_are_counted(forks: Forks) -> None:
    """As those are that drain after a reload."""
    before, after = Slots(9, {"a": 4}, forks.shared), Slots(9, {"a": 2}, forks.shared)

    async def take() -> None:
        async with after.turn("a"):
            pass

    first, second = before.turn("a"), before.turn("a")
    await first.__aenter__()
    async with second:
        waiting = asyncio.create_task(take())
        await some_turns()
        assert not waiting.done()
    await waiting
    await first.__aexit__(None, None, None)


async def test_the_housekeeping_leaves_half_of_the_slots_to_clients(tmp_path: Path) -> None:
    upstream = {"url": "http://localhost:1", "max_fills": 5}
    tree = {"disk": {"path": str(tmp_path / "disk")}, "namespaces": {"a": {"upstream": upstream}}}
    config, shared = configuration(tmp_path, tree), SharedState()
    clients = compose(config, shared=shared)
    housekeeping = compose(config, shared=shared, hooks=Hooks(background=True))
    async with AsyncExitStack() as held:
        for _ in range(2):
            await held.enter_async_context(housekeeping.fills._slots.turn("a"))
        waiting = asyncio.create_task(housekeeping.fills._slots.turn("a").__aenter__())
        await some_turns()
        assert not waiting.done()
        for _ in range(3):
            await held.enter_async_context(clients.fills._slots.turn("a"))
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    await clients.close()
    await housekeeping.close()


class Sleeper:
    """Time that passes only by sleep."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.slept: list[float] = []
        monkeypatch.setattr(asyncio, "sleep", self._sleep)
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: self.now)

    async def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


async def test_one_process_alone_has_all_of_the_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    table = SharedTable()
    one, *_ = [RateLimit(1000, table, "a") for _ in range(8)]
    time = Sleeper(monkeypatch)
    for _ in range(100):
        await one.take(50)
    assert time.now == pytest.approx(5, abs=0.11)
    await RateLimit(1000, table, "b").take(100)
    assert time.now == pytest.approx(5, abs=0.11), "another upstream has its own"


@pytest.mark.parametrize("processes", [2, 8])
async def test_all_processes_have_no_more_than_the_bandwidth(
    monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    table = SharedTable()
    limits = [RateLimit(1000, table, "a") for _ in range(processes)]
    time = Sleeper(monkeypatch)
    for number in range(160):
        await limits[number % processes].take(50)
    assert time.now == pytest.approx(8, abs=0.11)


async def test_what_another_process_has_received_counts(
    forks: Forks, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = forks.shared.upstreams

    async def receive(parent: Parent) -> int:
        with pytest.MonkeyPatch.context() as patch:
            time = Sleeper(patch)
            await RateLimit(1000, table, "a").take(7000)
            return int(time.now)

    assert await forks.run(receive) == [7]
    time = Sleeper(monkeypatch)
    await RateLimit(1000, table, "a").take(500)
    assert sum(time.slept) == pytest.approx(7.5)


@pytest.mark.parametrize(
    ("new", "takes"),
    [(4000.0, 1 + 9 / 4), (500.0, 1 + 9 * 2), (None, 1.0)],
    ids=["more", "less", "none"],
)
async def test_a_changed_rate_holds_for_transfers_that_wait(
    monkeypatch: pytest.MonkeyPatch, new: float | None, takes: float
) -> None:
    """10,000 bytes of a rate of 1000, which changes after a second."""
    table = SharedTable()
    transfer, parent = RateLimit(1000, table, "a"), RateLimit(1000, table, "a")
    time = Sleeper(monkeypatch)
    sleep, changed = time._sleep, False

    async def until_changed(seconds: float) -> None:
        nonlocal changed
        await sleep(seconds)
        if time.now >= 1 and not changed:
            changed = True
            parent.change(new)

    monkeypatch.setattr(asyncio, "sleep", until_changed)
    await transfer.take(10_000)
    assert time.now == pytest.approx(takes, rel=0.25)
    # Who comes later waits for the changed rate alone.
    before = time.now
    await RateLimit(1000, table, "a").take(2000)
    assert time.now - before == pytest.approx(0 if new is None else 2000 / new, abs=0.5)


async def test_a_rate_that_comes_later_holds_for_transfers_that_had_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = SharedTable()
    transfer = RateLimit(None, table, "a")
    time = Sleeper(monkeypatch)
    await transfer.take(1 << 40)
    RateLimit(None, table, "a").change(1000)
    time.now += 1
    await transfer.take(3000)
    assert time.now == pytest.approx(4)


async def test_the_change_of_one_upstream_leaves_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    table = SharedTable()
    RateLimit(1000, table, "a").change(None)
    time = Sleeper(monkeypatch)
    await RateLimit(1000, table, "b").take(2000)
    assert time.now == pytest.approx(2)
