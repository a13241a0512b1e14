"""Load and faults for a while, with a worker killed now and then; and nothing is wrong, lost or left.

ENTREPOT_SOAK_SECONDS sets for how long, ENTREPOT_SOAK_SEED with which load.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from collections import Counter
from random import Random
from statistics import median

import pytest

from proxy.server.supervisor import LIVED
from tests.processes import Event, Place, Server, Worker, descriptors, memory, place
from tests.soak import REPOSITORIES, TAGS, Load, Storm, drop_one
from tests.upstream import Upstream

__all__ = ["place"]  # the fixture

pytestmark = pytest.mark.clients

SECONDS = float(os.environ.get("ENTREPOT_SOAK_SECONDS", "12"))
CLIENTS = 8
MEMORY = 300 << 20  # bytes of a worker; the load's content is smaller
# How often something happens: at every so manieth operation of the clients.
MOVE, DROP, BREATHE, SAMPLE, KILL = 20, 10, 2, 10, 250


class Soak:
    def __init__(self, place: Place, server: Server, upstream: Upstream, random: Random) -> None:
        self.random = random
        self.place = place
        self.server = server
        self.upstream = upstream
        self.storm = Storm(upstream, random)
        self.load = Load(server.url, upstream, random)
        self.kills = 0
        self.killed_at = 0.0  # of the loop's clock
        self.memory: list[int] = []
        # It lives through all, the others die: what it holds at the end is what leaked.
        self.eldest = server.pids()[0]

    async def run(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        self.storm.on = True
        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(self.load.client(lambda: loop.time() < until, self._step))
        self.storm.on = False
        self.storm.breathe()

    async def _step(self) -> None:
        """After every operation of a client."""
        number = self.load.total
        if number % BREATHE == 0:
            self.storm.breathe()
        if number % MOVE == 0:
            self.load.move(self.random.choice(REPOSITORIES), self.random.choice(TAGS))
            # Both remember all that they are asked, for hours if need be.
            self.upstream.clear()
            self.server.forget("request.served")
        if number % DROP == 0:
            drop_one(self.place.directory, self.random)
        if number % SAMPLE == 0:
            self.memory.append(memory(self.eldest))
        if number % KILL == 0 and self._may_kill():
            (youngest,) = set(self.server.pids()) - {self.eldest}
            os.kill(youngest, signal.SIGKILL)
            self.kills += 1
            self.killed_at = asyncio.get_running_loop().time()

    def _may_kill(self) -> bool:
        if len(self.server.said("worker.replaced")) < self.kills:
            return False
        # One that dies young is waited for ever longer: beyond some seconds that is no load for a test.
        waited = max((each["again_in"] for each in self.server.said("worker.died")[-1:]), default=0)
        return waited < 8 or asyncio.get_running_loop().time() - self.killed_at > LIVED + 2 * waited

    async def pull_all(self, worker: Worker) -> None:
        """Without faults: everything is right at once, but for what is let alone since it has failed."""
        for repository, images in self.load.images.items():
            for image in images:
                for path in (f"manifests/{image.digest}", *(f"blobs/{each}" for each in image.layers)):
                    body = await self._get(worker, f"/v2/{repository}/{path}")
                    assert body == self.load.contents[path.partition("/")[2]]
                await self._get(worker, f"/v2/{repository}/blobs/{image.config}")
            for tag in TAGS:
                assert await self._get(worker, f"/v2/{repository}/manifests/{tag}")

    async def _get(self, worker: Worker, path: str) -> bytes:
        for _ in range(10):
            async with worker.ask(path) as response:
                body = await response.read()
            if response.status == 200:
                return body
            assert response.status in (502, 503, 504), (path, response.status, body)
            # The breaker is open for a second, then longer; a 429 said one.
            await asyncio.sleep(float(response.headers.get("Retry-After", "1")))
        raise AssertionError(f"{path} is not to be had: {response.status} {body!r}")

    async def quiet(self, workers: list[Worker]) -> None:
        """Wait until no fill is on its way."""
        count = len(ends(self.server))
        while True:
            for worker in workers:
                await worker.get("/v2/")  # what it has logged, it has counted by now
            if not await self.server.metric("entrepot_fills_in_flight"):
                return
            await self.server.until(lambda known=count: len(ends(self.server)) > known)
            count = len(ends(self.server))


def ends(server: Server) -> list[Event]:
    """Of fills."""
    names = {f"fill.{word}" for word in ("committed", "followed", "linked", "suspended", "failed")}
    return [each for each in server.events if each["event"] in names]


@pytest.mark.errors("fill.failed", "worker.died", "upstream.wrong_digest")
async def test_soak(place: Place, upstream: Upstream) -> None:
    seed = int(os.environ.get("ENTREPOT_SOAK_SEED", secrets.randbelow(1 << 32)))
    print(f"ENTREPOT_SOAK_SEED={seed}")
    place.namespace.update(fresh_for="1s", negative_for="1s")
    place.namespace["upstream"].update(header_timeout="2s", progress_timeout="2s")
    server = await place.start()
    soak = Soak(place, server, upstream, Random(seed))
    before = await held(server, soak.eldest)
    await soak.run(SECONDS)
    print(dict(soak.load.done), f"kills={soak.kills}")
    assert soak.load.wrong == []
    assert min(soak.load.done[f"{name} right"] for name in ("pull", "some", "leave", "dawdle", "head")) > 0

    if soak.kills:
        await server.heard("worker.replaced", soak.kills)
    workers = await server.workers()
    await asyncio.gather(*map(soak.pull_all, workers))
    await soak.quiet(workers)
    for worker in workers:
        await worker.close()
    assert server.partial() == []
    assert server.said("request.failed") == []

    await upstream.stop()  # so that no connection to it is kept
    assert await held(server, soak.eldest) == before
    assert await server.metric("entrepot_followers") == 0
    half = len(soak.memory) // 2
    third, fourth = soak.memory[half : half + half // 2], soak.memory[half + half // 2 :]
    print(f"memory: {soak.memory[0] >> 20}, {median(third) / 2**20:.1f}, {median(fourth) / 2**20:.1f} MiB")
    assert max(soak.memory) < MEMORY
    assert median(fourth) < 1.1 * median(third) + (8 << 20)
    await server.stop()
    assert server.noise == []
    assert server.locks() == []
    assert list(place.temporary.iterdir()) == []


async def held(server: Server, pid: int) -> Counter[str]:
    """What that worker holds open, with one connection to it."""
    worker = await server.worker(pid)
    await worker.get("/v2/")  # by now it has seen whatever was closed before
    found = descriptors(pid)
    await worker.close()
    return found
