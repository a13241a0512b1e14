"""The checks of a client's machine: the server answers, the clients use it, and what bypasses it."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from yarl import URL

from proxy.config.image_names import ImageName
from proxy.connections.failures import explain
from proxy.connections.trust import client_context
from proxy.doctor import canary, containerd, docker, podman, tokens
from proxy.doctor.checks import Check, failed, guarded, ok, warning
from proxy.doctor.machine import Machine
from proxy.setup.site import CA, Site

TIMEOUT = 60.0  # seconds: a cold pull waits for the upstream
CANARY = "docker.io/library/hello-world:latest"
CLIENTS = {docker.CLIENT: docker.check, containerd.CLIENT: containerd.check, podman.CLIENT: podman.check}


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """The image to request as each client would, and optionally one for each client to pull.

    `admin` is the admin address of the server, whose metrics show whether a pull reached it.
    """

    canary: ImageName
    pull: ImageName | None = None
    admin: URL | None = None


async def examine(site: Site, root: Path, options: ClientOptions) -> list[Check]:
    """All checks of the clients below `root`, which should use the server `site`."""
    machine = Machine(site, root)
    found = {
        name: await guarded("configuration", name, asyncio.to_thread(check, machine))
        for name, check in CLIENTS.items()
    }
    installed = [name for name, checks in found.items() if checks]
    client_checks = [each for checks in found.values() for each in checks]
    if not installed:
        message = "no dockerd, containerd, podman or related program is installed"
        advice = "give the root directory of the clients with --root"
        client_checks = [warning("client", str(root), message, advice)]
    timeout = aiohttp.ClientTimeout(total=TIMEOUT)
    connector = aiohttp.TCPConnector(ssl=_trust(machine))
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        checks = [*await guarded("server", str(site.url), _listed(_check_server(session, site)))]
        if checks[0].state != "failed":
            checks += await guarded("tokens", site.base, _listed(tokens.check(session, site)))
        checks += client_checks
        if checks[0].state != "failed":
            for client in installed or [podman.CLIENT]:
                pull = canary.check(session, machine, client, options.canary)
                checks += await guarded("canary", client, _listed(pull))
        if options.pull:
            for client in installed:
                pulled = canary.pull(session, machine, client, options.pull, options.admin)
                checks += await guarded("pull", client, _listed(pulled))
    return checks


async def _listed(check: Awaitable[Check | None]) -> list[Check]:
    found = await check
    return [] if found is None else [found]


def _trust(machine: Machine) -> ssl.SSLContext:
    """The system's authorities, the given one, and those that installed clients have for the server."""
    context = client_context()
    if machine.site.ca:
        context.load_verify_locations(cadata=machine.site.ca)
    for directory in ("/etc/docker/certs.d", "/etc/containers/certs.d", "/etc/containerd/certs.d"):
        path = machine.path(directory) / machine.site.host / CA
        if path.is_file():
            context.load_verify_locations(path)
    return context


async def _check_server(session: aiohttp.ClientSession, site: Site) -> Check:
    """Whether the server answers, and is Entrepôt."""
    url = f"{site.base}/v2/"
    try:
        async with session.get(url, allow_redirects=False) as response:
            server, status = response.headers.get("Server", ""), response.status
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        failure = explain(error, URL(url), "--ca-file of entrepot setup CLIENT")
        advice = "check that the server runs (entrepot doctor there) and that no firewall blocks this machine"
        return failed("server", site.base, f"{url}: {failure.cause}", failure.advice or advice)
    if server != "entrepot":
        message = f"{url} answers {status}, but the server is {server or 'unknown'}, not entrepot"
        advice = "give the address that listen: names; a proxy in between may also have answered"
        return warning("server", site.base, message, advice)
    if status not in (200, 401):
        return failed("server", site.base, f"{url} answers {status}", "run entrepot doctor on the server")
    return ok("server", site.base, f"answers {status}, and is entrepot")
