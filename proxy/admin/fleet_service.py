"""Where the operations of a fleet are done: by the housekeeping process, which the others ask.

A request of another replica comes to any process that serves clients.  It passes the body on to a socket in
the directory of the server's processes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from importlib.metadata import version
from pathlib import Path

from aiohttp import web

from proxy.admin.acts import ActControl, Acts
from proxy.admin.api.audited import kind_of
from proxy.admin.fleet import Fleet
from proxy.admin.fleet_socket import SOCKET
from proxy.admin.local_operations import LocalOperations
from proxy.namespaces.composition import Composition
from proxy.namespaces.references import ReferenceReader
from proxy.processes.server_processes import CLOSING, serve_at
from proxy.telemetry.audit import AuditLog
from proxy.upstream.fleet import connect_to_peers
from proxy.upstream.replicas import ReplicaClient, ReplicaState

LARGEST = 1 << 20  # bytes of a request

Health = Callable[[], Awaitable[Mapping[str, str]]]


def joined(
    parts: Composition,
    own: LocalOperations,
    health: Health,
    audit: AuditLog | None,
    changed: Callable[[], None],
) -> Fleet:
    """The fleet that a server belongs to, for operators.

    own: what this server can do by itself
    health: gives what /readyz says
    audit: records what other replicas ask for
    changed: is called after an act that another replica told
    """
    peers = parts.peers
    assert peers is not None

    async def state() -> ReplicaState:
        return ReplicaState(version("entrepot"), dict(await health()))

    def administered(sender: str, operation: str, arguments: Mapping[str, object], status: int) -> None:
        if audit is not None:
            audit.administered(kind_of(operation), sender, "entrepot", "POST", operation, arguments, status)

    acts = Acts(parts.store.records, parts.clock)
    reader = ReferenceReader(parts.namespaces)
    return Fleet(
        own,
        peers,
        ReplicaClient(connect_to_peers(parts.config), peers.secrets),
        ActControl(acts, own, reader, parts.clock, changed),
        sharing=parts.private is not None and parts.private.records.remote,
        state=state,
        look=own.look,
        administered=administered,
    )


async def serve(fleet: Fleet, run: Path, closing: AsyncExitStack) -> None:
    """Answer the other processes of the server, until it closes."""

    async def handle(request: web.Request) -> web.Response:
        status, body = await fleet.answer(await request.read())
        return web.Response(status=status, body=body, content_type="application/json")

    application = web.Application(client_max_size=LARGEST)
    application.add_routes([web.post("/", handle)])
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=CLOSING)
    closing.push_async_callback(await serve_at(run / SOCKET, runner))
