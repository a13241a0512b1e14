"""Replicas of a fleet on this machine, in the process of the test."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from proxy.server.process import ServerProcess
from proxy.telemetry.tracing import Tracer
from proxy.upstream.rendezvous import ranked
from tests.conftest import Clock, Site, configuration

SECRET = "the-secret-of-the-fleet"


def free_ports(number: int) -> list[int]:
    """Ports at which nobody listens now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class Replica(Site):
    """A replica under test."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.stopped = False

    async def stop(self) -> None:
        if not self.stopped:
            self.stopped = True
            await self.session.close()
            await self.app.stop()


class Replicas:
    """Those of a fleet, in the order of their ports; `urls` are those that they have for each other."""

    def __init__(self, urls: list[str], directory: Path, clock: Clock, tree: dict[str, Any]) -> None:
        self.urls = urls
        self.all: list[Replica] = []
        self._directory = directory
        self._clock = clock
        self._tree = {**tree, "peers": {"urls": urls, "secret": SECRET}}

    async def start(self, number: int) -> Replica:
        """Start one of them, for the first time or again."""
        listen = self.urls[number].removeprefix("http://")
        replica = await start(self._directory / str(number), self._clock, {**self._tree, "listen": listen})
        self.all[number : number + 1] = [replica]
        return replica

    def ranked(self, key: str) -> list[Replica]:
        """The owner of the key first."""
        return [self.all[self.urls.index(each)] for each in ranked(key, self.urls)]


async def start(directory: Path, clock: Clock, tree: dict[str, Any], tracer: Tracer | None = None) -> Replica:
    """A server with its own disk in `directory`, and the keys of `tree`; without pages unless they say so."""
    directory.mkdir(parents=True, exist_ok=True)
    base = {
        "admin": "127.0.0.1:0",
        "admin_ui": "off",
        "drain": "1s",
        "disk": {"path": str(directory / "disk")},
    }
    app = ServerProcess(configuration(directory, {**base, **tree}), clock, tracer=tracer)
    await app.start()
    connector = aiohttp.TCPConnector(ssl=False)
    timeout = aiohttp.ClientTimeout(total=30)
    session = aiohttp.ClientSession(connector=connector, auto_decompress=False, timeout=timeout)
    return Replica(app, session, directory / "disk", clock)


@asynccontextmanager
async def replicas(
    number: int,
    directory: Path,
    clock: Clock,
    namespace: dict[str, Any],
    top: dict[str, Any] | None = None,
    more: dict[str, Any] | None = None,
) -> AsyncIterator[Replicas]:
    """So many caches of docker.io, whose keys are `namespace`; `more` are further namespaces."""
    urls = [f"http://127.0.0.1:{port}" for port in free_ports(number)]
    tree = {"namespaces": {"docker.io": namespace, **(more or {})}, **(top or {})}
    fleet = Replicas(urls, directory, clock, tree)
    try:
        for at in range(number):
            await fleet.start(at)
        yield fleet
    finally:
        for each in fleet.all:
            await each.stop()
