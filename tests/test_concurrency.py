"""Single flight, work in order, and waiting for threads."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Coroutine
from functools import partial
from typing import Any

import pytest

from storage.concurrency import SingleFlight, Waiters, for_each, shielded


class Tower:
    """Counts the calls, which stay in the air until a test lands them."""

    def __init__(self) -> None:
        self.calls = 0
        self.landing: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def fly(self) -> str:
        self.calls += 1
        return await shielded(self.landing)


async def in_the_air(*asking: Coroutine[Any, Any, Any]) -> list[asyncio.Task[Any]]:
    """Tasks of these, each of which has got as far as it gets."""
    tasks = [asyncio.create_task(each) for each in asking]
    for _ in range(3):  # turns: the task starts, the call starts, the call waits
        await asyncio.sleep(0)
    return tasks


async def test_only_those_wait_no_more_for_whom_it_is_so() -> None:
    waiters, reached, asked = Waiters(), 0, 0

    def past(number: int) -> bool:
        nonlocal asked
        asked += 1
        return reached >= number

    await waiters.until(lambda: past(0))
    one, two, gone = await in_the_air(*(waiters.until(partial(past, each)) for each in (1, 2, 1)))
    gone.cancel()
    await asyncio.wait([gone])
    asked = 0
    waiters.tell()
    assert asked == 2
    reached = 1
    waiters.tell()
    waiters.tell()  # before it runs
    await one
    assert not two.done()
    reached = 2
    waiters.tell()
    reached = 1  # it is not so any more when it runs
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not two.done()
    reached = 3
    waiters.tell()
    await two
    asked = 0
    waiters.tell()
    assert asked == 0


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


async def test_what_is_shielded_has_its_result_whoever_waits_no_longer() -> None:
    result = asyncio.get_running_loop().create_future()
    first, second = await in_the_air(shielded(result), shielded(result))
    first.cancel()
    await in_the_air()
    assert first.cancelled()
    result.set_result("here")
    assert await second == await shielded(result) == "here"
    cancelled = asyncio.get_running_loop().create_future()
    (third,) = await in_the_air(shielded(cancelled))
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await third


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
