"""The composition root: the tree of the configuration becomes the tree of registries, and is served."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import structlog
from aiohttp import web
from yarl import URL

from proxy import config
from proxy.cache import Cache, Policy
from proxy.fills import Fills
from proxy.namespaces import Member, Namespaces
from proxy.telemetry import Metrics
from proxy.upstream.client import Settings, Upstream
from proxy.upstream.credentials import Credentials, DockerConfig, Helper, Inline, PasswordFile
from proxy.upstream.transport import Connect
from proxy.web.admin import application
from proxy.web.server import Server, listener
from storage.errors import StorageFailed
from storage.files import Files
from storage.records import Records
from storage.store import Store

log = structlog.get_logger()

ABANDONED = 86400.0  # seconds after which a partial file that nobody went on with is removed
HOUSEKEEPING = 3600.0  # seconds between its rounds


class StartError(Exception):
    """Why the server cannot start, in one line."""


class App:
    """One server process.  start() and stop() belong into one event loop."""

    def __init__(self, settings: config.Config, clock: Callable[[], float] = time.time) -> None:
        self._settings = settings
        self._clock = clock
        self._draining = False
        self._closing: list[Callable[[], Any]] = []
        self._keeper: asyncio.Task[None] | None = None
        self.url = URL()
        self.admin_url: URL | None = None

    async def start(self) -> None:
        """Raises StartError; then nothing is left behind."""
        try:
            await self._start()
        except (StorageFailed, ssl.SSLError) as error:
            await self.stop()
            raise StartError(str(error)) from error
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> None:
        settings = self._settings
        metrics = Metrics()
        root = settings.disk.path / "cache"
        self._files = Files(root, self._clock)
        self._files.check()
        self._store = Store(self._files, Records(root / "records"), self._clock)
        self._closing.append(self._store.close)
        fills = Fills(self._store, metrics)
        members = []
        for name, namespace in settings.namespaces.items():
            cache = self._cache(name, namespace, fills, metrics)
            members.append(Member(cache, name, namespace.aliases, namespace.hosts, namespace.library))
        self._closing.append(fills.close)  # before what they read from
        namespaces = Namespaces(members, settings.default_namespace, self._store)
        server = Server(namespaces, namespaces.qualify, metrics, deny_bypass=settings.fallback == "deny")
        self.url = await self._listen(
            web.ServerRunner(listener(server), shutdown_timeout=settings.drain), settings.listen
        )
        if settings.admin is not None:
            runner = web.AppRunner(application(metrics.registry, self._state), access_log=None)
            self.admin_url = await self._listen(runner, settings.admin)
        self._keeper = asyncio.create_task(self._keep_house(metrics))

    def _cache(self, name: str, namespace: config.Namespace, fills: Fills, metrics: Metrics) -> Cache:
        upstream = namespace.upstream
        connect = Connect(
            ca_file=upstream.ca_file,
            client_certificate=upstream.client_certificate,
            client_key=upstream.client_key,
            proxy=upstream.proxy,
            plain_http=upstream.plain_http,
            insecure_skip_verify=upstream.insecure_skip_verify,
            connect_timeout=upstream.connect_timeout,
            header_timeout=upstream.header_timeout,
            progress_timeout=upstream.progress_timeout,
        )
        try:
            origin = Upstream(
                name, Settings(upstream.url, connect, upstream.token_realms), _credentials(upstream), metrics
            )
        except OSError as error:
            raise StartError(f"namespaces.{name}.upstream: ca_file or client_certificate: {error}") from error
        policy = Policy(
            fresh_for=namespace.fresh_for_tag,
            negative_for=namespace.negative_for,
            drop_deleted=namespace.on_upstream_delete == "drop",
            offline=namespace.offline or self._settings.offline,
        )
        cache = Cache(name, origin, self._store, fills, policy, self._clock)
        self._closing.append(cache.close)
        return cache

    async def _listen(self, runner: web.BaseRunner, address: config.Address) -> URL:
        await runner.setup()
        self._closing.append(runner.cleanup)
        site = web.TCPSite(runner, address.host, address.port, backlog=1024)
        try:
            await site.start()
        except OSError as error:
            raise StartError(f"cannot listen on {address}: {error.strerror or error}") from error
        host, port = runner.addresses[0][:2]
        return URL.build(scheme="http", host=host, port=port)

    def _state(self) -> Mapping[str, str]:
        if self._draining:
            return {"status": "draining"}
        try:
            self._files.check()
        except StorageFailed as error:
            return {"status": "degraded", "store": str(error)}
        return {"status": "ready"}

    async def _keep_house(self, metrics: Metrics) -> None:
        with suppress(StorageFailed, OSError):
            metrics.stored.inc(await asyncio.to_thread(self._files.stored_bytes))
        while True:
            try:
                reaped = await asyncio.to_thread(self._files.reap, ABANDONED)
                if reaped:
                    log.info("partial.reaped", files=reaped)
            except StorageFailed as error:
                log.error("store.failed", error=str(error))
            await asyncio.sleep(HOUSEKEEPING)

    async def stop(self) -> None:
        """Finish what is being served, for `drain` at most; fills stop where the next start resumes them."""
        self._draining = True
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        while self._closing:
            await self._closing.pop()()


def _credentials(upstream: config.Upstream) -> Credentials:
    if upstream.username is not None and upstream.password is not None:
        return Inline(upstream.username, upstream.password)
    if upstream.username is not None and upstream.password_file is not None:
        return PasswordFile(upstream.username, upstream.password_file)
    if upstream.docker_config is not None:
        return DockerConfig(upstream.docker_config)
    if upstream.credential_helper is not None:
        return Helper(upstream.credential_helper)
    return Credentials()
