"""Content codings of responses, which some servers apply although identity was requested."""

from __future__ import annotations

import zlib

import aiohttp

from storage.errors import OriginFailed


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
            decoder = zlib.decompressobj(wbits=47 if "gzip" in encoding else zlib.MAX_WBITS)
            decoded = decoder.decompress(content, limit + 1)
        except zlib.error:
            raise OriginFailed(f"{name} sent a body that is not {encoding}") from None
        if len(decoded) <= limit and decoder.eof:
            return decoded
    raise OriginFailed(f"{name} sent a body encoded as {encoding}, although identity was requested")
