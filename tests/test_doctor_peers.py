"""What the doctor says of a fleet."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from proxy.doctor import peers, running
from proxy.doctor.checks import Check
from proxy.upstream import membership
from tests.conftest import Clock, configuration
from tests.fleet import SECRET, Replicas, free_ports, replicas
from tests.test_peers import cached
from tests.upstream import Upstream


async def examine(
    directory: Path, listen: str, clock: Callable[[], float] = time.time, **keys: Any
) -> list[Check]:
    tree = {"listen": listen, "disk": {"path": str(directory / "disk")}, "peers": {"secret": SECRET, **keys}}
    return await peers.check(configuration(directory, tree), clock)


def said(checks: list[Check]) -> list[tuple[str, str, str]]:
    return [(each.name, each.subject, each.state) for each in checks]


async def test_without_a_fleet_there_is_nothing_to_check(tmp_path: Path) -> None:
    assert await peers.check(configuration(tmp_path, {"disk": {"path": str(tmp_path)}})) == []


@pytest.mark.errors("disk.failed")
async def test_the_doctor_of_a_fleet(tmp_path: Path, clock: Clock, upstream: Upstream) -> None:
    async with replicas(2, tmp_path, clock, cached(upstream)) as fleet:
        await _all_is_well(tmp_path, fleet)
        await _what_does_not_fit(tmp_path, fleet)
        await _one_that_is_down(tmp_path, fleet)
        await _clocks(tmp_path, fleet)
        await _what_replicas_say_of_themselves(tmp_path, fleet)
    assert upstream.log == []


async def _all_is_well(directory: Path, fleet: Replicas) -> None:
    one, other = fleet.urls
    checks = await examine(directory, one.removeprefix("http://"), urls=fleet.urls)
    assert said(checks) == [("peers", "peers.urls", "ok"), ("peer", other, "ok")]
    assert one in checks[0].message


async def _what_does_not_fit(directory: Path, fleet: Replicas) -> None:
    one, other = fleet.urls
    listen = one.removeprefix("http://")
    (own, peer) = await examine(directory, listen, urls=fleet.urls, secret=f"{SECRET}-of-another")
    assert (own.state, peer.state) == ("ok", "failed")
    assert "secret" in peer.advice
    assert SECRET not in f"{peer.message} {peer.advice}"
    # By another name than its own.
    alias = other.replace("127.0.0.1", "localhost")
    (_, peer) = await examine(directory, listen, urls=[one, alias])
    assert (peer.state, other in peer.message) == ("warning", True)
    (own, *_) = await examine(directory, "127.0.0.1:1", urls=fleet.urls)
    assert (own.state, "peers.self" in own.advice) == ("failed", True)


async def _one_that_is_down(directory: Path, fleet: Replicas) -> None:
    one, other = fleet.urls
    dead = f"http://127.0.0.1:{free_ports(1)[0]}"
    checks = await examine(directory, one.removeprefix("http://"), urls=[one, dead, other])
    assert said(checks)[1:] == [("peer", dead, "warning"), ("peer", other, "ok")]


def _away(seconds: float) -> float:
    return time.time() + seconds


async def _clocks(directory: Path, fleet: Replicas) -> None:
    one, other = fleet.urls
    for ours, which in ((-60.0, "ahead of"), (60.0, "behind")):
        clock = partial(_away, ours)
        checks = await examine(directory, one.removeprefix("http://"), clock, urls=fleet.urls)
        assert said(checks)[1:] == [("peer", other, "ok"), ("clock", other, "warning")]
        assert which in checks[2].message


async def _what_replicas_say_of_themselves(directory: Path, fleet: Replicas) -> None:
    one, other = fleet.urls
    listen = one.removeprefix("http://")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "version", lambda name: "0.0.1")
        checks = await examine(directory, listen, urls=fleet.urls)
        assert said(checks)[1:] == [("peer", other, "ok"), ("version", other, "warning")]
    partial = fleet.all[1].directory / "cache" / "partial"
    partial.rmdir()
    partial.touch()  # even root cannot write below a file
    checks = await examine(directory, listen, urls=fleet.urls)
    assert said(checks)[1:] == [("peer", other, "ok"), ("replica", other, "warning")]
    assert str(partial) in checks[2].message
    partial.unlink()
    partial.mkdir()


async def test_a_name_without_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(name: str, port: int) -> list[str]:
        raise OSError("no such name")

    monkeypatch.setattr(peers, "membership_of", _with(resolve))
    (found,) = await examine(tmp_path, "127.0.0.1:5000", dns="peers.example:5000")
    assert (found.name, found.subject, found.state) == ("peers", "peers.example:5000", "failed")


async def test_a_replica_that_is_not_ready_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(name: str, port: int) -> list[str]:
        return []

    monkeypatch.setattr(peers, "membership_of", _with(resolve))
    own = "http://10.0.0.1:5000"
    (found,) = await examine(tmp_path, "127.0.0.1:5000", dns="peers.example:5000", self=own)
    assert found.state == "failed"


def _with(resolve: membership.Resolve) -> Any:
    def made(config: Any) -> membership.Membership:
        return membership.Membership(config.peers, config.listen.port, resolve=resolve)

    return made


def test_a_replica_that_is_left_out_is_no_upstream() -> None:
    labels = {"namespace": "peers", "host": "10.0.0.2:5000"}
    (found,) = running._check_breakers([running.Sample(running.OPEN, labels, 1.0)])
    assert (found.subject, found.state) == ("peers", "warning")
    assert "10.0.0.2:5000 has failed and is left out" in found.message
    assert "cached content" not in found.message
