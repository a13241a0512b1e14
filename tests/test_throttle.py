"""Whoever tries passwords waits, ever longer."""

from __future__ import annotations

import ipaddress

import pytest

from proxy.access.throttle import FORGOTTEN, FREE, LONGEST, LoginThrottle
from storage.errors import Throttled
from storage.shared import SharedTable
from tests.conftest import Clock

HOME = ipaddress.ip_address("192.0.2.1")
AWAY = ipaddress.ip_address("198.51.100.1")
ENTRIES = 64


@pytest.fixture
def table() -> SharedTable:
    return SharedTable(records=ENTRIES)


@pytest.fixture
def throttle(clock: Clock, table: SharedTable) -> LoginThrottle:
    async def sleep(seconds: float) -> None:
        clock.advance(seconds)

    return LoginThrottle(clock, sleep, table)


async def wrong() -> bool:
    return False


async def right() -> bool:
    return True


def fail(throttle: LoginThrottle, times: int, address: object = HOME, user: str = "alice") -> None:
    for _ in range(times):
        throttle.failed(address, user)  # type: ignore[arg-type]


async def test_the_first_failures_cost_nothing_then_it_doubles(throttle: LoginThrottle, clock: Clock) -> None:
    begun = clock.now
    waits = []
    for _ in range(FREE + 7):
        before = clock.now
        assert not await throttle.attempt(HOME, "alice", wrong)
        waits.append(clock.now - before)
    assert waits == [0] * (FREE + 1) + [1, 1, 2, 4, 8, 16]
    assert clock.now - begun == sum(waits)


def test_no_wait_is_longer_than_the_longest(throttle: LoginThrottle, clock: Clock) -> None:
    fail(throttle, 100)
    clock.advance(1)
    assert throttle.turn(HOME, "alice") == 0
    assert throttle.turn(HOME, "alice") == LONGEST


def test_many_at_once_queue_and_the_last_are_refused(throttle: LoginThrottle, clock: Clock) -> None:
    fail(throttle, FREE + 5)
    turns = []
    with pytest.raises(Throttled) as raised:
        for _ in range(10):
            turns.append(throttle.turn(HOME, "alice"))
    assert turns == [1, 17]
    assert raised.value.retry_after == 33


def test_who_waits_long_enough_is_forgiven(throttle: LoginThrottle, clock: Clock) -> None:
    fail(throttle, 20)
    clock.advance(FORGOTTEN)
    assert throttle.turn(HOME, "alice") == 0
    fail(throttle, FREE)
    assert throttle.turn(HOME, "alice") == 0


def test_by_address_and_by_user(throttle: LoginThrottle) -> None:
    fail(throttle, FREE + 1)
    assert throttle.turn(HOME, "bob") == 1
    assert throttle.turn(AWAY, "alice") == 1
    assert throttle.turn(AWAY, "bob") == 0


def test_who_cannot_be_told_apart_waits_together(throttle: LoginThrottle) -> None:
    fail(throttle, FREE + 1, None)
    assert throttle.turn(None, "bob") == 1


def test_a_network_is_one_client_in_ipv6(throttle: LoginThrottle) -> None:
    fail(throttle, FREE + 1, ipaddress.ip_address("2001:db8::1"))
    assert throttle.turn(ipaddress.ip_address("2001:db8::2:1"), "bob") == 1
    assert throttle.turn(ipaddress.ip_address("2001:db8:0:1::1"), "bob") == 0


async def test_a_user_is_not_kept_out_by_others_in_its_name(throttle: LoginThrottle) -> None:
    assert await throttle.attempt(HOME, "alice", right)
    fail(throttle, 50, AWAY)
    assert throttle.turn(HOME, "alice") == 0
    assert throttle.turn(AWAY, "alice") > 0


async def test_a_right_password_does_not_buy_further_tries(throttle: LoginThrottle) -> None:
    fail(throttle, FREE + 3, user="mallory")
    assert await throttle.attempt(HOME, "alice", right)
    assert throttle.turn(HOME, "mallory") > 0


def test_memory_is_bounded_and_the_last_failures_are_remembered(
    throttle: LoginThrottle, table: SharedTable
) -> None:
    for number in range(100):
        fail(throttle, FREE + 1, AWAY + number, f"user-{number}")
        throttle.succeeded(HOME, f"user-{number}")
    assert len(list(table)) <= ENTRIES
    assert throttle.turn(AWAY + 99, "nobody") == 1
    assert throttle.turn(HOME + 99, "user-99") == 1
    assert throttle.turn(AWAY, "nobody") == 0


def test_processes_count_together(throttle: LoginThrottle, table: SharedTable, clock: Clock) -> None:
    others = [LoginThrottle(clock, table=table) for _ in range(FREE)]
    for each in (throttle, *others):
        fail(each, 1)
    assert [each.turn(HOME, "alice") for each in others] == [1, 2, 3], "they queue behind each other"
    others[0].succeeded(AWAY, "alice")
    assert throttle.turn(AWAY, "alice") == 0


async def test_what_went_wrong_is_no_failure(throttle: LoginThrottle) -> None:
    async def broken() -> bool:
        raise Throttled("busy")

    for _ in range(20):
        with pytest.raises(Throttled):
            await throttle.attempt(HOME, "alice", broken)
    assert throttle.turn(HOME, "alice") == 0


async def test_credentials_that_are_repeated_are_one_guess_of_their_address(
    throttle: LoginThrottle, clock: Clock
) -> None:
    begun = clock.now
    for _ in range(FREE + 2):
        await throttle.attempt(HOME, "bob", wrong, b"bob's")
    assert clock.now > begun  # bob waits
    begun = clock.now
    assert await throttle.attempt(HOME, "alice", right, b"alice's")
    assert clock.now == begun
    for guess in range(FREE + 1):
        throttle.failed(HOME, f"user{guess}", guess)
    with pytest.raises(Throttled):
        for _ in range(50):
            throttle.turn(HOME, "erin", b"erin's")


def test_repeated_credentials_are_forgotten_and_count_again(throttle: LoginThrottle, clock: Clock) -> None:
    for _ in range(FREE + 1):
        throttle.failed(HOME, "bob", b"bob's")
        clock.advance(FORGOTTEN)
        throttle.failed(HOME, "eve", b"eve's")
    assert throttle.turn(HOME, "alice", b"alice's") == 0
    assert throttle.turn(AWAY, "bob", b"bob's") == 0


def test_users_who_have_logged_in_wait_if_they_repeat_wrong_credentials(throttle: LoginThrottle) -> None:
    throttle.succeeded(HOME, "bob")
    for _ in range(FREE + 2):
        throttle.failed(HOME, "bob", b"wrong")
    assert throttle.turn(HOME, "bob", b"right") == 0
    assert throttle.turn(HOME, "bob", b"wrong") > 0
