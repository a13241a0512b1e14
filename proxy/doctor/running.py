"""The server itself: whether it runs, answers where it says, and how it does."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families
from yarl import URL

from proxy.config.errors import StartError
from proxy.config.hosts import local_url
from proxy.config.schema import Config
from proxy.doctor import certificates
from proxy.doctor.checks import Check, cause, failed, ok, warning
from proxy.web.sockets import bind
from proxy.web.tls import Certificates

PATIENCE = 5.0  # seconds for an answer of our own server
DESCRIPTORS = 4096  # a follower takes three; fewer than that are soon used up
OPEN, REQUESTS = "entrepot_upstream_open", "entrepot_requests_total"


@dataclass(frozen=True, slots=True)
class Sample:
    """One number of the metrics."""

    name: str
    labels: dict[str, str]
    value: float


class _State(msgspec.Struct):
    status: str
    store: str = ""


async def look(config: Config, admin: URL | None = None) -> list[Check]:
    """`admin` is the admin address where it is not that of the configuration."""
    url = admin
    if url is None and config.admin and config.admin.port:
        url = local_url("https" if config.admin_tls() else "http", config.admin)
    timeout = aiohttp.ClientTimeout(total=PATIENCE)
    # It is asked by its address, and a certificate is for its name.
    connector = aiohttp.TCPConnector(ssl=False)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        if url is None:
            advice = "set admin: in the configuration, to see how it does"
            found = [warning("server", "-", "its admin listener is off: how it does is not told", advice)]
            return [*found, await _listens(session, config, None)]
        found, runs = await _administered(session, url)
        return [*found, await _listens(session, config, runs)]


async def _administered(session: aiohttp.ClientSession, url: URL) -> tuple[list[Check], bool]:
    """What its admin listener tells, and whether it runs."""
    subject = str(url)
    try:
        async with session.get(url / "readyz") as response:
            state = msgspec.json.decode(await response.read(), type=_State)
        samples = await metrics(session, url)
    except aiohttp.ClientConnectorError as error:
        message = f"nobody answers: {cause(error)}"
        return [warning("server", subject, message, "start it: entrepot serve")], False
    except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
        message = f"answers what entrepot does not: {cause(error)}"
        return [failed("server", subject, message, "see what listens there, and what admin: says")], True
    if state.status == "degraded":
        found = [
            failed("server", subject, state.store, "see to the disk: pulls go through uncached meanwhile")
        ]
    elif state.status != "ready":
        found = [warning("server", subject, f"is {state.status}", "it ends; start it anew")]
    else:
        found = [ok("server", subject, "is ready")]
    return [*found, *_breakers(samples)], True


async def metrics(session: aiohttp.ClientSession, url: URL) -> list[Sample]:
    """Those of the server whose admin listener is there.  Raises ClientError, ValueError, TimeoutError."""
    async with session.get(url / "metrics") as response:
        response.raise_for_status()
        text = await response.text()
    families = text_string_to_metric_families(text)
    return [
        Sample(each.name, dict(each.labels), each.value) for family in families for each in family.samples
    ]


def _breakers(samples: list[Sample]) -> list[Check]:
    """Upstreams that the server lets alone at the moment, since they have failed."""
    hosts = [each for each in samples if each.name == OPEN]
    found = []
    for each in hosts:
        if each.value:
            subject, host = each.labels.get("namespace", "?"), each.labels.get("host", "?")
            advice = f"entrepot why {subject}/NAME tells since when and why; it is tried again by itself"
            message = f"{host} has failed and is let alone: what is cached is served"
            found.append(warning("breaker", subject, message, advice))
    if hosts and not found:
        found.append(ok("breaker", "all", "no upstream is let alone"))
    return found


async def _listens(session: aiohttp.ClientSession, config: Config, runs: bool | None) -> Check:
    """Whether clients are answered; `runs` is None where that is not known."""
    subject = str(config.listen)
    if not config.listen.port:
        return warning("listen", subject, "is any free port: clients cannot know it", "give listen: a port")
    if runs and config.tls and config.tls.client_certificate == "required":
        return ok("listen", subject, "was not asked: it answers none but clients with certificates")
    url = local_url("https" if config.tls else "http", config.listen)
    try:
        async with session.get(url / "v2/") as response:
            theirs, status = response.headers.get("Server", ""), response.status
    except aiohttp.ClientConnectorError as error:
        if runs:
            advice = "is listen: another one than that of the running server? restart it, or name its file"
            return failed(
                "listen", subject, f"nobody answers, though the server runs: {cause(error)}", advice
            )
        return _could_listen(config)
    except (aiohttp.ClientError, TimeoutError) as error:
        advice = "see what listens there: ss -ltnp"
        return failed("listen", subject, f"no answer that is HTTP: {cause(error)}", advice)
    if theirs != "entrepot":
        advice = "see what listens there (ss -ltnp), end it or choose another port for listen"
        return failed("listen", subject, f"something else answers there: {theirs or status}", advice)
    if config.listen.loopback:
        return ok("listen", subject, f"answers {status}; only this machine reaches it")
    return ok("listen", subject, f"answers {status}")


def _could_listen(config: Config) -> Check:
    subject = str(config.listen)
    try:
        for each in bind(config.listen, "listen"):
            each.close()
    except StartError as error:
        return failed("listen", subject, str(error), "choose an address of this machine's, and a free port")
    return ok("listen", subject, "is free, for the server to listen at")


def own_certificate(config: Config) -> list[Check]:
    """Of the listener's, where it has one."""
    if config.tls is None:
        return []
    subject, advice = str(config.tls.certificate), "renew it: the server reads it again by itself"
    try:
        expires = Certificates(config.tls).expires
    except StartError as error:
        return [failed("tls", subject, str(error), "see to the files of tls: in the configuration")]
    if expires < time.time():
        return [failed("tls", subject, "the certificate has expired", advice)]
    return [certificates.judged("tls", subject, expires, advice)]


def machine(config: Config) -> list[Check]:
    """What processes may do here."""
    cores, processes = os.cpu_count() or 1, config.processes()
    said = f"{processes} on {cores} cores"
    if processes > 2 * cores:
        found = [warning("workers", "-", said, "leave workers: auto, one for each core")]
    else:
        found = [ok("workers", "-", said)]
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < DESCRIPTORS:
        advice = "raise it: LimitNOFILE= of the unit, ulimit -Hn"
        message = f"a process may have {most}; a client that follows a transfer takes three"
        found.append(warning("descriptors", "-", message, advice))
    else:
        found.append(ok("descriptors", "-", "are enough"))
    return found
