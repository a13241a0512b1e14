"""Who the replicas of a fleet are, with a name service that the test is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from structlog.testing import LogCapture

from proxy.config.peers import PeersConfig
from proxy.config.values import Secret
from proxy.upstream.membership import REFRESH, Membership, is_of_this_machine, one_family, resolve_all
from tests.conftest import Clock

SECRET = Secret("a-secret-of-tests")
URLS = ("http://one.example:5000", "http://two.example:5000")


class Names:
    """A name service: the addresses of each name, or an error."""

    def __init__(self) -> None:
        self.addresses: dict[str, list[str]] = {}
        self.asked: list[tuple[str, int]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def resolve(self, name: str, port: int) -> list[str]:
        self.asked.append((name, port))
        await self.gate.wait()
        if name not in self.addresses:
            raise OSError(f"{name} is unknown")
        return self.addresses[name]


@pytest.fixture
def names() -> Names:
    return Names()


Make = Callable[..., Membership]


@pytest.fixture
async def make(names: Names, clock: Clock) -> AsyncIterator[Make]:
    """Makes a Membership of a server at port 5000, whose machine has the addresses of `local`."""
    async with AsyncExitStack() as stack:

        def made(settings: PeersConfig, *local: str, port: int = 5000, **named: Any) -> Membership:
            found = Membership(
                settings,
                port,
                **named,
                resolve=names.resolve,
                local=local.__contains__,
                ticks=clock,
            )
            stack.push_async_callback(found.close)
            return found

        yield made


def by_name(own: str | None = None) -> PeersConfig:
    return PeersConfig(secret=SECRET, dns=("peers.example", 5000), own=own)


async def looked(membership: Membership) -> None:
    """Have a look that is due, and wait for its end."""
    await membership.refresh()
    assert membership._looking is not None
    await asyncio.wait([membership._looking])


async def test_the_addresses_of_a_name_are_the_replicas(make: Make, names: Names) -> None:
    names.addresses["peers.example"] = ["10.0.0.2", "10.0.0.1", "10.0.0.2"]
    found = make(by_name(), "10.0.0.2")
    await found.refresh()
    assert found.urls == ("http://10.0.0.1:5000", "http://10.0.0.2:5000")
    assert found.own == "http://10.0.0.2:5000"
    assert names.asked == [("peers.example", 5000)]


async def test_a_server_with_tls_reaches_the_others_by_tls(make: Make, names: Names) -> None:
    names.addresses["peers.example"] = ["fd00::2", "fd00::1"]
    found = make(by_name(), "fd00::1", encrypted=True)
    await found.refresh()
    assert found.urls == ("https://[fd00::1]:5000", "https://[fd00::2]:5000")
    assert found.own == "https://[fd00::1]:5000"


def test_replicas_with_addresses_of_two_families_are_there_once() -> None:
    assert one_family(["fd00::1", "10.0.0.1", "fd00::2", "10.0.0.2"]) == ["10.0.0.1", "10.0.0.2"]
    assert one_family(["fd00::2", "fd00::1"]) == ["fd00::1", "fd00::2"]


async def test_a_name_is_resolved_again_in_the_background(make: Make, names: Names, clock: Clock) -> None:
    names.addresses["peers.example"] = ["10.0.0.1"]
    found = make(by_name(), "10.0.0.1")
    await found.refresh()
    names.addresses["peers.example"] = ["10.0.0.1", "10.0.0.2"]
    clock.advance(REFRESH - 0.1)
    await found.refresh()
    assert len(names.asked) == 1
    clock.advance(0.1)
    names.gate.clear()
    await found.refresh()  # it does not wait
    await found.refresh()
    assert found.urls == ("http://10.0.0.1:5000",)
    names.gate.set()
    await looked(found)
    assert found.urls == ("http://10.0.0.1:5000", "http://10.0.0.2:5000")
    assert len(names.asked) == 2


async def test_all_wait_for_the_first_look_together(make: Make, names: Names) -> None:
    names.addresses["peers.example"] = ["10.0.0.1", "10.0.0.2"]
    found = make(by_name(), "10.0.0.1")
    names.gate.clear()
    async with asyncio.TaskGroup() as group:
        waiting = [group.create_task(found.refresh()) for _ in range(3)]
        await asyncio.sleep(0)
        assert not any(each.done() for each in waiting)
        names.gate.set()
    assert len(found.urls) == 2
    assert len(names.asked) == 1


async def test_while_the_name_is_not_resolved_the_former_replicas_stay(
    make: Make, names: Names, clock: Clock, events: LogCapture
) -> None:
    names.addresses["peers.example"] = ["10.0.0.1", "10.0.0.2"]
    found = make(by_name(), "10.0.0.1")
    await found.refresh()
    del names.addresses["peers.example"]
    for _ in range(3):
        clock.advance(REFRESH)
        await looked(found)
    assert len(found.urls) == 2
    said = [each["event"] for each in events.entries]
    assert said == ["peers.changed", "peers.unresolved"]  # once
    names.addresses["peers.example"] = ["10.0.0.1"]
    clock.advance(REFRESH)
    await looked(found)
    assert found.urls == ("http://10.0.0.1:5000",)


async def test_a_server_that_is_not_ready_yet_finds_itself_later(
    make: Make, names: Names, clock: Clock
) -> None:
    names.addresses["peers.example"] = ["10.0.0.2"]
    found = make(by_name(), "10.0.0.1")
    await found.refresh()
    assert found.own is None
    names.addresses["peers.example"] = ["10.0.0.1", "10.0.0.2"]
    clock.advance(REFRESH)
    await looked(found)
    assert found.own == "http://10.0.0.1:5000"


async def test_at_another_port_it_is_another_server(make: Make, names: Names) -> None:
    names.addresses["peers.example"] = ["10.0.0.1"]
    found = make(by_name(), "10.0.0.1", port=5001)
    await found.refresh()
    assert found.own is None


@pytest.mark.parametrize(
    ("host", "own"),
    [("", 0), ("10.0.0.1", 0), ("10.0.0.2", 1), ("fd00::2", 1), ("10.0.0.3", 0), ("localhost", 0)],
)
async def test_of_several_on_a_machine_each_finds_itself(
    make: Make, names: Names, host: str, own: int
) -> None:
    """One at an address that is not listed, as behind another server, is the first."""
    names.addresses |= {"one.example": ["10.0.0.1"], "two.example": ["10.0.0.2", "fd00::2"]}
    listed = make(PeersConfig(secret=SECRET, urls=URLS), "10.0.0.1", "10.0.0.2", "fd00::2", host=host)
    await listed.refresh()
    assert listed.own == URLS[own]


@pytest.mark.parametrize(("host", "own"), [("", 0), ("10.0.0.1", 0), ("10.0.0.2", 1), ("10.0.0.3", 0)])
async def test_of_several_addresses_of_a_name_each_finds_itself(
    make: Make, names: Names, host: str, own: int
) -> None:
    names.addresses["peers.example"] = ["10.0.0.2", "10.0.0.1"]
    found = make(by_name(), "10.0.0.1", "10.0.0.2", host=host)
    await found.refresh()
    assert found.own == found.urls[own]


async def test_what_is_configured_is_not_looked_for(make: Make, names: Names) -> None:
    found = make(PeersConfig(secret=SECRET, urls=URLS, own=URLS[1]))
    await found.refresh()
    assert (found.urls, found.own) == (URLS, URLS[1])
    assert not names.asked


async def test_a_list_of_urls_has_the_server_itself(make: Make, names: Names) -> None:
    names.addresses |= {"one.example": ["10.0.0.1"], "two.example": ["10.0.0.2", "fd00::2"]}
    found = make(PeersConfig(secret=SECRET, urls=URLS), "fd00::2")
    await found.refresh()
    assert (found.urls, found.own) == (URLS, URLS[1])


async def test_a_host_that_is_unknown_does_not_hide_the_server_itself(make: Make, names: Names) -> None:
    names.addresses["two.example"] = ["10.0.0.2"]
    found = make(PeersConfig(secret=SECRET, urls=URLS), "10.0.0.2")
    await found.refresh()
    assert found.own == URLS[1]


async def test_the_name_service_and_the_interfaces_of_this_machine() -> None:
    assert "127.0.0.1" in await resolve_all("localhost", 5000)
    assert is_of_this_machine("127.0.0.1")
    assert not is_of_this_machine("192.0.2.1")  # RFC 5737
