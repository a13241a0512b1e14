"""What the processes of a server say of themselves, and of each other."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import stat
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import msgspec
import pytest

from proxy.cache import parts
from proxy.cache.cache import Cache
from proxy.cache.fills import Fills
from proxy.cache.policy import Policy
from proxy.processes import server_processes
from proxy.processes.rows import SpanRow
from proxy.processes.server_processes import ServerProcesses, serve_state
from proxy.processes.state import FillState, ProcessState, UpstreamState
from proxy.server import make_room as room
from proxy.telemetry.metrics import Metrics
from proxy.upstream import client, requests
from proxy.upstream.breaker import FAILURES
from proxy.upstream.connect import Connect
from proxy.upstream.credentials import Credentials, Inline
from proxy.upstream.failover import Failover
from proxy.upstream.transport import RETRIES
from storage.disk.blobs import BlobFiles
from storage.disk.health import DiskHealth
from storage.disk.records import SQLiteRecords
from storage.errors import ManifestUnknown, TooManyRequests, Unavailable
from storage.limits import Slots
from storage.oci import Digest, Span, Tag
from storage.registry import Blob, Registry
from storage.store import Store
from tests.conftest import Clock
from tests.events import Ear
from tests.test_start import fail_to_accept
from tests.upstream import Hold, RetryAfter, Status, Upstream

BODY = random.Random(1).randbytes(300_000)
HELD = 100_000  # bytes after which the fake waits


@dataclass
class Process:
    """What one process of a server has, of all on one directory."""

    cache: Cache
    fills: Fills
    disk: DiskHealth
    live: ProcessState

    @property
    def fill(self) -> FillState:
        [found] = self.live.state().fills
        return found

    @property
    def upstream(self) -> UpstreamState:
        [found] = self.live.state().upstreams
        return found


Start = Callable[..., Process]
Serving = Callable[[ProcessState], Awaitable[Path]]


@pytest.fixture
async def start(tmp_path: Path, upstream: Upstream, clock: Clock) -> AsyncIterator[Start]:
    closing = AsyncExitStack()

    def start(
        pid: int = 1,
        urls: tuple[str, ...] = (),
        credentials: tuple[Credentials, ...] = (Credentials(),),
        turns: Slots | None = None,
    ) -> Process:
        metrics, connect = Metrics(), Connect(plain_http=True)
        disk = DiskHealth(tmp_path, clock)
        store = Store(BlobFiles(tmp_path, clock, disk), SQLiteRecords(tmp_path / "records", clock), clock)
        closing.push_async_callback(store.close)
        fills = Fills(store, metrics, turns, backoff=0, clock=clock)
        origins = [
            client.UpstreamRegistry(
                "up", requests.UpstreamSettings(url, connect), credentials, metrics, clock
            )
            for url in urls or (upstream.url,)
        ]
        origin: Registry = origins[0] if len(origins) == 1 else Failover(origins, clock)
        cache = Cache("up", origin, store, fills, Policy(lambda tag: 600.0), clock)
        closing.push_async_callback(cache.close)
        closing.push_async_callback(fills.close)
        return Process(cache, fills, disk, ProcessState(fills, {"up": cache}, [disk], clock, pid))

    async with closing:
        yield start


@pytest.fixture
async def run() -> AsyncIterator[Path]:
    with tempfile.TemporaryDirectory() as directory:  # a socket's path has to be short
        yield Path(directory)


@pytest.fixture
async def serve_live_at(run: Path) -> AsyncIterator[Serving]:
    async with AsyncExitStack() as closing:

        async def serve(served: ProcessState) -> Path:
            path = run / f"{served.pid}.sock"
            closing.push_async_callback(await serve_state(served, path))
            return path

        yield serve


async def read(blob: Blob) -> bytes:
    try:
        return b"".join([chunk async for chunk in blob.chunks()])
    finally:
        await blob.close()


async def frontier(blob: Blob, offset: int) -> None:
    """Wait until so much has come."""
    position = 0
    async for chunk in blob.chunks():
        position += len(chunk)
        if position >= offset:
            return


# Of one process


async def test_of_a_process_that_does_nothing_there_is_little_to_tell(
    start: Start, upstream: Upstream
) -> None:
    process = start(pid=7)
    state = process.live.state()
    assert (state.pid, state.fills, state.troubles) == (7, [], [])
    assert upstream.requests == []


def test_by_itself_it_is_this_process(tmp_path: Path) -> None:
    store = Store(BlobFiles(tmp_path), SQLiteRecords(tmp_path / "records"))
    assert ProcessState(Fills(store, Metrics()), {}, [DiskHealth(tmp_path)]).pid == os.getpid()


async def test_a_fill_tells_how_far_it_is_and_who_follows(
    start: Start, upstream: Upstream, clock: Clock
) -> None:
    digest = Digest(upstream.blob("a/b", BODY))
    process = start(pid=7)
    gate = asyncio.Event()
    upstream.next("GET", digest, Hold(gate, after=HELD))
    first = await process.cache.get_blob("a/b", digest)
    began = clock()
    clock.advance(5)
    second = await process.cache.get_blob("a/b", digest)
    await frontier(first, HELD - 1)
    expected = FillState(
        digest=digest,
        namespace="up",
        repository="up/a/b",
        bytes=HELD,
        size=len(BODY),
        started=began,
        followers=2,
        pid=7,
        own=True,
        extents=[SpanRow(start=0, stop=HELD)],
        coming=[SpanRow(start=HELD, stop=len(BODY))],
        repeated=0,
    )
    assert process.fill == expected
    await second.close()
    assert process.fill == msgspec.structs.replace(expected, followers=1)
    gate.set()
    assert await read(first) == BODY
    await process.fills.close()
    assert process.live.state().fills == []


async def test_the_extents_of_a_fill_are_those_of_the_process_that_transfers_it(
    start: Start, upstream: Upstream, serve_live_at: Serving, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "ASSUMED", 1)  # whatever is not next is far ahead
    digest = Digest(upstream.blob("a/b", BODY))
    first, second = start(pid=1), start(pid=2)
    gate = asyncio.Event()
    upstream.next("GET", digest, Hold(gate, after=HELD))
    upstream.next("GET", digest, Hold(gate, after=50_000))
    whole = await first.cache.get_blob("a/b", digest)
    await frontier(whole, HELD - 1)
    part = await second.cache.get_blob("a/b", digest, Span(200_000, 260_000))
    came = 0
    async for chunk in part.chunks(200_000, 260_000):
        came += len(chunk)
        if came == 50_000:
            break
    for each in (first, second):
        await serve_live_at(each.live)
    [found] = await ServerProcesses(None, run).fills()
    assert (found.pid, found.own, found.followers, found.repeated) == (1, True, 2, 0)
    there = [(each.start, each.stop) for each in found.extents]
    assert there == [(0, HELD), (200_000, 250_000)]
    assert [(each.start, each.stop) for each in found.coming] == [(HELD, 200_000), (250_000, 260_000)]
    [copy] = second.live.state().fills
    assert (copy.own, copy.coming, copy.extents) == (False, [], found.extents)
    gate.set()
    await part.close()
    assert await read(whole) == BODY


async def test_extents_that_are_close_to_each_other_are_one(start: Start, upstream: Upstream) -> None:
    digest = Digest(upstream.blob("a/b", BODY))
    turns = Slots(1)
    process = start(turns=turns)
    async with turns.turn("up"):
        for at in (0, 350, 1000, 200_000):
            blob = await process.cache.get_blob("a/b", digest, Span(at, at + 100))
            assert b"".join([chunk async for chunk in blob.chunks(at, at + 100)]) == BODY[at : at + 100]
            await blob.close()
        spans = [(each.start, each.stop) for each in process.fill.extents]
        assert spans == [(0, 450), (1000, 1100), (200_000, 200_100)]
    await process.fills.ended(digest)


async def test_a_fill_of_which_nothing_is_known_yet_is_told(start: Start, upstream: Upstream) -> None:
    digest = Digest(upstream.blob("a/b", BODY))
    process = start()
    hold = Hold(asyncio.Event(), after=None)
    upstream.next("GET", digest, hold)
    asking = asyncio.create_task(process.cache.get_blob("a/b", digest))
    await hold.reached.wait()
    fill = process.fill
    assert (fill.bytes, fill.size, fill.followers, fill.own) == (0, -1, 0, True)
    hold.gate.set()
    assert await read(await asking) == BODY


@pytest.mark.errors("disk.failed")
async def test_what_fails_at_the_disk_is_told(start: Start, tmp_path: Path) -> None:
    process = start()
    process.disk.failed("blobs", tmp_path / "x", OSError(5, "Input/output error"))
    assert process.live.state().troubles == [f"{tmp_path / 'x'}: Input/output error"]


# Upstreams


async def test_an_upstream_that_is_well(start: Start, upstream: Upstream) -> None:
    found = start().upstream
    assert (found.namespace, found.url, found.host) == ("up", upstream.url, upstream.url.split("/")[2])
    assert (found.open, found.until, found.error, found.limited_until) == (False, None, None, None)
    assert (found.ratelimit_limit, found.ratelimit_remaining) == (None, None)


async def test_one_that_fails_is_open_until_it_is_asked_again(
    start: Start, upstream: Upstream, clock: Clock
) -> None:
    upstream.image("a/b", "latest")
    process = start()
    upstream.next("GET", lambda request: True, Status(503, {"Retry-After": "0"}), times=FAILURES)
    for _ in range(FAILURES):
        with pytest.raises(Unavailable):
            await process.cache.get_manifest("a/b", Tag("latest"))
    found = process.upstream
    assert (found.open, found.until) == (True, clock() + 1)
    assert found.error == "up answered 503"
    clock.advance(3)
    found = process.upstream
    assert (found.open, found.until) == (True, clock())  # the next request finds out
    await process.cache.get_manifest("a/b", Tag("latest"))
    assert not process.upstream.open


async def test_the_rate_limit_as_told(start: Start, upstream: Upstream) -> None:
    upstream.image("a/b", "latest")
    upstream.ratelimit = 100, 21600, 77
    process = start()
    await process.cache.get_manifest("a/b", Tag("latest"))
    found = process.upstream
    assert (found.ratelimit_limit, found.ratelimit_remaining) == (100, 76)
    assert [(each.credential, each.limit, each.remaining) for each in found.limits] == [(0, 100, 76)]


async def test_that_all_credentials_are_refused_is_told_and_until_when(
    start: Start, upstream: Upstream, clock: Clock
) -> None:
    upstream.image("a/b", "latest")
    process = start(credentials=(Inline("one", "x"), Inline("two", "x")))
    for seconds in (50, 30):
        upstream.next("GET", lambda request: True, RetryAfter(seconds))
    with pytest.raises(TooManyRequests):
        await process.cache.get_manifest("a/b", Tag("latest"))
    found = process.upstream
    assert [each.blocked_for for each in found.limits] == [50, 30]
    assert (found.open, found.limited_until) == (False, clock() + 30)
    clock.advance(31)
    assert process.upstream.limited_until is None


async def test_where_an_upstream_sends_us_is_told_after_itself(start: Start, upstream: Upstream) -> None:
    upstream.cdn = True
    digest = Digest(upstream.blob("a/b", BODY))
    process = start()
    assert await read(await process.cache.get_blob("a/b", digest)) == BODY
    found = process.live.state().upstreams
    assert [(each.url, each.host, len(each.limits)) for each in found] == [
        (upstream.url, upstream.url.split("/")[2], 1),
        (upstream.url, upstream.cdn_url.split("/")[2], 0),
    ]


async def test_each_of_several_upstreams_is_told(start: Start, upstream: Upstream) -> None:
    async with Upstream() as mirror:
        upstream.image("a/b", "latest")
        mirror.next("GET", lambda request: True, Status(503, {"Retry-After": "0"}), times=FAILURES)
        process = start(urls=(mirror.url, upstream.url))
        for number in range(FAILURES):
            upstream.image("a/b", f"{number}")
            await process.cache.get_manifest("a/b", Tag(f"{number}"))
        found = process.live.state().upstreams
        assert [(each.url, each.open) for each in found] == [(mirror.url, True), (upstream.url, False)]


async def test_an_origin_that_is_not_far_away_has_no_upstream(
    tmp_path: Path, start: Start, clock: Clock
) -> None:
    process = start()
    store = Store(
        BlobFiles(tmp_path / "other", clock), SQLiteRecords(tmp_path / "other" / "records", clock), clock
    )
    cache = Cache("near", store, store, process.fills, Policy(lambda tag: 0.0), clock)
    assert ProcessState(process.fills, {"near": cache}, [process.disk]).state().upstreams == []
    await cache.close()


# The socket


async def test_what_is_told_over_the_socket_is_the_state(
    start: Start, upstream: Upstream, serve_live_at: Serving, run: Path
) -> None:
    upstream.image("a/b", "latest")
    upstream.ratelimit = 100, 21600, 77
    process = start()
    await process.cache.get_manifest("a/b", Tag("latest"))
    await serve_live_at(process.live)
    assert await ServerProcesses(None, run).states() == [process.live.state()]


async def test_only_its_user_may_connect_and_the_file_goes_with_it(start: Start, run: Path) -> None:
    path = run / "1.sock"
    close = await serve_state(start().live, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    await close()
    assert not path.exists()


async def test_a_file_that_was_left_is_replaced_and_one_that_is_anothers_stays(
    start: Start, run: Path
) -> None:
    path = run / "1.sock"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()
    first = await serve_state(start(pid=1).live, path)
    second = await serve_state(start(pid=2).live, path)
    await first()
    assert [each.pid for each in await ServerProcesses(None, run).states()] == [2]
    await second()


async def test_a_path_that_is_too_long_is_an_error(start: Start, run: Path) -> None:
    with pytest.raises(OSError, match="too long"):
        await serve_state(start().live, run / ("x" * 120))


@pytest.mark.errors("accept.failed")
async def test_without_descriptors_it_answers_later(
    start: Start, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ear = Ear()
    allow = fail_to_accept(monkeypatch, 24)
    close = await serve_state(start(pid=3).live, run / "3.sock")
    asking = asyncio.create_task(ServerProcesses(None, run).states())
    assert (await ear.heard("accept.failed"))["error"] == os.strerror(24)
    allow.set()
    assert [each.pid for each in await asking] == [3]
    await close()


@pytest.mark.parametrize(
    ("method", "target", "body", "status"),
    [
        ("POST", "/forget", b"{}", 400),
        ("POST", "/forget", b"no", 400),
        ("POST", "/forget", b'{"repository": "nowhere/a"}', 204),
        ("GET", "/forget", b"", 404),
        ("POST", "/record", b"", 204),
        ("GET", "/else", b"", 404),
    ],
)
async def test_what_it_answers(
    start: Start, serve_live_at: Serving, method: str, target: str, body: bytes, status: int
) -> None:
    path = await serve_live_at(start().live)
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session,
        session.request(method, f"http://x{target}", data=body) as response,
    ):
        assert response.status == status


# Of all


async def test_of_all_processes_each_is_told_once(start: Start, serve_live_at: Serving, run: Path) -> None:
    processes = [start(pid) for pid in (1, 2, 3)]
    for process in processes:
        await serve_live_at(process.live)
    everyone = ServerProcesses(processes[2].live, run)
    assert [each.pid for each in await everyone.states()] == [3, 1, 2]


async def test_nobody_is_nobody(tmp_path: Path) -> None:
    for directory in (None, tmp_path, tmp_path / "absent"):
        everyone = ServerProcesses(None, directory)
        assert (await everyone.states(), await everyone.fills()) == ([], [])
        await everyone.forget("up/a/b")


async def test_who_does_not_answer_is_left_out(start: Start, serve_live_at: Serving, run: Path) -> None:
    await serve_live_at(start(pid=1).live)
    left = socket.socket(socket.AF_UNIX)  # as of one that was killed
    left.bind(str(run / "2.sock"))
    left.close()
    (run / "3.sock").write_text("no socket")

    async def make_room(coming: int) -> None:
        raise AssertionError

    close = await room.serve(run / "keeper.sock", make_room)  # lives there too, and speaks otherwise
    everyone = ServerProcesses(None, run)
    assert [each.pid for each in await everyone.states()] == [1]
    await everyone.forget("up/a/b")
    assert (run / "2.sock").exists(), "it is for whoever starts or ends processes to remove"
    await close()


async def test_who_hangs_is_not_waited_for(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_processes, "TIMEOUT", 0.01)
    with socket.socket(socket.AF_UNIX) as hung:
        hung.bind(str(run / "1.sock"))
        hung.listen()  # and nobody accepts
        assert await ServerProcesses(None, run).states() == []


async def test_what_speaks_http_but_not_as_we_do_is_none_of_ours(run: Path) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
        writer.close()

    server = await asyncio.start_unix_server(answer, str(run / "1.sock"))
    assert await ServerProcesses(None, run).states() == []
    server.close()
    await server.wait_closed()


async def test_a_fill_that_two_processes_follow_is_told_once(
    start: Start, upstream: Upstream, serve_live_at: Serving, run: Path, clock: Clock
) -> None:
    digest = Digest(upstream.blob("a/b", BODY))
    transferring, following = start(pid=1), start(pid=2)
    for process in (transferring, following):
        await serve_live_at(process.live)
    gate = asyncio.Event()
    upstream.next("GET", digest, Hold(gate, after=HELD))
    began = clock()
    blobs = [await transferring.cache.get_blob("a/b", digest)]
    await frontier(blobs[0], HELD - 1)
    clock.advance(1)
    blobs += [await following.cache.get_blob("a/b", digest) for _ in range(2)]
    await frontier(blobs[1], HELD - 1)
    assert (transferring.fill.own, transferring.fill.followers) == (True, 1)
    other = following.fill
    assert (other.own, other.followers, other.bytes, other.size) == (False, 2, HELD, len(BODY))
    [merged] = await ServerProcesses(None, run).fills()
    assert merged == msgspec.structs.replace(transferring.fill, followers=3)
    assert (merged.pid, merged.started) == (1, began)
    gate.set()
    assert await asyncio.gather(*map(read, blobs)) == [BODY] * 3


async def test_fills_are_told_oldest_first_and_one_that_waits_for_its_turn_has_no_bytes(
    start: Start, upstream: Upstream, clock: Clock
) -> None:
    bodies = [BODY, BODY[:-1]]
    digests = [Digest(upstream.blob("a/b", body)) for body in bodies]
    process = start(turns=Slots(1))
    hold = Hold(asyncio.Event(), after=None)
    upstream.next("GET", digests[0], hold)
    first = asyncio.create_task(process.cache.get_blob("a/b", digests[0]))
    await hold.reached.wait()
    clock.advance(1)
    second = asyncio.create_task(process.cache.get_blob("a/b", digests[1]))
    await asyncio.sleep(0)  # it has begun
    found = await ServerProcesses(process.live, None).fills()
    assert [(each.digest, each.bytes, each.own) for each in found] == [(each, 0, True) for each in digests]
    hold.gate.set()
    assert [await read(await each) for each in (first, second)] == bodies


# Forgetting


async def test_what_was_unknown_is_asked_for_again_once_it_is_forgotten(
    start: Start, upstream: Upstream, serve_live_at: Serving, run: Path
) -> None:
    upstream.image("a/b", "other")
    processes = [start(pid) for pid in (1, 2)]
    await serve_live_at(processes[1].live)
    everyone = ServerProcesses(processes[0].live, run)
    for process in processes:
        with pytest.raises(ManifestUnknown):
            await process.cache.get_manifest("a/b", Tag("new"))
    upstream.image("a/b", "new")
    upstream.clear()
    await everyone.forget("up/a/c")
    for process in processes:
        with pytest.raises(ManifestUnknown):
            await process.cache.get_manifest("a/b", Tag("new"))
    assert upstream.log == []
    await everyone.forget("up/a/b")
    for process in processes:
        await process.cache.get_manifest("a/b", Tag("new"))
    assert upstream.log == ["GET manifest a/b:new"]  # the second process finds it in the store


async def test_a_tag_that_could_not_be_asked_for_is_asked_for_again_once_that_is_forgotten(
    start: Start, upstream: Upstream, clock: Clock
) -> None:
    upstream.image("a/b", "latest")
    process = start()
    await process.cache.get_manifest("a/b", Tag("latest"))
    clock.advance(601)
    upstream.next("HEAD", lambda request: True, Status(500), times=1 + RETRIES)
    await process.cache.get_manifest("a/b", Tag("latest"))  # stale
    moved = upstream.image("a/b", "latest", [b"moved"])
    upstream.clear()
    await process.cache.get_manifest("a/b", Tag("latest"))
    assert upstream.log == []
    await process.live.forget("up/a/b")
    assert (await process.cache.get_manifest("a/b", Tag("latest"))).digest == moved.digest
