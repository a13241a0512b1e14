"""`entrepot migrate` and `entrepot reload`, beside a server that people use."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import aiohttp
import pytest

from proxy.cli.moves import moved_tables
from proxy.config.loader import load
from proxy.namespaces.private import is_shared
from proxy.transfer.results import DamageRow, EngineMoved, MovedPart
from storage.oci import OCI_MANIFEST, Digest
from tests.moving import push
from tests.objects import FakeBucket
from tests.postgres import PostgresServer
from tests.processes import Place, Server
from tests.processes import place as place  # a fixture
from tests.test_move import in_bucket
from tests.test_push import image

pytestmark = pytest.mark.clients

APP = "/v2/local/team/app"
TURNS = 80  # images that a client pushes during a move, or tries to


@pytest.fixture
async def fake() -> AsyncIterator[FakeBucket]:
    async with FakeBucket() as fake:
        yield fake


class Client:
    """Pushes images, each with its own tag, and knows which of them were acknowledged."""

    def __init__(self, server: Server, name: str) -> None:
        self.acknowledged: dict[str, bytes] = {}
        self._url = server.url + APP
        self._name = name
        self._news = asyncio.Event()
        self._turns = asyncio.Semaphore(TURNS)
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        number = 0
        async with aiohttp.ClientSession() as session:
            while True:
                number += 1
                await self._turns.acquire()
                await self._push(session, f"{self._name}-{number}")

    async def _push(self, session: aiohttp.ClientSession, tag: str) -> None:
        layer = tag.encode() * 1000
        for content in (layer, b"{}"):
            url = f"{self._url}/blobs/uploads/?digest={Digest.of(content)}"
            if not await self._sent(session.post(url, data=content)):
                return
        given = {"Content-Type": OCI_MANIFEST}
        manifest = image(Digest.of(layer))
        if await self._sent(session.put(f"{self._url}/manifests/{tag}", data=manifest, headers=given)):
            self.acknowledged[tag] = manifest
            self._news.set()

    async def _sent(self, request: Any) -> bool:
        with suppress(aiohttp.ClientConnectionError):  # of a process that has just been replaced
            async with request as response:
                if response.status == 201:
                    return True
                assert response.status == 503, await response.text()
                assert response.headers["Retry-After"]
        return False

    async def another(self) -> None:
        """Wait until one more is acknowledged."""
        self._news.clear()
        for _ in range(TURNS):
            self._turns.release()
        news = asyncio.create_task(self._news.wait())
        async with asyncio.timeout(60):
            await asyncio.wait([news, self.task], return_when=asyncio.FIRST_COMPLETED)
        if self.task.done():
            self.task.result()


async def command(place: Place, *arguments: str) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy", *arguments, "--config", str(place.home / "entrepot.yml"), "--json"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    found: dict[str, Any] = json.loads(out)
    return found


async def test_nothing_that_was_acknowledged_is_lost(
    place: Place, fake: FakeBucket, postgres_server: PostgresServer
) -> None:
    place.tree["namespaces"]["local"] = {"store": {}}
    place.tree["access"] = {"rules": [{"who": ["anonymous"], "may": ["pull", "push"]}]}
    server = await place.start()
    place.tree["shared"] = {"records": postgres_server.database(), **in_bucket(fake)}
    place.configure()
    clients = [Client(server, name) for name in "ab"]
    tasks = [each.task for each in clients]
    try:
        await clients[0].another()
        expected = await command(
            place, "migrate", "--to", "shared", "--dry-run", "--server", server.admin_url
        )
        assert expected["parts"][0]["blobs"] >= 2
        assert fake.objects == {}
        for nth, where in enumerate(("shared", "local"), 1):
            found = await command(place, "migrate", "--to", where, "--server", server.admin_url)
            assert found["reloaded"]
            await server.heard("config.reloaded", nth)
            await asyncio.gather(*[each.another() for each in clients])
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    async with aiohttp.ClientSession() as session:
        for client in clients:
            for tag, manifest in client.acknowledged.items():
                async with session.get(f"{server.url}{APP}/manifests/{tag}") as response:
                    assert await response.read() == manifest
                digest = Digest.of(tag.encode() * 1000)
                async with session.get(f"{server.url}{APP}/blobs/{digest}") as response:
                    assert await response.read() == tag.encode() * 1000


@pytest.mark.parametrize(("options", "kept"), [([], True), (["--dry-run"], False)])
def test_what_stays_is_said_only_where_something_was_to_be_copied(
    place: Place, options: list[str], kept: bool
) -> None:
    place.tree["namespaces"]["local"] = {"store": {}}
    place.configure()
    asyncio.run(push(load(place.home / "entrepot.yml"), b"content"))
    place.tree["shared"] = {"records": "postgresql://entrepot:x@127.0.0.1:1/entrepot"}  # nobody listens
    place.configure()
    arguments = ["migrate", "--to", "shared", *options, "--config", str(place.home / "entrepot.yml")]
    found = subprocess.run([sys.executable, "-m", "proxy", *arguments], capture_output=True, text=True)
    assert found.returncode == 1
    message = found.stderr.splitlines()[-1]
    assert message.startswith("entrepot: records in 127.0.0.1:1/entrepot: connection failed")
    assert ("what was copied stays" in message) == kept


async def test_who_cannot_reach_the_server_has_to_reload_it(place: Place, fake: FakeBucket) -> None:
    place.tree["namespaces"]["local"] = {"store": {}}
    place.configure()
    await push(load(place.home / "entrepot.yml"), b"content")
    place.tree["shared"] = in_bucket(fake)
    place.configure()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy", "migrate", "--to", "shared", "--server", "http://127.0.0.1:1"),
        *("--config", str(place.home / "entrepot.yml")),
        stderr=asyncio.subprocess.PIPE,
    )
    _, err = await process.communicate()
    assert process.returncode == 1
    assert b"is moved; reload the server now" in err
    assert b"no server at http://127.0.0.1:1" in err
    assert is_shared(load(place.home / "entrepot.yml"))


async def test_a_server_is_told_to_read_its_configuration_again(place: Place) -> None:
    server = await place.start()
    before = set(server.pids())
    found = await command(place, "reload", "--server", server.admin_url)
    assert found == {"pid": server.pid}
    await server.heard("config.reloaded")
    await server.gone(*before)
    assert not before & set(server.pids())


@pytest.mark.parametrize(
    ("to", "more", "says"),
    [
        ("shared", {"reloaded": True}, "is in the engines of `shared`; the server is reloading"),
        ("local", {}, "is on the disk; the server has to be reloaded now: it refuses pushes until then"),
        ("local", {"dry_run": True}, "nothing was copied"),
        ("shared", {"damaged": [DamageRow("", "sha256:00", "why")]}, "the server continues with what it had"),
    ],
)
def test_what_is_said_of_a_move(to: str, more: dict[str, Any], says: str) -> None:
    part = MovedPart(name="private registry", blobs=1, bytes=2048, records=3, paused=0.44, expected=120.0)
    given: dict[str, Any] = {"damaged": [], "dry_run": False, "reloaded": False, **more}
    tables = moved_tables(EngineMoved(to=to, parts=[part], seconds=2.0, **given), 0.0)
    notes = tables[-1].notes
    line = "private registry: 1 blob of 2.0 KiB, 3 records, in about 2 min; pushes waited for 0.4 s"
    assert notes[0] == line
    assert says in notes[1]
    assert len(tables) == 1 + bool(given["damaged"])
