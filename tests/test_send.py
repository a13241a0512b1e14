"""Blobs on the wire: ranges as written, and bytes that are right or visibly cut, whatever befalls them."""

from __future__ import annotations

import asyncio
import errno
import math
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trustme
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from proxy.cache import fetcher
from proxy.telemetry.metrics import Metrics
from proxy.web import kernel_tls, send
from proxy.web.listener import ConnectionLimits, Listener
from proxy.web.ranges import Range, parse_ranges, satisfy
from proxy.web.server import DistributionAPI
from proxy.web.tls import Certificates
from proxy.web.tls_listener import PlainSite, TLSSite
from storage.disk.blobs import BlobFiles
from storage.disk.uploads import FileBlob
from storage.errors import OriginFailed, RangeInvalid, StorageFailed
from storage.oci import OCTETS, Descriptor, Digest, Span
from storage.registry import Blob, Registry
from tests.conftest import Serve, Site
from tests.events import Ear
from tests.upstream import Corrupt, Hold, Status, Truncate, Upstream, digest_of
from tests.wire import connect

MiB = 1 << 20
BIG = os.urandom(MiB) * 8 + b"the end"  # more than all the buffers between server and client hold
SLOW = 16 << 10  # bytes that a slow client takes before it reads

# Ranges


@pytest.mark.parametrize(
    ("header", "ranges"),
    [
        (None, []),
        ("", []),
        ("bytes=0-0", [Range(0, 0)]),
        ("bytes=0-", [Range(0)]),
        ("bytes=-5", [Range(suffix=5)]),
        ("BYTES = 1-2", [Range(1, 2)]),
        (" bytes=1-2 ", [Range(1, 2)]),
        ("bytes=1-2,\t-3 , 4-", [Range(1, 2), Range(suffix=3), Range(4)]),
        ("bytes=,,1-2,", [Range(1, 2)]),
        ("bytes=007-08", [Range(7, 8)]),
        ("bytes=9999999999999999999-", [Range(9999999999999999999)]),
        ("bytes=99999999999999999999-", [Range(99999999999999999999)]),
        ("bytes=0-" + "9" * 9000, [Range(0, 99999999999999999999)]),
        ("bytes=" + "0" * 9000 + "7-", [Range(7)]),
        ("bytes=-" + "9" * 9000, [Range(suffix=99999999999999999999)]),
        ("bytes=2-1", [Range(2, 1)]),
        ("bytes=1-2,2-1", []),
        ("bytes=1", []),
        ("bytes=-", []),
        ("bytes=--1", []),
        ("bytes=1--2", []),
        ("bytes=1-2-3", []),
        ("bytes=1- 2", []),
        ("bytes=１-２", []),
        ("bytes=+1-2", []),
        ("bytes=1_0-", []),
        ("bytes", []),
        ("bytes=", []),
        ("bytes:1-2", []),
        ("items=1-2", []),
        ("bytes=1-2;q=1", []),
        ("bytes=" + "0-0," * 256, [Range(0, 0)] * 256),
        ("bytes=" + "0-0," * 16_000, [Range(0, 0)] * 16_000),
        ("bytes=" + "0-0," * 16_000 + "2-1", []),
    ],
)
def test_parse_ranges(header: str | None, ranges: list[Range]) -> None:
    assert parse_ranges(header) == ranges


NUMBERS = st.integers(0, 40)
SPECS = st.one_of(
    st.builds(Range, NUMBERS),
    st.tuples(NUMBERS, NUMBERS).map(lambda pair: Range(min(pair), max(pair))),
    st.builds(lambda suffix: Range(suffix=suffix), NUMBERS),
)
SPACE = st.sampled_from(["", " ", "\t", " \t "])


def written(each: Range) -> str:
    if each.first is None:
        return f"-{each.suffix}"
    return f"{each.first}-{'' if each.last is None else each.last}"


