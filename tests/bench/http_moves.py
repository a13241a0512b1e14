"""Random writes over HTTP to a server whose private registry is moved to and fro: what is lost or wrong.

Rounds of http_writes.py, while `entrepot migrate`, a process of its own, moves the registry between the disk
and a bucket and a database, one way and then the other.  Meanwhile it, a worker, the housekeeping, the server
or the database may be killed, or the bucket may be away; it is then run again.  While the registry is shared,
a second server may run.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections import Counter
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import click

from tests.bench.clients import BenchError
from tests.bench.http_servers import FleetDisturbances, stopped
from tests.bench.http_writes import ACCESS, IMMUTABLE, Clients
from tests.bench.telling import ACTIONS
from tests.objects import FakeBucket
from tests.postgres import PostgresServer
from tests.processes import Place
from tests.receiver import Receiver

WORKERS = 2
ENDS = ("config.reloaded", "config.refused")  # of a reload
SECOND = 0.3  # the share of the moments when the registry is shared, in which a second server starts
BEGUN = 0.4  # the share of the rounds in which a move begins, if none is under way


class MovingClients(Clients):
    """Clients that know that old workers read where the registry was until they have ended."""

    async def _settled(self) -> None:
        server = self.servers[0]
        begun = len(server.said("config.reloading"))
        await server.until(lambda: sum(len(server.said(each)) for each in ENDS) >= begun)
        while True:
            if len(server.pids()) <= WORKERS:
                return await super()._settled()
            await asyncio.sleep(0.05)


class Mover:
    """Runs `entrepot migrate` beside the clients, again and again."""

    def __init__(self, place: Place, clients: Clients, random: Random) -> None:
        self.done: Counter[str] = Counter()
        self.shared = False  # where the registry is, if the last move came to its end
        self.sure = True
        self.excused = False  # whether something was killed since it began
        self._place = place
        self._clients = clients
        self._random = random
        self._process: asyncio.subprocess.Process | None = None
        self._ended: asyncio.Task[tuple[bytes, bytes]] | None = None

    @property
    def runs(self) -> bool:
        return self._process is not None

    @property
    def may_share(self) -> bool:
        """Whether a second server may start."""
        return self.shared and self.sure and not self.runs

    async def begin(self) -> None:
        where = "local" if self.shared else "shared"
        config, admin = self._place.home / "entrepot.yml", self._clients.servers[0].admin_url
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "proxy", "migrate", "--to", where, "--config", str(config)),
            *("--server", admin),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        self._ended = asyncio.create_task(self._process.communicate())
        self.excused = False

    async def kill(self) -> None:
        await asyncio.sleep(self._random.random() * 1.5)
        if self._process is not None:
            self.excused = True
            with suppress(ProcessLookupError):
                self._process.kill()

    async def look(self) -> None:
        """Note its end, if it has ended."""
        if self._ended is not None and self._ended.done():
            await self.end()

    async def end(self) -> None:
        if self._process is None or self._ended is None:
            return
        _, said = await self._ended
        status = self._process.returncode
        self._process = self._ended = None
        self.done[f"migrate {status}"] += 1
        self.sure = status == 0
        if status == 0:
            self.shared = not self.shared
        elif not self.excused:
            self._clients.expected.wrong.append(f"migrate ended with {status}: {said.decode()}")


async def sample(seed: int, rounds: int) -> tuple[Clients, Mover]:
    random = Random(seed)
    async with AsyncExitStack() as stack:
        receiver = Receiver()
        await receiver.start()
        stack.push_async_callback(receiver.stop)
        hook = {"name": "all", "url": receiver.url, "actions": ACTIONS, "format": "cloudevents"}
        database = PostgresServer()
        stack.callback(database.remove)
        database.start()
        stack.callback(database.stop)
        bucket = await stack.enter_async_context(FakeBucket())
        settings = bucket.settings("regis/try")
        keys = {"access_key": settings.access_key, "secret_key": settings.secret_key}
        shared = {
            "bucket": settings.url,
            "endpoint": settings.endpoint,
            "records": database.database(),
            **keys,
        }
        places = []
        for _ in range(2):
            home = stack.enter_context(tempfile.TemporaryDirectory(prefix="entrepot-bench-"))
            place = Place(Path(home), Path(home), SimpleNamespace(url=""))  # type: ignore[arg-type]
            place.tree |= {"workers": WORKERS, "webhooks": [hook], "access": ACCESS, "shared": shared}
            place.tree["namespaces"] = {"local": {"store": {"immutable_tags": IMMUTABLE}}}
            places.append(place)
        clients = MovingClients([await places[0].start()], random)
        stack.push_async_callback(clients.close)
        mover = Mover(places[0], clients, random)
        await _rounds(clients, mover, places, random, rounds, database=database, bucket=bucket)
        clients.expected.wrong += await clients.telling.compare(receiver)
        clients.expected.wrong += await stopped(clients.servers, places)
    return clients, mover


async def _rounds(
    clients: Clients, mover: Mover, places: list[Place], random: Random, rounds: int, **engines: Any
) -> None:
    disturbances = FleetDisturbances(places, clients.servers, random, **engines)
    kinds = [disturbances.worker, disturbances.keeper, disturbances.server]
    kinds += [disturbances.database, disturbances.bucket]

    async def nothing() -> None:
        """Writers may have to wait for a moment, or until a move that was killed is run again."""

    for _ in range(rounds):
        if not mover.runs and random.random() < BEGUN:
            while len(clients.servers) > 1:
                await clients.servers.pop().stop()
            await mover.begin()
        elif mover.may_share and len(clients.servers) == 1 and random.random() < SECOND:
            clients.servers.append(await places[1].start())
        kill = [mover.kill] * 2 if mover.runs else []
        calm = nothing if mover.runs or not mover.sure else None
        chosen = random.choice([*kinds, *kill, *[calm] * 5])
        if chosen not in (None, nothing):
            mover.excused = True
        await clients.round(chosen)
        await mover.look()
    await mover.end()
    await clients.round(nothing)


@click.command()
@click.option("--rounds", default=60, show_default=True, help="Of each seed.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--seed", default=0, show_default=True, help="The first one.")
def main(rounds: int, seeds: int, seed: int) -> None:
    """Write at random over HTTP while the registry is moved, and compare; prints a table."""
    print("| requests | cut off | 5xx | moves | moves that ended early | wrong |\n|--:|--:|--:|--:|--:|--:|")
    done, moves, found = Counter[str](), Counter[str](), 0
    for number in range(seed, seed + seeds):
        clients, mover = asyncio.run(sample(number, rounds))
        for text in clients.expected.wrong:
            print(f"  seed {number}: {text}", file=sys.stderr)
        done, moves, found = done + clients.done, moves + mover.done, found + len(clients.expected.wrong)
    print(sorted((done + moves).items()), file=sys.stderr)
    cut = sum(count for name, count in done.items() if name.endswith("cut off"))
    failed = sum(count for name, count in done.items() if " 5" in name)
    moved = moves.pop("migrate 0", 0)
    print(f"| {done.total():,} | {cut:,} | {failed:,} | {moved} | {moves.total()} | {found} |", flush=True)
    if found:
        raise BenchError(f"{found} times something was lost, wrong or not told")


if __name__ == "__main__":
    main(prog_name="python -m tests.bench.http_moves")
