"""Replicas as people run them, of two workers each, one of which is killed while an operator asks another."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.fleet import SECRET, free_ports
from tests.processes import Place, Server
from tests.relay import Relay
from tests.test_peers import LATEST, NAME, image_of
from tests.upstream import Upstream

pytestmark = pytest.mark.clients


class Gate(Relay):
    """Leads to a replica.  What asks it for its repositories is held until the replica is gone."""

    def __init__(self, to: int) -> None:
        super().__init__(to)
        self.reached, self.gone = asyncio.Event(), asyncio.Event()

    async def _proxied(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        head = await reader.readuntil(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        body = await reader.readexactly(int(length or 0))
        if b'"repositories"' in body:
            self.reached.set()
            await self.gone.wait()
        return head + body


class KilledFleet:
    """Three servers; the other two reach the last one through a gate."""

    def __init__(self, servers: list[Server], urls: list[str], gate: Gate, configs: list[Path]) -> None:
        self.servers, self.urls, self.gate = servers, urls, gate
        self._configs = configs

    async def run(self, number: int, *arguments: str) -> tuple[int, Any, str]:
        """A command for one of them: its exit status, its JSON, and what it says besides."""
        server = ("--server", self.servers[number].admin_url, "--config", str(self._configs[number]))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "proxy", *arguments, *server, "--json"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        said, besides = await process.communicate()
        return process.returncode or 0, json.loads(said or b"null"), besides.decode()


@pytest.fixture
async def fleet(tmp_path: Path, upstream: Upstream) -> AsyncIterator[KilledFleet]:
    ports = free_ports(3)
    places, gate = [], Gate(ports[2])
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(gate)
        urls = [f"http://127.0.0.1:{port}" for port in (*ports[:2], gate.port)]
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="entrepot-")))
        for port, own in zip(ports, urls, strict=True):
            home, short = tmp_path / str(port), temporary / str(port)
            home.mkdir()
            short.mkdir()
            place = Place(home, short, upstream)
            peers = {"urls": urls, "self": own, "secret": SECRET}
            place.tree |= {"listen": f"127.0.0.1:{port}", "peers": peers}
            places.append(place)
        try:
            async with asyncio.TaskGroup() as group:
                starting = [group.create_task(each.start()) for each in places]
            servers = [each.result() for each in starting]
            yield KilledFleet(servers, urls, gate, [each.home / "entrepot.yml" for each in places])
        finally:
            for place in places:
                for server in place.servers:
                    await server.clear()
    for server in servers:
        assert not server.noise, "".join(server.noise)
        assert not [each for each in server.events if each["level"] == "error"]


async def test_one_that_is_killed_while_it_is_asked_is_named(fleet: KilledFleet, upstream: Upstream) -> None:
    image_of(upstream)
    async with aiohttp.ClientSession() as session:
        for server in fleet.servers[:2]:
            async with session.get(server.url + LATEST) as response:
                assert response.status == 200
    status, pins, said = await fleet.run(2, "pin", "a/b")  # by any worker, from whom the keepers hear
    assert (status, [each["replica"] for each in pins], said) == (0, [None], "")
    listing = asyncio.create_task(fleet.run(0, "ls"))
    await fleet.gate.reached.wait()
    await fleet.servers[2].kill()
    fleet.gate.gone.set()
    status, listed, said = await listing
    assert status == 0
    assert {each["repository"] for each in listed["repositories"]} == {NAME}
    assert said.startswith(f"warning: {fleet.urls[2]} cannot be reached")
    status, pins, said = await fleet.run(1, "pins")
    assert (status, [each["pattern"] for each in pins]) == (0, ["docker.io/a/b"])
    assert fleet.urls[2] in said
