"""Uploads of blobs to a remote registry.

A small blob is buffered and sent with the closing PUT.  A larger one is sent in one PATCH while it is
written: chunks of a fixed size would cost a round trip each, and some registries do not support them.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from urllib.parse import quote

import aiohttp
from yarl import URL

from proxy.upstream.body import StreamedBody
from proxy.upstream.messages import UpstreamRequest
from proxy.upstream.requests import RequestSender
from storage.errors import BlobUploadUnknown, DigestInvalid, OriginFailed, RegistryError
from storage.oci import OCTETS, Descriptor, Digest
from storage.registry import Upload

SMALL = 1 << 20  # bytes that are sent in one request
# Statuses of a successful write; the specification allows one for each request, registries mix them up.
WRITTEN = (200, 201, 202, 204)
_RANGE = re.compile(r"(?:bytes=)?0-([0-9]{1,18})")


class UploadSession:
    """An upload session of a remote registry, and its location, which each response may change.

    distribution-spec, "Pushing blobs": a location may be absolute or relative, on another host, and its query
    must not be changed.
    """

    def __init__(self, sender: RequestSender, repository: str) -> None:
        self.repository = repository
        self._sender = sender
        self._url: URL | None = None

    @property
    def id(self) -> str:
        return str(self._url)

    async def begin(self, query: str = "", also: str = "") -> bool:
        """Start the session; return False if the registry has instead done what `query` requests, a mount."""
        url = self._sender.url(f"{self.repository}/blobs/uploads/{query}")
        request = UpstreamRequest("POST", url, "upload", self.repository, also=also, granted=WRITTEN)
        response = await self._sender.send(request)
        response.release()
        if response.status == 201:
            return False
        self._moved(response)
        if self._url is None:
            raise OriginFailed(f"{self._sender.name} started an upload without a location")
        return True

    async def find(self, id: str) -> int:
        """Resume the session `id`; return how many bytes it has.  Raises BlobUploadUnknown."""
        try:
            url = URL(id, encoded=True)
            known = url.origin() == self._sender.home.origin() and f"/{self.repository}/" in url.path
        except ValueError:
            known = False
        if not known:  # an id must not make us send requests to other hosts
            raise BlobUploadUnknown(f"{self._sender.name} has no upload {id[:80]!r}")
        self._url = url
        response = await self.send("GET", "")
        # "0-0" may be one byte or none: many servers send it for an empty upload.
        found = _RANGE.fullmatch(response.headers.get("Range", ""))
        last = int(found[1]) if found else 0
        return last + 1 if last else 0

    async def send(
        self, method: str, query: str, body: bytes | StreamedBody | None = None
    ) -> aiohttp.ClientResponse:
        """Send one request to the location; the response has been read."""
        assert self._url is not None
        joint = ("&" if self._url.raw_query_string else "?") if query else ""
        url = URL(f"{self._url}{joint}{query}", encoded=True)
        headers = {} if body is None else {"Content-Type": OCTETS}
        request = UpstreamRequest(method, url, "upload", self.repository, headers, body, granted=WRITTEN)
        response = await self._sender.send(request)
        if isinstance(body, StreamedBody) and not body.sent:
            response.close()
            raise OriginFailed(f"{self._sender.name} answered an upload before all of it was sent")
        response.release()
        self._moved(response)
        return response

    def _moved(self, response: aiohttp.ClientResponse) -> None:
        location = response.headers.get("Location")
        if not location or response.status == 201:  # it is that of the blob
            return
        home = self._sender.home
        with suppress(ValueError):  # target() raises it again as OriginFailed
            target = response.url.join(URL(location, encoded=True))
            if (target.scheme, home.scheme, target.raw_host) == ("http", "https", home.raw_host):
                # The registry does not know that a proxy terminates TLS before it.  Keep using TLS.
                location = str(target.with_scheme("https").with_port(home.explicit_port))
        self._url = self._sender.transport.target(response.url, location)


class UpstreamUpload(Upload):
    """An upload to a remote registry; `offset` is how many bytes it has been given."""

    def __init__(self, session: UploadSession, offset: int = 0) -> None:
        self.offset = offset
        self._session = session
        self._buffer = bytearray()
        self._body = StreamedBody()
        self._sending: asyncio.Task[aiohttp.ClientResponse] | None = None

    @property
    def id(self) -> str:  # type: ignore[override]
        return self._session.id

    async def write(self, chunk: bytes) -> None:
        self.offset += len(chunk)
        if self._sending is None:
            self._buffer += chunk
            if len(self._buffer) > SMALL:
                await self._send()
        else:
            await self._body.put(chunk, self._sending)
        if self._sending is not None and self._sending.done():
            self._sending.result()  # raises its error; without one, the registry answered too early
            raise OriginFailed("the registry answered before the upload was complete")

    async def _send(self) -> None:
        buffered, self._buffer = bytes(self._buffer), bytearray()
        self._body = StreamedBody()
        self._sending = asyncio.create_task(self._session.send("PATCH", "", self._body))
        await self._body.put(buffered, self._sending)

    async def _sent(self) -> None:
        """Wait until all that was written is sent."""
        if self._sending is not None:
            await self._body.end(self._sending)
            try:
                await self._sending
            finally:
                self._sending = None

    async def commit(self, digest: Digest) -> Descriptor:
        await self._sent()
        buffered, self._buffer = bytes(self._buffer), bytearray()
        try:
            await self._session.send("PUT", f"digest={quote(digest, safe='')}", buffered)
        except DigestInvalid:
            await self.cancel()
            raise
        return Descriptor(OCTETS, digest, self.offset)

    async def suspend(self, error: BaseException | None = None) -> None:
        if self._buffer:
            await self._send()
        await self._sent()

    async def cancel(self, error: BaseException | None = None) -> None:
        """Ask the registry to delete the session; one that refuses deletes it when it expires."""
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.gather(self._sending, return_exceptions=True)
            self._sending = None
        with suppress(RegistryError):
            await self._session.send("DELETE", "")
