"""Upstreams, as they answer this machine: name, reach, certificate, credentials, rate limit, clock.

Asked is what pulls ask as well, of nobody else, and nothing that counts against a limit.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Any

from yarl import URL

from proxy.config.quantities import format_duration
from proxy.config.upstream import Login, UpstreamConfig
from proxy.doctor import certificates
from proxy.doctor.checks import Check, cause, failed, ok, warning
from proxy.upstream.configured import connect_of, credentials_of
from proxy.upstream.credentials import Credentials
from proxy.upstream.ratelimit import Budget
from proxy.upstream.tokens import TokenCache, TokenResponse
from proxy.upstream.transport import Connect, Transport
from storage.errors import OriginDenied, RegistryError

HUB = frozenset(("registry-1.docker.io", "index.docker.io"))
# Docker's own, made for it: a HEAD of it tells the limit, and costs nothing.  docs.docker.com, "Pull limits"
PREVIEW = "ratelimitpreview/test"
SLOW = 2.0  # seconds for an answer without content
SKEW, WRONG = 30.0, 300.0  # seconds by which clocks may differ
LOW = 0.1  # of a rate limit
SMALL = 1 << 20  # bytes of a token


@dataclass(frozen=True, slots=True)
class Greeting:
    """`ahead` is by how many seconds its clock is before ours, None where it does not tell."""

    status: int
    seconds: float
    ahead: float | None


class UpstreamProbe:
    """One URL of an upstream.  Needs a running event loop; raises OSError for certificates that are none."""

    def __init__(self, name: str, url: str, keys: UpstreamConfig) -> None:
        self.name, self.keys = name, keys
        self.url = URL(url)
        self.base = f"{url.rstrip('/')}/v2/"
        self.connect: Connect = replace(connect_of(keys), plain_http=keys.allows_http(url))
        self._transport = Transport(name, self.connect, self.url)

    async def greet(self) -> Greeting:
        """Raises RegistryError."""
        begun = time.monotonic()
        response = await self._transport.send("GET", URL(self.base), {})
        seconds, now = time.monotonic() - begun, time.time()
        response.release()
        try:
            date = parsedate_to_datetime(response.headers.get("Date", "")).timestamp()
        except (ValueError, OverflowError):
            return Greeting(response.status, seconds, None)
        return Greeting(response.status, seconds, date + 0.5 - now)  # it is told in whole seconds

    def tokens(self, credentials: Credentials) -> TokenCache:
        host = self.url.host_port_subcomponent or ""
        realms, plain = self.keys.token_realms, self.connect.plain_http
        return TokenCache(host, credentials, self._fetch, allowed_realms=realms, plain_http=plain)

    async def _fetch(
        self, method: str, url: URL, *, headers: Mapping[str, str], form: Any = None
    ) -> TokenResponse:
        async with await self._transport.send(method, url, headers, form) as response:
            return TokenResponse(response.status, await self._transport.read(response, SMALL))

    async def ask(
        self, method: str, path: str, tokens: TokenCache, scope: str = ""
    ) -> tuple[int, Mapping[str, str]]:
        """Status and headers of what is at `path` below /v2/, asked with a token.  Raises RegistryError."""
        url = URL(f"{self.base}{path}")
        headers = {"Accept": "*/*"}
        response = await self._transport.send(method, url, headers)
        response.release()
        if response.status == 401:
            challenges = response.headers.getall("WWW-Authenticate", [])
            if authorization := await tokens.renew(scope, challenges, None):
                response = await self._transport.send(
                    method, url, {**headers, "Authorization": authorization}
                )
                response.release()
        return response.status, response.headers

    async def close(self) -> None:
        await self._transport.close()


async def look(name: str, keys: UpstreamConfig) -> tuple[list[Check], list[float]]:
    """Of all URLs of an upstream; then by how many seconds their clocks are before ours."""
    checks: list[Check] = []
    ahead: list[float] = []
    for url in keys.url:
        subject = name if len(keys.url) == 1 else f"{name} ({url})"
        try:
            door = UpstreamProbe(name, url, keys)
        except OSError as error:
            advice = f"see to ca_file, client_certificate and client_key of namespaces.{name}.upstream"
            checks.append(failed("tls", subject, f"its certificates cannot be read: {cause(error)}", advice))
            continue
        try:
            checks += [each async for each in _looked(door, subject, ahead)]
        finally:
            await door.close()
    return checks, ahead


async def _looked(door: UpstreamProbe, subject: str, ahead: list[float]) -> AsyncIterator[Check]:
    resolved = await _resolved(door, subject)
    yield resolved
    if resolved.state == "failed":
        return
    if door.url.scheme == "https":
        yield (certificate := await _certificate(door, subject))
        if certificate.state == "failed":
            return  # whatever is asked next fails for that
    try:
        greeting = await door.greet()
    except RegistryError as error:
        advice = f"see whether a firewall or a proxy keeps this machine from {door.url.origin()}"
        yield failed("reach", subject, str(error), advice)
        return
    if greeting.ahead is not None:
        ahead.append(greeting.ahead)
    yield _answered(door, subject, greeting)
    for number, login in enumerate(door.keys.logins()):
        who = subject if len(door.keys.logins()) == 1 else f"{subject}, credentials[{number}]"
        if login.sources():
            yield await _accepted(door, who, login)
        if door.url.host in HUB:
            yield await _limit(door, who, login)


async def _resolved(door: UpstreamProbe, subject: str) -> Check:
    proxy = door.connect.proxy
    asked = URL(proxy) if proxy else door.url
    host, role = asked.host or "", "its proxy" if proxy else "its host"
    begun = time.monotonic()
    try:
        async with asyncio.timeout(door.connect.header_timeout):
            found = await asyncio.get_running_loop().getaddrinfo(host, asked.port)
    except (OSError, TimeoutError) as error:
        advice = "see to the name servers of this machine (/etc/resolv.conf), and to the name"
        return failed("dns", subject, f"{role}, {host}, has no address: {cause(error)}", advice)
    seconds = time.monotonic() - begun
    if seconds > SLOW:
        message = f"{host} is resolved in {seconds:.1f} s"
        return warning("dns", subject, message, "have a name server nearer to it, or one that caches")
    addresses = list(dict.fromkeys(str(each[4][0]) for each in found))
    return ok("dns", subject, f"{role}, {host}, is {addresses[0]}" + (", …" if len(addresses) > 1 else ""))


async def _certificate(door: UpstreamProbe, subject: str) -> Check:
    connect = door.connect
    if connect.proxy:
        return ok("tls", subject, "is behind a proxy; its certificate is checked with the answer")
    if connect.insecure_skip_verify:
        message = "any certificate is accepted (insecure_skip_verify), anybody's"
        return warning("tls", subject, message, f"give namespaces.{door.name}.upstream.ca_file instead")
    context = connect.ssl_context()
    if not isinstance(context, ssl.SSLContext):
        context = ssl.create_default_context()
    try:
        end = await certificates.of_host(
            door.url.host or "", door.url.port or 443, context, connect.header_timeout
        )
    except ssl.SSLError as error:
        advice = (
            "have it renewed, or give ca_file where its authority is your own; then see to the clock here"
        )
        return failed("tls", subject, certificates.refused(error), advice)
    except (OSError, TimeoutError) as error:
        advice = f"see whether a firewall or a proxy keeps this machine from {door.url.origin()}"
        return failed("reach", subject, f"{door.url.origin()} cannot be reached: {cause(error)}", advice)
    return certificates.judged("tls", subject, end, "have whoever runs it renew it")


def _answered(door: UpstreamProbe, subject: str, greeting: Greeting) -> Check:
    message = f"{door.base} answers {greeting.status} in {1000 * greeting.seconds:.0f} ms"
    if greeting.status not in (200, 401):
        advice = "is that a registry? url is to end before /v2"
        return warning("reach", subject, message, advice)
    if greeting.seconds > SLOW:
        return warning(
            "reach", subject, message, "cold pulls take as long at least; is it the way, or the registry?"
        )
    return ok("reach", subject, message)


async def _accepted(door: UpstreamProbe, subject: str, login: Login) -> Check:
    where = f"{login.sources()[0]} of namespaces.{door.name}.upstream"
    tokens = door.tokens(credentials_of(login))
    try:
        status, _ = await door.ask("GET", "", tokens)
    except OriginDenied as error:
        return failed("credentials", subject, str(error), f"see to {where}")
    except RegistryError as error:
        return warning("credentials", subject, f"cannot be tried: {error}", "try again later")
    finally:
        await tokens.close()
    if status == 200:
        return ok("credentials", subject, "are accepted")
    return failed("credentials", subject, f"with them it answers {status}", f"see to {where}")


async def _limit(door: UpstreamProbe, subject: str, login: Login) -> Check:
    tokens = door.tokens(credentials_of(login))
    try:
        status, headers = await door.ask(
            "HEAD", f"{PREVIEW}/manifests/latest", tokens, f"repository:{PREVIEW}:pull"
        )
    except RegistryError as error:
        return warning("rate limit", subject, f"is not told: {error}", "try again later")
    finally:
        await tokens.close()
    budget = Budget(time.monotonic)
    told = budget.read(headers)
    advice = "give credentials, or more of them, with a higher limit; or wait for the window to pass"
    if status == 429:
        return failed("rate limit", subject, "nothing is left of it", advice)
    if not told or budget.limit is None or budget.remaining is None:
        return ok("rate limit", subject, "none is told for these credentials")
    message = f"{budget.remaining} of {budget.limit} requests are left"
    if not budget.remaining:
        return failed("rate limit", subject, message, advice)
    if budget.remaining < budget.limit * LOW:
        return warning("rate limit", subject, message, advice)
    return ok("rate limit", subject, message)


def clock(ahead: list[float]) -> Check:
    """This machine's, against those of the upstreams: the median, since one of them may be wrong itself."""
    if not ahead:
        message = "no upstream has told the time"
        return warning("clock", "this machine", message, "see whether the clock here is kept by NTP")
    by = sorted(ahead)[len(ahead) // 2]
    message = f"is {format_duration(abs(by))} {'behind' if by > 0 else 'ahead of'} the upstreams'"
    advice = "have the clock kept by NTP: tokens and certificates are judged by it"
    if abs(by) > WRONG:
        return failed("clock", "this machine", message, advice)
    if abs(by) > SKEW:
        return warning("clock", "this machine", message, advice)
    return ok("clock", "this machine", "agrees with the upstreams'")