@given(st.lists(st.tuples(SPACE, SPECS, SPACE), max_size=10), st.sampled_from([",", ",,", " , , "]))
def test_ranges_are_read_as_they_are_written(specs: list[tuple[str, Range, str]], comma: str) -> None:
    header = "bytes=" + comma.join(f"{before}{written(each)}{after}" for before, each, after in specs)
    assert parse_ranges(header) == [each for _, each, _ in specs]


@given(st.one_of(st.text(), st.text("bytes=0123456789-, ").map("bytes={}".format)))
def test_whatever_is_written_is_read_or_ignored(header: str) -> None:
    for each in parse_ranges(header):
        assert (each.first is None) != (each.suffix is None)
        assert each.last is None or each.first is not None
        assert not each.backwards or parse_ranges(header) == [each]


def positions(each: Range, size: int) -> list[int]:
    """RFC 9110 section 14.1.2, byte by byte."""
    if each.first is None:
        return [at for at in range(size) if at >= size - (each.suffix or 0)]
    return [at for at in range(size) if each.first <= at and (each.last is None or at <= each.last)]


@given(st.lists(SPECS, max_size=5), NUMBERS)
def test_satisfy(ranges: list[Range], size: int) -> None:
    wanted = [found for each in ranges if (found := positions(each, size))]
    if ranges and size and not wanted:
        with pytest.raises(RangeInvalid, match=str(size)):
            satisfy(ranges, size)
        return
    if sum(map(len, wanted)) > size:
        wanted = []  # all of it is less
    assert [list(range(span.start, span.stop or 0)) for span in satisfy(ranges, size)] == wanted


@pytest.mark.parametrize(
    ("each", "span"),
    [(Range(3), Span(3)), (Range(3, 5), Span(3, 6)), (Range(0, 0), Span(0, 1)), (Range(suffix=4), Span(-4))],
)
def test_what_is_known_of_a_range_before_the_size(each: Range, span: Span | None) -> None:
    assert each.span == span


# Through the whole server


