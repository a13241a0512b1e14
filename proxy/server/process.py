"""One process of the server: it serves clients, or keeps house and serves the administrator, or both."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, suppress
from pathlib import Path

from aiohttp import web
from yarl import URL

from proxy.admin.drills import DrillControl, resume
from proxy.admin.peers import ServerProcesses, serve_state
from proxy.admin.processes import state_of
from proxy.config import schema
from proxy.namespaces.composition import Composition
from proxy.server import make_room
from proxy.server.access import admission, needed
from proxy.server.housekeeping import Housekeeper
from proxy.web.listener import Listener, Manners
from proxy.web.server import DistributionAPI
from proxy.web.sockets import BACKLOG, bind_all
from proxy.web.tls import Certificates
from proxy.web.tls_listener import TLSSite
from proxy.webhooks import wakeup
from proxy.webhooks.delivery import Dispatcher
from storage.disk import health
from storage.errors import StorageFailed

KEEPER = "keeper"


class ServerProcess:
    """start() and stop() belong into one event loop.

    `sockets` are those that it listens on, for clients and for the administrator; without, it binds its own,
    and does all that there is to do.  Else it serves clients if there are sockets for them, and is the keeper
    if there are none; `run` is a directory where the processes of one server find each other.
    """

    def __init__(
        self,
        settings: schema.Config,
        clock: Callable[[], float] = time.time,
        sockets: tuple[list[socket.socket], list[socket.socket]] | None = None,
        run: Path | None = None,
    ) -> None:
        self._settings = settings
        self._sockets = sockets
        self._run = run
        self._clock = clock
        self._draining = False
        self._closing = AsyncExitStack()
        self.url = URL()
        self.admin_url: URL | None = None

    async def start(self) -> None:
        """Raises StartError; then nothing is left behind."""
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> None:
        settings = self._settings
        listen, admin = self._sockets or bind_all(settings)
        for each in (*listen, *admin):
            self._closing.callback(each.close)
        keeps = not listen or self._sockets is None
        room = health.nobody if keeps or self._run is None else make_room.ask(self._run / KEEPER)
        workers = 1 if self._sockets is None else settings.processes()
        self.composition = Composition(settings, self._clock, None, workers, room)
        self._closing.push_async_callback(self.composition.close)
        self._live = state_of(self.composition)
        if self.composition.teller is not None and self._run is not None:
            self.composition.teller.wake = wakeup.caller(self._run)
        recording = asyncio.create_task(self.composition.recorder.run())
        self._closing.push_async_callback(_ended, recording)
        if keeps:
            await self._keep_house(admin)
        if listen:
            await self._serve_clients(listen)
        if keeps:  # last: nothing is looked through before it listens
            keeping = asyncio.create_task(self.keeper.run())
            self._closing.push_async_callback(_ended, keeping)
            self._closing.callback(self.keeper.close)

    async def _keep_house(self, admin: list[socket.socket]) -> None:
        composition, settings = self.composition, self._settings
        self.keeper = keeper = Housekeeper(composition, self._live.forget, self._deliveries())
        composition.fills.make_room = keeper.make_room
        self._everyone = ServerProcesses(self._live, self._run)
        if self._run is not None:
            self._closing.push_async_callback(await make_room.serve(self._run / KEEPER, keeper.make_room))
        if admin:
            from proxy.admin.api.app import application
            from proxy.admin.local_operations import LocalOperations

            drills = DrillControl(
                self._everyone, composition.drill, composition.metrics, composition.clock, self._run
            )
            # First, since what was started last is stopped first: so it can tell of the draining.
            pages = application(
                composition.metrics,
                self._state,
                LocalOperations(composition, self._everyone, keeper.evicting, keeper.heal, drills),
                token=settings.admin_token,
                loopback=settings.admin is not None and settings.admin.loopback,
            )
            runner = web.AppRunner(pages, access_log=None)
            self.admin_url = await self._serve(runner, admin, settings.admin_tls())

    def _deliveries(self) -> Dispatcher | None:
        """Raises StartError."""
        composition, settings = self.composition, self._settings
        if composition.queue is None or composition.teller is None:
            return None
        deliveries = Dispatcher(
            settings.webhooks,
            composition.queue,
            settings.listen.port,
            composition.metrics,
            composition.clock,
            self._run,
        )
        composition.teller.wake = deliveries.wake
        return deliveries

    async def _serve_clients(self, listen: list[socket.socket]) -> None:
        composition, settings = self.composition, self._settings
        limits = settings.limits
        server = DistributionAPI(
            composition.namespaces,
            composition.namespaces.qualify,
            composition.metrics,
            deny_bypass=settings.fallback == "deny",
            client_timeout=limits.client_timeout,
            served=composition.recorder.served,
            teller=composition.teller,
            clock=self._clock,
            access=admission(composition, self._closing) if needed(settings) else None,
        )
        if self._run is not None:
            path = self._run / f"{os.getpid()}.sock"
            self._closing.push_async_callback(await serve_state(self._live, path))
            resume(composition.drill, self._run)
        manners = Manners(limits.connections_per_address, limits.request_timeout, limits.idle_timeout)
        # To aiohttp 0 means to wait for ever.
        runner = web.ServerRunner(
            Listener(server.handle, manners, encrypted=settings.tls is not None),
            shutdown_timeout=max(settings.drain, 0.01),
        )
        self.url = await self._serve(runner, listen, settings.tls, clients=True)

    async def _serve(
        self,
        runner: web.BaseRunner,
        sockets: list[socket.socket],
        tls: schema.TLS | None,
        *,
        clients: bool = False,
    ) -> URL:
        """By TLS if there is `tls`; `clients`: they may show certificates of their own."""
        limits = self._settings.limits
        certificates = None if tls is None else Certificates(tls, clients=clients)
        await runner.setup()
        self._closing.push_async_callback(runner.cleanup)
        for each in sockets:
            site: web.BaseSite = web.SockSite(runner, each, backlog=BACKLOG)
            if certificates is not None:
                times = {"handshake": limits.request_timeout, "goodbye": limits.client_timeout}
                site = TLSSite(runner, each, certificates, **times)
            await site.start()
        self._closing.push_async_callback(_stop_accepting, sockets)
        host, port = sockets[0].getsockname()[:2]
        return URL.build(scheme="https" if certificates else "http", host=host, port=port)

    async def _state(self) -> Mapping[str, str]:
        if self._draining:
            return {"status": "draining"}
        with suppress(StorageFailed):  # it is among the troubles then
            self.composition.files.check()
        left = self.composition.drill.left
        drill = {"drill": f"upstreams are cut off for {left:.0f} s more"} if left else {}
        states = await self._everyone.states()
        if troubles := dict.fromkeys(trouble for each in states for trouble in each.troubles):
            return {"status": "degraded", "store": "; ".join(troubles), **drill}
        return {"status": "ready", **drill}

    async def stop(self) -> None:
        """Finish what is being served, for `drain` at most; fills stop where the next start resumes them."""
        self._draining = True
        await self._closing.aclose()


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _stop_accepting(sockets: list[socket.socket]) -> None:
    """Before the servers on them are closed."""
    # 1. a connection is accepted, a task is to make its transport  2. the server is closed  3. the transport
    # cannot be made any more, and nobody closes the connection: its client would wait.
    for each in sockets:
        asyncio.get_running_loop().remove_reader(each.fileno())
    await asyncio.sleep(0)
