"""One transfer a digest whatever number of clients, and following it while it grows."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import structlog
from structlog.testing import LogCapture
from yarl import URL

from proxy.cache import fetcher
from proxy.cache.fills import Fills
from proxy.cache.readers import BlobSource
from proxy.telemetry.metrics import Metrics
from proxy.upstream import client, requests
from proxy.upstream.connect import Connect
from proxy.upstream.credentials import Credentials
from storage.disk.blobs import BlobFiles
from storage.disk.records import SQLiteRecords
from storage.errors import BlobUnknown, OriginFailed, Unavailable
from storage.oci import Digest
from storage.registry import Blob
from storage.store import Store
from tests.conftest import Clock, Serve, Site
from tests.upstream import (
    Corrupt,
    Fault,
    Hold,
    Reset,
    RetryAfter,
    Status,
    Truncate,
    Upstream,
    WrongLength,
    digest_of,
)

MANY = 50


def content_of(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


BODY = content_of(300_000)


def path_of(digest: str, repository: str = "a/b") -> str:
    return f"/v2/{repository}/blobs/{digest}"


def short(digest: str) -> str:
    """As the fake's log has it."""
    return digest[:19]


def blobs(site: Site) -> list[bytes]:
    return [path.read_bytes() for path in (site.directory / "cache" / "blobs").glob("*/*/*")]


def heard(event: str, times: int = 1) -> asyncio.Event:
    """Set when the server has said so so many times."""
    found, left = asyncio.Event(), iter(range(times - 1))

    def listen(logger: object, method: str, entry: Any) -> Any:
        if entry["event"] == event and next(left, None) is None:
            found.set()
        return entry

    structlog.get_config()["processors"].insert(0, listen)
    return found


async def read_broken(response: aiohttp.ClientResponse) -> bytes:
    """What came of a body that must not end well."""
    found = bytearray()
    with pytest.raises((aiohttp.ClientError, ConnectionError)):
        async for piece in response.content.iter_any():
            found += piece
    return bytes(found)


class Reader:
    """A client on a raw socket: no buffer of its own between the test and the network."""

    def __init__(self, url: str, path: str) -> None:
        self._address = URL(url).host or "", URL(url).port or 0
        self._request = f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2 << 20)
        self._socket.setblocking(False)

    async def __aenter__(self) -> Reader:
        loop = asyncio.get_running_loop()
        await loop.sock_connect(self._socket, self._address)
        await loop.sock_sendall(self._socket, self._request)
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += await loop.sock_recv(self._socket, 1)
        assert head.startswith(b"HTTP/1.1 200 ")
        return self

    async def __aexit__(self, *error: object) -> None:
        self._socket.close()

    async def equals(self, content: bytes) -> bool:
        """Compares as it reads, so that many readers of much content need no memory."""
        loop, position = asyncio.get_running_loop(), 0
        buffer = memoryview(bytearray(1 << 20))
        while position < len(content):
            count = await loop.sock_recv_into(self._socket, buffer)
            # As bytes: views are compared item by item, which takes twenty times as long.
            if count == 0 or buffer[:count].tobytes() != content[position : position + count]:
                return False
            position += count
        return True


# Through the server


@pytest.mark.clients
async def test_fifty_cold_pulls_of_100_MB_are_one_get(serve: Serve, upstream: Upstream) -> None:
    content = content_of(100_000_000)
    digest = upstream.blob("a/b", content)
    site = await serve(upstream)

    async def pull() -> bool:
        async with Reader(site.url, path_of(digest)) as reader:
            return await reader.equals(content)

    assert await asyncio.gather(*(pull() for _ in range(MANY))) == [True] * MANY
    assert upstream.log == [f"GET blob a/b@{short(digest)}"]
    assert upstream.bytes_sent == len(content)


async def test_who_comes_while_a_fill_runs_follows_it(serve: Serve, upstream: Upstream) -> None:
    digest = upstream.blob("a/b", BODY)
    site = await serve(upstream)
    gate = asyncio.Event()
    upstream.next("GET", digest, Hold(gate, after=100_000))
    responses = []
    for _ in range(10):  # headers come one after the other, all of them before the body is there
        response = await site.request("GET", path_of(digest))
        assert response.status == 200
        assert response.headers["Content-Length"] == str(len(BODY))
        responses.append(response)
    # The first byte does not wait for the last.
    assert await responses[0].content.readexactly(1000) == BODY[:1000]
    assert "entrepot_followers 10.0" in await site.metrics()
    gate.set()
    bodies = await asyncio.gather(*(response.read() for response in responses))
    assert bodies == [BODY[1000:]] + [BODY] * 9
    assert upstream.log == [f"GET blob a/b@{short(digest)}"]


