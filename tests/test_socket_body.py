"""Bodies that threads read from their sockets: over http and https, and whatever befalls them."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path

import aiohttp
import pytest
import trustme

from proxy.cache import streams
from proxy.upstream import socket_body
from proxy.upstream.connect import Connect
from proxy.upstream.socket_body import LITTLE, SocketBodies
from storage.errors import OriginFailed, OriginTimeout
from storage.limits import RateLimit
from storage.oci import Digest
from storage.registry import Blob, Incoming, ReadInto
from tests.conftest import Serve
from tests.outages import metric
from tests.relay import Relay, server_side
from tests.test_fills import blobs, heard, read_broken
from tests.test_policy import files_of_at_most
from tests.upstream import Corrupt, Fault, Hold, Reset, Truncate, Upstream, WrongLength, digest_of
from tests.upstream_client import Ask

BODY = os.urandom(3_000_000)
OTHER = os.urandom(2_000_000)
TRUSTING = Connect(plain_http=True, insecure_skip_verify=True, header_timeout=5, progress_timeout=5)
Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


def response(body: bytes, length: int | None = None, more: bytes = b"") -> Answer:
    """A response of `length` bytes, and more after it."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        size = len(body) if length is None else length
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + body + more)
        await writer.drain()

    return answer


async def hang_up(writer: asyncio.StreamWriter) -> None:
    writer.close()


