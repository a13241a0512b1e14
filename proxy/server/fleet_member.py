"""The part of a server's process in a fleet: whose operations it does, or has the housekeeping process do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from proxy.namespaces.composition import Composition
from proxy.server.health import Health
from proxy.telemetry.audit import AuditLog
from proxy.web.listener import ServerHandler
from proxy.web.peers import OperationRequests

if TYPE_CHECKING:  # they are large
    from proxy.admin.fleet import Fleet
    from proxy.admin.local_operations import LocalOperations


class FleetMember:
    """Answers other replicas, if the configuration has any.

    run: the directory of the server's processes, None if it is one process

    fleet: all replicas, once this process has joined
    """

    def __init__(self, composition: Composition, run: Path | None) -> None:
        self._composition = composition
        self._run = run
        self.fleet: Fleet | None = None

    async def join(
        self,
        own: LocalOperations,
        health: Health,
        audit: AuditLog | None,
        changed: Callable[[], None],
        closing: AsyncExitStack,
    ) -> Fleet | None:
        """Have this process do the operations.  `changed` is called after those of other replicas."""
        if self._composition.peers is None:
            return None
        from proxy.admin.fleet_service import joined, serve

        self.fleet = joined(self._composition, own, health.report, audit, changed)
        closing.push_async_callback(self.fleet.close)
        if self._run is not None:
            await serve(self.fleet, self._run, closing)
        return self.fleet

    def handler(self, handle: ServerHandler) -> ServerHandler:
        """The handler of the listener for clients, whose requests `handle` answers."""
        peers = self._composition.peers
        if peers is None:
            return handle
        from proxy.admin.fleet_socket import PATH

        return OperationRequests(peers, PATH, self._answer, handle).handle

    async def _answer(self, body: bytes) -> tuple[int, bytes]:
        if self.fleet is not None:
            return await self.fleet.answer(body)
        assert self._run is not None
        from proxy.admin.fleet_socket import forward

        return await forward(self._run, body)
