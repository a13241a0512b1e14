"""A namespace of a configuration, served on a free port of 127.0.0.1 by a thread."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from aiohttp import web

from proxy.config.loader import load
from proxy.namespaces.composition import Composition, compose
from proxy.telemetry.exchange import Exchange
from proxy.telemetry.request_log import RequestLog
from proxy.testing.loop import LoopThread
from proxy.web.listener import ConnectionLimits, Listener, ServerHandler
from proxy.web.server import DistributionAPI
from storage.oci import Reference, parse_reference

__all__ = ["SeenRequest", "ServedNamespace", "listen"]


@dataclass(frozen=True, slots=True)
class SeenRequest:
    """A request that was answered.

    kind: base, manifest, blob, tags, referrers, catalog, uploads, upload or other
    repository: without the namespace; "" if there is none
    reference: a tag, a digest or the id of an upload; "" without one
    result: hit, miss, revalidated, stale, negative or error (RFC 9111); "" if no content is concerned
    """

    method: str
    kind: str
    repository: str
    reference: str
    status: int
    result: str
    agent: str


async def listen(handler: ServerHandler, closing: AsyncExitStack) -> str:
    """Serve `handler` on a free port of 127.0.0.1 until `closing`; return its URL."""
    # Nobody waits for clients that keep their connections; aiohttp takes 0 for no limit.
    runner = web.ServerRunner(Listener(handler, ConnectionLimits()), shutdown_timeout=0.01)
    closing.push_async_callback(runner.cleanup)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    return f"http://{host}:{port}"


class ServedNamespace:
    """A context manager that serves one namespace, which clients need not name.

    directory: an empty or absent one for what is stored

    Every method is called from a thread that is not the server's; those that ask the registry raise
    RegistryError.
    """

    def __init__(self, directory: Path) -> None:
        self.requests: list[SeenRequest] = []
        self._directory = directory
        self._closing = AsyncExitStack()

    @property
    def url(self) -> str:
        """Where it listens: `http://127.0.0.1:<port>`."""
        return self._url

    @property
    def address(self) -> str:
        """What image names begin with: `127.0.0.1:<port>`."""
        return self._url.removeprefix("http://")

    def repositories(self) -> list[str]:
        """The names of the stored repositories."""
        names = self._loop.run(self._parts.namespaces.repositories())
        return [each.removeprefix(f"{self._name}/") for each in names]

    def tags(self, repository: str) -> list[str]:
        """The tags of a repository."""
        return self._loop.run(self._parts.namespaces.tags(self._full(repository)))

    def digest(self, repository: str, reference: str) -> str:
        """The digest of a manifest by its tag."""
        return str(self._loop.run(self._resolve(self._full(repository), parse_reference(reference))))

    async def _resolve(self, name: str, reference: Reference) -> str:
        return (await self._parts.namespaces.get_manifest(name, reference)).digest

    def __enter__(self) -> Self:
        self._loop = LoopThread()
        try:
            self._loop.run(self._start())
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        try:
            self._loop.run(self._closing.aclose())
        finally:
            self._loop.close()

    async def _start(self) -> None:
        raise NotImplementedError

    async def _serve(self, name: str, keys: Mapping[str, Any]) -> None:
        """Serve the namespace `name` with these keys of the configuration.

        Raises ConfigError, StartError.
        """
        self._name = name
        self._parts = parts = self._composed(name, keys)
        self._closing.push_async_callback(parts.close)
        api = DistributionAPI(
            parts.namespaces,
            parts.namespaces.qualify,
            parts.metrics,
            served=self._served,
            request_log=RequestLog(off=True),
        )
        self._url = await listen(api.handle, self._closing)

    def _composed(self, name: str, keys: Mapping[str, Any]) -> Composition:
        self._directory.mkdir(parents=True, exist_ok=True)
        file = self._directory / "entrepot.yml"
        tree = {
            "disk": {"path": str(self._directory / "disk")},
            "namespaces": {name: dict(keys)},
            "default_namespace": name,
        }
        file.write_text(json.dumps(tree))  # which is YAML, too
        return compose(load(file, {}))

    def _served(self, exchange: Exchange, status: int) -> None:
        self.requests.append(
            SeenRequest(
                exchange.method,
                exchange.kind,
                exchange.repository,
                exchange.reference,
                status,
                exchange.result,
                exchange.agent or "",
            )
        )

    def _full(self, repository: str) -> str:
        return self._parts.namespaces.qualify(repository)
