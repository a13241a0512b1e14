"""A limit that falls far below what is pulled, by several clients at once: no pull fails, and it is kept.

ENTREPOT_QUOTA_SECONDS sets for how long, ENTREPOT_SOAK_SEED with which load.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from functools import partial
from pathlib import Path
from random import Random

import pytest

from tests.processes import Place, place
from tests.soak import SIZES, Load
from tests.upstream import Upstream

__all__ = ["place"]  # the fixture

pytestmark = pytest.mark.clients

SECONDS = float(os.environ.get("ENTREPOT_QUOTA_SECONDS", "6"))
CLIENTS = 4
LIMIT = 16 << 20


def stored(directory: Path) -> int:
    total = 0
    for path in (directory / "cache" / "blobs").glob("*/*/*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # evicted meanwhile
            continue
    return total


async def test_a_limit_that_shrinks_below_the_working_set(place: Place, upstream: Upstream) -> None:
    seed = os.environ.get("ENTREPOT_SOAK_SEED") or secrets.token_hex(4)
    print(f"ENTREPOT_SOAK_SEED={seed}")
    place.tree["disk"] |= {"cache_limit": "1GiB", "min_free": 0, "scrub": "off"}
    place.tree["log"] = {"level": "debug"}  # it tells of each blob that it evicts
    server = await place.start()
    # A worker that drains closes connections at rest, and a client may just then send a request.
    load = Load(server.url, upstream, Random(seed), keep_alive=False)
    working_set = sum(map(len, load.contents.values()))
    # Each client has one image on its way at most, with one layer of each size; about means up to twice.
    most = LIMIT + CLIENTS * 2 * sum(SIZES)
    assert most < working_set * 0.9, "the limit would not be felt"
    shrunk = asyncio.Event()
    highest = 0

    async def look() -> None:
        nonlocal highest
        if shrunk.is_set():
            highest = max(highest, await asyncio.to_thread(stored, server.directory))

    async def shrink() -> None:
        await server.until(lambda: len(server.said("fill.committed")) > 20)
        place.tree["disk"]["cache_limit"] = f"{LIMIT >> 20}MiB"
        place.configure()
        server.send(signal.SIGHUP)
        await server.heard("config.reloaded")
        await server.heard("evict.done")
        shrunk.set()

    loop = asyncio.get_running_loop()
    until = loop.time() + SECONDS
    async with asyncio.TaskGroup() as group:
        group.create_task(shrink())
        for _ in range(CLIENTS):
            going_on = partial(_going_on, until, shrunk)
            group.create_task(load.client(going_on, look))
    assert not load.wrong, load.wrong
    done = {outcome: number for outcome, number in load.done.items() if number}
    assert not [each for each in done if each.endswith(" broken")], done
    assert not [each for each in done if each.endswith(" refused") and not each.startswith("nothing")], done
    assert done["pull right"] > 0
    assert server.said("blob.evicted")
    assert 0 < highest <= most, (highest, most, working_set)
    await server.stop()
    assert stored(server.directory) <= most


def _going_on(until: float, shrunk: asyncio.Event) -> bool:
    return asyncio.get_running_loop().time() < until or not shrunk.is_set()
