"""HTTP to one upstream: connections, timeouts, retries, redirects.  It knows nothing of registries.

Each step has a timeout, a whole transfer has none: a layer may take an hour as long as bytes flow.  A
redirect to another origin is followed without Authorization (RFC 9110 §15.4, RFC 6750 §5.3), and its URL is
sent unchanged: normalising the escapes of a signed URL breaks its signature.

Each host has its own breaker, whether it is the upstream, a token server or a CDN: a registry whose CDN is
down still answers for its tags.
"""

from __future__ import annotations

import asyncio
import errno
import math
import random
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, TypeAlias

import aiohttp
from yarl import URL

from proxy.config.hosts import is_private
from proxy.config.quantities import seconds_until
from proxy.connections.trust import Certificate, certificate_shown
from proxy.telemetry import loops
from proxy.telemetry.tracing import TraceSpan, step
from proxy.upstream.body import StreamedBody
from proxy.upstream.breaker import Breaker, Outlook
from proxy.upstream.connect import Connect, open_session
from proxy.upstream.errors import DOWN, Interrupted, error_from_failure, is_brief, is_final
from proxy.upstream.failing_urls import FailingURLs
from proxy.upstream.listing_memory import ignore
from proxy.upstream.liveness import answering, coming
from proxy.upstream.redirects import RedirectMemory, good_for
from proxy.upstream.sent_span import described, note_status
from proxy.upstream.socket_body import SocketBodies
from storage.errors import OriginFailed, OriginTimeout, RegistryError
from storage.shared import SharedState

REDIRECTS = 5
RETRIES = 2  # of a request that reads
BACKOFF = 0.1  # seconds at most before the first retry, doubling
RESTART = 30  # times as long: how long a host may take that restarts
READING = ("GET", "HEAD")
HOSTS = 100  # hosts whose breakers are kept
_MOVED = frozenset((301, 302, 303, 307, 308))
_CONTENT = frozenset((200, 206, 416))  # of answers to a request for content, or for a part of it
_PASSING = DOWN | {500}  # which concerns one request only: S3 wants it to be sent again
RequestBody: TypeAlias = Mapping[str, str] | bytes | StreamedBody | None  # a mapping is a form