async def reset(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


class Server:
    """Answers each request by the next of `answers`; after a None comes what follows without a request."""

    def __init__(self, tls: ssl.SSLContext | None) -> None:
        self.url = ""
        self.connections = 0
        self.ended = asyncio.Event()  # a client has closed its connection
        self.answers: list[Answer | None] = []
        self._tls = tls
        self._writers: dict[asyncio.StreamWriter, asyncio.Task[None] | None] = {}

    async def __aenter__(self) -> Server:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self._tls)
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"{'https' if self._tls else 'http'}://127.0.0.1:{port}"
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.gather(*filter(None, self._writers.values()), return_exceptions=True)
        await self._server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers[writer] = asyncio.current_task()
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                await self._next(writer)
                while self.answers[:1] == [None]:
                    self.answers.pop(0)
                    await self._next(writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            self.ended.set()
        finally:
            writer.transport.abort()
            del self._writers[writer]

    async def _next(self, writer: asyncio.StreamWriter) -> None:
        answer = self.answers.pop(0)
        assert answer is not None
        await answer(writer)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(params=["http", "TLS 1.2", "TLS 1.3"])
async def server(request: pytest.FixtureRequest, authority: trustme.CA) -> AsyncIterator[Server]:
    tls = None if request.param == "http" else server_side(authority)
    if tls is not None and request.param == "TLS 1.2":
        tls.maximum_version = ssl.TLSVersion.TLSv1_2
    async with Server(tls) as made:
        yield made


async def opened(ask: Ask, server: Server, content: bytes = BODY, connect: Connect = TRUSTING) -> Blob:
    return await ask(server.url, connect).get_blob("a/b", Digest(digest_of(content)))


async def collect(incoming: Incoming | None, step: int = 100_000) -> bytes:
    """All that comes, which threads read."""
    assert incoming is not None
    found = bytearray()

    def copy(readinto: ReadInto) -> int:
        buffer = memoryview(bytearray(step))
        number = readinto(buffer)
        found.extend(buffer[:number])
        return number

    while await incoming.pass_on(lambda readinto: asyncio.to_thread(copy, readinto)):
        pass
    return bytes(found)


# One body


@pytest.mark.parametrize("step", [7_777, 100_000, 5_000_000])
async def test_it_is_read_and_the_connection_is_used_again(ask: Ask, server: Server, step: int) -> None:
    origin = ask(server.url, TRUSTING)
    for body in (BODY, OTHER, OTHER[:10], BODY):
        server.answers.append(response(body))
        blob = await origin.get_blob("a/b", Digest(digest_of(body)))
        if len(body) > 10:
            assert await collect(blob.incoming(), step) == body
        else:
            assert blob.incoming() is None
            assert b"".join([chunk async for chunk in blob.chunks()]) == body
        await blob.close()
    assert server.connections == 1


async def test_what_has_come_and_is_not_read_is_counted(ask: Ask, server: Server) -> None:
    server.answers.append(response(BODY))
    blob = await opened(ask, server)
    incoming, read = blob.incoming(), 0
    assert incoming is not None

    async def write(readinto: ReadInto) -> int:
        nonlocal read
        read += (number := readinto(memoryview(bytearray(1))))
        return number

    while not read:
        await incoming.pass_on(write)
    assert 0 < blob.unread < 2 * len(BODY)
    assert await collect(incoming) == BODY[read:]
    assert blob.unread == 0
    await blob.close()


async def test_what_is_small_is_counted_too(ask: Ask, server: Server) -> None:
    server.answers.append(response(OTHER[:1000]))
    blob = await opened(ask, server, OTHER[:1000])
    assert blob.incoming() is None
    chunks = [chunk async for chunk in blob.chunks()]
    assert (b"".join(chunks), blob.unread) == (OTHER[:1000], 0)
    await blob.close()


async def test_what_comes_after_it_is_no_response(ask: Ask, server: Server) -> None:
    stray = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwrong"
    server.answers += [response(BODY, more=stray), response(OTHER)]
    origin = ask(server.url, TRUSTING)
    for body in (BODY, OTHER):
        blob = await origin.get_blob("a/b", Digest(digest_of(body)))
        assert await collect(blob.incoming()) == body
        await blob.close()
    assert server.connections == 2


@pytest.mark.parametrize("end", [hang_up, reset])
async def test_it_ends_early(ask: Ask, server: Server, end: Answer) -> None:
    server.answers += [response(BODY[:2_000_000], len(BODY)), None, end]
    blob = await opened(ask, server)
    with pytest.raises(OriginFailed):
        await collect(blob.incoming())
    await blob.close()


async def test_the_less_is_found_the_later_it_is_looked_for(
    ask: Ask, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = [1000, LITTLE, 1, 1, 1, LITTLE + 1, 2 * LITTLE, 1000, 1000]
    ends = list(accumulate(pieces, initial=40_000))
    pauses: list[float] = []
    sent: asyncio.StreamWriter | None = None

    async def begin(writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await response(BODY[: ends[0]], len(BODY))(writer)
        sent = writer

    async def pause(seconds: float) -> None:
        assert sent is not None
        pauses.append(seconds)
        stop = ends[len(pauses)] if len(pauses) < len(ends) else len(BODY)
        sent.write(BODY[ends[len(pauses) - 1] : stop] if len(pauses) <= len(ends) else b"")
        await sent.drain()

    server.answers.append(begin)
    blob = await opened(ask, server)
    incoming = blob.incoming()
    monkeypatch.setattr(asyncio, "sleep", pause)
    assert await collect(incoming, 5_000_000) == BODY
    await blob.close()
    assert [round(1000 * each) for each in pauses[:10]] == [5, 10, 20, 40, 40, 40, 5, 5, 10, 20]


async def test_the_first_byte_is_not_kept_waiting(
    ask: Ask, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: asyncio.StreamWriter | None = None

    async def begin(writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await response(b"", len(BODY))(writer)
        sent = writer

    async def pause(seconds: float) -> None:
        raise AssertionError("it has not waited for the first byte")

    server.answers.append(begin)
    blob = await opened(ask, server)
    incoming = blob.incoming()
    assert incoming is not None
    read = 0

    async def count(readinto: ReadInto) -> int:
        nonlocal read
        read = readinto(memoryview(bytearray(100)))
        return read

    monkeypatch.setattr(asyncio, "sleep", pause)
    await incoming.pass_on(count)
    assert read == 0
    assert sent is not None
    sent.write(BODY[:50])
    while not read:  # by TLS, what comes first may be none of the body
        await incoming.pass_on(count)
    assert read == 50
    monkeypatch.undo()
    await blob.close()


async def test_nothing_more_comes(ask: Ask, server: Server) -> None:
    server.answers.append(response(BODY[:2_000_000], len(BODY)))
    blob = await opened(ask, server, connect=replace(TRUSTING, progress_timeout=0.05))
    with pytest.raises(OriginTimeout):
        await collect(blob.incoming())
    await blob.close()
    await server.ended.wait()


async def test_a_reader_that_is_cancelled_closes_the_connection(ask: Ask, server: Server) -> None:
    server.answers.append(response(BODY[:2_000_000], len(BODY)))
    blob = await opened(ask, server)
    incoming, came = blob.incoming(), asyncio.Event()
    assert incoming is not None
    left = 2_000_000

    async def write(readinto: ReadInto) -> int:
        nonlocal left
        number = await asyncio.to_thread(readinto, memoryview(bytearray(1 << 20)))
        left -= number
        if not left:
            came.set()
        return number

    async def read() -> None:
        while await incoming.pass_on(write):
            pass

    reading = asyncio.create_task(read())
    await came.wait()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await blob.close()
    await server.ended.wait()


async def test_a_registry_that_is_closed_ends_it(ask: Ask, server: Server) -> None:
    server.answers.append(response(BODY[:2_000_000], len(BODY)))
    origin = ask(server.url, TRUSTING)
    blob = await origin.get_blob("a/b", Digest(digest_of(BODY)))
    reading = asyncio.create_task(collect(blob.incoming()))
    await asyncio.sleep(0)
    await origin.close()
    with pytest.raises(OriginFailed):
        await reading
    await blob.close()
    await server.ended.wait()


async def test_a_body_that_is_not_read_to_its_end_is_not_drained(ask: Ask, server: Server) -> None:
    server.answers.append(response(BODY[:2_000_000], len(BODY)))
    blob = await opened(ask, server)
    assert blob.incoming() is not None
    await blob.close()
    await server.ended.wait()


async def test_who_reads_on_until_the_end_waits_for_nothing(ask: Ask, server: Server) -> None:
    emptied, come = asyncio.Event(), asyncio.Event()

    async def answer(writer: asyncio.StreamWriter) -> None:
        await response(BODY[:-1000], len(BODY))(writer)
        await emptied.wait()
        writer.write(BODY[-1000:])
        come.set()

    async def read(readinto: ReadInto) -> int:
        before, memory = len(got), memoryview(bytearray(1 << 20))
        while len(got) < len(BODY):
            if number := readinto(memory):
                got.extend(memory[:number])
            elif len(got) == len(BODY) - 1000:
                emptied.set()
                await come.wait()
            else:
                break
            await asyncio.sleep(0)  # so that the server writes
        return len(got) - before

    got = bytearray()
    server.answers.append(answer)
    blob = await opened(ask, server)
    incoming = blob.incoming()
    assert incoming is not None
    while await incoming.pass_on(read):
        pass
    assert got == BODY
    await blob.close()


async def test_a_former_response_is_read_meanwhile(ask: Ask, server: Server) -> None:
    small = OTHER[:10_000]  # it comes with its head
    read = asyncio.Event()

    async def answer(writer: asyncio.StreamWriter) -> None:
        await response(BODY[:300_000], len(BODY))(writer)
        await read.wait()
        writer.write(BODY[300_000:])
        await writer.drain()

    server.answers += [response(small), answer]
    origin = ask(server.url, TRUSTING)
    former = await origin.get_blob("a/b", Digest(digest_of(small)))
    blob = await origin.get_blob("a/b", Digest(digest_of(BODY)))
    assert server.connections == 1  # the former response has come, and waits to be read
    incoming = blob.incoming()
    assert incoming is not None
    assert b"".join([chunk async for chunk in former.chunks()]) == small
    read.set()
    assert await collect(incoming) == BODY
    await blob.close()
    await former.close()


async def test_what_comes_in_another_way_comes_in_chunks(ask: Ask, upstream: Upstream) -> None:
    digest = upstream.blob("a/b", BODY)
    upstream.content_length = False
    blob = await ask(upstream.url).get_blob("a/b", Digest(digest))
    assert blob.incoming() is None
    assert b"".join([chunk async for chunk in blob.chunks()]) == BODY
    await blob.close()


async def test_tls_within_tls_is_left_to_aiohttp(server: Server) -> None:
    async with aiohttp.ClientSession() as session:
        for proxy, possible in ((None, True), ("http://proxy", True), ("https://proxy", False)):
            server.answers.append(response(BODY))
            async with session.get(server.url, ssl=TRUSTING.ssl_context()) as answer:
                body = SocketBodies(lambda: asyncio.timeout(5), proxy).take(answer)
                assert (body is not None) is possible
                if body is not None:
                    body.close()


async def test_a_connection_that_cannot_be_kept_from_aiohttp_is_left_to_it(
    ask: Ask, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("aiohttp.base_protocol.BaseProtocol._pause_reading_for_buffer")
    server.answers.append(response(BODY))
    blob = await opened(ask, server)
    assert blob.incoming() is None
    assert b"".join([chunk async for chunk in blob.chunks()]) == BODY
    await blob.close()


async def test_through_a_proxy(ask: Ask, server: Server) -> None:
    server.answers.append(response(BODY))
    async with Relay(int(server.url.rpartition(":")[2])) as proxy:
        blob = await opened(ask, server, connect=replace(TRUSTING, proxy=f"http://127.0.0.1:{proxy.port}"))
        assert await collect(blob.incoming()) == BODY
        await blob.close()
        assert proxy.seen[0].split(" ")[0] == ("GET" if server.url.startswith("http:") else "CONNECT")


# Fills


@pytest.fixture(params=["http", "https"])
async def url(
    request: pytest.FixtureRequest, upstream: Upstream, authority: trustme.CA
) -> AsyncIterator[str]:
    """The fake upstream, by http or by https."""
    async with AsyncExitStack() as stack:
        if request.param == "http":
            yield upstream.url
        else:
            relay = Relay(int(upstream.url.rpartition(":")[2]), server_side(authority))
            yield f"https://localhost:{(await stack.enter_async_context(relay)).port}"


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes the threads have read, each time."""
    found: list[int] = []
    readinto = socket_body.SocketBody.readinto

    def count(body: socket_body.SocketBody, buffer: memoryview) -> int:
        found.append(readinto(body, buffer))
        return found[-1]

    monkeypatch.setattr(socket_body.SocketBody, "readinto", count)
    return found


# With time: a busy machine may not come to what it has received for seconds.
OPTIONS = {"insecure_skip_verify": True, "header_timeout": "1m", "progress_timeout": "1m"}


@pytest.mark.parametrize("clients", [1, 3])
async def test_a_fill(serve: Serve, upstream: Upstream, url: str, taken: list[int], clients: int) -> None:
    digest = upstream.blob("a/b", BODY)
    site = await serve(url, options=OPTIONS)
    committed = heard("fill.committed")
    pulls = [site.get(f"/v2/a/b/blobs/{digest}") for _ in range(clients)]
    assert [body for _, _, body in await asyncio.gather(*pulls)] == [BODY] * clients
    await committed.wait()
    assert blobs(site) == [BODY]
    assert sum(taken) == len(BODY)
    assert sum((await metric(site, "entrepot_received_bytes_total")).values()) == len(BODY)


@pytest.mark.parametrize("fault", [Reset(1_500_000), Truncate(1_500_000)], ids=str)
async def test_a_transfer_that_breaks_off_is_resumed(
    serve: Serve, upstream: Upstream, url: str, taken: list[int], fault: Fault
) -> None:
    digest = upstream.blob("a/b", BODY)
    upstream.next("GET", digest, fault)
    site = await serve(url, options=OPTIONS)
    assert (await site.get(f"/v2/a/b/blobs/{digest}"))[2] == BODY
    first, second = upstream.requests
    assert first.range is None
    assert 0 < int((second.range or "")[6:].partition("-")[0]) <= 1_500_000
    assert sum(taken) == len(BODY), "each byte is read once"


async def test_a_transfer_that_stalls_is_resumed(serve: Serve, upstream: Upstream, url: str) -> None:
    digest = upstream.blob("a/b", BODY)
    upstream.next("GET", digest, Hold(asyncio.Event(), after=1_500_000))
    site = await serve(url, options={**OPTIONS, "progress_timeout": "100ms"})
    assert (await site.get(f"/v2/a/b/blobs/{digest}"))[2] == BODY
    assert [each.range for each in upstream.requests] == [None, "bytes=1500000-"]


@pytest.mark.errors("fill.failed")
@pytest.mark.parametrize("fault", [Corrupt(2_999_999), Corrupt(5), WrongLength(-500)], ids=str)
async def test_wrong_content_is_never_complete(
    serve: Serve, upstream: Upstream, url: str, taken: list[int], fault: Fault
) -> None:
    digest = upstream.blob("a/b", BODY)
    upstream.next("GET", digest, fault)
    site = await serve(url, options=OPTIONS)
    async with site.request("GET", f"/v2/a/b/blobs/{digest}") as response:
        length = int(response.headers["Content-Length"])
        assert len(await read_broken(response)) < length
    assert blobs(site) == []
    assert sum(taken) >= len(BODY) - 500
    assert (await site.get(f"/v2/a/b/blobs/{digest}"))[2] == BODY


async def test_a_server_that_stops_keeps_what_came(
    serve: Serve, upstream: Upstream, url: str, tmp_path: Path
) -> None:
    digest = upstream.blob("a/b", BODY)
    upstream.next("GET", digest, Hold(asyncio.Event(), after=1_500_000))
    site = await serve(url, options=OPTIONS)
    async with site.request("GET", f"/v2/a/b/blobs/{digest}") as response:
        await response.content.readexactly(1_499_999)
        await site.app.stop()
    site = await serve(url, options=OPTIONS)
    assert (await site.get(f"/v2/a/b/blobs/{digest}"))[2] == BODY
    assert [each.range for each in upstream.requests] == [None, "bytes=1500000-"]


async def test_ranges_at_once(
    serve: Serve, upstream: Upstream, url: str, taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket_body, "LEAST", 1)
    monkeypatch.setattr(streams, "BATCH", 50_000)
    digest = upstream.blob("a/b", BODY)
    site = await serve(url, options=OPTIONS)
    committed = heard("fill.committed")
    bounds = list(range(0, len(BODY) + 1, len(BODY) // 12))
    ranges = [{"Range": f"bytes={start}-{stop - 1}"} for start, stop in pairwise(bounds)]
    pulls = [site.get(f"/v2/a/b/blobs/{digest}", **each) for each in ranges]
    assert b"".join(body for _, _, body in await asyncio.gather(*pulls)) == BODY
    await committed.wait()
    assert blobs(site) == [BODY]


async def test_bandwidth(
    serve: Serve, upstream: Upstream, url: str, taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []

    async def take(limit: RateLimit, number: int) -> None:
        counted.append(number)
        assert sum(counted) == sum(taken), "what was read is counted before more is read"

    monkeypatch.setattr(RateLimit, "take", take)
    digest = upstream.blob("a/b", BODY)
    site = await serve(url, options={**OPTIONS, "bandwidth": "1MB"})
    assert (await site.get(f"/v2/a/b/blobs/{digest}"))[2] == BODY
    assert sum(counted) == len(BODY)


@pytest.mark.errors("disk.failed")
async def test_a_full_disk(serve: Serve, upstream: Upstream, url: str) -> None:
    digest = upstream.blob("a/b", BODY)
    site = await serve(url, options=OPTIONS)
    gate = asyncio.Event()
    upstream.next("GET", digest, Hold(gate, after=500_000))
    response = await site.request("GET", f"/v2/a/b/blobs/{digest}")
    with files_of_at_most(1_000_000):
        gate.set()
        assert await response.read() == BODY
    assert len(upstream.requests) == 2
    assert blobs(site) == site.partial == []
