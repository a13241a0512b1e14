"""One process of the server: it serves clients, does the housekeeping, or both."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from aiohttp import web
from yarl import URL

from proxy.access.authorization import Authorizer
from proxy.config.errors import StartError
from proxy.config.schema import TLS, Config
from proxy.namespaces.composition import compose
from proxy.namespaces.hooks import Hooks
from proxy.namespaces.routing import Namespaces
from proxy.processes.drills import DrillControl, resume
from proxy.processes.server_processes import ServerProcesses, serve_state
from proxy.processes.state import state_of
from proxy.server import make_room
from proxy.server.access import access_control, needed
from proxy.server.fleet_member import FleetMember
from proxy.server.health import Health
from proxy.server.housekeeping import Housekeeper, warm_schedule
from proxy.server.observation import Observation
from proxy.server.process_name import show_as
from proxy.server.supervisor import Assignment
from proxy.telemetry import logs
from proxy.telemetry.audit import AuditLog
from proxy.telemetry.exchange import Exchange
from proxy.telemetry.metrics import share_metrics
from proxy.telemetry.request_log import RequestLog
from proxy.telemetry.stalls import watched_callbacks
from proxy.telemetry.tracers import make_tracer
from proxy.telemetry.tracing import NoTracer, Tracer, current_span
from proxy.web.directions import Directions
from proxy.web.hits import HitMemory
from proxy.web.listener import ConnectionLimits, Listener
from proxy.web.middleware import Middleware
from proxy.web.peers import PeerRequests
from proxy.web.redirects import Redirects
from proxy.web.server import DistributionAPI
from proxy.web.sockets import Sockets, bind_all, stop_accepting
from proxy.web.tls import Certificates
from proxy.web.tls_listener import PlainSite, TLSSite
from proxy.webhooks import wakeup
from storage.maintenance.resolutions import ResolutionJournal
from storage.patient import waits_ended
from storage.shared import SharedState
from storage.store import Store

if TYPE_CHECKING:  # only servers whose configuration needs them import them
    from proxy.access.token_exchange import TokenExchange
    from proxy.webhooks.delivery import Dispatcher

log = structlog.get_logger()

NICE = 10  # of the process that does the housekeeping: those that serve clients come first; nice(2)
HOUSEKEEPING = "keeper"  # the socket of the process that does the housekeeping


class ServerProcess:
    """One process of a server.  start() and stop() are called in one event loop.

    A process without `sockets` binds its own, and is the whole server.  Otherwise `sockets` are those that
    the supervisor bound: a process with sockets for clients serves clients, and a process without them does
    the housekeeping.  `run` is the directory in which the processes of one server find each other, and
    `shared` is what all of them know.
    """

    def __init__(
        self,
        config: Config,
        clock: Callable[[], float] = time.time,
        sockets: Sockets | None = None,
        run: Path | None = None,
        shared: SharedState | None = None,
        request_log: RequestLog | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self._config = config
        self._clock = clock
        self._sockets = sockets
        self._run = run
        self._shared = shared
        self._request_log = request_log
        self._tracer = tracer or NoTracer()
        self._draining = False
        self._stores: list[Store] = []
        self._closing = AsyncExitStack()
        self.url = URL()
        self.admin_url: URL | None = None
        self.store_urls: dict[str, URL] = {}

    async def start(self) -> None:
        """Start all parts, or none of them.  Raises StartError."""
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """End all parts, after the requests in progress or after `drain` seconds.

        The next start resumes the fills that are not complete.
        """
        self._draining = True
        with waits_ended(self._stores, self._drain):
            await self._closing.aclose()

    async def _start(self) -> None:
        current_span.set(self._tracer.background)  # of all tasks that it starts
        sockets = self._sockets or bind_all(self._config)
        for each in sockets:
            self._closing.callback(each.close)
        housekeeps = not sockets.listen or self._sockets is None
        self._compose(self._housekeeping_hooks() if housekeeps else self._worker_hooks())
        if housekeeps:
            await self._prepare_housekeeping()
            if sockets.admin or self.composition.peers is not None:
                await self._serve_administrators(sockets.admin)
        if sockets.listen:
            await self._serve_clients(sockets)
        if self._member.fleet is not None:
            self._run_in_background(self._member.fleet.run())
        if housekeeps:  # last: nothing is read through before the server listens
            self._run_in_background(self.housekeeper.run())
            self._closing.callback(self.housekeeper.close)

    # Parts

    def _compose(self, hooks: Hooks) -> None:
        self.composition = compose(self._config, self._clock, None, self._shared, hooks)
        self._closing.push_async_callback(self.composition.close)
        self._closing.callback(self.composition.metrics.flush)
        self._stores = self.composition.all_stores
        self._state = state_of(self.composition)
        self._run_in_background(self.composition.recorder.run())
        self._member = FleetMember(self.composition, self._run)
        self._audit = AuditLog(self._config.audit, self._clock) if self._config.audit is not None else None
        if self._audit is not None:
            self._closing.callback(self._audit.close)

    def _worker_hooks(self) -> Hooks:
        """Make the housekeeping process act, if there is one."""
        if self._run is None:
            return Hooks()
        return Hooks(make_room=make_room.ask(self._run / HOUSEKEEPING), wake=wakeup.sender(self._run))

    def _housekeeping_hooks(self) -> Hooks:
        # The housekeeper and the dispatcher need the composition, whose parts need them only later.
        def wake() -> None:
            if self._dispatcher is not None:
                self._dispatcher.wake()

        return Hooks(
            make_room=lambda coming: self.housekeeper.make_room(coming),
            wake=wake,
            pause=lambda seconds: self.housekeeper.pause(seconds),
            drill_begun=lambda: self.housekeeper.postpone_fetches(),
            background=self._sockets is not None,
        )

    async def _prepare_housekeeping(self) -> None:
        """Raises StartError."""
        self._dispatcher = self._webhook_dispatcher()
        self.housekeeper = Housekeeper(
            self.composition, warm_schedule(self.composition, self._state.forget), self._dispatcher
        )
        self._processes = ServerProcesses(self._state, self._run)
        self._health = Health(self.composition, self._processes, lambda: self._draining)
        self._closing.push_async_callback(self._health.close)
        self._observation = Observation(self.composition, self._health, keeper=self._sockets is not None)
        self._observation.prepare()
        self._closing.push_async_callback(self._observation.close)
        if self._run is not None:
            close = await make_room.serve(self._run / HOUSEKEEPING, self.housekeeper.make_room)
            self._closing.push_async_callback(close)

    def _webhook_dispatcher(self) -> Dispatcher | None:
        """Raises StartError."""
        config, parts = self._config, self.composition
        if parts.queue is None:
            return None
        from proxy.webhooks.delivery import Dispatcher

        parts.extensions.load("event_sink")
        port, metrics, clock = config.listen.port, parts.metrics, parts.clock
        return Dispatcher(
            config.webhooks, parts.queue, port, metrics, clock, self._run, extensions=parts.extensions
        )

    def _run_in_background(self, work: Coroutine[None, None, None]) -> None:
        self._closing.push_async_callback(_cancel, asyncio.create_task(work))

    # Listeners

    async def _serve_administrators(self, sockets: list[socket.socket]) -> None:
        # Only one process needs these, and they are large.
        from proxy.admin.api.app import AdminRunner, Summaries, application
        from proxy.admin.local_operations import LocalOperations
        from proxy.ui.app import pages
        from proxy.ui.documentation import documentation

        config, parts, housekeeper = self._config, self.composition, self.housekeeper
        drills = DrillControl(self._processes, parts.drill, parts.metrics, parts.clock, self._run)
        operations = LocalOperations(parts, self._processes, housekeeper.evicting, housekeeper.heal, drills)
        summaries = Summaries()
        fleet = await self._member.join(
            operations, self._health, self._audit, summaries.forget, self._closing
        )
        if not sockets:
            self._closing.push_async_callback(operations.close)
            return
        # Before the clients' listener, since what starts last stops first: so /healthz can report "draining".
        api = application(
            parts.metrics,
            self._health.report,
            operations,
            fleet,
            token=config.admin_token,
            audit=self._audit,
            loopback=config.admin is not None and config.admin.loopback,
            pages=pages(config, fleet or operations, self._health.report, parts.clock),
            manual=None if config.admin_ui == "off" else documentation(),
            observe=self._observation.observe,
            summaries=summaries,
            tracer=self._tracer,
        )
        encrypted = config.admin_tls() is not None
        runner = AdminRunner(api, self._connection_limits(), encrypted=encrypted, drain=self._drain)
        self.admin_url = await self._serve(runner, sockets, config.admin_tls())

    async def _serve_clients(self, sockets: Sockets) -> None:
        config, parts = self._config, self.composition
        permits, tokens = access_control(parts, self._closing) if needed(config) else (None, None)
        if self._run is not None:
            path = self._run / f"{os.getpid()}.sock"
            self._closing.push_async_callback(await serve_state(self._state, path))
            resume(parts.drill, self._run)
        hits = HitMemory(config.limits.hit_memory) if config.limits.hit_memory else None
        for name, each in sockets.stores.items():
            alone = permits and permits.alone(name)
            self.store_urls[name] = await self._serve_api(
                each, parts.namespaces.alone(name), alone, hits, tokens
            )
        self.url = await self._serve_api(sockets.listen, parts.namespaces, permits, hits, tokens)

    async def _serve_api(
        self,
        sockets: list[socket.socket],
        namespaces: Namespaces,
        permits: Authorizer | None,
        hits: HitMemory | None,
        tokens: TokenExchange | None,
    ) -> URL:
        config, parts = self._config, self.composition
        api = DistributionAPI(
            namespaces,
            namespaces.qualify,
            parts.metrics,
            deny_bypass=config.fallback == "deny",
            client_timeout=config.limits.client_timeout,
            served=parts.recorder.served if self._audit is None else self._served,
            reporter=parts.publisher,
            clock=self._clock,
            authorizer=permits,
            tokens=tokens,
            request_log=self._request_log,
            hit_memory=hits,
            past=ResolutionJournal(parts.store).at,
            tracer=self._tracer,
            peers=PeerRequests(parts.peers, parts.is_cache) if parts.peers is not None else None,
            redirects=Redirects(config.redirect.never_for) if config.redirect is not None else None,
            middleware=Middleware(parts.extensions.load("middleware")),
            server=parts.shared.id,
            directions=Directions({name: config.namespaces[name].listen for name in config.hosted()}),
        )
        listener = Listener(
            self._member.handler(api.handle),
            self._connection_limits(),
            encrypted=config.tls is not None,
            connections=parts.shared.connections,
            hits=api.hits,
        )
        runner = web.ServerRunner(listener, shutdown_timeout=self._drain)
        return await self._serve(runner, sockets, config.tls, clients=True)

    def _served(self, exchange: Exchange, status: int) -> None:
        """Called with each request of a client that has ended, if there is an audit log."""
        assert self._audit is not None
        self.composition.recorder.served(exchange, status)
        self._audit.served(exchange, status)

    @property
    def _drain(self) -> float:
        return max(self._config.drain, 0.01)  # aiohttp takes 0 for no limit

    def _connection_limits(self) -> ConnectionLimits:
        limits = self._config.limits
        return ConnectionLimits(
            limits.connections_per_address, limits.request_timeout, limits.idle_timeout, limits.client_timeout
        )

    async def _serve(
        self,
        runner: web.BaseRunner,
        sockets: list[socket.socket],
        tls: TLS | None,
        *,
        clients: bool = False,
    ) -> URL:
        """Serve `runner` on `sockets`, by TLS if `tls` is given.  `clients` may show a certificate."""
        limits = self._config.limits
        certificates = None
        if tls is not None:
            expiry = self.composition.metrics.expiry.labels("clients" if clients else "admin")
            certificates = Certificates(tls, clients=clients, loaded=expiry.set)
        await runner.setup()
        self._closing.push_async_callback(runner.cleanup)
        for each in sockets:
            site = PlainSite(runner, each)
            if certificates is not None:
                times = {"handshake": limits.request_timeout, "goodbye": limits.client_timeout}
                site = TLSSite(runner, each, certificates, **times)
            await site.start()
        self._closing.push_async_callback(stop_accepting, sockets)
        host, port = sockets[0].getsockname()[:2]
        return URL.build(scheme="https" if certificates else "http", host=host, port=port)


def run(assignment: Assignment) -> int:
    """Be a process of a supervisor, until a signal or the end of the supervisor.  Returns the exit status."""
    config = assignment.config
    show_as("entrepot", assignment.role)
    if assignment.role == "keeper":
        os.nice(NICE)
    request_log = logs.configure(config.log.format, config.log.level, access=config.log.access)
    share_metrics(assignment.run)
    # A follower needs three descriptors; the soft limit is made for programs that use select().
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        with watched_callbacks(config.log.slow_callbacks):
            return asyncio.run(_run(assignment, request_log))
    finally:
        request_log.flush()


async def _run(assignment: Assignment, request_log: RequestLog) -> int:
    tracer = make_tracer(tell=assignment.role == "keeper")  # of several processes, one says what is wrong
    process = ServerProcess(
        assignment.config,
        sockets=assignment.sockets,
        run=assignment.run,
        shared=assignment.shared,
        request_log=request_log,
        tracer=tracer,
    )
    ended, loop, parent = asyncio.Event(), asyncio.get_running_loop(), assignment.parent
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    loop.add_reader(parent.fileno(), ended.set)
    try:
        await process.start()
    except StartError as error:
        parent.report(str(error))
        return 1
    except Exception as error:  # of all processes, one report is shown
        log.debug("start.failed", exc_info=True)
        parent.report(f"{_cause(error)} (set log.level to debug to see where)")
        return 1
    parent.report("ready")
    await ended.wait()
    loop.remove_reader(parent.fileno())
    await process.stop()
    await tracer.close()
    return 0


def _cause(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return ": ".join([*([str(error.filename)] if error.filename else []), error.strerror])
    return f"an unexpected error: {error or 'nothing more is known'}"


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