class Transport:
    """HTTP to one upstream and to the hosts it redirects to.  It is made inside a running event loop.

    `name` names the upstream in errors, `home` is its URL.  `changed` is called with a host and the error
    that opened its breaker, or None when the breaker has closed; `retried` is called at each retry, and
    `expires` with the time at which the certificate expires that `home` shows, in seconds since the epoch.
    All processes with the same `shared` share the breakers.
    """

    def __init__(
        self,
        name: str,
        connect: Connect,
        home: URL,
        *,
        changed: Callable[[str, RegistryError | None], None] = lambda host, error: None,
        retried: Callable[[], None] = lambda: None,
        expires: Callable[[float], None] = lambda when: None,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
        shared: SharedState | None = None,
    ) -> None:
        self._name = name
        self._connect = connect
        self._home = home.origin()
        self._changed = changed
        self._retried = retried
        self._expires = expires
        self._clock = clock
        self._jitter = jitter
        self._shared = shared or SharedState()
        self._failing = FailingURLs(clock)
        self.moment = RESTART * BACKOFF
        self._breakers: dict[URL, Breaker] = {}
        self.breaker(home)  # the first, and so never dropped
        self._private = connect.private_redirects or is_private(home.raw_host or "")
        self._ssl = connect.ssl_context()
        # Two pools: a connection made for the upstream itself is never used for a redirect.
        self._sessions: dict[bool, aiohttp.ClientSession] = {}
        self._closed = False
        self.coming = partial(coming, connect.progress_timeout, connect.silence, self._ping)
        self.bodies = SocketBodies(self.coming, connect.proxy, connect.least)

    def _session(self, home: bool) -> aiohttp.ClientSession:
        """The pool of connections to the upstream itself, or that for redirects; opened when it is needed."""
        if self._closed:
            raise aiohttp.ClientConnectionError("all connections were closed")
        if home not in self._sessions:
            new_socket = self._home_socket if home else self._redirect_socket
            self._sessions[home] = open_session(self._ssl, None if self._connect.proxy else new_socket)
        return self._sessions[home]

    # The address is checked when the socket is made, since a name may resolve to another one each time.

    def _home_socket(self, address: Any) -> socket.socket:
        family, kind, protocol, _, (host, *_) = address
        if not self._connect.private_home and is_private(host):
            raise OSError(errno.EACCES, "it has a private address; upstream.hosts allows it by its full name")
        self._private = self._connect.private_redirects or is_private(host)
        return socket.socket(family, kind, protocol)

    def _redirect_socket(self, address: Any) -> socket.socket:
        family, kind, protocol, _, (host, *_) = address
        if not self._private and is_private(host):
            raise OSError(errno.EACCES, "redirected to a private address; private_redirects allows it")
        return socket.socket(family, kind, protocol)

    def breaker(self, url: URL) -> Breaker:
        """The breaker of the URL's host."""
        origin = url.origin()
        if (found := self._breakers.get(origin)) is None:
            changed = partial(self._changed, origin.host_port_subcomponent or "")
            # After a reload, processes with former options of the connection have states of their own.
            key = self._name, str(self._home), self._connect, str(origin)
            found = Breaker(self._clock, changed, self._shared, key, self.moment)
            self._breakers[origin] = found
            if len(self._breakers) > HOSTS:
                del self._breakers[list(self._breakers)[1]]
        return found

    def breakers(self) -> list[tuple[str, Breaker]]:
        """The hosts and their breakers, the upstream's own first."""
        return [(url.host_port_subcomponent or "", each) for url, each in self._breakers.items()]

    @property
    def lost(self) -> bool:
        """Whether the upstream's own host may be back in a moment."""
        return self.breaker(self._home).pause is not None

    @property
    def pause(self) -> float | None:
        """Seconds until to ask a host again that may be back in a moment; None: there is none."""
        pauses = (each.pause for each in self._breakers.values())
        return min((each for each in pauses if each is not None), default=None)

    async def send(
        self, method: str, url: URL, headers: Mapping[str, str], body: RequestBody = None
    ) -> aiohttp.ClientResponse:
        """Send one request, without following redirects; it is retried if that is safe and may help.

        Raises OriginFailed, OriginTimeout; without a request while the host's breaker is open.
        """
        return (await self._send(method, url, headers, body, None))[0]

    async def exchange(
        self, method: str, url: URL, headers: Mapping[str, str], body: RequestBody, limit: int
    ) -> tuple[aiohttp.ClientResponse, bytes]:
        """As send(), with the body of the response, a small document: all of it within `header_timeout`."""
        self._check_private(url)
        return await self._send(method, url, headers, body, limit)

    async def _send(
        self, method: str, url: URL, headers: Mapping[str, str], body: RequestBody, limit: int | None
    ) -> tuple[aiohttp.ClientResponse, bytes]:
        breaker = self.breaker(url)
        await breaker.probed()
        outlook = self._failing.outlook(method, url, breaker.answered_after, self.moment)
        with breaker.call() as attempt:
            try:
                async with self._bounded(method, body):
                    response, content = await self._persist(method, url, headers, body, limit)
            except (TimeoutError, aiohttp.ClientError, OSError) as error:
                failure = self.failed(error, url)
                brief, late = is_brief(error), isinstance(failure, OriginTimeout)
                if brief or late:
                    self._failing.note(method, url, True)
                # One slow object, again and again, does not pause a host that answers other requests.
                final = is_final(error) and not (late and outlook is not Outlook.SOON)
                attempt.failed(failure, outlook if brief else Outlook.LATER, final=final)
                raise failure from error
            except UnicodeError:  # a redirect or a challenge named it
                raise OriginFailed(f"{self._name} names the host {url.raw_host}, which is none") from None
            if response.status in DOWN:
                wait = seconds_until(response.headers, time.time) or 0.0
                failure = OriginFailed(f"{self._name} answered {response.status}", retry_after=wait)
                attempt.failed(failure, outlook if wait <= self.moment else Outlook.LATER)
            else:
                attempt.succeeded()
            return response, content

    @asynccontextmanager
    async def _bounded(self, method: str, body: RequestBody) -> AsyncIterator[None]:
        """Limit the time until the request is sent and answered."""
        connect, loop = self._connect, asyncio.get_running_loop()
        writes = method not in READING and not isinstance(body, Mapping)
        async with asyncio.timeout(connect.write_timeout if writes else connect.header_timeout) as bound:
            if not isinstance(body, StreamedBody):
                async with answering(bound, connect.silence, self._ping):
                    yield
                return

            def watch(sending: bool) -> None:
                seconds = connect.write_timeout if body.sent else connect.progress_timeout
                with suppress(RuntimeError):  # it has expired already
                    bound.reschedule(loop.time() + seconds if sending else None)

            with body.watched(watch):
                yield

    async def _ping(self) -> None:
        name, url = self._connect.server_name, self._home / "v2/"
        (await self._session(True).head(url, allow_redirects=False, server_hostname=name)).release()

    async def _persist(
        self, method: str, url: URL, headers: Mapping[str, str], body: RequestBody, limit: int | None
    ) -> tuple[aiohttp.ClientResponse, bytes]:
        connect = self._connect
        retries = RETRIES if method in READING else 0  # RFC 9110 §9.2.1
        wait = connect.progress_timeout if method in READING else connect.write_timeout
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect.connect_timeout, sock_read=wait)
        for attempt in range(retries + 1):
            try:
                response = await self._once(method, url, headers, body, timeout, attempt)
                fails = response.status in _PASSING
                late = "Retry-After" in response.headers or self._failing.has(method, url)
                if not fails or late or attempt == retries:
                    self._failing.note(method, url, fails)
                    return response, b"" if limit is None else await self._body(response, limit)
                response.release()
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
                # A timeout has used up the time, and a certificate will not change.
                if attempt == retries or isinstance(error, TimeoutError | aiohttp.ClientSSLError):
                    raise
            self._retried()
            await asyncio.sleep(BACKOFF * 2**attempt * self._jitter())
        raise AssertionError("the last attempt returns or raises")

    def _shown(self, certificate: Certificate) -> None:
        self._expires(ssl.cert_time_to_seconds(certificate["notAfter"]))

    async def _once(
        self,
        method: str,
        url: URL,
        headers: Mapping[str, str],
        body: RequestBody,
        timeout: aiohttp.ClientTimeout,
        attempt: int,
    ) -> aiohttp.ClientResponse:
        home = url.origin() == self._home
        certificate_shown.set(self._shown if home else None)
        with step(method, "client", described(method, url, attempt)) as span:
            response = await self._session(home).request(
                method,
                url,
                headers=self._sent(headers, span) if home else headers,
                data=body,
                timeout=timeout,
                proxy=self._connect.proxy,
                allow_redirects=False,
                server_hostname=self._connect.server_name,
            )
            note_status(
                span, response.status, expected=response.status == 401 and "Authorization" not in headers
            )
        return response

    def _sent(self, headers: Mapping[str, str], span: TraceSpan) -> Mapping[str, str]:
        # Of others, who might keep it, only those that are ours learn what belongs together.
        traced = span.headers() if self._connect.trace else {}
        return {**headers, **traced, loops.HEADER: loops.mark(self._shared.id)}

    async def follow(
        self,
        method: str,
        url: URL,
        headers: Mapping[str, str],
        body: RequestBody = None,
        elsewhere: Callable[[URL], Awaitable[str | None]] | None = None,
        redirects: RedirectMemory | None = None,
    ) -> aiohttp.ClientResponse:
        """Send a request and follow redirects; the last response.  Raises OriginFailed, OriginTimeout.

        `elsewhere` returns the Authorization for a URL at another origin, in place of that in `headers`.
        With `redirects`, the request goes at once to where the last one for this URL has led.
        """
        sent, first, seconds = dict(headers), url, math.inf
        if redirects is not None and (known := redirects.get(url)) is not None:
            if (answered := await self._revisit(method, known, headers, elsewhere)) is not None:
                return answered
            redirects.drop(url)
        for _ in range(REDIRECTS + 1):
            response = await self.send(method, url, sent, body)
            location = response.headers.get("Location")
            if response.status not in _MOVED or location is None:
                if redirects is not None and url.origin() != first.origin() and response.status in _CONTENT:
                    redirects.put(first, url, seconds)
                return response
            seconds = min(seconds, good_for(response.headers))
            if isinstance(body, StreamedBody):
                response.close()
                raise OriginFailed(f"{self._name} redirected an upload while its body was sent")
            response.release()
            target = self.target(url, location)
            # The port is compared too: origin() accepts one that is out of range.
            if (target.origin(), target.port) != (url.origin(), url.port):
                sent.pop("Authorization", None)
                if elsewhere is not None and (value := await elsewhere(target)):
                    sent["Authorization"] = value
            url = target
        raise OriginFailed(f"{self._name} redirected more than {REDIRECTS} times")

    async def _revisit(
        self,
        method: str,
        target: URL,
        headers: Mapping[str, str],
        elsewhere: Callable[[URL], Awaitable[str | None]] | None,
    ) -> aiohttp.ClientResponse | None:
        """The response from where a redirect has led before; None if that does not serve any more."""
        sent = {name: value for name, value in headers.items() if name != "Authorization"}
        with suppress(RegistryError):
            if elsewhere is not None and (value := await elsewhere(target)):
                sent["Authorization"] = value
            response = await self.send(method, target, sent)
            if response.status in _CONTENT:
                return response
            # Stores answer 403, and some 400, once a signature has lapsed.
            response.release()
        return None

    def target(self, url: URL, location: str) -> URL:
        """The URL to which a response from `url` redirects.  Raises OriginFailed if that is not allowed."""
        try:
            target = url.join(URL(location, encoded=True))
            _ = target.origin(), target.port
        except ValueError:
            raise OriginFailed(f"{self._name} redirected to an invalid URL") from None
        if target.scheme not in ("https", "http") or (
            target.scheme == "http" and target.origin() != url.origin() and not self._connect.plain_http
        ):
            raise OriginFailed(
                f"{self._name} redirected from {url.scheme} to {target.scheme}; plain_http allows http"
            )
        self._check_private(target)
        return target

    def _check_private(self, url: URL) -> None:
        """Behind a proxy no socket shows the address.  Raises OriginFailed."""
        if self._connect.proxy and not self._private and is_private(url.raw_host or ""):
            raise OriginFailed(f"{self._name} redirected to a private address; private_redirects allows it")

    async def read(
        self, response: aiohttp.ClientResponse, limit: int, take: Callable[[int], None] = ignore
    ) -> bytes:
        """The body of a small document, all of which must come within `progress_timeout`.

        `take` is called with the size of each piece of it.
        Raises OriginTimeout, Interrupted, and OriginFailed if it has more than `limit` bytes.
        """
        try:
            async with self.coming():
                return await self._body(response, limit, take)
        except TimeoutError as error:
            raise self.failed(error) from error
        except (aiohttp.ClientError, OSError) as error:
            raise Interrupted(str(self.failed(error))) from error

    async def _body(
        self, response: aiohttp.ClientResponse, limit: int, take: Callable[[int], None] = ignore
    ) -> bytes:
        content = bytearray()
        try:
            async for chunk in response.content.iter_any():
                take(len(chunk))
                content += chunk
                if len(content) > limit:
                    raise OriginFailed(f"{self._name} sent more than {limit} bytes, the most that is allowed")
        except BaseException:
            response.close()
            raise
        return bytes(content)

    def failed(self, error: BaseException, url: URL | None = None) -> RegistryError:
        return error_from_failure(self._name, error, url, self._home)

    async def close(self) -> None:
        """Requests that are under way or come later fail with OriginFailed."""
        self._closed = True
        self.bodies.cut(aiohttp.ClientConnectionError("all connections were closed"))
        for session in self._sessions.values():
            await session.close()
