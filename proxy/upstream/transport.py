"""HTTP to one upstream: connections, time-outs, redirects.  Knows nothing of registries.

Time is bounded by step, never in total: a layer may take an hour as long as bytes flow.  A redirect to
another origin carries no Authorization (RFC 9110 §15.4, RFC 6750 §5.3), and its URL is sent as it came:
normalising the escapes of a signed URL breaks its signature.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from yarl import URL

from storage.errors import OriginFailed, OriginTimeout, RegistryError

REDIRECTS = 5
READ = 1 << 20  # bytes buffered of a body before its socket is paused
_MOVED = frozenset((301, 302, 303, 307, 308))


@dataclass(frozen=True)
class Connect:
    """How to connect; times in seconds.

    `header_timeout` covers connecting and waiting for the response's headers, `progress_timeout` each
    wait for more of its body.
    """

    ca_file: Path | None = None
    client_certificate: Path | None = None
    client_key: Path | None = None
    proxy: str | None = None
    plain_http: bool = False
    insecure_skip_verify: bool = False
    connect_timeout: float = 3.0
    header_timeout: float = 10.0
    progress_timeout: float = 60.0

    def ssl_context(self) -> ssl.SSLContext | bool:
        """Raises OSError, ssl.SSLError for files that are none."""
        if not (self.ca_file or self.client_certificate or self.insecure_skip_verify):
            return True  # aiohttp's own, which all upstreams share: loading the authorities takes time
        context = ssl.create_default_context(cafile=self.ca_file)
        if self.ca_file is not None:
            context.load_default_certs()  # CDNs and token servers may stand under public authorities
        if self.insecure_skip_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if self.client_certificate is not None:
            context.load_cert_chain(self.client_certificate, self.client_key)
        return context


class Transport:
    """Needs a running event loop.  `name` says in errors whom we could not reach."""

    def __init__(self, name: str, connect: Connect) -> None:
        self._name = name
        self._connect = connect
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=connect.ssl_context(), limit=0, ttl_dns_cache=30),
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=connect.connect_timeout, sock_read=connect.progress_timeout
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            requote_redirect_url=False,
            read_bufsize=READ,
            headers={"User-Agent": "entrepot", "Accept-Encoding": "identity"},
        )

    async def send(
        self, method: str, url: URL, headers: Mapping[str, str], form: Mapping[str, str] | None = None
    ) -> aiohttp.ClientResponse:
        """One request, no redirect followed.  Raises OriginFailed, OriginTimeout."""
        try:
            async with asyncio.timeout(self._connect.header_timeout):
                return await self._session.request(
                    method,
                    url,
                    headers=headers,
                    data=form,
                    proxy=self._connect.proxy,
                    allow_redirects=False,
                )
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise self.failed(error) from error

    async def follow(self, method: str, url: URL, headers: Mapping[str, str]) -> aiohttp.ClientResponse:
        """The answer at the end of the redirects.  Raises OriginFailed, OriginTimeout."""
        given = dict(headers)
        for _ in range(REDIRECTS + 1):
            response = await self.send(method, url, given)
            location = response.headers.get("Location")
            if response.status not in _MOVED or location is None:
                return response
            response.release()
            try:
                target = url.join(URL(location, encoded=True))
                # The port as well: origin() lets pass one that is out of range.
                elsewhere = (target.origin(), target.port) != (url.origin(), url.port)
            except ValueError:
                raise OriginFailed(f"{self._name} redirected to what is no URL") from None
            if target.scheme not in ("https", "http") or (
                target.scheme == "http" and not self._connect.plain_http
            ):
                raise OriginFailed(
                    f"{self._name} redirected from {url.scheme} to {target.scheme}; plain_http allows http"
                )
            if elsewhere:
                given.pop("Authorization", None)
            url = target
        raise OriginFailed(f"{self._name} redirected more than {REDIRECTS} times")

    async def read(self, response: aiohttp.ClientResponse, limit: int) -> bytes:
        """The body.  Raises OriginFailed where it has more than `limit` bytes, or ends early."""
        try:
            content = bytearray()
            async for chunk in response.content.iter_any():
                content += chunk
                if len(content) > limit:
                    response.close()
                    raise OriginFailed(f"{self._name} sent more than {limit} bytes where less were due")
            return bytes(content)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise self.failed(error) from error

    def failed(self, error: BaseException) -> RegistryError:
        """What a failure of the network means to who asked."""
        if isinstance(error, TimeoutError):
            return OriginTimeout(f"{self._name} did not answer in time")
        # Neither the message of a ClientResponseError nor of InvalidURL: they hold the URL, maybe signed.
        detail = type(error).__name__
        if isinstance(error, aiohttp.ClientConnectorError):
            detail = error.os_error.strerror or type(error.os_error).__name__
        return OriginFailed(f"{self._name} cannot be reached: {detail}")

    async def close(self) -> None:
        await self._session.close()
