"""The checks of the upstreams: name, reachability, certificate, credentials, rate limit, clock.

The requests are those that pulls send too; none of them counts against a rate limit.
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
from proxy.config.wellknown import DOCKER_HUB_ALIASES
from proxy.connections.failures import explain, file_fault, reason
from proxy.doctor import certificates
from proxy.doctor.checks import Check, failed, ok, warning
from proxy.extensions.extension import Extensions
from proxy.upstream.configured import connect_of, credentials_of
from proxy.upstream.connect import Connect
from proxy.upstream.ratelimit import Budget
from proxy.upstream.tokens import TokenCache, TokenResponse
from proxy.upstream.transport import Transport
from storage.errors import OriginDenied, RegistryError

HUB = frozenset(DOCKER_HUB_ALIASES)
# Docker's image for this purpose: a HEAD shows the limit, and is not counted.  docs.docker.com, "Pull limits"
PREVIEW = "ratelimitpreview/test"
SLOW = 2.0  # seconds for an answer without content
MAX_SKEW, FAILED_SKEW = 30.0, 300.0  # seconds between two clocks: more is a warning, or a failure
LOW_BUDGET = 0.1  # of a rate limit
TOKEN_LIMIT = 1 << 20  # bytes


@dataclass(frozen=True, slots=True)
class Greeting:
    """The answer to GET /v2/.  `ahead` is how many seconds its clock is ahead of ours, None if unknown."""

    status: int
    seconds: float
    ahead: float | None


class UpstreamProbe:
    """A client of one URL of an upstream.

    Its creation needs a running event loop, and raises OSError if a certificate cannot be read.
    """

    def __init__(self, name: str, url: str, keys: UpstreamConfig, extensions: Extensions) -> None:
        self.name, self.keys, self._extensions = name, keys, extensions
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
        return Greeting(response.status, seconds, date + 0.5 - now)  # Date has whole seconds

    def tokens(self, login: Login) -> TokenCache:
        """Raises LookupError if an extension that it needs could not be made."""
        credentials = credentials_of(login, self._extensions)
        host = self.url.host_port_subcomponent or ""
        realms, plain = self.keys.token_realms, self.connect.plain_http
        return TokenCache(host, credentials, self._fetch, allowed_realms=realms, plain_http=plain)

    async def _fetch(
        self, method: str, url: URL, *, headers: Mapping[str, str], form: Any = None
    ) -> TokenResponse:
        response, content = await self._transport.exchange(method, url, headers, form, TOKEN_LIMIT)
        return TokenResponse(response.status, content)

    async def ask(
        self, method: str, path: str, tokens: TokenCache, scope: str = ""
    ) -> tuple[int, Mapping[str, str]]:
        """The status and headers of `path` below /v2/, requested with a token.  Raises RegistryError."""
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


async def check(name: str, keys: UpstreamConfig, extensions: Extensions) -> tuple[list[Check], list[float]]:
    """The checks of all URLs of an upstream, and how many seconds their clocks are ahead of ours."""
    checks: list[Check] = []
    ahead: list[float] = []
    for url in keys.url:
        subject = name if len(keys.url) == 1 else f"{name} ({url})"
        try:
            probe = UpstreamProbe(name, url, keys, extensions)
        except OSError as error:
            advice = f"check ca_file, client_certificate and client_key of namespaces.{name}.upstream"
            message = f"its certificates cannot be used: {file_fault(error)}"
            checks.append(failed("tls", subject, message, advice))
            continue
        try:
            checks += [each async for each in _checks(probe, subject, ahead)]
        finally:
            await probe.close()
    return checks, ahead


async def _checks(probe: UpstreamProbe, subject: str, ahead: list[float]) -> AsyncIterator[Check]:
    resolved = await _check_name(probe, subject)
    yield resolved
    if resolved.state == "failed":
        return
    if probe.url.scheme == "https":
        yield (certificate := await _check_certificate(probe, subject))
        if certificate.state == "failed":
            return  # every further request would fail for it
    try:
        greeting = await probe.greet()
    except RegistryError as error:
        advice = f"check whether a firewall or proxy blocks this machine from {probe.url.origin()}"
        yield failed("reach", subject, str(error), advice)
        return
    if greeting.ahead is not None:
        ahead.append(greeting.ahead)
    yield _check_answer(probe, subject, greeting)
    for number, login in enumerate(probe.keys.logins()):
        who = subject if len(probe.keys.logins()) == 1 else f"{subject}, credentials[{number}]"
        if login.sources():
            yield await _check_credentials(probe, who, login)
        if probe.url.host in HUB and login.credential_provider is None:
            yield await _check_rate_limit(probe, who, login)


async def _check_name(probe: UpstreamProbe, subject: str) -> Check:
    proxy = probe.connect.proxy
    contacted = URL(proxy) if proxy else probe.url
    host, role = contacted.host or "", "its proxy" if proxy else "its host"
    begun = time.monotonic()
    try:
        async with asyncio.timeout(probe.connect.header_timeout):
            found = await asyncio.get_running_loop().getaddrinfo(host, contacted.port)
    except (OSError, TimeoutError) as error:
        advice = "check the name servers of this machine (/etc/resolv.conf), and the name"
        return failed("dns", subject, f"{role}, {host}, has no address: {reason(error)}", advice)
    seconds = time.monotonic() - begun
    if seconds > SLOW:
        message = f"{host} takes {seconds:.1f} s to resolve"
        return warning("dns", subject, message, "use a name server that is closer, or that caches")
    addresses = list(dict.fromkeys(str(each[4][0]) for each in found))
    return ok("dns", subject, f"{role}, {host}, is {addresses[0]}" + (", …" if len(addresses) > 1 else ""))


async def _check_certificate(probe: UpstreamProbe, subject: str) -> Check:
    connect = probe.connect
    if connect.proxy:
        return ok("tls", subject, "is reached by a proxy; its certificate is checked with the answer")
    if connect.insecure_skip_verify:
        message = "any certificate is accepted (insecure_skip_verify)"
        return warning("tls", subject, message, f"set namespaces.{probe.name}.upstream.ca_file instead")
    context, host, port = connect.ssl_context(), probe.url.host or "", probe.url.port or 443
    try:
        end = await certificates.expiry_of(host, port, context, connect.header_timeout)
    except (OSError, TimeoutError) as error:
        failure = explain(error, probe.url, f"namespaces.{probe.name}.upstream.ca_file")
        if isinstance(error, ssl.SSLError):
            return failed("tls", subject, failure.cause, failure.advice or "ask its operator")
        message = f"{probe.url.origin()} cannot be reached: {failure.cause}"
        return failed("reach", subject, message, failure.advice or "check the firewalls on the way")
    return certificates.check_expiry("tls", subject, end, "ask its operator to renew it")


def _check_answer(probe: UpstreamProbe, subject: str, greeting: Greeting) -> Check:
    message = f"{probe.base} answers {greeting.status} in {1000 * greeting.seconds:.0f} ms"
    if greeting.status not in (200, 401):
        advice = "check that it is a registry, and that url does not include /v2"
        if greeting.status == 400 and probe.url.scheme == "http":
            advice = "if it serves https, write https:// in its URL"
        return warning("reach", subject, message, advice)
    if greeting.seconds > SLOW:
        return warning(
            "reach", subject, message, "cold pulls take at least as long: check the network and the registry"
        )
    return ok("reach", subject, message)


async def _check_credentials(probe: UpstreamProbe, subject: str, login: Login) -> Check:
    where = f"{login.sources()[0]} of namespaces.{probe.name}.upstream"
    try:
        tokens = probe.tokens(login)
    except LookupError:
        return failed("credentials", subject, "their extension cannot be made", "see the check extension")
    try:
        status, _ = await probe.ask("GET", "", tokens)
    except OriginDenied as error:
        return failed("credentials", subject, str(error), f"check {where}")
    except RegistryError as error:
        return warning("credentials", subject, f"cannot be checked: {error}", "try again later")
    finally:
        await tokens.close()
    if status == 200:
        return ok("credentials", subject, "are accepted")
    return failed("credentials", subject, f"the upstream answers {status}", f"check {where}")


async def _check_rate_limit(probe: UpstreamProbe, subject: str, login: Login) -> Check:
    tokens = probe.tokens(login)
    try:
        status, headers = await probe.ask(
            "HEAD", f"{PREVIEW}/manifests/latest", tokens, f"repository:{PREVIEW}:pull"
        )
    except RegistryError as error:
        return warning("rate limit", subject, f"cannot be checked: {error}", "try again later")
    finally:
        await tokens.close()
    budget = Budget(time.monotonic)
    known = budget.read(headers)
    advice = "give credentials, or more of them, with a higher limit, or wait for the window to end"
    if status == 429:
        return failed("rate limit", subject, "no requests are left", advice)
    if not known or budget.limit is None or budget.remaining is None:
        return ok("rate limit", subject, "the registry reports none for these credentials")
    message = f"{budget.remaining} of {budget.limit} requests are left"
    if not budget.remaining:
        return failed("rate limit", subject, message, advice)
    if budget.remaining < budget.limit * LOW_BUDGET:
        return warning("rate limit", subject, message, advice)
    return ok("rate limit", subject, message)


def check_clock(ahead: list[float]) -> Check:
    """The check of this machine's clock against the median of the upstreams, one of which may be wrong."""
    if not ahead:
        message = "no upstream has sent its time"
        return warning("clock", "this machine", message, "check that the clock is synchronized by NTP")
    median = sorted(ahead)[len(ahead) // 2]
    message = f"is {format_duration(abs(median))} {'behind' if median > 0 else 'ahead of'} the upstreams"
    advice = "synchronize the clock by NTP: tokens and certificates depend on it"
    if abs(median) > FAILED_SKEW:
        return failed("clock", "this machine", message, advice)
    if abs(median) > MAX_SKEW:
        return warning("clock", "this machine", message, advice)
    return ok("clock", "this machine", "agrees with the upstreams")
