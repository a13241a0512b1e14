"""Who is asked before the upstream, without any server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from proxy.config.peers import PeersConfig
from proxy.config.values import Secret
from proxy.telemetry.exchange import Exchange, current_exchange
from proxy.upstream.membership import REFRESH, Membership
from proxy.upstream.peers import FORMER, HOLDERS, Peers
from proxy.upstream.rendezvous import ranked
from tests.conftest import Clock

KEYS = [f"docker.io/library/{number}" for number in range(40)]


class Registry:
    """A replica, as far as it matters whether it answers."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.healthy = True
        self.closed = False

    def as_peer(self, namespace: str, link: object) -> Registry:
        view = Registry(self.url)
        view.healthy = self.healthy
        return view

    async def close(self) -> None:
        self.closed = True


class Fleet:
    """So many replicas that are found by a name, of which this is the first."""

    def __init__(self, clock: Clock, number: int) -> None:
        self.addresses = [f"10.0.0.{each}" for each in range(1, number + 1)]
        self.made: dict[str, Registry] = {}
        settings = PeersConfig(secret=Secret("a-secret-of-tests"), dns=("peers", 5000))
        self.membership = Membership(
            settings, 5000, resolve=self._resolve, local="10.0.0.1".__eq__, ticks=clock
        )
        self.peers = Peers(self.membership, settings.secret, self._make, ticks=clock)

    async def _resolve(self, name: str, port: int) -> list[str]:
        return self.addresses

    def _make(self, url: str) -> Any:
        self.made[url] = Registry(url)
        return self.made[url]

    @property
    def urls(self) -> list[str]:
        return [f"http://{each}:5000" for each in self.addresses]

    async def looked(self) -> None:
        await self.peers.known()
        assert self.membership._looking is not None
        await asyncio.wait([self.membership._looking])
        await self.peers.known()


async def test_the_owner_is_asked_first_and_then_who_takes_its_place(clock: Clock) -> None:
    fleet = Fleet(clock, 5)
    for key in KEYS:
        before = await fleet.peers.before(key)
        order = ranked(key, fleet.urls)
        assert before == order[: order.index(fleet.urls[0])][:2]
    await fleet.peers.close()


async def test_who_fails_gives_its_place_to_the_next(clock: Clock) -> None:
    fleet = Fleet(clock, 4)
    for key in KEYS:
        await fleet.peers.before(key)
    dead = fleet.urls[1]
    fleet.made[dead].healthy = False
    for key in KEYS:
        before = await fleet.peers.before(key)
        order = ranked(key, fleet.urls)
        asked = order[: order.index(fleet.urls[0])]
        # It is still there, at the end, so that it is tried when that is due.
        healthy = [each for each in asked if each != dead]
        assert before == healthy[:2] + [each for each in asked if each == dead]
    await fleet.peers.close()


async def test_others_may_have_what_the_owner_has_not(clock: Clock) -> None:
    fleet = Fleet(clock, 14)
    for key in KEYS:
        before, holders = await fleet.peers.before(key), await fleet.peers.holders(key)
        assert len(holders) <= HOLDERS
        assert not {*before, fleet.urls[0]} & set(holders)
        assert len({*before, *holders}) == len(before) + len(holders)
    await fleet.peers.close()


async def test_who_does_not_know_itself_asks_the_owner(clock: Clock) -> None:
    fleet = Fleet(clock, 3)
    fleet.addresses = fleet.addresses[1:]
    for key in KEYS:
        assert await fleet.peers.before(key) == ranked(key, fleet.urls)
    assert fleet.peers.own is None
    await fleet.peers.close()


async def test_for_another_replica_nobody_is_asked(clock: Clock) -> None:
    fleet = Fleet(clock, 3)
    fleet.addresses = fleet.addresses[1:]  # so that others own everything
    owners = fleet.peers.owners("docker.io", (), [], lambda: False)
    assert await owners.of("library/1", None)
    token = current_exchange.set(Exchange(peer="http://10.0.0.2:5000"))
    try:
        assert await owners.of("library/1", None) == []
        assert await owners.holders("library/1", None) == []
    finally:
        current_exchange.reset(token)
    await fleet.peers.close()


@pytest.mark.parametrize("returns", [True, False])
async def test_a_replica_that_is_gone_for_long_is_forgotten(clock: Clock, returns: bool) -> None:
    fleet = Fleet(clock, 3)
    for key in KEYS:
        await fleet.peers.before(key)
    gone = fleet.urls[2]
    address = fleet.addresses.pop()
    clock.advance(REFRESH)
    await fleet.looked()
    clock.advance(FORMER / 2)
    if returns:
        fleet.addresses.append(address)
    await fleet.looked()
    assert not fleet.made[gone].closed  # a transfer may still be under way
    clock.advance(FORMER / 2)
    await fleet.looked()
    assert fleet.made[gone].closed is not returns
    await fleet.peers.close()
    assert all(each.closed for each in fleet.made.values())