@pytest.fixture(params=["http", "https", "https on the socket"])
def serve(
    request: pytest.FixtureRequest, serve: Serve, identity: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Serve:
    """By TLS as in plain: it makes no difference to a client."""
    if request.param == "http":
        return serve
    monkeypatch.setattr(kernel_tls, "is_offered", lambda: request.param != "https")

    async def encrypted(upstream: Upstream | str, *, top: dict[str, Any] | None = None, **more: Any) -> Site:
        return await serve(upstream, top={"tls": {**identity, "kernel": True}, **(top or {})}, **more)

    return encrypted


@pytest.fixture
def digest(upstream: Upstream) -> str:
    return upstream.blob("library/alpine", BIG)


def path_of(digest: str) -> str:
    return f"/v2/library/alpine/blobs/{digest}"


async def warm(site: Site, digest: str) -> None:
    ear, other = Ear(), Ear()
    status, _, body = await site.get(path_of(digest))
    assert (status, digest_of(body)) == (200, digest)
    await ear.heard("fill.committed")
    await other.heard("request.served")  # before or after that


def open_files(site: Site) -> int:
    """Descriptors of blobs, growing or not."""
    found = 0
    places = (f"{site.directory}/cache/blobs", f"{site.directory}/cache/partial")
    for each in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            found += str(each.readlink()).startswith(places)
    return found


@pytest.mark.parametrize("state", ["cold", "warm"])
async def test_a_big_blob_is_exact(serve: Serve, upstream: Upstream, digest: str, state: str) -> None:
    site = await serve(upstream)
    if state == "warm":
        await warm(site, digest)
    async with connect(site.url) as wire:
        for header, start, stop in (
            ("", 0, len(BIG)),
            ("bytes=5-", 5, len(BIG)),
            (f"bytes={MiB - 1}-{3 * MiB}", MiB - 1, 3 * MiB + 1),
            (f"bytes=-{2 * MiB}", len(BIG) - 2 * MiB, len(BIG)),
            ("bytes=7-100", 7, 101),
        ):
            reply = await wire.ask("GET", path_of(digest), f"Range: {header}")
            assert reply.status == (206 if header else 200)
            assert reply.body == BIG[start:stop]
    assert len(upstream.log) == 1


@pytest.mark.parametrize("state", ["cold", "warm"])
async def test_a_slow_client_gets_all_and_holds_up_nobody(
    serve: Serve, upstream: Upstream, digest: str, state: str
) -> None:
    site = await serve(upstream)
    if state == "warm":
        await warm(site, digest)
    async with connect(site.url, buffer=SLOW) as slow:
        await slow.send(f"GET {path_of(digest)} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        status, headers = await slow.head()
        assert (status, headers["Content-Length"]) == (200, str(len(BIG)))
        begun = await slow.read(1000)
        async with connect(site.url) as quick:
            assert (await quick.ask("GET", path_of(digest))).body == BIG
        assert begun + await slow.read(len(BIG) - 1000) == BIG
        # And the connection is still in step.
        assert (await slow.ask("GET", "/v2/")).body == b"{}"
    assert len(upstream.log) == 1


async def test_a_client_that_leaves_a_fill_does_not_end_it(
    serve: Serve, upstream: Upstream, digest: str
) -> None:
    gate = asyncio.Event()
    upstream.next("GET", digest, hold := Hold(gate, after=3 * MiB))
    site = await serve(upstream)
    ear = Ear()
    async with connect(site.url) as wire:
        await wire.send(f"GET {path_of(digest)} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await wire.head()
        assert await wire.read(MiB) == BIG[:MiB]
        await hold.reached.wait()
    event = await ear.heard("request.served")
    assert (event["status"], event["detail"], event["result"]) == (499, "client left", "miss")
    assert MiB <= event["bytes"] < len(BIG)
    assert open_files(site) == 1  # the fill's own
    gate.set()
    await ear.heard("fill.committed")
    assert open_files(site) == 0
    status, headers, body = await site.get(path_of(digest))
    assert (status, headers["Cache-Status"], body) == (200, "entrepot; hit", BIG)
    assert len(upstream.log) == 1


async def test_a_client_that_leaves_a_stored_blob_leaves_nothing_open(
    serve: Serve, upstream: Upstream, digest: str
) -> None:
    site = await serve(upstream)
    await warm(site, digest)
    ear = Ear()
    for header in ("", f"bytes=0-{4 * MiB},-{4 * MiB - 1}"):
        async with connect(site.url, buffer=SLOW) as wire:
            lines = f"Host: x\r\nRange: {header}\r\n\r\n"
            await wire.send(f"GET {path_of(digest)} HTTP/1.1\r\n{lines}".encode())
            await wire.head()
            await wire.read(1000)
            assert open_files(site) == 1
        event = await ear.heard("request.served")
        assert (event["status"], event["detail"], event["result"]) == (499, "client left", "hit")
        assert 0 < event["bytes"] < len(BIG)
        assert open_files(site) == 0


@pytest.mark.clients
async def test_many_who_leave_cost_no_descriptor(serve: Serve, upstream: Upstream, digest: str) -> None:
    # containerd opens many ranges to the end, and closes each when it has its part.
    site = await serve(upstream)
    await warm(site, digest)
    before = set(Path("/proc/self/fd").iterdir())
    ear = Ear()
    for start in range(40):
        async with connect(site.url) as wire:
            lines = f"Host: x\r\nRange: bytes={start}-\r\n\r\n"
            await wire.send(f"GET {path_of(digest)} HTTP/1.1\r\n{lines}".encode())
            await wire.head()
            assert await wire.read(100) == BIG[start : start + 100]
        assert (await ear.heard("request.served"))["detail"] == "client left"
    left = set(Path("/proc/self/fd").iterdir()) - before
    assert len(left) < 4, left  # the connections of the last clients may be closed only now


REQUESTS = {
    "whole": b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n",
    "to the end": b"GET %b HTTP/1.1\r\nHost: x\r\nRange: bytes=5-\r\n\r\n",
    "parts": b"GET %b HTTP/1.1\r\nHost: x\r\nRange: bytes=0-9,-10\r\n\r\n",
    "old client": b"GET %b HTTP/1.0\r\n\r\n",
}


@pytest.mark.errors("fill.failed")
@pytest.mark.parametrize("size", [1000, len(BIG)])
@pytest.mark.parametrize("length", [True, False], ids=["length", "no length"])
@pytest.mark.parametrize("request_text", REQUESTS.values(), ids=REQUESTS)
async def test_wrong_bytes_are_cut_never_ended(
    serve: Serve, upstream: Upstream, request_text: bytes, length: bool, size: int
) -> None:
    digest = upstream.blob("library/alpine", BIG[:size])
    upstream.content_length = length
    upstream.next("GET", digest, Corrupt(at=0))
    site = await serve(upstream)
    ear = Ear()
    async with connect(site.url) as wire:
        await wire.send(request_text % path_of(digest).encode())
        status, _ = await wire.head()
        if b"Range" in request_text and not length:
            assert status == 502  # its headers wait for the size, and with it for the digest
            return
        assert status in (200, 206)
        # A reset, not an end: to who was told no length an end would be the end.
        with pytest.raises(ConnectionResetError):
            await wire.rest()
    event = await ear.heard("request.served")
    assert event["result"] == "error"
    assert "sha256" in event["detail"]
    assert site.partial == []
    if size == 1000:
        assert (await site.get(path_of(digest)))[2] == BIG[:size]


@pytest.mark.errors("fill.failed")
async def test_what_upstream_never_finishes_is_cut(
    serve: Serve, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetcher, "RETRIES", 0)
    digest = upstream.blob("library/alpine", BIG)
    upstream.next("GET", digest, Truncate(after=MiB))
    gate = asyncio.Event()
    # To who asks for the rest, and then for the whole.
    upstream.next("GET", digest, Status(404), Hold(gate, after=None), times=2)
    site = await serve(upstream)
    async with connect(site.url) as wire:
        await wire.send(f"GET {path_of(digest)} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await wire.head()
        assert await wire.read(MiB - 1) == BIG[: MiB - 1]
        gate.set()  # not before: a reset takes along what is still on its way
        with pytest.raises(ConnectionResetError):
            await wire.rest()
    for name in site.partial:  # from there the next fill would go on
        (site.directory / "cache" / "partial" / name).unlink()


async def test_a_file_that_is_truncated_meanwhile_is_cut(
    serve: Serve, upstream: Upstream, digest: str
) -> None:
    site = await serve(upstream)
    await warm(site, digest)
    ear = Ear()
    (file,) = (site.directory / "cache" / "blobs").glob(f"*/*/{digest.partition(':')[2]}")
    async with connect(site.url, buffer=SLOW) as wire:
        await wire.send(f"GET {path_of(digest)} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await wire.head()
        await wire.read(1000)
        os.truncate(file, 1000)
        with pytest.raises(ConnectionResetError):
            await wire.rest()
    event = await ear.heard("request.served")
    assert (event["result"], event["status"]) == ("error", 200)
    assert (await site.get(path_of(digest)))[2] == BIG  # and it is fetched again


async def test_an_evicted_file_is_sent_to_its_end(serve: Serve, upstream: Upstream, digest: str) -> None:
    site = await serve(upstream)
    await warm(site, digest)
    (file,) = (site.directory / "cache" / "blobs").glob(f"*/*/{digest.partition(':')[2]}")
    async with connect(site.url, buffer=SLOW) as wire:
        await wire.send(f"GET {path_of(digest)} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await wire.head()
        begun = await wire.read(1000)
        file.unlink()
        assert begun + await wire.read(len(BIG) - 1000) == BIG


# Over a registry of one blob, in plain and by TLS


class One(Registry):
    """Whatever blob is asked for, it is the one that `open` opens."""

    def __init__(self, open: Callable[[], Blob]) -> None:
        self._open = open

    async def get_blob(self, repository: str, digest: Digest, span: Span | None = None) -> Blob:
        return self._open()


class Failing(FileBlob):
    """A blob on a disk that fails at byte `at`; `rest` is what it can be had from then, if at all."""

    at = 2 * MiB
    rest: bytes | None = None

    async def readable(self, offset: int, stop: int | None = None) -> int:
        if offset >= self.at:
            raise StorageFailed("the disk failed")
        return self.at

    async def chunks(self, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        if start < self.at:
            yield os.pread(self.fileno(), self.at - start, start)
        if self.rest is None:
            raise OriginFailed("there is no more")
        yield self.rest[max(start, self.at) : stop]


class Bypassed(FileBlob):
    """One that can be had in another way than from its file."""

    async def chunks(self, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        yield BIG[start:stop]


Over = Callable[..., Awaitable[str]]


@pytest.fixture
async def over() -> AsyncIterator[Over]:
    runners = []

    async def start(
        registry: Registry,
        tls: ssl.SSLContext | None = None,
        buffer: int = 0,
        client_timeout: float = math.inf,
    ) -> str:
        api = DistributionAPI(
            registry, lambda name, **_: f"test/{name}", Metrics(), client_timeout=client_timeout
        )
        runner = web.ServerRunner(Listener(api.handle, ConnectionLimits()), shutdown_timeout=1)
        runners.append(runner)
        await runner.setup()
        listening = socket.create_server(("127.0.0.1", 0))
        if buffer:  # those that are accepted have it as well
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        listening.setblocking(False)
        certificates = cast(Certificates, SimpleNamespace(context=lambda: tls))
        site = PlainSite(runner, listening)
        if tls is not None:
            site = TLSSite(runner, listening, certificates, handshake=20.0, goodbye=5.0)
        await site.start()
        return site.name.replace("https", "http")

    yield start
    for runner in runners:
        await runner.cleanup()
    await asyncio.sleep(0)  # their transports close their sockets in the next turn of the loop


@pytest.fixture
async def files(tmp_path: Path) -> Any:
    found = BlobFiles(tmp_path / "files")
    upload = found.create()
    await upload.write(BIG)
    await upload.commit(Digest.of(BIG))
    return found


@pytest.fixture(scope="module", params=[0, kernel_tls.OP_ENABLE_KTLS], ids=["asyncio", "socket"])
def contexts(request: pytest.FixtureRequest) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.options |= request.param
    authority.issue_cert("127.0.0.1").configure_cert(server)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # which loads no authorities: that takes 20 ms
    authority.configure_trust(client)
    return server, client


def failing(files: BlobFiles, rest: bytes | None) -> Blob:
    digest = Digest.of(BIG)
    blob = Failing(os.open(files.path(digest), os.O_RDONLY), Descriptor(OCTETS, digest, len(BIG)))
    blob.rest = rest
    return blob


PING = b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n"
PATH = f"/v2/library/alpine/blobs/{digest_of(BIG)}"


async def test_what_was_written_before_is_not_overtaken(over: Over, files: BlobFiles) -> None:
    # The first answer waits within the server for a client that does not read; the second goes by sendfile.
    url = await over(One(lambda: files.open(Digest.of(BIG))), buffer=SLOW)
    async with connect(url, buffer=SLOW) as wire:
        first = f"GET {PATH} HTTP/1.1\r\nHost: x\r\nRange: bytes=0-59999\r\n\r\n"
        await wire.send(f"{first}GET {PATH} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert (await wire.reply()).body == BIG[:60000]
        assert (await wire.reply()).body == BIG


@pytest.mark.parametrize("share", [0.0, 60.0])
async def test_a_client_that_keeps_up_gets_its_share_of_each_turn(
    over: Over, files: BlobFiles, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    loop = asyncio.get_running_loop()
    turn, turns, position = 0, [], 0

    def count() -> None:
        nonlocal turn, counting
        turn += 1
        counting = loop.call_soon(count)

    def sendfile(to: int, file: int, offset: int, size: int) -> int:
        """Of a client that takes everything at once."""
        nonlocal position
        most = send.QUICK_CHUNK if position and share else send.CHUNK
        assert (offset, size) == (position, min(most, len(BIG) - position))
        turns.append(turn)
        position += size
        return size

    monkeypatch.setattr(os, "sendfile", sendfile)
    monkeypatch.setattr(send, "SHARE", share)  # if it is 0, each call is late
    monkeypatch.setattr(send, "TURN", 60.0)
    url = await over(One(lambda: files.open(Digest.of(BIG))))
    ear = Ear()
    async with connect(url) as wire:
        counting = loop.call_soon(count)
        await wire.send(f"GET {PATH} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        event = await ear.heard("request.served")
        counting.cancel()
    assert (event["status"], event["bytes"]) == (200, len(BIG))
    assert position == len(BIG)
    assert len(set(turns)) == (1 if share else math.ceil(len(BIG) / send.CHUNK))


async def test_after_a_call_that_waited_for_the_disk_less_is_asked_of_it(
    over: Over, files: BlobFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, position = 0.0, 0
    durations = iter([0.0001, 0.0001, 0.02, 0.02, 0.0001])
    sizes: list[int] = []

    def sendfile(to: int, file: int, offset: int, size: int) -> int:
        nonlocal now, position
        assert offset == position
        now += next(durations, 0.0)
        position += size
        sizes.append(size)
        return size

    monkeypatch.setattr(os, "sendfile", sendfile)
    monkeypatch.setattr(send, "time", SimpleNamespace(perf_counter=lambda: now))
    url = await over(One(lambda: files.open(Digest.of(BIG))))
    ear = Ear()
    async with connect(url) as wire:
        await wire.send(f"GET {PATH} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await ear.heard("request.served")
    small, large = send.CHUNK, send.QUICK_CHUNK
    assert sizes == [small, large, large, small, small, len(BIG) - 3 * small - 2 * large]


def test_all_clients_share_a_turn() -> None:
    turns = send.Turns()
    with turns:
        assert turns.end() - time.perf_counter() <= send.SHARE
        with ExitStack() as many:
            for _ in range(99):
                many.enter_context(turns)
            assert turns.end() - time.perf_counter() <= send.TURN / 100
        before = time.perf_counter()
        assert turns.end() - before >= send.SHARE  # those who ended take nothing


async def test_by_tls_the_bytes_are_the_same(
    over: Over, files: BlobFiles, contexts: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    url = await over(One(lambda: files.open(Digest.of(BIG))), contexts[0])
    async with connect(url, tls=contexts[1]) as wire:
        assert (await wire.ask("GET", PATH)).body == BIG
        assert (await wire.ask("GET", PATH, f"Range: bytes=10-{MiB}")).body == BIG[10 : MiB + 1]
        assert (await wire.ask("GET", PATH, "Range: bytes=1-2")).body == BIG[1:3]
        parts = await wire.ask("GET", PATH, "Range: bytes=1-2,5-6")
        assert parts.headers["Content-Type"].startswith("multipart/byteranges")
        assert parts.headers["Content-Length"] == str(len(parts.body))
        assert (await wire.ask("GET", "/v2/")).body == b"{}"


async def test_by_tls_a_slow_client_may_leave(
    over: Over, files: BlobFiles, contexts: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    url = await over(One(lambda: files.open(Digest.of(BIG))), contexts[0])
    ear = Ear()
    async with connect(url, buffer=SLOW, tls=contexts[1]) as wire:
        await wire.send(f"GET {PATH} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await wire.head()
        assert await wire.read(1000) == BIG[:1000]
    event = await ear.heard("request.served")
    assert (event["status"], event["detail"]) == (499, "client left")


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "TLS"])
async def test_a_blob_that_fails_is_cut(
    over: Over, files: BlobFiles, contexts: tuple[ssl.SSLContext, ssl.SSLContext], encrypted: bool
) -> None:
    server, client = contexts if encrypted else (None, None)
    url = await over(One(lambda: failing(files, None)), server)
    async with connect(url, tls=client) as wire:
        await wire.send(f"GET {PATH} HTTP/1.0\r\n\r\n".encode())
        _, headers = await wire.head()
        assert headers["Content-Length"] == str(len(BIG))
        with pytest.raises((ConnectionError, ssl.SSLError, asyncio.IncompleteReadError)):
            await wire.read(len(BIG))


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "TLS"])
async def test_a_blob_whose_disk_fails_goes_on_from_where_it_knows(
    over: Over, files: BlobFiles, contexts: tuple[ssl.SSLContext, ssl.SSLContext], encrypted: bool
) -> None:
    server, client = contexts if encrypted else (None, None)
    url = await over(One(lambda: failing(files, BIG)), server)
    async with connect(url, tls=client) as wire:
        for header, start, stop in (
            ("", 0, len(BIG)),
            (f"bytes={2 * MiB - 5}-{2 * MiB + 5}", 2 * MiB - 5, 2 * MiB + 6),
            (f"bytes={3 * MiB}-", 3 * MiB, len(BIG)),
        ):
            assert (await wire.ask("GET", PATH, f"Range: {header}")).body == BIG[start:stop]


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "TLS"])
async def test_a_disk_that_fails_within_what_it_said_it_has(
    over: Over,
    files: BlobFiles,
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
    encrypted: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was sent before it failed is not sent again."""
    bad = 3 * MiB + 5
    sendfile, pread = os.sendfile, os.pread

    def failing(way: Callable[[int, int], Any], offset: int, count: int) -> Any:
        if offset >= bad:
            raise OSError(errno.EIO, "the disk failed")
        return way(offset, min(count, bad - offset))

    monkeypatch.setattr(
        os,
        "sendfile",
        lambda to, file, offset, count: failing(lambda *at: sendfile(to, file, *at), offset, count),
    )
    monkeypatch.setattr(
        os,
        "pread",
        lambda file, count, offset: failing(lambda at, most: pread(file, most, at), offset, count),
    )
    digest = Digest.of(BIG)
    described = Descriptor(OCTETS, digest, len(BIG))
    server, client = contexts if encrypted else (None, None)
    url = await over(One(lambda: Bypassed(os.open(files.path(digest), os.O_RDONLY), described)), server)
    async with connect(url, tls=client) as wire:
        assert (await wire.ask("GET", PATH)).body == BIG
        assert (await wire.ask("GET", PATH, f"Range: bytes={MiB}-")).body == BIG[MiB:]


async def test_by_tls_a_client_that_takes_but_a_little_is_not_cut_off(
    over: Over,
    files: BlobFiles,
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if contexts[0].options & kernel_tls.OP_ENABLE_KTLS and kernel_tls.is_offered():
        pytest.skip("where the kernel encrypts, sendfile says what a client takes, as without TLS")
    looks = 0

    def taken(connection: object) -> int:
        """It seems to have taken something each time that it is looked at, up to the fiftieth."""
        nonlocal looks
        looks += 1
        return min(looks, 50)

    monkeypatch.setattr(send, "_taken", taken)
    url = await over(One(lambda: files.open(Digest.of(BIG))), contexts[0], client_timeout=0.01)
    ear = Ear()
    async with connect(url, buffer=SLOW, tls=contexts[1]) as wire:
        await wire.send(f"GET {PATH} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await wire.head()
        assert (await ear.heard("request.served"))["detail"] == "client took nothing"
    assert looks == 51


async def test_what_a_client_has_taken(over: Over, files: BlobFiles) -> None:
    url = URL(await over(One(lambda: files.open(Digest.of(BIG)))))
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setblocking(False)
        await loop.sock_connect(client, (url.host, url.port))
        before = send._taken(client)
        await loop.sock_sendall(client, PING)
        assert await loop.sock_recv(client, MiB)
        assert send._taken(client) == before + len(PING)