async def test_a_fill_outlives_its_clients(serve: Serve, upstream: Upstream) -> None:
    digest = upstream.blob("a/b", BODY)
    site = await serve(upstream)
    gate, left, committed = asyncio.Event(), heard("request.served"), heard("fill.committed")
    upstream.next("GET", digest, Hold(gate, after=1000))
    response = await site.request("GET", path_of(digest))
    response.close()
    await left.wait()
    gate.set()
    await committed.wait()
    assert (await site.get(path_of(digest)))[2] == BODY
    assert upstream.log == [f"GET blob a/b@{short(digest)}"]


async def test_a_client_that_leaves_before_the_headers_disturbs_nobody(
    serve: Serve, upstream: Upstream
) -> None:
    digest = upstream.blob("a/b", BODY)
    site = await serve(upstream)
    gate, left = asyncio.Event(), heard("request.served")
    hold = Hold(gate, after=None)
    upstream.next("GET", digest, hold)
    first = asyncio.ensure_future(site.get(path_of(digest)))
    await hold.reached.wait()
    second = asyncio.ensure_future(site.get(path_of(digest)))
    first.cancel()
    await left.wait()
    gate.set()
    assert (await second)[2] == BODY
    assert upstream.log == [f"GET blob a/b@{short(digest)}"]


async def test_a_slow_client_does_not_hold_up_the_fill(serve: Serve, upstream: Upstream) -> None:
    content = content_of(20 << 20)
    digest = upstream.blob("a/b", content)
    site = await serve(upstream)
    committed = heard("fill.committed")
    async with Reader(site.url, path_of(digest)) as slow:
        await committed.wait()  # though the slow one has read nothing of the body
        assert (await site.get(path_of(digest)))[2] == content
        assert await slow.equals(content)


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
async def test_a_hit_asks_nothing(serve: Serve, upstream: Upstream, algorithm: str) -> None:
    digest = upstream.blob("a/b", BODY, algorithm)
    site = await serve(upstream)
    for result in ("fwd=miss", "hit"):
        status, headers, body = await site.get(path_of(digest))
        assert (status, body, headers["Docker-Content-Digest"]) == (200, BODY, digest)
        assert result in headers["Cache-Status"]
    assert len(upstream.log) == 1


