"""Tokens alone: what they hold, and what becomes of them where a credential is no longer known."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proxy.access.credentials import BadCredential
from proxy.access.issuing import LEEWAY, REMEMBERED, Renew, TokenIssuer
from proxy.access.records import AccessRecords
from proxy.access.rules import Grant, Principal
from storage.disk.records import SQLiteRecords
from tests.conftest import Clock

GRANTS = (Grant("local/team/app", frozenset({"pull", "push"})), Grant("registry:catalog", frozenset("*")))
ALICE = Principal("alice", "password", frozenset({"ops", "dev"}), {"team": ["a", "b"]}, proof="1f")


@pytest.fixture
async def records(tmp_path: Path) -> AsyncIterator[AccessRecords]:
    stored = SQLiteRecords(tmp_path / "records")
    yield AccessRecords(stored)
    stored.close()


def issuer(records: AccessRecords, clock: Clock, service: str = "a", **renewals: Renew) -> TokenIssuer:
    return TokenIssuer(records, service, 300.0, 3600.0, renewals, clock)


def same(principal: Principal) -> Principal:
    return principal


async def test_a_token_holds_who_it_is_for_and_what(records: AccessRecords, clock: Clock) -> None:
    one = issuer(records, clock, password=same)
    made = await one.issue(ALICE, "access", GRANTS)
    found = await issuer(records, clock, password=same).verify("", made.token)
    assert (found.user, found.scheme) == ("alice", "password")
    assert found.groups == frozenset()  # which are found again with the user
    assert (dict(found.claims), found.proof) == ({"team": ["a", "b"]}, "1f")
    assert found.within == GRANTS
    assert found.until == clock.now + 300
    assert one.recognizes(made.token)
    assert len(made.token) < 1000


async def test_a_token_holds_the_groups_that_cannot_be_found_again(
    records: AccessRecords, clock: Clock
) -> None:
    one = issuer(records, clock, password=same)
    made = await one.issue(Principal("bob", "certificate", frozenset({"ops", "dev"})), "access", GRANTS)
    assert (await one.verify("", made.token)).groups == {"ops", "dev"}


@pytest.mark.parametrize(
    ("principal", "accepted"),
    [
        (Principal(), True),
        (Principal("bob", "certificate"), True),
        (ALICE, False),
        (Principal("key:ci", "key"), False),
        (Principal("ci:repo", "oidc"), False),
        (Principal("", "token"), False),
    ],
)
async def test_a_credential_that_is_no_longer_configured_is_not_accepted(
    records: AccessRecords, clock: Clock, principal: Principal, accepted: bool
) -> None:
    before = issuer(records, clock, **{principal.scheme: same} if principal.scheme else {})
    made = await before.issue(principal, "access", GRANTS)
    assert await before.verify("", made.token)
    after = issuer(records, clock)
    if accepted:
        assert (await after.verify("", made.token)).user == principal.user
        assert after.remembers("", made.token)
    else:
        with pytest.raises(BadCredential, match="no longer accepted"):
            await after.verify("", made.token)
        assert not after.remembers("", made.token)


async def test_a_token_is_for_one_service_and_one_use(records: AccessRecords, clock: Clock) -> None:
    one, other = (issuer(records, clock, each, password=same) for each in ("a", "b"))
    access, refresh = await one.issue(ALICE, "access"), await one.issue(ALICE, "refresh")
    with pytest.raises(BadCredential, match="no access token for the service b"):
        await other.verify("", access.token)
    with pytest.raises(BadCredential, match="no access token"):
        await one.verify("", refresh.token)
    assert not one.remembers("", refresh.token)
    with pytest.raises(BadCredential, match="no refresh token"):
        await one.refreshed(access.token)
    assert (await one.refreshed(refresh.token)).within is None


async def test_clocks_of_servers_may_differ(records: AccessRecords, clock: Clock) -> None:
    one = issuer(records, clock, password=same)
    made = await one.issue(ALICE, "access")
    behind = Clock(clock.now - LEEWAY)
    assert await issuer(records, behind, password=same).verify("", made.token)
    behind.advance(-1)
    with pytest.raises(BadCredential, match="not valid yet"):
        await issuer(records, behind, password=same).verify("", made.token)


async def test_a_token_ends_with_its_credential(records: AccessRecords, clock: Clock) -> None:
    one = issuer(records, clock, oidc=same)
    made = await one.issue(Principal("x", "oidc", until=clock.now + 90), "refresh")
    assert made.lifetime == 90
    clock.advance(90)
    with pytest.raises(BadCredential, match="it has expired"):
        await one.refreshed(made.token)


async def test_one_key_signs_whoever_is_first(records: AccessRecords, clock: Clock, tmp_path: Path) -> None:
    stored = SQLiteRecords(tmp_path / "records")
    other = AccessRecords(stored)
    one, two = await asyncio.gather(
        issuer(records, clock).issue(Principal(), "access"), issuer(other, clock).issue(Principal(), "access")
    )
    assert one.token.partition(".")[0] == two.token.partition(".")[0]
    assert len((await other.read()).signing) == 1
    stored.close()


async def test_what_is_remembered_is_bounded(
    records: AccessRecords, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.access.issuing.REMEMBERED", 3)
    one = issuer(records, clock)
    tokens = [(await one.issue(Principal(), "access")).token for _ in range(5)]
    for each in tokens:
        await one.verify("", each)
    assert [one.remembers("", each) for each in tokens] == [False, False, True, True, True]
    assert REMEMBERED > 3
