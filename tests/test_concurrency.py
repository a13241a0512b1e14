"""Single flight, slots, bandwidth, and waiting for threads; and that fills keep to the bounds."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Coroutine
from functools import partial
from typing import Any

import pytest

from storage.concurrency import RateLimit, SingleFlight, Slots, for_each, share_of
from tests.conftest import Serve
from tests.upstream import Hold, Upstream


class Tower:
    """Counts the calls, which stay in the air until a test lands them."""

    def __init__(self) -> None:
        self.calls = 0
        self.landing: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def fly(self) -> str:
        self.calls += 1
        return await asyncio.shield(self.landing)


async def in_the_air(*asking: Coroutine[Any, Any, Any]) -> list[asyncio.Task[Any]]:
    """Tasks of these, each of which has got as far as it gets."""
    tasks = [asyncio.create_task(each) for each in asking]
    for _ in range(3):  # turns: the task starts, the call starts, the call waits
        await asyncio.sleep(0)
    return tasks


async def test_all_who_ask_meanwhile_share_one_call() -> None:
    flights, tower = SingleFlight(), Tower()
    tasks = await in_the_air(*(flights.join("key", tower.fly) for _ in range(20)))
    tower.landing.set_result("here")
    assert await asyncio.gather(*tasks) == ["here"] * 20
    assert tower.calls == 1


async def test_keys_fly_apart() -> None:
    flights, tower = SingleFlight(), Tower()
    tasks = await in_the_air(flights.join("a", tower.fly), flights.join(("a",), tower.fly))
    tower.landing.set_result("here")
    assert await asyncio.gather(*tasks) == ["here"] * 2
    assert tower.calls == 2


async def test_who_asks_after_the_landing_flies_anew() -> None:
    flights, tower = SingleFlight(), Tower()
    tower.landing.set_result("here")
    await flights.join("key", tower.fly)
    await flights.join("key", tower.fly)
    assert tower.calls == 2


async def test_a_failure_is_shared_and_not_kept() -> None:
    flights, tower = SingleFlight(), Tower()
    tasks = await in_the_air(*(flights.join("key", tower.fly) for _ in range(3)))
    tower.landing.set_exception(OSError("no runway"))
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(outcome, OSError)

    async def fly() -> str:
        return "here"

    assert await flights.join("key", fly) == "here"


async def test_one_who_leaves_disturbs_nobody_the_first_included() -> None:
    flights, tower = SingleFlight(), Tower()
    first, second, third = await in_the_air(*(flights.join("key", tower.fly) for _ in range(3)))
    first.cancel()
    third.cancel()
    assert isinstance((await asyncio.gather(first, return_exceptions=True))[0], asyncio.CancelledError)
    tower.landing.set_result("here")
    assert await second == "here"
    assert third.cancelled()


async def test_a_call_goes_on_when_all_have_left() -> None:
    flights, tower = SingleFlight(), Tower()
    (only,) = await in_the_air(flights.join("key", tower.fly))
    only.cancel()
    (later,) = await in_the_air(flights.join("key", tower.fly))
    tower.landing.set_result("here")
    assert await later == "here"
    assert tower.calls == 1


async def test_a_failure_that_nobody_waited_for_is_no_complaint_of_the_loop() -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    flights, failing = SingleFlight(), asyncio.Event()

    async def fly() -> None:
        await failing.wait()
        raise OSError("no runway")

    (only,) = await in_the_air(flights.join("key", fly))
    only.cancel()
    failing.set()
    await in_the_air()
    del only
    gc.collect()
    assert complaints == []


async def test_close_ends_what_is_in_the_air() -> None:
    flights, tower = SingleFlight(), Tower()
    (task,) = await in_the_air(flights.join("key", tower.fly))
    await flights.close()
    with pytest.raises(asyncio.CancelledError):
        await task
    await flights.close()


async def test_a_call_that_was_closed_before_its_first_step_is_not_remembered() -> None:
    flights, tower = SingleFlight(), Tower()
    join = partial(flights.join, "key", tower.fly)
    task = asyncio.ensure_future(join())
    await asyncio.sleep(0)  # it has asked; the call has not begun
    await flights.close()
    assert tower.calls == 0
    with pytest.raises(asyncio.CancelledError):
        await task
    tower.landing.set_result("here")
    assert await join() == "here"


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
    assert slept == [1.0]
    slept.clear()
    await RateLimit(None).take(1 << 40)
    assert slept == []


@pytest.mark.parametrize(("total", "workers", "each"), [(64, 1, 64), (64, 2, 32), (5, 2, 3), (1, 8, 1)])
def test_each_worker_has_its_part(total: int, workers: int, each: int) -> None:
    assert share_of(total, workers) == each


async def test_so_many_fills_at_once(serve: Serve, upstream: Upstream) -> None:
    digests = [upstream.blob("library/alpine", os.urandom(100_000)) for _ in range(3)]
    holds = [Hold(asyncio.Event(), after=10) for _ in digests]
    for digest, hold in zip(digests, holds, strict=True):
        upstream.next("GET", digest, hold)
    site = await serve(upstream, options={"max_fills": 2, "progress_timeout": "60s"})
    pulls = [asyncio.create_task(site.get(f"/v2/alpine/blobs/{digest}")) for digest in digests]
    await asyncio.gather(holds[0].reached.wait(), holds[1].reached.wait())
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


async def test_lazy_passes_a_range_through_and_fetches_no_more(serve: Serve, upstream: Upstream) -> None:
    content = os.urandom(300_000)
    digest = upstream.blob("library/alpine", content)
    site = await serve(upstream, lazy=True)
    for _ in range(2):
        status, headers, body = await site.get(f"/v2/alpine/blobs/{digest}", Range="bytes=1000-1999")
        assert (status, body) == (206, content[1000:2000])
        assert headers["Content-Range"] == "bytes 1000-1999/300000"
    assert [line.split()[0] for line in upstream.log] == ["GET", "GET"]
    assert upstream.bytes_sent == 2000
    # Asked for whole it is fetched, and then ranges are served from it.
    assert (await site.get(f"/v2/alpine/blobs/{digest}"))[2] == content
    upstream.clear()
    assert (await site.get(f"/v2/alpine/blobs/{digest}", Range="bytes=5-9"))[2] == content[5:10]
    assert upstream.log == []


async def test_the_blobs_of_an_upstream_keep_to_its_bandwidth(serve: Serve, upstream: Upstream) -> None:
    content = os.urandom(1_000_000)
    digest = upstream.blob("library/alpine", content)
    site = await serve(upstream, options={"bandwidth": "2MB"})
    begun = asyncio.get_running_loop().time()
    assert (await site.get(f"/v2/alpine/blobs/{digest}"))[2] == content
    assert asyncio.get_running_loop().time() - begun > 0.3


async def test_several_at_once_in_their_order() -> None:
    begun: list[int] = []
    gate = asyncio.Event()

    async def work(number: int) -> None:
        begun.append(number)
        await gate.wait()

    working = asyncio.create_task(for_each(work, range(5), 2))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert begun == [0, 1]
    gate.set()
    await working
    assert begun == [0, 1, 2, 3, 4]
    await for_each(work, [], 3)


async def test_the_first_failure_ends_all() -> None:
    ended: list[int] = []

    async def work(number: int) -> None:
        if number == 1:
            raise ValueError(number)
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(number)

    with pytest.raises(ValueError, match="1"):
        await for_each(work, range(5), 2)
    assert ended == [0]
