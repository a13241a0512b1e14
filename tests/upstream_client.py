"""Clients of the fake upstream, for tests of proxy.upstream."""

from __future__ import annotations

from collections.abc import Callable

from proxy.upstream import client
from proxy.upstream.connect import Connect
from storage.oci import Digest, Span, Tag
from tests.upstream import Basic

BODY = bytes(range(256)) * 100
LATEST = Tag("latest")
PLAIN = Connect(plain_http=True, header_timeout=2, progress_timeout=2)
USER = Basic("ci", "secret")

Ask = Callable[..., client.UpstreamRegistry]


async def read(origin: client.UpstreamRegistry, digest: str, span: Span | None = None) -> bytes:
    blob = await origin.get_blob("a/b", Digest(digest), span)
    start, stop = (span.start, span.stop) if span else (0, None)
    try:
        return b"".join([chunk async for chunk in blob.chunks(start, stop)])
    finally:
        await blob.close()
