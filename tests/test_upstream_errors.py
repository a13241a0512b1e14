"""What the statuses of an upstream mean."""

from __future__ import annotations

import errno
import socket
import ssl
import time
from collections.abc import Awaitable
from email.utils import formatdate
from typing import Any
from unittest.mock import Mock

import aiohttp
import pytest

from proxy.upstream.errors import OriginAway, is_brief
from storage.errors import (
    BlobUnknown,
    ManifestUnknown,
    NameUnknown,
    OriginDenied,
    OriginFailed,
    RangeInvalid,
    RegistryError,
    TooManyRequests,
)
from tests.upstream import (
    RetryAfter,
    Status,
    Upstream,
)
from tests.upstream_client import LATEST, Ask, read

STATUSES: list[tuple[int, type[RegistryError]]] = [
    (400, OriginFailed),
    (401, OriginDenied),
    (403, OriginDenied),
    (404, BlobUnknown),
    (405, OriginFailed),
    (408, OriginFailed),
    (410, BlobUnknown),
    (416, RangeInvalid),
    (429, TooManyRequests),
    (451, OriginFailed),
    (500, OriginFailed),
    (501, OriginFailed),
    (502, OriginAway),
    (503, OriginAway),
    (504, OriginAway),
    (204, OriginFailed),
    (304, OriginFailed),
    (302, OriginFailed),
]


@pytest.mark.parametrize(("status", "error"), STATUSES)
async def test_what_a_status_means(
    ask: Ask, upstream: Upstream, status: int, error: type[RegistryError]
) -> None:
    image = upstream.image("a/b", "latest")
    origin = ask(upstream.url)
    upstream.next("GET", lambda request: True, Status(status), times=9)
    with pytest.raises(error) as raised:
        await read(origin, image.layers[0])
    assert type(raised.value) is error
    calls: list[Awaitable[Any]] = [origin.get_manifest("a/b", LATEST), origin.tags("a/b")]
    for call, unknown in zip(calls, (ManifestUnknown, NameUnknown), strict=True):
        with pytest.raises(unknown if error is BlobUnknown else error):
            await call


@pytest.mark.parametrize("after", ["7", "date", "soon", None])
async def test_retry_after(ask: Ask, upstream: Upstream, after: str | None) -> None:
    upstream.image("a/b", "latest")
    header = formatdate(time.time() + 800, usegmt=True) if after == "date" else after
    upstream.next("GET", "latest", Status(429) if header is None else RetryAfter(header))
    with pytest.raises(TooManyRequests) as raised:
        await ask(upstream.url).get_manifest("a/b", LATEST)
    found = raised.value.retry_after
    if after == "date":
        assert found is not None
        assert 700 < found <= 800
    else:
        assert found == (7 if after == "7" else 60)


async def test_a_400_by_http_may_mean_https(ask: Ask, upstream: Upstream) -> None:
    image = upstream.image("a/b", "latest")
    upstream.next("GET", lambda request: True, Status(400), times=9)
    with pytest.raises(OriginFailed, match=r"answered 400 .*: if it serves https, write"):
        await read(ask(upstream.url), image.layers[0])


def connecting(error: OSError) -> aiohttp.ClientConnectorError:
    return aiohttp.ClientConnectorError(Mock(), error)


@pytest.mark.parametrize(
    ("error", "brief"),
    [
        (connecting(ConnectionRefusedError(errno.ECONNREFUSED, "refused")), True),
        (connecting(ConnectionResetError(errno.ECONNRESET, "reset, in the handshake")), True),
        (aiohttp.ClientOSError(errno.EPIPE, "broken pipe"), True),
        (aiohttp.ClientConnectionResetError("Cannot write to closing transport"), True),
        (aiohttp.ServerDisconnectedError(), True),
        (aiohttp.ClientPayloadError("it broke off"), True),
        (connecting(OSError(errno.ENETUNREACH, "a site that is cut off")), False),
        (connecting(OSError(errno.EHOSTUNREACH, "no such host")), False),
        (connecting(OSError(errno.EACCES, "a private address")), False),
        (connecting(socket.gaierror(socket.EAI_AGAIN, "no name server")), False),
        (connecting(socket.gaierror(socket.EAI_NONAME, "no such name")), False),
        (connecting(ssl.SSLCertVerificationError(1, "expired")), False),
        (aiohttp.ConnectionTimeoutError(), False),
        (TimeoutError(), False),
        (aiohttp.ClientConnectionError("all connections were closed"), False),
        (aiohttp.InvalidURL("nonsense"), False),
    ],
)
def test_what_may_be_over_in_a_moment(error: Exception, brief: bool) -> None:
    assert is_brief(error) == brief
