"""A cache of Docker Hub on port 5000, made of its parts and without a configuration.

python examples/cache_by_hand.py
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

from aiohttp import web

from proxy import (
    Cache,
    ConnectionLimits,
    Credentials,
    DistributionAPI,
    Fills,
    Listener,
    Member,
    Metrics,
    Namespaces,
    Policy,
    UpstreamRegistry,
    UpstreamSettings,
)
from storage import BlobFiles, Registry, SQLiteRecords, Store


async def serve(
    origin: Registry, metrics: Metrics, directory: Path, port: int, closing: AsyncExitStack
) -> web.ServerRunner:
    store = Store(BlobFiles(directory), SQLiteRecords(directory / "records"))
    fills = Fills(store, metrics)
    cache = Cache("hub", origin, store, fills, Policy(fresh_for=lambda tag: 600.0))
    names = Namespaces([Member(cache, "hub", library=True)], default="hub")
    api = DistributionAPI(names, names.qualify, metrics)
    runner = web.ServerRunner(Listener(api.handle, ConnectionLimits()))
    for each in (store.close, cache.close, fills.close, runner.cleanup):  # closed in reverse order
        closing.push_async_callback(each)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    return runner


async def main() -> None:
    metrics = Metrics()
    hub = UpstreamSettings("https://registry-1.docker.io")
    origin = UpstreamRegistry("hub", hub, [Credentials()], metrics)  # anonymous
    async with AsyncExitStack() as closing:
        await serve(origin, metrics, Path("cache"), 5000, closing)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
