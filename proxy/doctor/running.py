"""The checks of the server itself: it runs, answers at its addresses, and is healthy."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families
from yarl import URL

from proxy.config.cores import count_cores
from proxy.config.errors import StartError
from proxy.config.hosts import Address, local_url
from proxy.config.schema import Config
from proxy.connections.failures import reason
from proxy.doctor import certificates
from proxy.doctor.checks import Check, failed, ok, warning
from proxy.web.sockets import bind
from proxy.web.tls import Certificates

TIMEOUT = 5.0  # seconds for an answer of the server
MIN_DESCRIPTORS = 4096  # a client that follows a fill takes three
OPEN, REQUESTS = "entrepot_upstream_open", "entrepot_requests_total"


@dataclass(frozen=True, slots=True)
class Sample:
    """One value of the metrics."""

    name: str
    labels: dict[str, str]
    value: float


class _State(msgspec.Struct):
    status: str
    store: str = ""
    extensions: str = ""


async def check(config: Config, admin: URL | None = None) -> list[Check]:
    """All checks.  `admin` replaces the admin address of the configuration."""
    url = admin
    if url is None and config.admin and config.admin.port:
        url = local_url("https" if config.admin_tls() else "http", config.admin)
    timeout = aiohttp.ClientTimeout(total=TIMEOUT)
    # The request goes to an address, but the certificate is for a name.
    connector = aiohttp.TCPConnector(ssl=False)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        if url is None:
            advice = "set admin: in the configuration to see the state of the server"
            found = [warning("server", "-", "the admin listener is off, so its state is unknown", advice)]
            return [*found, *await _check_listeners(session, config, None)]
        found, runs = await _check_admin(session, url)
        return [*found, *await _check_listeners(session, config, runs)]


async def _check_admin(session: aiohttp.ClientSession, url: URL) -> tuple[list[Check], bool]:
    """The checks by the admin listener, and whether the server runs."""
    subject = str(url)
    try:
        async with session.get(url / "readyz") as response:
            state = msgspec.json.decode(await response.read(), type=_State)
        samples = await metrics(session, url)
    except aiohttp.ClientConnectorError as error:
        message = f"does not answer: {reason(error)}"
        return [warning("server", subject, message, "start it: entrepot serve")], False
    except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
        message = f"its answer is not that of entrepot: {reason(error)}"
        return [failed("server", subject, message, "check what listens there, and admin:")], True
    if state.status == "degraded":
        found = []
        if state.store:
            advice = "check the disk: until then, pulls are not cached"
            found.append(failed("server", subject, state.store, advice))
        if state.extensions:
            advice = "see entrepot extensions, and the event extension.failed in the log"
            found.append(failed("server", subject, f"an extension fails: {state.extensions}", advice))
    elif state.status != "ready":
        found = [warning("server", subject, f"is {state.status}", "wait for it to stop, then start it again")]
    else:
        found = [ok("server", subject, "is ready")]
    return [*found, *_check_breakers(samples)], True


async def metrics(session: aiohttp.ClientSession, url: URL) -> list[Sample]:
    """The metrics at the admin address `url`.  Raises ClientError, ValueError, TimeoutError."""
    async with session.get(url / "metrics") as response:
        response.raise_for_status()
        text = await response.text()
    families = text_string_to_metric_families(text)
    return [
        Sample(each.name, dict(each.labels), each.value) for family in families for each in family.samples
    ]


def _check_breakers(samples: list[Sample]) -> list[Check]:
    """Checks of upstream hosts that the server has paused because they failed."""
    hosts = [each for each in samples if each.name == OPEN]
    found = []
    for each in hosts:
        if each.value:
            subject, host = each.labels.get("namespace", "?"), each.labels.get("host", "?")
            advice = f"entrepot why {subject}/NAME shows the reason; the server tries again by itself"
            message = f"{host} has failed and is paused: only cached content is served"
            if subject == "peers":
                advice = "look whether that replica runs; this one tries again by itself"
                message = f"{host} has failed and is left out: others are asked in its place"
            found.append(warning("breaker", subject, message, advice))
    if hosts and not found:
        found.append(ok("breaker", "all", "no upstream is paused"))
    return found


async def _check_listeners(session: aiohttp.ClientSession, config: Config, runs: bool | None) -> list[Check]:
    """Whether the listeners for clients answer.

    `runs` is whether the server runs, None if that is unknown.
    """
    addresses = [config.listen, *config.store_listeners().values()]
    return [await _check_listener(session, config, each, runs) for each in addresses]


async def _check_listener(
    session: aiohttp.ClientSession, config: Config, address: Address, runs: bool | None
) -> Check:
    subject = str(address)
    if not address.port:
        return warning("listen", subject, "is any free port, unknown to clients", "give listen: a port")
    if runs and config.tls and config.tls.client_certificate == "required":
        return ok("listen", subject, "was not checked: it answers only clients with certificates")
    url = local_url("https" if config.tls else "http", address)
    try:
        async with session.get(url / "v2/") as response:
            program, status = response.headers.get("Server", ""), response.status
    except aiohttp.ClientConnectorError as error:
        if runs:
            advice = "if listen: was changed, restart the server; or give its file with --config"
            return failed("listen", subject, f"does not answer, but the server runs: {reason(error)}", advice)
        return _check_address(address)
    except (aiohttp.ClientError, TimeoutError) as error:
        advice = "check what listens there: ss -ltnp"
        return failed("listen", subject, f"the answer is not HTTP: {reason(error)}", advice)
    if program != "entrepot":
        advice = "check what listens there (ss -ltnp); stop it, or choose another port for listen"
        return failed("listen", subject, f"another program answers: {program or status}", advice)
    if address.loopback:
        return ok("listen", subject, f"answers {status}; only this machine can connect")
    return ok("listen", subject, f"answers {status}")


def _check_address(address: Address) -> Check:
    subject = str(address)
    try:
        for each in bind(address, "listen"):
            each.close()
    except StartError as error:
        return failed("listen", subject, str(error), "choose an address of this machine and a free port")
    return ok("listen", subject, "is free for the server")


def check_certificate(config: Config) -> list[Check]:
    """The check of the listener's certificate, if it has one."""
    if config.tls is None:
        return []
    subject, advice = str(config.tls.certificate), "renew it; the server reloads it by itself"
    try:
        expires = Certificates(config.tls).expires
    except StartError as error:
        return [failed("tls", subject, str(error), "check the files of tls: in the configuration")]
    if expires < time.time():
        return [failed("tls", subject, "the certificate has expired", advice)]
    return [certificates.check_expiry("tls", subject, expires, advice)]


def check_limits(config: Config) -> list[Check]:
    """The checks of the number of processes and of open files."""
    cores, processes = count_cores(), config.processes()
    counts = f"{processes} on {cores} cores"
    if processes > 2 * cores:
        found = [warning("workers", "-", counts, "set workers: auto, for one per core")]
    else:
        found = [ok("workers", "-", counts)]
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < MIN_DESCRIPTORS:
        advice = "raise the limit: LimitNOFILE= of the unit, or ulimit -Hn"
        message = f"a process may open {most}; a client that follows a fill takes three"
        found.append(warning("descriptors", "-", message, advice))
    else:
        found.append(ok("descriptors", "-", "the limit is high enough"))
    return found
