"""Content codings of responses, which some servers apply although identity was requested."""

from __future__ import annotations

import zlib

import aiohttp

from storage.errors import OriginFailed

MAX_MEMBERS = 64  # of one body; each costs a copy of what follows it


def encoding_of(response: aiohttp.ClientResponse) -> str:
    """The content coding; "" for identity."""
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    return "" if encoding == "identity" else encoding


def decoded(name: str, response: aiohttp.ClientResponse, content: bytes, limit: int) -> bytes:
    """The content of a response from the upstream `name`, decoded.  Raises OriginFailed."""
    encoding = encoding_of(response)
    if not encoding:
        return content
    if encoding in ("gzip", "x-gzip", "deflate"):
        try:
            inflated = _inflated(content, limit, 47 if "gzip" in encoding else zlib.MAX_WBITS)
        except zlib.error:
            raise OriginFailed(f"{name} sent a body that is not {encoding}") from None
        if inflated is not None:
            return inflated
    raise OriginFailed(f"{name} sent a body encoded as {encoding}, although identity was requested")


def _inflated(content: bytes, limit: int, wbits: int) -> bytes | None:
    """All members of compressed content (RFC 1952, section 2.2); None if it is cut, or over `limit` bytes.

    Raises zlib.error.
    """
    inflated = b""
    for _ in range(MAX_MEMBERS):
        decoder = zlib.decompressobj(wbits)
        inflated += decoder.decompress(content, limit + 1 - len(inflated))
        if len(inflated) > limit or not decoder.eof:
            return None
        if not (content := decoder.unused_data):
            return inflated
    return None
