"""What the responses of a registry state about their content, and the download of a blob.

A function that takes the `name` of the upstream raises OriginFailed for a header that is malformed.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp

from proxy.config.quantities import parse_number
from proxy.upstream.encoding import encoding_of
from proxy.upstream.socket_body import SocketBody
from proxy.upstream.transport import Transport
from storage.errors import OriginFailed, RegistryError
from storage.oci import Descriptor, Digest, Span
from storage.registry import Blob, Incoming, ReadInto

# RFC 9110 §14.4; the name of the unit is case-insensitive.
_CONTENT_RANGE = re.compile(r"bytes[ \t]+([0-9]+)-([0-9]+)/([0-9]+|\*)", re.IGNORECASE)


def stated_media_type(response: aiohttp.ClientResponse) -> str:
    return response.headers.get("Content-Type", "").partition(";")[0].strip()


def stated_digest(response: aiohttp.ClientResponse) -> Digest | None:
    text = response.headers.get("Docker-Content-Digest", "")
    try:
        return Digest.parse(text)
    except RegistryError:
        return None


def stated_extent(name: str, response: aiohttp.ClientResponse, span: Span | None) -> tuple[int, int]:
    """The position of the body in the blob, and the size of the blob, or -1 if unknown."""
    if response.status != 206:
        return 0, stated_length(name, response)
    found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
    first, last, total = map(parse_number, found.groups()) if found else (None, None, None)
    unknown = found is not None and found[3] == "*"
    if first is None or last is None or last < first or not (unknown or last < (total or 0)):
        raise OriginFailed(f"{name} sent a range whose Content-Range is malformed")
    if span is None or first != span.start:
        raise OriginFailed(f"{name} answered with another range than was requested")
    return first, -1 if total is None else total


def stated_length(name: str, response: aiohttp.ClientResponse) -> int:
    """The length of the content in bytes; -1 if it is missing or that of the encoded content."""
    length = response.headers.get("Content-Length")
    if length is None or encoding_of(response):
        return -1
    if (number := parse_number(length)) is None:
        raise OriginFailed(f"{name} sent a Content-Length that is malformed")
    return number


class Download(Blob):
    """A blob that is being downloaded; it can be read once."""

    def __init__(
        self,
        transport: Transport,
        response: aiohttp.ClientResponse,
        descriptor: Descriptor,
        start: int,
        received: Callable[[int], Awaitable[None]],
    ) -> None:
        self.descriptor = descriptor
        self._received = received
        self._transport = transport
        self._response = response
        self.position = self._position = start
        self.whole = response.status != 206
        self._body: SocketBody | None = None

    async def chunks(self, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        if start < self._position:
            raise ValueError(f"byte {start} has been read already")
        try:
            while chunk := await self._next():
                await self._received(len(chunk))
                # An upstream that ignores Range sends the bytes before `start` again.
                skipped = min(len(chunk), start - self._position)
                self._position += len(chunk)
                rest = len(chunk) if stop is None else len(chunk) - max(0, self._position - stop)
                if skipped < rest:
                    yield chunk[skipped:rest] if skipped or rest < len(chunk) else chunk
                    start = self._position
                if stop is not None and self._position >= stop:
                    return
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise self._transport.failed(error) from error

    async def _next(self) -> bytes:
        """The bytes that come next; none at the end."""
        async with self._transport.coming():
            return await self._response.content.readany()

    @property
    def unread(self) -> int:
        if self._body is not None:
            return self._body.unread
        return self._response.content.total_bytes - (self._position - self.position)

    def incoming(self) -> Incoming | None:
        self._body = self._transport.bodies.take(self._response)
        return self if self._body is not None else None

    async def pass_on(self, write: Callable[[ReadInto], Awaitable[int]]) -> bool:
        assert self._body is not None
        try:
            more = await self._body.wait()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise self._transport.failed(error) from error
        if more:
            await self._received(await write(self._body.readinto))
        return more

    async def close(self) -> None:
        # Not release(): that would read the rest of a large body.
        if self._body is not None:
            self._body.close()
        else:
            self._response.close()
