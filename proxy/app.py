"""The composition root: the tree of the configuration becomes the tree of registries, and is served."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import replace

import structlog
from aiohttp import web
from yarl import URL

from proxy import config
from proxy.cache import Cache, Policy
from proxy.fills import Fills
from proxy.limits import Bandwidth, Turns, part
from proxy.listening import BACKLOG, StartError, bind_all
from proxy.namespaces import Member, Namespaces
from proxy.telemetry import Metrics
from proxy.upstream.client import Settings, Upstream
from proxy.upstream.credentials import Credentials, DockerConfig, Helper, Inline, PasswordFile
from proxy.upstream.failover import Failover
from proxy.upstream.transport import Connect
from proxy.web.admin import application
from proxy.web.listener import Listener, Manners
from proxy.web.server import Server
from storage.disk import Disk, may_pass
from storage.errors import StorageFailed
from storage.files import Files, finished
from storage.records import Records
from storage.store import Store

log = structlog.get_logger()

ABANDONED = 86400.0  # seconds after which a partial file that nobody went on with is removed
HOUSEKEEPING = 300.0  # seconds between its rounds


class App:
    """One server process.  start() and stop() belong into one event loop.

    `sockets` are those that it listens on, for clients and for the administrator, when others listen on
    them too; else it binds its own.
    """

    def __init__(
        self,
        settings: config.Config,
        clock: Callable[[], float] = time.time,
        sockets: tuple[list[socket.socket], list[socket.socket]] | None = None,
    ) -> None:
        self._settings = settings
        self._sockets = sockets
        self._workers = 1 if sockets is None else settings.processes()
        self._clock = clock
        self._draining = False
        self._closing = AsyncExitStack()
        self._keeper: asyncio.Task[None] | None = None
        self.url = URL()
        self.admin_url: URL | None = None

    async def start(self) -> None:
        """Raises StartError; then nothing is left behind."""
        try:
            await self._start()
        except StorageFailed as error:
            await self.stop()
            raise StartError(f"cannot store in {self._settings.disk.path} (disk.path): {error}") from error
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> None:
        settings = self._settings
        listen, admin = self._sockets or bind_all(settings)
        for each in (*listen, *admin):
            self._closing.callback(each.close)
        metrics = Metrics()
        root = settings.disk.path / "cache"
        self._disk = Disk(root, self._clock)
        self._files = Files(root, self._clock, self._disk)
        try:
            self._files.check()
        except StorageFailed as error:
            if not may_pass(error):
                raise
        self._store = Store(self._files, Records(root / "records", self._clock, self._disk), self._clock)
        self._closing.push_async_callback(self._store.close)
        turns = Turns(
            part(settings.limits.fills, self._workers),
            {
                name: part(each.upstream.max_fills, self._workers)
                for name, each in settings.namespaces.items()
            },
        )
        fills = Fills(self._store, metrics, turns)
        members = []
        for name, namespace in settings.namespaces.items():
            cache = self._cache(name, namespace, fills, metrics)
            members.append(Member(cache, name, namespace.aliases, namespace.hosts, namespace.library))
        self._closing.push_async_callback(fills.close)  # before what they read from
        namespaces = Namespaces(members, settings.default_namespace, self._store)
        server = Server(
            namespaces,
            namespaces.qualify,
            metrics,
            deny_bypass=settings.fallback == "deny",
            client_timeout=settings.limits.client_timeout,
        )
        if admin:
            # First, since what was started last is stopped first: so it can tell of the draining.
            pages = web.AppRunner(application(metrics, self._state), access_log=None)
            self.admin_url = await self._serve(pages, admin)
        limits = settings.limits
        manners = Manners(limits.connections_per_address, limits.request_timeout, limits.idle_timeout)
        # To aiohttp 0 means to wait for ever.
        runner = web.ServerRunner(
            Listener(server.handle, manners), shutdown_timeout=max(settings.drain, 0.01)
        )
        self.url = await self._serve(runner, listen)
        self._keeper = asyncio.create_task(self._keep_house(metrics))

    def _cache(self, name: str, namespace: config.Namespace, fills: Fills, metrics: Metrics) -> Cache:
        upstream = namespace.upstream
        connect = Connect(
            ca_file=upstream.ca_file,
            client_certificate=upstream.client_certificate,
            client_key=upstream.client_key,
            proxy=upstream.proxy,
            private_redirects=upstream.private_redirects,
            insecure_skip_verify=upstream.insecure_skip_verify,
            connect_timeout=upstream.connect_timeout,
            header_timeout=upstream.header_timeout,
            progress_timeout=upstream.progress_timeout,
        )
        try:
            credentials = [_credentials(login) for login in upstream.logins()]
            bandwidth = Bandwidth(part(upstream.bandwidth, self._workers) if upstream.bandwidth else None)
            origins = []
            for url in upstream.url:
                reach = replace(connect, plain_http=upstream.allows_http(url))
                given = Settings(url, reach, upstream.token_realms, upstream.reserve.of, bandwidth)
                origins.append(Upstream(name, given, credentials, metrics, self._clock))
        except OSError as error:
            needed = (upstream.ca_file, upstream.client_certificate, upstream.client_key)
            files = ", ".join(str(each) for each in needed if each is not None)
            raise StartError(f"namespaces.{name}.upstream: {files}: {error.strerror or error}") from error
        policy = Policy(
            fresh_for=namespace.fresh_for_tag,
            negative_for=namespace.negative_for,
            drop_deleted=namespace.on_upstream_delete == "drop",
            offline=namespace.offline or self._settings.offline,
            lazy=namespace.lazy,
        )
        origin = origins[0] if len(origins) == 1 else Failover(origins, self._clock)
        cache = Cache(name, origin, self._store, fills, policy, self._clock)
        self._closing.push_async_callback(cache.close)
        return cache

    async def _serve(self, runner: web.BaseRunner, sockets: list[socket.socket]) -> URL:
        await runner.setup()
        self._closing.push_async_callback(runner.cleanup)
        for each in sockets:
            await web.SockSite(runner, each, backlog=BACKLOG).start()
        self._closing.push_async_callback(_stop_accepting, sockets)
        host, port = sockets[0].getsockname()[:2]
        return URL.build(scheme="http", host=host, port=port)

    def _state(self) -> Mapping[str, str]:
        if self._draining:
            return {"status": "draining"}
        with suppress(StorageFailed):  # it is among the troubles then
            self._files.check()
        if troubles := self._disk.troubles():
            return {"status": "degraded", "store": "; ".join(troubles)}
        return {"status": "ready"}

    async def _keep_house(self, metrics: Metrics) -> None:
        while True:
            begun = time.monotonic()
            try:
                with self._files.turn(HOUSEKEEPING) as ours:
                    if ours:
                        metrics.stored.set(await finished(self._files.stored_bytes))
                        if reaped := await finished(self._files.reap, ABANDONED):
                            log.info("partial.reaped", files=reaped)
            except StorageFailed:
                pass  # the disk has told of it
            except OSError as error:
                log.error("store.failed", error=str(error))
            # To look at a million files takes seconds: so it takes a small part of the time.
            await asyncio.sleep(max(HOUSEKEEPING, 200 * (time.monotonic() - begun)))

    async def stop(self) -> None:
        """Finish what is being served, for `drain` at most; fills stop where the next start resumes them."""
        self._draining = True
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        await self._closing.aclose()


async def _stop_accepting(sockets: list[socket.socket]) -> None:
    """Before the servers on them are closed."""
    # 1. a connection is accepted, a task is to make its transport  2. the server is closed  3. the transport
    # cannot be made any more, and nobody closes the connection: its client would wait.
    for each in sockets:
        asyncio.get_running_loop().remove_reader(each.fileno())
    await asyncio.sleep(0)


def _credentials(login: config.Login) -> Credentials:
    if login.username is not None and login.password is not None:
        return Inline(login.username, login.password)
    if login.username is not None and login.password_file is not None:
        return PasswordFile(login.username, login.password_file)
    if login.docker_config is not None:
        return DockerConfig(login.docker_config)
    if login.credential_helper is not None:
        return Helper(login.credential_helper)
    return Credentials()
