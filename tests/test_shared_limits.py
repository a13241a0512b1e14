"""What replicas tell each other of an upstream, without any."""

from __future__ import annotations

import pytest

from proxy.upstream.breaker import HEARSAY, LAST, Breaker
from proxy.upstream.ratelimit import Budget
from proxy.upstream.shared_limits import KnownUpstream, Namer, SharedLimits
from storage.errors import OriginFailed, OriginTimeout, RegistryError
from tests.conftest import Clock

URL = "https://registry.example"
NAMER = Namer("a secret")
FULL = {"ratelimit-limit": "100;w=21600", "ratelimit-remaining": "7;w=21600"}


class One:
    """What one replica knows of an upstream that it uses with an account, or without."""

    def __init__(self, clock: Clock, account: str = "ci", url: str = URL) -> None:
        self.changes: list[RegistryError | None] = []
        self.breaker = Breaker(clock, self.changes.append)
        self.budget = Budget(clock)
        self.known = KnownUpstream(url, self.breaker, [(account, self.budget)])

    def fail(self, error: RegistryError) -> None:
        with self.breaker.call() as attempt:
            attempt.failed(error, final=True)

    def tell(self, other: One, namer: Namer = NAMER) -> None:
        other.known.learn(SharedLimits.parse(self.known.tell(NAMER).encode()), namer)


@pytest.fixture
def one(clock: Clock) -> One:
    return One(clock)


@pytest.fixture
def other(clock: Clock) -> One:
    return One(clock)


def test_nothing_is_told_of_what_works(one: One) -> None:
    assert one.known.tell(NAMER) == SharedLimits()


@pytest.mark.parametrize("error", [OriginFailed("it is down \u2603"), OriginTimeout("it is slow")])
def test_a_host_that_failed_elsewhere_is_asked_once(one: One, other: One, error: RegistryError) -> None:
    one.fail(error)
    one.tell(other)
    assert not other.breaker.closed
    assert other.breaker.due
    assert [type(each) for each in other.changes] == [type(error)]
    assert "another replica found" in str(other.changes[0])
    other.fail(error)
    with pytest.raises(type(error)), other.breaker.call():
        pytest.fail("it was asked again")


def test_a_host_that_works_here_is_used_at_once(one: One, other: One) -> None:
    one.fail(OriginFailed("it is down"))
    one.tell(other)
    with other.breaker.call() as attempt:
        attempt.succeeded()
    one.tell(other)  # its own answer is younger
    assert other.breaker.closed


def test_what_answered_a_moment_ago_is_not_doubted(one: One, other: One, clock: Clock) -> None:
    other.breaker.succeeded()
    clock.advance(LAST)
    one.fail(OriginFailed("it is down"))
    one.tell(other)
    assert other.breaker.closed
    clock.advance(0.1)
    one.tell(other)
    assert not other.breaker.closed


def test_hearsay_is_not_told_on_and_passes(one: One, other: One, clock: Clock) -> None:
    one.fail(OriginFailed("it is down"))
    one.tell(other)
    assert other.known.tell(NAMER) == SharedLimits()
    third = One(clock)
    clock.advance(HEARSAY)
    one.tell(third)
    assert third.breaker.closed


def test_the_remaining_requests_are_known_to_all(one: One, other: One, clock: Clock) -> None:
    other.budget.read({**FULL, "ratelimit-remaining": "50;w=21600"})
    clock.advance(10)
    one.budget.read(FULL)
    one.tell(other)
    assert (other.budget.remaining, other.budget.limit) == (7, 100)
    clock.advance(10)
    other.budget.read({**FULL, "ratelimit-remaining": "6;w=21600"})
    one.tell(other)  # what is older is no news
    assert other.budget.remaining == 6
    clock.advance(21600)
    assert other.budget.remaining is None


def test_an_account_that_is_blocked_is_blocked_for_all(one: One, other: One, clock: Clock) -> None:
    one.budget.refused(100)
    clock.advance(40)
    one.tell(other)
    assert other.budget.blocked_for == 60
    clock.advance(30)
    one.tell(other)
    assert other.budget.blocked_for == 30


def test_without_an_account_each_address_is_blocked_for_itself(clock: Clock) -> None:
    one, other = One(clock, ""), One(clock, "")
    one.budget.read(FULL)
    one.budget.refused(100)
    one.tell(other)
    assert other.budget.blocked_for == 0
    assert other.budget.remaining == 7


def test_other_upstreams_accounts_and_secrets_are_others(one: One, clock: Clock) -> None:
    one.budget.refused(100)
    one.fail(OriginFailed("it is down"))
    elsewhere, somebody, stranger = One(clock, url="https://other.example"), One(clock, "cd"), One(clock)
    one.tell(elsewhere)
    one.tell(somebody)
    one.tell(stranger, Namer("another secret"))
    assert elsewhere.breaker.closed
    assert stranger.breaker.closed
    assert not any(each.budget.blocked_for for each in (elsewhere, somebody, stranger))
    assert not somebody.breaker.closed


def test_neither_url_nor_account_can_be_read(one: One) -> None:
    one.budget.refused(100)
    one.fail(OriginFailed("refused"))
    text = one.known.tell(NAMER).encode()
    assert "registry.example" not in text
    assert "ci" not in text.replace("circuits", "")
    assert text.isprintable()


@pytest.mark.parametrize("text", ["", "{}", "[[", '[{"a": 1}]', '[{}, {"a": ["x"]}]', "\udcff", "[" * 5000])
def test_nonsense_is_nothing(text: str) -> None:
    assert SharedLimits.parse(text) == SharedLimits()
