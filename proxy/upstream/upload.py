"""A blob on its way to a registry across the network.

What fits into one request is kept until it is known to be all, and sent with the closing PUT.  More than that
is one PATCH, sent as it comes: chunks of a size would be a round trip each, and some registries take none.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from urllib.parse import quote

import aiohttp
from yarl import URL

from proxy.upstream.body import StreamedBody
from proxy.upstream.requests import RequestSender, UpstreamRequest
from storage.errors import BlobUploadUnknown, DigestInvalid, OriginFailed, RegistryError
from storage.oci import OCTETS, Descriptor, Digest
from storage.registry import Upload

SMALL = 1 << 20  # bytes that are sent in one request
# What registries answer to what was done; by the specification it is one of them each time.
WRITTEN = (200, 201, 202, 204)
_RANGE = re.compile(r"(?:bytes=)?0-([0-9]{1,18})")


class UploadSession:
    """Where an upload is to go on; every answer may say it anew.

    distribution-spec, "Pushing blobs": a location may be absolute or relative, on another host, and its query
    is not to be touched.
    """

    def __init__(self, sender: RequestSender, repository: str) -> None:
        self.repository = repository
        self._sender = sender
        self._url: URL | None = None

    @property
    def id(self) -> str:
        return str(self._url)

    async def begin(self, query: str = "", also: str = "") -> bool:
        """Whether it has begun; if not, what was asked for by `query` is done already."""
        url = self._sender.to(f"{self.repository}/blobs/uploads/{query}")
        question = UpstreamRequest("POST", url, "upload", self.repository, also=also, granted=WRITTEN)
        response = await self._sender.send(question)
        response.release()
        if response.status == 201:
            return False
        self._moved(response)
        if self._url is None:
            raise OriginFailed(f"{self._sender.name} does not say where to upload to")
        return True

    async def find(self, id: str) -> int:
        """Go on with that one; how many bytes it has.  Raises BlobUploadUnknown."""
        try:
            url = URL(id, encoded=True)
            known = url.origin() == self._sender.home.origin() and f"/{self.repository}/" in url.path
        except ValueError:
            known = False
        if not known:  # nobody sends us anywhere by an id
            raise BlobUploadUnknown(f"{self._sender.name} has no upload {id[:80]!r}")
        self._url = url
        response = await self.send("GET", "")
        # "0-0" may be one byte or none: the servers that say it of an empty one are many.
        found = _RANGE.fullmatch(response.headers.get("Range", ""))
        last = int(found[1]) if found else 0
        return last + 1 if last else 0

    async def send(
        self, method: str, query: str, body: bytes | StreamedBody | None = None
    ) -> aiohttp.ClientResponse:
        """One request to where it is; the answer has been read."""
        assert self._url is not None
        joint = ("&" if self._url.raw_query_string else "?") if query else ""
        url = URL(f"{self._url}{joint}{query}", encoded=True)
        headers = {} if body is None else {"Content-Type": OCTETS}
        question = UpstreamRequest(method, url, "upload", self.repository, headers, body, granted=WRITTEN)
        response = await self._sender.send(question)
        if isinstance(body, StreamedBody) and not body.sent:
            response.close()
            raise OriginFailed(f"{self._sender.name} took an upload before it had come to its end")
        response.release()
        self._moved(response)
        return response

    def _moved(self, response: aiohttp.ClientResponse) -> None:
        location = response.headers.get("Location")
        if not location or response.status == 201:  # that is where the blob is
            return
        home = self._sender.home
        with suppress(ValueError):  # target() says so
            target = response.url.join(URL(location, encoded=True))
            if (target.scheme, home.scheme, target.host) == ("http", "https", home.host):
                # A registry that does not know that there is TLS before it.  We stay with TLS.
                location = str(target.with_scheme("https").with_port(home.explicit_port))
        self._url = self._sender.transport.target(response.url, location)


class UpstreamUpload(Upload):
    """`offset` is what the registry has already."""

    def __init__(self, session: UploadSession, offset: int = 0) -> None:
        self.offset = offset
        self._session = session
        self._held = bytearray()
        self._outgoing = StreamedBody()
        self._sending: asyncio.Task[aiohttp.ClientResponse] | None = None

    @property
    def id(self) -> str:  # type: ignore[override]
        return self._session.id

    async def write(self, chunk: bytes) -> None:
        self.offset += len(chunk)
        if self._sending is None:
            self._held += chunk
            if len(self._held) > SMALL:
                await self._send()
        else:
            await self._outgoing.put(chunk, self._sending)
        if self._sending is not None and self._sending.done():
            self._sending.result()  # what it has failed with; it cannot have been right
            raise OriginFailed("the upload was answered too early")

    async def _send(self) -> None:
        held, self._held = bytes(self._held), bytearray()
        self._outgoing = StreamedBody()
        self._sending = asyncio.create_task(self._session.send("PATCH", "", self._outgoing))
        await self._outgoing.put(held, self._sending)

    async def _sent(self) -> None:
        """All that was written is there."""
        if self._sending is not None:
            await self._outgoing.end(self._sending)
            try:
                await self._sending
            finally:
                self._sending = None

    async def commit(self, digest: Digest) -> Descriptor:
        await self._sent()
        held, self._held = bytes(self._held), bytearray()
        try:
            await self._session.send("PUT", f"digest={quote(digest, safe='')}", held)
        except DigestInvalid:
            await self.cancel()
            raise
        return Descriptor(OCTETS, digest, self.offset)

    async def suspend(self, error: BaseException | None = None) -> None:
        if self._held:
            await self._send()
        await self._sent()

    async def cancel(self, error: BaseException | None = None) -> None:
        """The registry is asked to forget it; where it does not, it does so in its own time."""
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.gather(self._sending, return_exceptions=True)
            self._sending = None
        with suppress(RegistryError):
            await self._session.send("DELETE", "")
