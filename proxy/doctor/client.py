"""A client's machine, looked over: does the server answer, who is told to ask it, what goes past it."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from yarl import URL

from proxy.config.image_names import ImageName
from proxy.doctor import canary, containerd, docker, podman
from proxy.doctor.certificates import refused
from proxy.doctor.checks import Check, cause, failed, ok, warning
from proxy.doctor.host import Host
from proxy.setup.site import CA, Site

PATIENCE = 60.0  # seconds: a cold pull has to wait for its upstream
CANARY = "docker.io/library/hello-world:latest"
CLIENTS = {docker.CLIENT: docker.look, containerd.CLIENT: containerd.look, podman.CLIENT: podman.look}


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """What is asked of the machine: a canary of that name; with `pull`, each client's own pull of it."""

    canary: ImageName
    pull: ImageName | None = None
    admin: URL | None = None


async def examine(site: Site, root: Path, wish: ClientOptions) -> list[Check]:
    host = Host(site, root)
    found = {name: look(host) for name, look in CLIENTS.items()}
    here = [name for name, checks in found.items() if checks]
    told = [each for checks in found.values() for each in checks]
    if not here:
        message = "neither dockerd nor containerd nor podman and its kin are here"
        told = [warning("client", str(root), message, "name where they are by --root")]
    timeout = aiohttp.ClientTimeout(total=PATIENCE)
    connector = aiohttp.TCPConnector(ssl=_trust(host))
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        checks = [await _answers(session, site)]
        checks += told
        if checks[0].state != "failed":
            for client in here or [podman.CLIENT]:
                checks.append(await canary.look(session, host, client, wish.canary))
        if wish.pull:
            pulled = [await canary.pull(session, host, each, wish.pull, wish.admin) for each in here]
            checks += [each for each in pulled if each is not None]
    return checks


def _trust(host: Host) -> ssl.SSLContext:
    """Who everybody trusts, and the authority that is given or that a client here has for the server."""
    context = ssl.create_default_context()
    if host.site.ca:
        context.load_verify_locations(cadata=host.site.ca)
    for directory in ("/etc/docker/certs.d", "/etc/containers/certs.d", "/etc/containerd/certs.d"):
        path = host.path(directory) / host.site.host / CA
        if path.is_file():
            context.load_verify_locations(path)
    return context


async def _answers(session: aiohttp.ClientSession, site: Site) -> Check:
    """Whether it is there, and is one of ours."""
    url = f"{site.base}/v2/"
    try:
        async with session.get(url, allow_redirects=False) as response:
            server, status = response.headers.get("Server", ""), response.status
    except aiohttp.ClientConnectorCertificateError as error:
        why = error.certificate_error
        message = refused(why) if isinstance(why, ssl.SSLError) else str(why)
        advice = "give its authority: entrepot setup CLIENT --ca-file FILE puts it where the client looks"
        return failed("server", site.base, message, advice)
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        advice = "see whether it runs (entrepot doctor there), listens here, and no firewall is between"
        return failed("server", site.base, f"{url}: {cause(error)}", advice)
    if server != "entrepot":
        message = f"{url} answers {status}, but is {server or 'something'} and not entrepot"
        advice = "name the address that listen: says; a proxy between may also answer for it"
        return warning("server", site.base, message, advice)
    if status not in (200, 401):
        return failed("server", site.base, f"{url} answers {status}", "see entrepot doctor on the server")
    return ok("server", site.base, f"answers {status}, and is entrepot")
