"""The servers of random writes over HTTP: what befalls them, and their end."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from random import Random
from typing import Any

from tests.objects import FakeBucket, answer
from tests.postgres import PostgresServer
from tests.processes import Place, Server


class Disturbances:
    """What befalls the servers; each lasts until they answer again."""

    def __init__(self, places: list[Place], servers: list[Server], random: Random) -> None:
        self._places = places
        self._servers = servers
        self._random = random

    async def _moment(self) -> None:
        await asyncio.sleep(self._random.random() / 20)

    def _kill(self, pid: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    async def worker(self) -> None:
        await self._moment()
        server = self._random.choice(self._servers)
        pids = server.pids()
        self._kill(victim := self._random.choice(pids))
        await server.gone(victim)

    async def keeper(self) -> None:
        await self._moment()
        server = self._random.choice(self._servers)
        with suppress(ValueError):  # it has just been killed
            self._kill(victim := server.keeper())
            await server.gone(victim)

    async def server(self) -> None:
        await self._moment()
        number = self._random.randrange(len(self._servers))
        await self._servers[number].kill()
        self._servers[number] = await self._places[number].start()


class FleetDisturbances(Disturbances):
    def __init__(self, *arguments: Any, database: PostgresServer, bucket: FakeBucket) -> None:
        super().__init__(*arguments)
        self._database, self._bucket = database, bucket

    async def database(self) -> None:
        await self._moment()
        await asyncio.to_thread(self._database.kill)
        await asyncio.to_thread(self._database.start)

    async def bucket(self) -> None:
        await self._moment()
        self._bucket.down = answer(503, "SlowDown")
        await self._moment()
        self._bucket.down = None


async def stopped(servers: list[Server], places: list[Place]) -> list[str]:
    """Stop them; the requests that failed, and the events that webhooks have lost."""
    failures = []
    for server in servers:
        names = ("request.failed", "webhook.lost")
        failures += [f"{event}" for event in server.events if event["event"] in names]
        await server.stop()
    for place in places:
        for server in place.servers:
            await server.clear()
    return failures
