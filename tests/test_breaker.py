"""The policy alone, with a clock; its effect on a server is in test_upstream_outage and test_ratelimit."""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress
from typing import Any

import pytest
from multidict import CIMultiDict

from proxy.config.quantities import MAX_RETRY_AFTER, seconds_until
from proxy.server.fork import Parent
from proxy.upstream.breaker import FAILURES, LAST, Breaker, Outlook
from proxy.upstream.ratelimit import DEFAULT_BLOCK, LONGEST_BLOCK, Budget, Budgets
from storage.errors import OriginFailed, OriginTimeout, RegistryError
from storage.shared import SharedState, SharedTable
from tests.conftest import Clock
from tests.forks import forking

CUT = OriginFailed("cut")
SLOW = OriginTimeout("slow")


class Host:
    """A breaker, and what it says."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.changes: list[RegistryError | None] = []
        self.breaker = Breaker(clock, self.changes.append)

    def fail(self, error: RegistryError = CUT, *, final: bool = False) -> None:
        with self.breaker.call() as call:
            call.failed(error, final=final)

    def succeed(self) -> None:
        with self.breaker.call() as call:
            call.succeeded()

    def refusal(self) -> RegistryError:
        with pytest.raises(RegistryError) as caught, self.breaker.call():
            pytest.fail("the call went out")
        return caught.value

    @property
    def open_for(self) -> float:
        return self.refusal().retry_after or 0.0


@pytest.fixture
def host(clock: Clock) -> Host:
    return Host(clock)


def test_a_time_out_opens_it_at_once(host: Host) -> None:
    host.fail(SLOW, final=True)
    assert host.open_for == 1
    assert host.changes == [SLOW]


def test_a_time_out_is_one_failure_of_several_if_the_host_has_answered_meanwhile(
    host: Host, clock: Clock
) -> None:
    for _ in range(FAILURES + 1):
        with host.breaker.call() as slow:
            clock.advance(1)
            host.succeed()
            clock.advance(1)
            slow.failed(SLOW, final=True)
        assert host.breaker.closed, "one object is slow, not the host"
        host.succeed()
    host.succeed()
    clock.advance(1)
    host.fail(SLOW, final=True)
    assert host.open_for == 1, "it was silent since"


def test_failures_in_a_row_open_it(host: Host) -> None:
    for _ in range(FAILURES - 1):
        host.fail()
    assert host.breaker.closed
    host.fail()
    assert not host.breaker.closed


def test_an_answer_in_between_starts_the_row_anew(host: Host) -> None:
    for _ in range(FAILURES):
        host.fail()
        host.succeed()
    assert host.breaker.closed
    assert host.changes == []


def test_a_refusal_is_of_the_kind_that_opened_it_and_says_when_to_come_back(host: Host, clock: Clock) -> None:
    host.fail(SLOW, final=True)
    clock.advance(0.75)
    refusal = host.refusal()
    assert type(refusal) is OriginTimeout
    assert refusal.retry_after == 0.25
    assert str(refusal).startswith("slow; ")


def test_it_is_open_for_a_second_doubling_to_thirty(host: Host, clock: Clock) -> None:
    host.fail(final=True)
    seconds = []
    for _ in range(8):
        seconds.append(host.open_for)
        clock.advance(seconds[-1])
        host.fail()  # the probe
    assert seconds == [1, 2, 4, 8, 16, LAST, LAST, LAST]
    assert host.changes == [CUT], "it has been open all the time"


def test_a_host_that_may_be_back_in_a_moment_is_asked_sooner(clock: Clock) -> None:
    breaker, asked = Breaker(clock, moment=3.0), [0.0]
    assert breaker.pause is None
    while True:
        with breaker.call() as call:
            call.failed(CUT, Outlook.SOON, final=True)
        if (pause := breaker.pause) is None:
            break
        assert breaker.state("", "").seconds == pause
        clock.advance(pause / 2)
        assert breaker.pause == pause / 2, "for whoever comes now"
        clock.advance(pause / 2)
        asked.append(asked[-1] + pause)
    assert asked == [0, 0.25, 0.5, 0.75, 1.125, 1.6875, 2.53125, 3.796875]
    assert breaker.state("", "").seconds == 2 * 1.265625, "then less and less often"


def test_it_is_known_to_be_down_until_it_has_answered(clock: Clock) -> None:
    breaker = Breaker(clock, moment=3.0)
    for _ in range(2):
        with breaker.call() as call:
            call.failed(CUT, Outlook.SOON, final=True)
        clock.advance(3)
        with breaker.call() as call:
            call.failed(CUT, Outlook.SOON, final=True)
        assert breaker.pause is None
        clock.advance(LAST)
        with breaker.call() as call:
            call.succeeded()
        assert breaker.pause is None


@pytest.mark.parametrize("error", [CUT, SLOW])
def test_other_failures_are_not_over_in_a_moment(clock: Clock, error: RegistryError) -> None:
    breaker = Breaker(clock, moment=3.0)
    for outlook, awaited in ((Outlook.SOON, True), (Outlook.LATER, False), (Outlook.SOON, False)):
        with suppress(RegistryError), breaker.call() as call:
            call.failed(error, outlook, final=True)
        assert (breaker.pause is not None) == awaited
        clock.advance(1)


def test_before_it_opens_it_may_be_back_as_well(clock: Clock) -> None:
    breaker = Breaker(clock, moment=3.0)
    for _ in range(FAILURES - 1):
        with breaker.call() as call:
            call.failed(CUT, Outlook.SOON)
        assert breaker.closed
        assert breaker.pause == 0.25
    clock.advance(3)
    assert breaker.pause is None
    with breaker.call() as call:
        call.failed(CUT, Outlook.SOON)
    assert (breaker.closed, breaker.pause) == (False, 0.25), "a failure long ago was of another outage"


def test_what_fails_alone_waits_for_the_end_and_holds_up_nothing_else(clock: Clock) -> None:
    breaker, pauses = Breaker(clock, moment=3.0), []
    for _ in range(FAILURES):
        with breaker.call() as call:
            call.failed(CUT, Outlook.ALONE)
        pauses.append(breaker.pause)
    assert pauses == [3.0, 3.0, 0.25], "it is open then, and the next request is a probe"


def test_a_host_is_left_alone_for_as_long_as_it_asks(clock: Clock) -> None:
    breaker = Breaker(clock, moment=3.0)
    with breaker.call() as call:
        call.failed(OriginFailed("busy", retry_after=2.0), Outlook.SOON)
    assert breaker.pause == 2.0
    with breaker.call() as call:
        call.failed(OriginFailed("busy", retry_after=20.0))
    assert breaker.pause is None


def test_while_a_probe_is_under_way_the_pause_is_not_nothing(clock: Clock) -> None:
    breaker = Breaker(clock, moment=3.0)
    with breaker.call() as call:
        call.failed(CUT, Outlook.SOON, final=True)
    clock.advance(0.25)
    assert breaker.pause == 0
    with breaker.call() as probe:
        assert breaker.pause == 0.25
        probe.succeeded()
    assert breaker.pause is None


@pytest.mark.parametrize(("error", "pause"), [(CUT, 0.25), (SLOW, None)])
def test_a_host_of_which_another_replica_has_told_may_be_back_too(
    clock: Clock, error: RegistryError, pause: float | None
) -> None:
    told, breaker = Breaker(clock, moment=3.0), Breaker(clock, moment=3.0)
    with told.call() as call:
        call.failed(error, Outlook.SOON if error is CUT else Outlook.LATER, final=True)
    opened = told.opened()
    assert opened is not None
    breaker.learn(opened)
    with breaker.call() as probe:
        probe.failed(error, Outlook.SOON if error is CUT else Outlook.LATER, final=True)
    assert breaker.pause == pause


@pytest.mark.parametrize("jump", [-86400.0, 86400.0])
def test_a_clock_that_jumps_makes_nobody_wait(clock: Clock, jump: float) -> None:
    breaker = Breaker(clock, moment=3.0)
    with breaker.call() as call:
        call.failed(CUT, Outlook.SOON, final=True)
    clock.advance(jump)
    assert breaker.pause == 0
    with breaker.call() as call:
        call.failed(CUT, Outlook.SOON, final=True)
    assert breaker.state("", "").seconds <= LAST


def test_half_open_exactly_one_probe_goes_out_at_a_time(host: Host, clock: Clock) -> None:
    host.fail(final=True)
    clock.advance(1)
    assert host.breaker.due
    with host.breaker.call() as probe:
        assert not host.breaker.due
        assert host.open_for > 0
        clock.advance(100)
        assert host.open_for > 0, "however long the probe takes"
        probe.succeeded()
        host.succeed()
    assert host.breaker.closed


def test_an_answered_probe_closes_it_and_forgets_the_past(host: Host, clock: Clock) -> None:
    host.fail(final=True)
    clock.advance(1)
    host.fail()
    clock.advance(2)
    host.succeed()
    assert host.changes == [CUT, None]
    host.fail()
    assert host.breaker.closed
    host.fail(final=True)
    assert host.open_for == 1


def test_a_probe_that_is_cancelled_leaves_room_for_the_next(host: Host, clock: Clock) -> None:
    host.fail(final=True)
    clock.advance(1)
    with pytest.raises(KeyboardInterrupt), host.breaker.call():
        raise KeyboardInterrupt
    assert host.breaker.due
    host.succeed()
    assert host.breaker.closed


def test_who_was_asked_before_it_opened_neither_prolongs_it_nor_opens_it_again(
    host: Host, clock: Clock
) -> None:
    with host.breaker.call() as first, host.breaker.call() as second, host.breaker.call() as third:
        first.failed(SLOW, final=True)
        second.failed(SLOW, final=True)
        assert host.open_for == 1
        clock.advance(1)
        with host.breaker.call() as probe:
            third.failed(SLOW, final=True)
            probe.succeeded()
        second.failed(SLOW, final=True)
    assert host.breaker.closed


def test_an_answer_closes_it_whenever_it_was_asked_for(host: Host) -> None:
    with host.breaker.call() as slow:
        host.fail(final=True)
        slow.succeeded()
    host.succeed()


# Several processes


def test_processes_share_a_circuit(clock: Clock) -> None:
    shared = SharedState()
    told: list[RegistryError | None] = []
    one, two, other = [Breaker(clock, told.append, shared, name) for name in ("a", "a", "b")]
    for breaker in (*[one] * (FAILURES - 1), two):
        with breaker.call() as call:
            call.failed(CUT)
    assert (one.closed, two.closed, other.closed) == (False, False, True)
    assert two.state("", "").error == one.state("", "").error == "cut"
    clock.advance(1)
    with one.call() as probe:
        assert not two.due
        with pytest.raises(OriginFailed, match="cut; the next attempt is not due yet"), two.call():
            pytest.fail("the call went out")
        probe.succeeded()
    assert two.closed
    assert told == [CUT, None]


def test_processes_share_that_the_host_has_answered(clock: Clock) -> None:
    shared = SharedState()
    one, two = (Breaker(clock, shared=shared, name="a") for _ in range(2))
    with one.call() as slow:
        clock.advance(1)
        with two.call() as call:
            call.succeeded()
        clock.advance(1)
        slow.failed(SLOW, final=True)
    assert two.closed


async def test_a_probe_of_a_process_that_is_killed_is_none(clock: Clock) -> None:
    async with forking() as forks:
        breaker = Breaker(clock, shared=forks.shared, name="a")
        breaker.failed(SLOW, Outlook.LATER, 0, final=True, sent=math.inf)
        clock.advance(1)

        async def probe(parent: Parent) -> int:
            with breaker.call():
                parent.report("ready")
                await asyncio.Event().wait()
            return 0

        process = await forks.start(probe)
        assert not breaker.due
        await forks.kill(process)
        assert breaker.due
        with breaker.call() as attempt:
            attempt.succeeded()
        assert breaker.closed


def test_processes_share_what_is_told_of_an_account(clock: Clock) -> None:
    table = SharedTable()
    one, two = [Budgets(["alice", "bob"], clock, table) for _ in range(2)]
    after = Budgets(["carol", "bob"], clock, table)  # as after a reload
    one[0].read(told("5;w=600"))
    one[1].refused(100)
    assert two.state() == one.state()
    assert (two[0].remaining, two[1].blocked_for) == (5, 100)
    assert (after[0].remaining, after[1].blocked_for) == (None, 100)
    assert not two[0].spares(keep(10))
    clock.advance(50)
    assert two[1].refused(10) == 50


# The rate limit


def told(remaining: str, limit: str = "100;w=21600") -> Any:
    return CIMultiDict({"RateLimit-Limit": limit, "RateLimit-Remaining": remaining})


@pytest.fixture
def budget(clock: Clock) -> Budget:
    return Budget(clock)


def keep(reserve: float) -> Any:
    return lambda limit: reserve


def test_what_docker_hub_tells_is_read(budget: Budget) -> None:
    assert budget.read(CIMultiDict(told("76;w=21600"), **{"docker-ratelimit-source": "192.0.2.1"}))
    assert (budget.limit, budget.remaining) == (100, 76)


@pytest.mark.parametrize(
    ("limit", "remaining", "expected"),
    [
        ("100", "76", (100, 76)),
        (" 100 ; w=60 ", " 76;w=60", (100, 76)),
        ("100, 100;w=60", "76", (100, 76)),
        ("100;w=60;burst=5", "76;reset=4", (100, 76)),
        ("", "76;w=60", (None, 76)),
        ("nonsense", "76", (None, 76)),
    ],
)
def test_other_ways_to_tell_it(budget: Budget, limit: str, remaining: str, expected: Any) -> None:
    assert budget.read(told(remaining, limit))
    assert (budget.limit, budget.remaining) == expected


@pytest.mark.parametrize("remaining", ["", "nonsense", "-1", "7x", "9" * 30])
def test_what_tells_nothing_is_passed_by(budget: Budget, remaining: str) -> None:
    assert not budget.read(told(remaining))
    assert (budget.limit, budget.remaining) == (None, None)
    assert budget.spares(keep(1000))


def test_what_was_told_holds_for_a_window(budget: Budget, clock: Clock) -> None:
    budget.read(told("0;w=600"))
    clock.advance(599)
    assert budget.remaining == 0
    clock.advance(1)
    assert budget.remaining is None


@pytest.mark.parametrize(
    ("headers", "retry_after", "seconds"),
    [
        ({}, 7.0, 7.0),
        ({}, 0.0, 1.0),
        ({}, None, DEFAULT_BLOCK),
        ({}, math.inf, LONGEST_BLOCK),
        (told("0;w=600", "100;w=600"), 7.0, 7.0),
        (told("0;w=600", "100;w=600"), None, 500.0),
        (told("0;w=999999999", "1;w=999999999"), None, LONGEST_BLOCK),
    ],
)
def test_after_a_429_it_is_blocked_for_retry_after_else_the_rest_of_the_window_else_a_minute(
    budget: Budget, clock: Clock, headers: Any, retry_after: float | None, seconds: float
) -> None:
    budget.read(headers)
    clock.advance(100)
    assert budget.refused(retry_after) == seconds
    assert budget.blocked_for == seconds
    clock.advance(seconds)
    assert budget.blocked_for == 0


def test_a_window_begins_with_the_first_answer_in_it(budget: Budget, clock: Clock) -> None:
    for _ in range(5):
        budget.read(told("50;w=600", "100;w=600"))
        clock.advance(250)  # at 0, 250, 500; a window begins at 750
    budget.read(told("0;w=600", "100;w=600"))
    assert budget.refused(None) == 750 + 600 - 1250


def test_a_second_429_does_not_shorten_the_first(budget: Budget) -> None:
    budget.refused(100)
    budget.refused(1)
    assert budget.blocked_for == 100


def test_below_the_reserve_it_spares_nothing_for_what_is_known(budget: Budget) -> None:
    budget.read(told("10;w=21600"))
    assert budget.spares(keep(10))
    budget.read(told("9;w=21600"))
    assert not budget.spares(keep(10))
    assert budget.spares(keep(0))


def test_the_reserve_may_be_a_share_of_the_limit(budget: Budget) -> None:
    budget.read(told("19;w=600", "200;w=600"))
    assert not budget.spares(lambda limit: limit / 10)


def test_below_the_reserve_one_may_look_as_often_as_one_request_comes_back(
    budget: Budget, clock: Clock
) -> None:
    budget.read(told("0;w=21600"))
    clock.advance(215.9)
    assert not budget.spares(keep(10))
    clock.advance(0.1)
    assert budget.spares(keep(10))
    budget.read(told("0;w=21600"))
    assert not budget.spares(keep(10))


def used(budgets: Budgets, times: int) -> list[int]:
    return [budgets.take_turn()[0] for _ in range(times)]


def test_credentials_are_used_in_turn(clock: Clock) -> None:
    assert used(Budgets(range(3), clock), 5) == [0, 1, 2, 0, 1]


def test_that_with_the_most_remaining_comes_first_and_the_untold_count_as_much(clock: Clock) -> None:
    budgets = Budgets(range(3), clock)
    budgets[0].read(told("5;w=600"))
    budgets[1].read(told("50;w=600"))
    assert budgets.take_turn() == [2, 1, 0]
    budgets[2].read(told("20;w=600"))
    assert budgets.take_turn() == [1, 2, 0]
    budgets[0].read(told("50;w=600"))
    assert sorted(used(budgets, 4)) == [0, 0, 1, 1]


def test_a_blocked_one_is_not_used(clock: Clock) -> None:
    budgets = Budgets(range(2), clock)
    budgets[0].refused(10)
    assert used(budgets, 3) == [1, 1, 1]
    assert budgets.blocked_for == 10
    clock.advance(10)
    assert sorted(budgets.take_turn()) == [0, 1]
    assert budgets.blocked_for == 0


def test_when_all_are_blocked_it_says_when_the_first_is_not(clock: Clock) -> None:
    budgets = Budgets(range(2), clock)
    budgets[0].refused(30)
    budgets[1].refused(20)
    assert budgets.take_turn() == []
    assert budgets.blocked_for == 20


def test_the_reserve_counts_for_the_one_whose_turn_it_is(clock: Clock) -> None:
    budgets = Budgets(range(2), clock)
    budgets[1].read(told("3;w=600", "100;w=600"))
    clock.advance(6)
    budgets[0].read(told("5;w=600", "100;w=600"))
    assert not budgets.spares(keep(10)), "what the other one was told is old, but it is not the one to ask"
    budgets[0].refused(60)
    assert budgets.spares(keep(10))
    budgets[1].refused(60)
    assert budgets.spares(keep(10)), "none can be asked, which is to be told otherwise"


def test_a_clock_that_was_set_back_prolongs_nothing(host: Host, budget: Budget, clock: Clock) -> None:
    host.fail(final=True)
    budget.read(told("0;w=600"))
    budget.refused(60)
    clock.advance(-86400)
    assert host.breaker.due
    assert budget.blocked_for == 0
    assert budget.remaining is None
    host.succeed()


# Retry-After


@pytest.mark.parametrize(
    ("value", "date", "seconds"),
    [
        ("0", "", 0),
        ("120", "", 120),
        ("9" * 30, "", MAX_RETRY_AFTER),
        ("Tue, 14 Nov 2023 22:15:20 GMT", "", 120),
        ("Tue, 14 Nov 2023 22:15:20 -0000", "", 120),
        ("Tue, 14 Nov 2023 22:15:20 GMT", "Tue, 14 Nov 2023 22:15:00 GMT", 20),
        ("Tue, 14 Nov 2023 22:10:00 GMT", "", 0),
        ("Tue, 14 Nov 2222 22:10:00 GMT", "", MAX_RETRY_AFTER),
        ("", "", None),
        ("soon", "", None),
        ("-5", "", None),
        ("1.5", "", None),
        ("²", "", None),
        ("٣", "", None),
        ("0" * 15 + "7", "", 7),
        ("0" * 30, "", MAX_RETRY_AFTER),
        ("Tue, 14 Nov 99999999999 22:15:20 GMT", "", None),
        ("Tue, 14 Nov 2023 22:15:20 +9999999999999999999", "", None),
        ("Tue, 14 Nov 2023 22:15:2٠ GMT", "", None),
        ("Tue, 14 Nov 2023 22:15:20 GMT", "Tue, 14 Nov " + "9" * 20 + " 22:15:00 GMT", 120),
        ("Tue, 99 Nov 2023 22:15:20 GMT", "", None),
    ],
)
def test_retry_after_is_a_number_of_seconds_or_a_date(
    clock: Clock, value: str, date: str, seconds: float | None
) -> None:
    headers = {"Retry-After": value} | ({"Date": date} if date else {})
    assert seconds_until(headers, clock) == seconds  # it is 22:13:20