@pytest.mark.errors("fill.failed")
@pytest.mark.parametrize("at", [0, 150_000, len(BODY) - 1])
@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
async def test_wrong_content_is_never_complete_and_never_kept(
    serve: Serve, upstream: Upstream, algorithm: str, at: int
) -> None:
    digest = upstream.blob("a/b", BODY, algorithm)
    site = await serve(upstream)
    gate, failed = asyncio.Event(), heard("fill.failed")
    upstream.next("GET", digest, Corrupt(at), Hold(gate, after=len(BODY) // 2))
    responses = [await site.request("GET", path_of(digest)) for _ in range(3)]
    gate.set()
    for response in responses:
        assert len(await read_broken(response)) < len(BODY)
    await failed.wait()
    assert (blobs(site), site.partial) == ([], [])
    assert (await site.get(path_of(digest)))[2] == BODY


async def test_the_last_byte_waits_for_the_digest(serve: Serve, upstream: Upstream) -> None:
    digest = upstream.blob("a/b", BODY)
    upstream.content_length = False  # so that the end of the body is not the last byte
    site = await serve(upstream)
    gate = asyncio.Event()
    upstream.next("GET", digest, Hold(gate, after=len(BODY)))
    async with site.request("GET", path_of(digest)) as response:
        assert await response.content.readexactly(len(BODY) - 1) == BODY[:-1]
        last = asyncio.ensure_future(response.content.read())
        assert blobs(site) == []  # all is there, and known to be right or wrong by nobody
        assert not last.done()
        gate.set()
        assert await last == BODY[-1:]


@pytest.mark.parametrize("size", [0, 1, 2])
@pytest.mark.parametrize("told", [True, False], ids=["length", "no length"])
async def test_tiny_blobs(serve: Serve, upstream: Upstream, size: int, told: bool) -> None:
    digest = upstream.blob("a/b", BODY[:size])
    upstream.content_length = told
    site = await serve(upstream)
    committed = heard("fill.committed")
    for _ in ("miss", "hit"):
        status, headers, body = await site.get(path_of(digest))
        assert (status, body) == (200, BODY[:size])
        await committed.wait()
    assert headers["Content-Length"] == str(size)


@pytest.mark.errors("fill.failed")
@pytest.mark.parametrize("told", [True, False], ids=["length", "no length"])
async def test_an_empty_answer_is_no_blob(serve: Serve, upstream: Upstream, told: bool) -> None:
    digest = upstream.blob("a/b", BODY)
    upstream.repositories["a/b"].blobs[digest] = b""
    upstream.content_length = told
    site = await serve(upstream)
    async with site.request("GET", path_of(digest)) as response:
        assert response.status == 502  # an empty blob has no last byte to withhold: all of it is
    assert (len(upstream.log), blobs(site), site.partial) == (1 if told else 2, [], [])


@pytest.mark.parametrize("told", [True, False], ids=["length", "no length"])
@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
@pytest.mark.parametrize("cut", [Reset(after=100_000), Truncate(after=100_000)], ids=["reset", "truncated"])
async def test_a_cut_is_resumed_within_the_same_response(
    serve: Serve, upstream: Upstream, cut: Fault, ranges: bool, told: bool
) -> None:
    digest = upstream.blob("a/b", BODY)
    upstream.ranges, upstream.content_length = ranges, told
    site = await serve(upstream)
    upstream.next("GET", digest, cut, times=1 if not ranges else 2)
    status, _, body = await site.get(path_of(digest))
    assert (status, body) == (200, BODY)
    gets = [request for request in upstream.requests if request.method == "GET"]
    assert gets[0].range is None
    assert len(gets) == (2 if not ranges else 3)
    # Without a length there is a HEAD in between, and what a cut finds unread is lost.
    assert not told or all((request.range or "").startswith("bytes=") for request in gets[1:])


async def test_a_cut_is_resumed_where_each_range_has_an_end(serve: Serve, upstream: Upstream) -> None:
    digest = upstream.blob("a/b", BODY)
    upstream.open_ranges = False
    site = await serve(upstream)
    upstream.next("GET", digest, Truncate(after=100_000))
    assert (await site.get(path_of(digest)))[::2] == (200, BODY)
    *_, refused, told, last = upstream.requests
    assert (refused.range or "").endswith("-") and told.method == "HEAD"
    assert last.range == f"{refused.range}{len(BODY) - 1}"


async def test_a_second_repository_costs_one_head(serve: Serve, upstream: Upstream) -> None:
    digest = upstream.blob("a/b", BODY)
    upstream.blob("c/d", BODY)
    site = await serve(upstream)
    committed = heard("fill.committed")
    await site.get(path_of(digest))
    await committed.wait()
    upstream.clear()
    found = await asyncio.gather(*(site.get(path_of(digest, "c/d")) for _ in range(5)))
    assert [body for _, _, body in found] == [BODY] * 5
    assert upstream.log == [f"HEAD blob c/d@{short(digest)}"]
    assert (await site.get(path_of(digest, "c/d")))[2] == BODY
    assert len(upstream.log) == 1


async def test_a_second_repository_joins_a_fill_for_one_head(serve: Serve, upstream: Upstream) -> None:
    digest = upstream.blob("a/b", BODY)
    upstream.blob("c/d", BODY)
    site = await serve(upstream)
    gate = asyncio.Event()
    upstream.next("GET", digest, Hold(gate, after=1000))
    first = await site.request("GET", path_of(digest))
    second = await site.request("GET", path_of(digest, "c/d"))
    third = await site.request("GET", path_of(digest, "c/d"))
    gate.set()
    assert [await response.read() for response in (first, second, third)] == [BODY] * 3
    assert upstream.log == [f"GET blob a/b@{short(digest)}", f"HEAD blob c/d@{short(digest)}"]
    await site.get(path_of(digest, "c/d"))
    assert len(upstream.log) == 2  # its link was made as well


async def test_another_namespace_costs_one_head(serve: Serve, upstream: Upstream) -> None:
    async with Upstream() as other:
        digest = upstream.blob("a/b", BODY)
        other.blob("x", BODY)
        site = await serve(upstream, more={"other.example": {"upstream": other.url}})
        await site.get(path_of(digest))
        assert (await site.get(path_of(digest, "other.example/x")))[2] == BODY
        assert other.log == [f"HEAD blob x@{short(digest)}"]
        assert len(upstream.log) == 1


@pytest.mark.parametrize("held", [True, False], ids=["in flight", "committed"])
async def test_a_digest_is_no_permission(serve: Serve, upstream: Upstream, held: bool) -> None:
    digest = upstream.blob("a/b", BODY)
    upstream.blob("c/d", b"else")
    site = await serve(upstream)
    gate = asyncio.Event()
    if held:
        upstream.next("GET", digest, Hold(gate, after=1000))
    async with site.request("GET", path_of(digest)) as response:
        if not held:
            await response.read()
        status, _, body = await site.get(path_of(digest, "c/d"))
        assert (status, b"BLOB_UNKNOWN" in body) == (404, True)
        gate.set()
        await response.read()


@pytest.mark.parametrize("refused", [Status(404), Status(403), RetryAfter(1, 500)], ids=str)
async def test_what_another_repository_is_refused_says_nothing_of_ours(
    serve: Serve, upstream: Upstream, refused: Fault
) -> None:
    digest = upstream.blob("a/b", BODY)
    upstream.blob("c/d", BODY)
    site = await serve(upstream)
    gate = asyncio.Event()
    hold = Hold(gate, after=None)
    upstream.next("GET", lambda request: request.repository == "a/b", refused, hold)
    permitted = Hold(gate, after=None)
    upstream.next("HEAD", lambda request: request.repository == "c/d", permitted)
    first = asyncio.ensure_future(site.get(path_of(digest)))
    await hold.reached.wait()
    second = asyncio.ensure_future(site.get(path_of(digest, "c/d")))
    await permitted.reached.wait()
    gate.set()
    assert (await first)[0] in (404, 502)
    assert (await second)[2] == BODY


@pytest.mark.errors("fill.failed")
async def test_a_fill_that_fails_while_we_ask_for_permission_is_begun_anew(
    serve: Serve, upstream: Upstream
) -> None:
    digest = upstream.blob("a/b", BODY)
    upstream.blob("c/d", BODY)
    site = await serve(upstream)
    gate, asked, failed = asyncio.Event(), asyncio.Event(), heard("fill.failed")
    upstream.next("GET", digest, Corrupt(), Hold(gate, after=1000))
    permission = Hold(asked, after=None)
    upstream.next("HEAD", digest, permission)
    first = await site.request("GET", path_of(digest))
    second = asyncio.ensure_future(site.get(path_of(digest, "c/d")))
    await permission.reached.wait()
    gate.set()
    await failed.wait()
    await read_broken(first)
    asked.set()
    status, _, body = await second
    assert (status, body) == (200, BODY)


async def test_a_fill_that_ends_while_we_ask_for_permission_serves_us(
    serve: Serve, upstream: Upstream
) -> None:
    digest = upstream.blob("a/b", BODY)
    upstream.blob("c/d", BODY)
    site = await serve(upstream)
    gate, asked, committed = asyncio.Event(), asyncio.Event(), heard("fill.committed")
    upstream.next("GET", digest, Hold(gate, after=1000))
    permission = Hold(asked, after=None)
    upstream.next("HEAD", digest, permission)
    first = await site.request("GET", path_of(digest))
    second = asyncio.ensure_future(site.get(path_of(digest, "c/d")))
    await permission.reached.wait()
    gate.set()
    assert await first.read() == BODY
    await committed.wait()
    asked.set()
    assert (await second)[2] == BODY
    await site.get(path_of(digest, "c/d"))
    assert len(upstream.log) == 2


async def test_a_damaged_file_is_not_shown_to_another_repository(
    serve: Serve, upstream: Upstream, tmp_path: Path
) -> None:
    digest = upstream.blob("a/b", BODY)
    upstream.blob("c/d", BODY)
    # Else the scrub may be the one that finds it.
    site = await serve(upstream, top={"disk": {"path": str(tmp_path / "disk"), "scrub": "off"}})
    committed = heard("fill.committed")
    await site.get(path_of(digest))
    await committed.wait()
    [path] = (site.directory / "cache" / "blobs").glob("*/*/*")
    path.write_bytes(BODY[:1000])
    assert (await site.get(path_of(digest, "c/d")))[2] == BODY


async def test_head_never_transfers(serve: Serve, upstream: Upstream) -> None:
    digest = upstream.blob("a/b", BODY)
    site = await serve(upstream)
    gate = asyncio.Event()
    for log in ([f"HEAD blob a/b@{short(digest)}"], []):
        async with site.request("HEAD", path_of(digest)) as response:
            assert response.status == 200
            assert response.headers["Content-Length"] == str(len(BODY))
        assert (upstream.log, blobs(site), site.partial) == (log, [], []) or not log
        if log:
            # Again while it is on its way: what is known of it needs no request.
            upstream.next("GET", digest, Hold(gate, after=1000))
            filling = await site.request("GET", path_of(digest))
            upstream.clear()
    assert upstream.log == []
    gate.set()
    assert await filling.read() == BODY


async def test_a_range_near_the_frontier_waits_for_the_fill(serve: Serve, upstream: Upstream) -> None:
    digest = upstream.blob("a/b", BODY)
    site = await serve(upstream)
    gate = asyncio.Event()
    upstream.next("GET", digest, Hold(gate, after=1000))
    async with site.request("GET", path_of(digest), headers={"Range": "bytes=2000-2999"}) as response:
        assert response.status == 206
        assert response.headers["Content-Range"] == f"bytes 2000-2999/{len(BODY)}"
        gate.set()
        assert await response.read() == BODY[2000:3000]
    assert (await site.get(path_of(digest)))[2] == BODY
    assert upstream.log == [f"GET blob a/b@{short(digest)}"]


@pytest.mark.clients
async def test_a_range_far_ahead_is_fetched_at_once_and_kept(serve: Serve, upstream: Upstream) -> None:
    content = content_of(18 << 20)
    digest = upstream.blob("a/b", content)
    site = await serve(upstream)
    gate = asyncio.Event()
    upstream.next("GET", digest, Hold(gate, after=1000))
    start = 17 << 20
    for _ in range(2):  # the second time it is there
        status, headers, body = await site.get(path_of(digest), Range=f"bytes={start}-{start + 999}")
        assert (status, body) == (206, content[start : start + 1000])
        assert headers["Content-Range"] == f"bytes {start}-{start + 999}/{len(content)}"
    assert blobs(site) == []  # a part never becomes a blob
    status, headers, _ = await site.get(path_of(digest), Range=f"bytes={len(content)}-")
    assert (status, headers["Content-Range"]) == (416, f"bytes */{len(content)}")
    async with site.request("GET", path_of(digest), headers={"Range": f"bytes={start - 500}-"}) as response:
        assert await response.content.readexactly(500) == content[start - 500 : start]
        gate.set()
        assert await response.content.read() == content[start:]
    assert (await site.get(path_of(digest)))[2] == content
    assert upstream.log == [
        f"GET blob a/b@{short(digest)}",
        f"GET blob a/b@{short(digest)} bytes={start}-{start + 999}",
        f"GET blob a/b@{short(digest)} bytes={start - 500}-{start - 1}",
        f"GET blob a/b@{short(digest)} bytes={start + 1000}-{len(content) - 1}",
    ]


@pytest.mark.parametrize("status", [403, 404, 500])
async def test_a_range_that_the_origin_refuses_beside_the_fill_waits_for_the_fill(
    serve: Serve, upstream: Upstream, status: int
) -> None:
    content = content_of(17 << 20)
    digest = upstream.blob("a/b", content)
    site = await serve(upstream)
    gate = asyncio.Event()
    upstream.next("GET", digest, Hold(gate, after=1000))
    upstream.next("GET", digest, Status(status), times=99)
    assert (await site.get(path_of(digest), Range="bytes=0-9"))[2] == content[:10]
    async with site.request("GET", path_of(digest), headers={"Range": "bytes=-7"}) as response:
        gate.set()
        assert (response.status, await response.read()) == (206, content[-7:])


async def test_an_origin_without_ranges_is_asked_for_one_only(serve: Serve, upstream: Upstream) -> None:
    content = content_of(20 << 20)
    digest = upstream.blob("a/b", content)
    upstream.ranges = False
    site = await serve(upstream)
    gate, committed = asyncio.Event(), heard("fill.committed")
    upstream.next("GET", digest, Hold(gate, after=1000))
    starts = [0, *range(17 << 20, 18 << 20, 1 << 18)]
    asked = [{"Range": f"bytes={start}-{start + 99}"} for start in starts]
    responses = await asyncio.gather(*(site.request("GET", path_of(digest), headers=each) for each in asked))
    gate.set()
    bodies = await asyncio.gather(*(response.read() for response in responses))
    assert bodies == [content[start : start + 100] for start in starts]
    assert len(upstream.log) == 2
    await committed.wait()


@pytest.mark.parametrize("asked", ["bytes=200000-", "bytes=5-9", "bytes=-7", "bytes=-7,0-9"])
async def test_a_range_waits_until_the_size_is_known(serve: Serve, upstream: Upstream, asked: str) -> None:
    digest = upstream.blob("a/b", BODY)
    upstream.content_length = False
    site = await serve(upstream)
    for _ in ("miss", "hit"):
        status, headers, body = await site.get(path_of(digest), Range=asked)
        assert status == 206
        for each in asked.removeprefix("bytes=").split(","):
            first, _, last = each.partition("-")
            expected = BODY[int(first) : int(last or len(BODY)) + 1] if first else BODY[-int(last) :]
            assert body == expected or (expected in body and "," in asked)
            assert f"/{len(BODY)}" in headers.get("Content-Range", body.decode("latin-1"))
    assert [request.method for request in upstream.requests] == ["GET", "HEAD"]


async def test_all_of_a_blob_of_unknown_size_does_not_wait(serve: Serve, upstream: Upstream) -> None:
    digest = upstream.blob("a/b", BODY)
    upstream.content_length = False
    site = await serve(upstream)
    gate = asyncio.Event()
    upstream.next("GET", digest, Hold(gate, after=100_000))
    async with site.request("GET", path_of(digest), headers={"Range": "bytes=0-"}) as response:
        assert (response.status, response.headers["Accept-Ranges"]) == (200, "none")
        assert await response.content.readexactly(99_999) == BODY[:99_999]
        gate.set()
        assert await response.content.read() == BODY[99_999:]


async def test_an_unsatisfiable_range_of_unknown_size_is_answered_416(
    serve: Serve, upstream: Upstream
) -> None:
    digest = upstream.blob("a/b", BODY)
    upstream.content_length = False
    site = await serve(upstream)
    status, headers, _ = await site.get(path_of(digest), Range=f"bytes={len(BODY)}-")
    assert (status, headers["Content-Range"]) == (416, f"bytes */{len(BODY)}")


@pytest.mark.parametrize("hung", [True, False], ids=["client waits", "client left"])
async def test_a_fill_goes_on_after_a_restart(serve: Serve, upstream: Upstream, hung: bool) -> None:
    digest = upstream.blob("a/b", BODY)
    site = await serve(upstream, top={"drain": "10ms"})
    gate, left = asyncio.Event(), heard("request.served")
    upstream.next("GET", digest, Hold(gate, after=100_000))
    response = await site.request("GET", path_of(digest))
    await response.content.readexactly(99_999)  # what can be read was written
    if not hung:
        response.close()
        await left.wait()
    await site.app.stop()
    if hung:
        await read_broken(response)
    assert site.partial == [f"sha256-{digest[7:]}"]
    upstream.clear()
    site = await serve(upstream)
    assert (await site.get(path_of(digest)))[2] == BODY
    assert upstream.log == [f"GET blob a/b@{short(digest)} bytes=100000-"]


@pytest.mark.parametrize(
    ("left", "log"),
    [
        (BODY, ["HEAD"]),
        (BODY[:1000], ["GET bytes=1000-"]),
        (BODY[:-1], [f"GET bytes={len(BODY) - 1}-"]),
        (b"\0" * len(BODY), [f"GET bytes={len(BODY)}-", "HEAD", "GET"]),
        (BODY + b"more", [f"GET bytes={len(BODY) + 4}-", "HEAD", "GET"]),
        (b"", ["GET"]),
    ],
    ids=["all of it", "the beginning", "all but a byte", "as long but wrong", "too long", "nothing"],
)
async def test_what_a_killed_server_left(
    serve: Serve, upstream: Upstream, left: bytes, log: list[str]
) -> None:
    digest = upstream.blob("a/b", BODY)
    site = await serve(upstream)
    (site.directory / "cache" / "partial" / f"sha256-{digest[7:]}").write_bytes(left)
    committed = heard("fill.committed")
    assert (await site.get(path_of(digest)))[2] == BODY
    await committed.wait()
    assert [" ".join([each.method, each.range or ""]).strip() for each in upstream.requests] == log
    assert blobs(site) == [BODY]


@pytest.mark.errors("fill.failed")
async def test_a_beginning_that_was_wrong_spoils_one_pull_only(serve: Serve, upstream: Upstream) -> None:
    digest = upstream.blob("a/b", BODY)
    site = await serve(upstream)
    (site.directory / "cache" / "partial" / f"sha256-{digest[7:]}").write_bytes(b"\0" * 1000)
    failed = heard("fill.failed")
    async with site.request("GET", path_of(digest)) as response:
        assert len(await read_broken(response)) < len(BODY)
    await failed.wait()
    assert (blobs(site), site.partial) == ([], [])
    assert (await site.get(path_of(digest)))[2] == BODY


@pytest.mark.errors("fill.failed")
@pytest.mark.parametrize("by", [7, -7])
async def test_a_wrong_length_is_a_broken_connection(serve: Serve, upstream: Upstream, by: int) -> None:
    digest = upstream.blob("a/b", BODY)
    site = await serve(upstream)
    failed = heard("fill.failed")
    upstream.next("GET", digest, WrongLength(by))
    async with site.request("GET", path_of(digest)) as response:
        await read_broken(response)
    await failed.wait()
    assert (blobs(site), site.partial) == ([], [])
    assert (await site.get(path_of(digest)))[2] == BODY


# Without a server


@dataclass
class Rig:
    """Fills over a store, from the fake, without waiting between its retries."""

    fills: Fills
    store: Store
    source: BlobSource
    partial: Path

    async def read(self, blob: Blob) -> bytes:
        try:
            return b"".join([chunk async for chunk in blob.chunks()])
        finally:
            await blob.close()


@pytest.fixture
async def rig(tmp_path: Path, upstream: Upstream, clock: Clock) -> AsyncIterator[Rig]:
    metrics = Metrics()
    connect = Connect(plain_http=True, header_timeout=2, progress_timeout=2)
    origin = client.UpstreamRegistry(
        "up", requests.UpstreamSettings(upstream.url, connect), [Credentials()], metrics
    )
    store = Store(BlobFiles(tmp_path, clock), SQLiteRecords(tmp_path / "records"), clock)
    fills = Fills(store, metrics, backoff=0)
    yield Rig(fills, store, BlobSource("up", origin, "a/b"), tmp_path / "partial")
    await fills.close()
    await origin.close()
    await store.close()


@pytest.mark.errors("fill.failed")
async def test_a_fill_without_progress_gives_up_and_keeps_what_it_has(rig: Rig, upstream: Upstream) -> None:
    digest = Digest(upstream.blob("a/b", BODY))
    # Of what a reset follows the kernel may give us nothing; what is cut short has come.
    upstream.next("GET", digest, Truncate(after=100_000))
    upstream.next("GET", lambda request: broken, Reset(after=0), times=100)
    broken = True
    with pytest.raises(OriginFailed):
        await rig.read((await rig.fills.join(rig.source, digest)).value)
    asked = [each.range or "bytes=0-" for each in upstream.requests if each.method == "GET"]
    # The client may have asked for a range beside it, which has an end.
    assert [each[-1] for each in asked].count("-") == 2 + fetcher.RETRIES
    [left] = rig.partial.iterdir()
    assert left.stat().st_size > 0
    assert BODY.startswith(left.read_bytes())
    upstream.clear()
    broken = False
    assert await rig.read((await rig.fills.join(rig.source, digest)).value) == BODY
    assert (upstream.requests[0].range or "").startswith("bytes=")


@pytest.mark.errors("fill.failed")
async def test_a_fill_that_stands_still_for_long_asks_for_all_of_the_blob_and_then_gives_up(
    rig: Rig, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetcher, "STALLED", -1.0)
    digest = Digest(upstream.blob("a/b", BODY))
    upstream.next("GET", digest, Truncate(after=100_000))
    upstream.next("GET", lambda request: standing, Truncate(after=0), times=100)
    standing = True
    with pytest.raises(OriginFailed):
        await rig.read((await rig.fills.join(rig.source, digest)).value)
    # Beside it the client may have asked for a range.
    assert [each.range for each in upstream.requests if each.method == "GET"].count(None) == 2
    standing = False
    assert await rig.read((await rig.fills.join(rig.source, digest)).value) == BODY


async def test_progress_starts_the_count_of_failures_again(rig: Rig, upstream: Upstream) -> None:
    digest = Digest(upstream.blob("a/b", BODY))
    for _ in range(3):
        upstream.next("GET", digest, Truncate(after=50_000))
        upstream.next("GET", digest, Status(503), times=4)
    assert await rig.read((await rig.fills.join(rig.source, digest)).value) == BODY
    assert [each.method for each in upstream.requests].count("GET") == 16


@pytest.mark.parametrize("status", [401, 403, 404])
async def test_a_fill_that_is_refused_what_is_missing_asks_again(
    rig: Rig, upstream: Upstream, status: int
) -> None:
    digest = Digest(upstream.blob("a/b", BODY))
    upstream.next("GET", digest, Truncate(after=50_000))
    upstream.next("GET", digest, Status(status), times=4)
    assert await rig.read((await rig.fills.join(rig.source, digest)).value) == BODY


@pytest.mark.parametrize("refused", [404, 403, 429, 500])
async def test_who_is_refused_is_told_and_nothing_is_left(
    rig: Rig, upstream: Upstream, refused: int, events: LogCapture
) -> None:
    digest = Digest(upstream.blob("a/b", BODY))
    upstream.next("GET", digest, RetryAfter(1, refused))
    expected = {404: "BlobUnknown", 403: "OriginDenied", 429: "TooManyRequests", 500: "OriginFailed"}
    found = await asyncio.gather(
        *(rig.fills.join(rig.source, digest) for _ in range(3)), return_exceptions=True
    )
    assert {type(error).__name__ for error in found} == {expected[refused]}
    assert len(upstream.log) == 1
    assert [each for each in events.entries if each["event"] == "fill.failed"] == []  # no fault of ours


async def test_close_keeps_what_a_fill_has_and_tells_its_followers(
    rig: Rig, upstream: Upstream, events: LogCapture
) -> None:
    digest = Digest(upstream.blob("a/b", BODY))
    upstream.next("GET", digest, Hold(asyncio.Event(), after=100_000))
    blob = (await rig.fills.join(rig.source, digest)).value
    assert isinstance(blob, Blob)
    reading = blob.chunks(0)
    position = 0
    while position < 99_999:
        position += len(await anext(reading))
    await rig.fills.close()
    with pytest.raises(Unavailable):
        await anext(reading)
    await blob.close()
    [left] = rig.partial.iterdir()
    assert left.read_bytes() == BODY[:100_000]
    assert [each["event"] for each in events.entries if each["event"].startswith("fill.")] == [
        "fill.suspended"
    ]
    left.unlink()


async def test_who_waits_for_headers_when_it_closes_is_told(rig: Rig, upstream: Upstream) -> None:
    digest = Digest(upstream.blob("a/b", BODY))
    hold = Hold(asyncio.Event(), after=None)
    upstream.next("GET", digest, hold)
    waiting = asyncio.ensure_future(rig.fills.join(rig.source, digest))
    await hold.reached.wait()
    await rig.fills.close()
    with pytest.raises(Unavailable):  # not BlobUnknown: that would be remembered
        await waiting
    # Another process that follows goes on with the file, though it is empty.
    (left,) = rig.partial.iterdir()
    assert left.stat().st_size == 0
    left.unlink()


async def test_descriptor_tells_only_who_may_know(rig: Rig, upstream: Upstream) -> None:
    digest = Digest(upstream.blob("a/b", BODY))
    gate = asyncio.Event()
    upstream.next("GET", digest, Hold(gate, after=1000))
    assert rig.fills.descriptor("up/a/b", digest) is None
    blob = (await rig.fills.join(rig.source, digest)).value
    known = rig.fills.descriptor("up/a/b", digest)
    assert known is not None
    assert (known.digest, known.size) == (digest, len(BODY))
    assert rig.fills.descriptor("up/c/d", digest) is None
    gate.set()
    assert await rig.read(blob) == BODY


async def test_an_absent_blob_is_unknown(rig: Rig, upstream: Upstream) -> None:
    upstream.blob("a/b", BODY)
    with pytest.raises(BlobUnknown):
        await rig.fills.join(rig.source, Digest(digest_of(b"absent")))


async def test_that_a_blob_is_unknown_is_told_before_anybody_could_ask_again(
    rig: Rig, upstream: Upstream
) -> None:
    upstream.blob("a/b", BODY)
    digest = Digest(digest_of(b"absent"))
    going_on: list[bool] = []
    source = replace(rig.source, unknown=lambda error: going_on.append(rig.fills.filling(digest)))
    with pytest.raises(BlobUnknown):
        await rig.fills.join(source, digest)
    assert going_on == [True]


async def test_a_blob_that_is_evicted_before_it_is_linked(
    serve: Serve, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. the fill commits it  2. another process evicts it, for what comes besides  3. the fill links it"""
    digest = upstream.blob("a/b", BODY)
    site, uncached, link = await serve(upstream), heard("fill.uncached"), Store.link

    async def evict_and_link(self: Store, *arguments: Any) -> Any:
        monkeypatch.undo()
        self.files.path(Digest(digest)).unlink()
        return await link(self, *arguments)

    monkeypatch.setattr(Store, "link", evict_and_link)
    assert (await site.get(path_of(digest)))[2] == BODY
    await uncached.wait()
    assert (await site.get(path_of(digest)))[2] == BODY
    assert len(upstream.log) == 2
