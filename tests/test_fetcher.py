"""The ranges that clients of big blobs ask for, as each kind of client does: every byte comes once."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.cache import fetcher, parts, readers
from proxy.cache.fills import Fills
from proxy.cache.parts import Part
from proxy.cache.policy import Threshold
from proxy.cache.readers import BlobSource
from proxy.telemetry.metrics import Metrics
from proxy.upstream import client, requests
from proxy.upstream.connect import Connect
from proxy.upstream.credentials import Credentials
from proxy.web.send import SMALL
from storage.disk.blobs import BlobFiles
from storage.disk.records import SQLiteRecords
from storage.disk.sparse import SparseUpload
from storage.disk.wanted import Wanted
from storage.errors import OriginFailed, RegistryError, StorageFailed
from storage.limits import Slots
from storage.oci import OCTETS, Descriptor, Digest, Span
from storage.registry import Blob, Registry
from storage.store import Store
from tests.conftest import Clock, Serve, Site
from tests.test_fills import blobs, content_of, heard, path_of
from tests.upstream import (
    Corrupt,
    Fault,
    Hold,
    Request,
    Reset,
    RetryAfter,
    Status,
    Truncate,
    Upstream,
    WrongLength,
)
from tests.upstream.messages import Answer

SIZE = 1_600_000
BODY = content_of(SIZE, 7)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is not next is far ahead."""
    monkeypatch.setattr(parts, "ASSUMED", 1)


def asked(upstream: Upstream) -> list[tuple[int, int]]:
    """The ranges that upstream was asked for, in order; [0, 0) is the whole blob."""
    found = []
    for each in upstream.requests:
        if each.method == "GET" and each.kind == "blob":
            first, last = re.fullmatch(r"(?:bytes=(\d+)-(\d*))?", each.range or "").groups()  # type: ignore[union-attr]
            found.append((int(first or 0), int(last or SIZE - 1) + 1 if first else 0))
    return sorted(found)


async def part(site: Site, digest: str, asked: str) -> bytes:
    status, headers, body = await site.get(path_of(digest), Range=asked)
    assert status == 206
    if "," not in asked:
        assert headers["Content-Range"].endswith(f"/{SIZE}")
    return body


# As clients do


@pytest.mark.parametrize("clients", [1, 3])
async def test_sixteen_ranges_at_once(
    serve: Serve, upstream: Upstream, impatient: None, clients: int
) -> None:
    digest = upstream.blob("a/b", BODY)
    site = await serve(upstream)
    begun, never, step = asyncio.Event(), asyncio.Event(), SIZE // 16
    upstream.next("GET", digest, Hold(begun, after=1000), Hold(never, after=step))
    committed = heard("fill.committed")
    starts = [start for _ in range(clients) for start in range(0, SIZE, step)]
    ranges = [f"bytes={start}-{start + step - 1}" for start in starts]
    pulls = [asyncio.create_task(part(site, digest, each)) for each in ranges]
    between = (0, SIZE - step)  # the last byte needs all
    await asyncio.gather(*(pull for pull, at in zip(pulls, starts, strict=True) if at not in between))
    begun.set()
    assert await asyncio.gather(*pulls) == [BODY[start : start + step] for start in starts]
    await committed.wait()
    never.set()
    assert blobs(site) == [BODY]
    assert asked(upstream) == [(0, 0), *((start, start + step) for start in range(step, SIZE, step))]
    assert upstream.bytes_sent == SIZE


@pytest.mark.parametrize("clients", [1, 3])
async def test_long_ranges_come_in_pieces_and_what_comes_first_beside_them(
    serve: Serve, upstream: Upstream, impatient: None, monkeypatch: pytest.MonkeyPatch, clients: int
) -> None:
    for name, value in {"LEAST": 50_000, "LONG": 100_000, "PIECE": 150_000}.items():
        monkeypatch.setattr(parts, name, value)
    digest = upstream.blob("a/b", BODY)
    site = await serve(upstream)
    begun, held, step = asyncio.Event(), asyncio.Event(), SIZE // 4
    upstream.next("GET", digest, Hold(begun, after=1000), Hold(held, after=151_000))
    committed = heard("fill.committed")
    async with site.request("GET", path_of(digest), headers={"Range": f"bytes=0-{step - 1}"}) as first:
        assert await first.content.readexactly(1000) == BODY[:1000]
        starts = [start for _ in range(clients) for start in range(step, SIZE, step)]
        ranges = [f"bytes={start}-{start + step - 1}" for start in starts]
        pulls = [asyncio.create_task(part(site, digest, each)) for each in ranges]
        await pulls[0]
        begun.set()
        assert await asyncio.gather(*pulls) == [BODY[start : start + step] for start in starts]
        assert await first.read() == BODY[1000:step]
    await committed.wait()
    held.set()
    assert blobs(site) == [BODY]
    whole, *pieces = asked(upstream)
    assert whole == (0, 0)
    # Where it ends, so that others bring what comes first as well.
    assert [start for start, _ in pieces] == [151_000, *(stop for _, stop in pieces[:-1])]
    assert max(stop - start for start, stop in pieces) <= 200_000
    assert upstream.bytes_sent == SIZE


async def test_open_ranges_that_are_dropped(serve: Serve, upstream: Upstream, impatient: None) -> None:
    digest = upstream.blob("a/b", BODY)
    site = await serve(upstream)
    begun, never = asyncio.Event(), asyncio.Event()
    upstream.next("GET", digest, Hold(begun, after=1000), Hold(never, after=400_000))
    committed = heard("fill.committed")
    for start in (1_200_000, 400_000, 1_300_000):
        header = {"Range": f"bytes={start}-"}
        async with site.request("GET", path_of(digest), headers=header) as response:
            assert await response.content.readexactly(1000) == BODY[start : start + 1000]
            response.close()
    begun.set()
    await committed.wait()
    never.set()
    assert blobs(site) == [BODY]
    assert asked(upstream) == [(0, 0), (400_000, 1_200_000), (1_200_000, SIZE)]
    assert upstream.bytes_sent == SIZE


async def test_steps_of_50_000_bytes_several_in_a_header(
    serve: Serve, upstream: Upstream, impatient: None
) -> None:
    digest = upstream.blob("a/b", BODY)
    site = await serve(upstream)
    begun, never = asyncio.Event(), asyncio.Event()
    upstream.next("GET", digest, Hold(begun, after=2), Hold(never, after=200_000))
    committed = heard("fill.committed")
    assert await part(site, digest, "bytes=0-1") == BODY[:2]
    spans = [(200_000, 250_000), (400_000, 500_000), (1_550_000, SIZE)]
    for _ in range(2):
        header = ",".join(f"{start}-{stop - 1}" for start, stop in spans)
        pull = asyncio.create_task(part(site, digest, f"bytes={header}"))
        begun.set()  # the last byte needs all
        body = await pull
        assert all(BODY[start:stop] in body for start, stop in spans)
    await committed.wait()
    never.set()
    assert blobs(site) == [BODY]


async def test_several_ranges_in_any_order(serve: Serve, upstream: Upstream, impatient: None) -> None:
    """What is between two ranges that are there may be a hole."""
    digest = upstream.blob("a/b", BODY)
    site = await serve(upstream)
    gate = asyncio.Event()
    upstream.next("GET", digest, Hold(gate, after=1000))
    spans = [(700_000, 700_100), (1_200_000, 1_200_100), (900_000, 900_100), (400_000, 400_100)]
    body = await part(site, digest, "bytes=" + ",".join(f"{start}-{stop - 1}" for start, stop in spans))
    places = [body.find(BODY[start:stop]) for start, stop in spans]
    assert 0 < places[0] < places[1] < places[2] < places[3]
    gate.set()
    assert (await site.get(path_of(digest)))[2] == BODY


@pytest.mark.errors("disk.failed")
@pytest.mark.parametrize("length", [100, 100_000])
async def test_a_disk_that_fails_between_ranges_of_one_header(
    serve: Serve, upstream: Upstream, impatient: None, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    digest = upstream.blob("a/b", BODY)
    site = await serve(upstream)
    gate, append = asyncio.Event(), SparseUpload._append
    upstream.next("GET", digest, Hold(gate, after=1000))

    def fail(self: SparseUpload, batch: list[tuple[int, bytes]]) -> None:
        if any(position >= 800_000 for position, _ in batch):
            raise OSError(28, "full")
        append(self, batch)

    spans = [(start, start + length) for start in (500_000, 900_000, 500_000)]
    assert await part(site, digest, "bytes=500000-699999") == BODY[500_000:700_000]
    monkeypatch.setattr(SparseUpload, "_append", fail)
    body = await part(site, digest, "bytes=" + ",".join(f"{start}-{stop - 1}" for start, stop in spans))
    assert [body.count(BODY[start:stop]) for start, stop in spans] == [2, 1, 2]
    gate.set()


@pytest.mark.parametrize("size", [51, SMALL + 1])
async def test_the_last_bytes_wait_for_the_digest(
    serve: Serve, upstream: Upstream, impatient: None, size: int
) -> None:
    digest = upstream.blob("a/b", BODY)
    site = await serve(upstream)
    gate = asyncio.Event()

    def of_the_end(request: Request) -> bool:
        return (request.range or "").endswith(f"-{SIZE - 1}")

    # Neither the fill goes on, nor what else fetches the bytes before these.
    upstream.next("GET", lambda request: not of_the_end(request), Hold(gate, after=1000), times=9)
    async with site.request("GET", path_of(digest), headers={"Range": f"bytes=-{size}"}) as response:
        assert response.status == 206
        assert await response.content.readexactly(size - 1) == BODY[-size:-1]
        assert blobs(site) == []
        gate.set()
        assert await response.content.read() == BODY[-1:]


@pytest.mark.errors("fill.failed")
async def test_a_wrong_range_spoils_all(serve: Serve, upstream: Upstream, impatient: None) -> None:
    digest = upstream.blob("a/b", BODY)
    site = await serve(upstream)
    gate, failed = asyncio.Event(), heard("fill.failed")
    upstream.next("GET", digest, Hold(gate, after=1000))
    upstream.next("GET", digest, Corrupt(at=800_000))
    assert await part(site, digest, "bytes=700000-899999") != BODY[700_000:900_000]
    response = await site.request("GET", path_of(digest))
    gate.set()
    with pytest.raises(Exception, match="payload"):
        await response.read()
    await failed.wait()
    assert (blobs(site), site.partial) == ([], [])
    assert (await site.get(path_of(digest)))[2] == BODY


@pytest.mark.parametrize("fault", [Status(403), Status(404), RetryAfter(0, 500), WrongLength(5)], ids=str)
async def test_a_range_that_fails_is_brought_by_the_fill(
    serve: Serve, upstream: Upstream, impatient: None, fault: Any
) -> None:
    digest = upstream.blob("a/b", BODY)
    site = await serve(upstream)
    gate, refused = asyncio.Event(), heard("fill.range_refused")
    upstream.next("GET", digest, Hold(gate, after=1000))
    upstream.next("GET", digest, fault, times=2)
    pull = asyncio.create_task(part(site, digest, "bytes=700000-899999"))
    if not isinstance(fault, WrongLength):
        await refused.wait()
    gate.set()
    assert await pull == BODY[700_000:900_000]
    assert (await site.get(path_of(digest)))[2] == BODY


# Without a server


@pytest.mark.parametrize(
    ("ranges", "status", "stated"),
    [
        (f"{SIZE}-", 416, f"bytes */{SIZE}"),
        (f"{SIZE}-{SIZE + 5},5-9", 206, f"bytes 5-9/{SIZE}"),
        ("5-9", 206, f"bytes 5-9/{SIZE}"),
        ("-5", 206, f"bytes {SIZE - 5}-{SIZE - 1}/{SIZE}"),
        ("-0", 416, f"bytes */{SIZE}"),
    ],
)
async def test_ranges_are_exact_where_nothing_can_be_stored(
    serve: Serve, upstream: Upstream, monkeypatch: pytest.MonkeyPatch, ranges: str, status: int, stated: str
) -> None:
    async def fail(self: BlobFiles, digest: Digest) -> SparseUpload:
        raise StorageFailed("broken")

    site = await serve(upstream)
    monkeypatch.setattr(BlobFiles, "resume", fail)
    digest = upstream.blob("a/b", BODY)
    found, headers, body = await site.get(path_of(digest), Range=f"bytes={ranges}")
    assert (found, headers["Content-Range"]) == (status, stated)
    if status == 206:
        assert (len(body), headers["Accept-Ranges"]) == (5, "bytes")


class Rig:
    """Fills over a store; `turns` is held by the test as long as no fill is to transfer."""

    def __init__(
        self, root: Path, upstream: Upstream, clock: Clock, ticks: Callable[[], float] = time.monotonic
    ) -> None:
        connect = Connect(plain_http=True, header_timeout=9, progress_timeout=9)
        settings = requests.UpstreamSettings(upstream.url, connect)
        metrics = self.metrics = Metrics()
        self.origin = client.UpstreamRegistry("up", settings, [Credentials()], metrics, ticks)
        self.store = Store(BlobFiles(root, clock), SQLiteRecords(root / "records"), clock)
        self.turns = Slots(1)
        self.fills = Fills(self.store, metrics, self.turns, backoff=0, ticks=clock)
        self.source = BlobSource("up", self.origin, "a/b")
        self.partial = root / "partial"

    async def read(self, digest: Digest, start: int, stop: int, lazy: Threshold | None = None) -> bytes:
        blob = (await self.fills.join(self.source, digest, Span(start, stop), lazy)).value
        try:
            return b"".join([chunk async for chunk in blob.chunks(start, stop)])
        finally:
            await blob.close()

    async def close(self) -> None:
        await self.fills.close()
        await self.origin.close()
        await self.store.close()


@pytest.fixture
async def rig(tmp_path: Path, upstream: Upstream, clock: Clock) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path, upstream, clock)
    yield rig
    await rig.close()


async def test_what_a_slow_transfer_would_bring_late_is_fetched(
    rig: Rig, upstream: Upstream, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "MEASURED", 0.25)
    digest = Digest(upstream.blob("a/b", BODY))
    gate = asyncio.Event()
    upstream.next("GET", digest, Hold(gate, after=100_000))
    assert await rig.read(digest, 0, 99_999) == BODY[:99_999]
    clock.advance(0.2)  # nothing is known of its pace
    waiting = asyncio.create_task(rig.read(digest, 200_000, 200_100))
    for _ in range(20):
        await asyncio.sleep(0)
    assert asked(upstream) == [(0, 0)]
    clock.advance(4)  # 25 kB a second
    assert await rig.read(digest, 300_000, 300_100) == BODY[300_000:300_100]
    assert asked(upstream) == [(0, 0), (300_000, 300_100)]
    gate.set()
    assert await waiting == BODY[200_000:200_100]
    await rig.fills.ended(digest)


def test_the_pace_is_that_of_the_last_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "MEASURED", 0.25)
    one = Part(1000, 10_000, since=50.0)
    assert one.seconds_to(1000, 60.0) == 0
    assert one.seconds_to(1001, 60.0) == math.inf
    assert one.seconds_to(1001, 50.1) < 1
    for second in range(1, 5):
        one.advance(1000, 50.0 + 2 * second)
    assert one.position == 5000
    assert one.seconds_to(6000, 58.0) == pytest.approx(2)
    assert one.seconds_to(6000, 158.0) > 50  # it has stopped


async def test_a_fill_that_waits_for_its_turn_begins_with_the_range(rig: Rig, upstream: Upstream) -> None:
    digest = Digest(upstream.blob("a/b", BODY))
    async with rig.turns.turn("up"):
        found = await asyncio.gather(*(rig.read(digest, 500, 900) for _ in range(3)))
        assert found == [BODY[500:900]] * 3
        assert await rig.read(digest, 100_000, 100_010) == BODY[100_000:100_010]
        assert asked(upstream) == [(500, 900), (100_000, 100_010)]
    await rig.fills.ended(digest)
    assert asked(upstream) == [(0, 500), (500, 900), (900, 100_000), (100_000, 100_010), (100_010, SIZE)]
    assert upstream.bytes_sent == SIZE


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("length", [True, False])
async def test_a_fill_waits_for_its_turn_where_the_origin_sends_no_range(
    rig: Rig, upstream: Upstream, ranges: bool, length: bool
) -> None:
    digest = Digest(upstream.blob("a/b", BODY))
    upstream.ranges, upstream.content_length = ranges, length
    answered = Hold(asyncio.Event(), after=None)
    upstream.next("GET", digest, answered)
    async with rig.turns.turn("up"):
        pull = asyncio.create_task(rig.read(digest, 500, 900))
        await answered.reached.wait()
        answered.gate.set()
    assert await pull == BODY[500:900]
    await rig.fills.ended(digest)
    assert rig.store.files.path(digest).read_bytes() == BODY
    if not ranges:  # all of it has come for the range
        assert (asked(upstream), upstream.bytes_sent) == ([(500, 900)], SIZE)


@pytest.mark.parametrize("lazy", [None, Threshold(share=1.0, clients=math.inf)], ids=["default", "lazy"])
@pytest.mark.parametrize("start", [0, 500])
async def test_all_of_a_blob_that_comes_for_a_range_is_the_fill(
    rig: Rig, upstream: Upstream, start: int, lazy: Threshold | None
) -> None:
    digest = Digest(upstream.blob("a/b", BODY))
    upstream.ranges, answered = False, Hold(asyncio.Event(), after=None)
    upstream.next("GET", digest, answered, Reset(after=700_000))
    async with rig.turns.turn("up"):
        pulls = [asyncio.create_task(rig.read(digest, start + each, 900, lazy)) for each in range(4)]
        await answered.reached.wait()
        answered.gate.set()
    assert await asyncio.gather(*pulls) == [BODY[start + each : 900] for each in range(4)]
    assert await rig.read(digest, 0, SIZE, lazy) == BODY
    with suppress(KeyError):
        await rig.fills.ended(digest)
    assert sorted(stop for _, stop in asked(upstream)) == [900, SIZE]
    assert upstream.bytes_sent == 700_000 + SIZE
    assert rig.store.files.path(digest).read_bytes() == BODY


async def test_all_of_a_blob_that_waits_for_its_turn_is_closed(rig: Rig) -> None:
    digest, closed = Digest.of(BODY), asyncio.Event()

    class Whole(Dealt):
        async def close(self) -> None:
            assert not closed.is_set()
            closed.set()

    class Dealing(Dealer):
        async def get_blob(self, repository: str, digest: Digest, span: Span | None = None) -> Blob:
            found = Whole(digest, 0, SIZE, self.gate)
            found.whole = True
            self.gate.set()
            return found

    origin = Dealing()
    rig.source = BlobSource("up", origin, "a/b")
    async with rig.turns.turn("up"):
        pull = asyncio.create_task(rig.read(digest, 500, 900))
        await origin.gate.wait()
        await rig.fills.close()
    assert closed.is_set()
    with pytest.raises(RegistryError):
        await pull
    for path in rig.partial.iterdir():  # empty, for another process that follows it
        path.unlink()


async def test_what_came_before_a_stop_is_not_asked_again(rig: Rig, upstream: Upstream) -> None:
    digest = Digest(upstream.blob("a/b", BODY))
    async with rig.turns.turn("up"):
        await rig.read(digest, 500, 900)
        await rig.read(digest, 5000, 9000)
        await rig.fills.close()
    assert len(list(rig.partial.iterdir())) == 2
    upstream.clear()
    assert await rig.read(digest, 600, 700) == BODY[600:700]
    await rig.fills.ended(digest)
    assert asked(upstream) == [(0, 500), (900, 5000), (9000, SIZE)]
    assert rig.store.files.path(digest).read_bytes() == BODY


async def test_the_extents_of_other_content_are_dropped(rig: Rig, upstream: Upstream) -> None:
    digest = Digest(upstream.blob("a/b", BODY))
    upstream.repositories["a/b"].blobs[digest] = BODY + b"more"
    async with rig.turns.turn("up"):
        await rig.read(digest, 5000, 9000)
        await rig.fills.close()
    upstream.repositories["a/b"].blobs[digest] = BODY
    upstream.clear()
    assert await rig.read(digest, 0, SIZE) == BODY
    await rig.fills.ended(digest)
    assert asked(upstream) == [(0, 0), (0, 5000)]


@pytest.mark.errors("disk.failed")
async def test_a_disk_that_fails_under_a_range(
    rig: Rig, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = Digest(upstream.blob("a/b", BODY))

    def fail(self: SparseUpload, batch: object) -> None:
        raise OSError(5, "broken")

    async with rig.turns.turn("up"):
        await rig.read(digest, 500, 900)
        monkeypatch.setattr(SparseUpload, "_append", fail)
        assert await rig.read(digest, 5000, 9000) == BODY[5000:9000]
    with suppress(RegistryError):
        await rig.fills.ended(digest)
    assert list(rig.partial.iterdir()) == []


async def leave_holes(rig: Rig, digest: Digest, upstream: Upstream, *spans: tuple[int, int]) -> None:
    """A former fill has got these."""
    async with rig.turns.turn("up"):
        for start, stop in spans:
            await rig.read(digest, start, stop)
        await rig.fills.close()
    upstream.clear()


def counted(rig: Rig) -> tuple[float, float, float]:
    """Transfers, extents, and bytes that came twice."""
    lines = rig.metrics.exposition()[0].decode().splitlines()
    found = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    names = ("transfers_in_flight", "extents", 'repeated_bytes_total{namespace="up"}')
    transfers, extents, repeated = (float(found.get(f"entrepot_fill_{name}", 0)) for name in names)
    return transfers, extents, repeated


class Dealt(Blob):
    """Comes in chunks of 100,000 bytes; all but the first wait for `gate`."""

    def __init__(self, digest: Digest, start: int, stop: int, gate: asyncio.Event) -> None:
        self.descriptor, self.position = Descriptor(OCTETS, digest, SIZE), start
        self._stop, self._gate = stop, gate

    @property
    def unread(self) -> int:
        return 7

    async def chunks(self, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        for at in range(start, self._stop, 100_000):
            yield BODY[at : min(self._stop, at + 100_000)]
            await self._gate.wait()

    async def close(self) -> None:
        pass


class Dealer(Registry):
    """An origin with the blob."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.asked: list[Span] = []

    async def get_blob(self, repository: str, digest: Digest, span: Span | None = None) -> Blob:
        self.asked.append(span or Span(0))
        return Dealt(digest, self.asked[-1].start, self.asked[-1].stop or SIZE, self.gate)


async def test_what_comes_twice_is_counted(
    rig: Rig, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, origin, listened = Digest.of(BODY), Dealer(), asyncio.Event()
    monkeypatch.setattr(fetcher, "HEARING", 0)
    monkeypatch.setattr(Wanted, "hear", lambda _: listened.set() or [])  # the metrics are changed before
    rig.source = BlobSource("up", origin, "a/b")
    assert await rig.read(digest, 0, 1000) == BODY[:1000]
    listened.clear()
    await listened.wait()
    assert counted(rig) == (1, 1, 0)
    assert await rig.read(digest, 150_000, 250_000) == BODY[150_000:250_000]
    [fill] = rig.fills.in_flight()
    assert fill.fetcher is not None
    assert fill.fetcher.coming == [(100_000, 150_000)]
    listened.clear()
    await listened.wait()
    assert counted(rig) == (1, 2, 7)  # of the one that has ended
    origin.gate.set()  # the chunk that comes now has 50,000 bytes more than is missing
    await rig.fills.ended(digest)
    assert origin.asked == [Span(0), Span(150_000, 250_000), Span(250_000)]
    assert fill.fetcher.repeated == 50_000 + 3 * 7  # and what is in the buffers of three connections
    assert counted(rig) == (0, 0, 50_021)
    assert rig.store.files.path(digest).read_bytes() == BODY


HOLES = ((0, 1000), (50_000, 90_000), (400_000, 400_001), (1_000_000, 1_500_000))


async def test_one_transfer_fills_all_holes_where_the_origin_sends_no_ranges_any_more(
    rig: Rig, upstream: Upstream
) -> None:
    digest = Digest(upstream.blob("a/b", BODY))
    await leave_holes(rig, digest, upstream, *HOLES)
    upstream.ranges = False
    assert await rig.read(digest, 0, SIZE) == BODY
    await rig.fills.ended(digest)
    assert (asked(upstream), upstream.bytes_sent) == ([(1000, 50_000)], SIZE)
    assert counted(rig) == (0, 0, sum(stop - start for start, stop in HOLES))
    assert rig.store.files.path(digest).read_bytes() == BODY


async def test_a_cut_of_that_transfer(rig: Rig, upstream: Upstream) -> None:
    digest = Digest(upstream.blob("a/b", BODY))
    await leave_holes(rig, digest, upstream, *HOLES)
    upstream.ranges = False
    upstream.next("GET", digest, Reset(after=200_000))
    assert await rig.read(digest, 0, SIZE) == BODY
    await rig.fills.ended(digest)
    assert [start for start, _ in asked(upstream)] == [1000, 200_000]
    assert rig.store.files.path(digest).read_bytes() == BODY


@pytest.mark.parametrize("status", [403, 404])
async def test_a_blob_comes_whole_where_its_ranges_are_refused(
    rig: Rig, upstream: Upstream, status: int
) -> None:
    digest = Digest(upstream.blob("a/b", BODY))
    await leave_holes(rig, digest, upstream, *HOLES)
    upstream.next("GET", lambda request: request.range is not None, Status(status), times=100)
    assert await rig.read(digest, 0, SIZE) == BODY
    await rig.fills.ended(digest)
    assert asked(upstream) == [(0, 0), (1000, 50_000)]


def to_ranges(request: Request) -> bool:
    return request.range is not None


@pytest.mark.parametrize("fault", [Status(503, {"Retry-After": "0"}), Status(500)])
@pytest.mark.parametrize("holes", [HOLES, HOLES[1:]])
async def test_what_fails_for_ranges_alone_comes_whole(
    rig: Rig, upstream: Upstream, fault: Fault, holes: tuple[tuple[int, int], ...]
) -> None:
    digest = Digest(upstream.blob("a/b", BODY))
    await leave_holes(rig, digest, upstream, *holes)
    upstream.next("GET", to_ranges, fault, times=100)
    held = Hold(asyncio.Event(), after=None)
    upstream.next("GET", lambda request: not to_ranges(request), held)
    start, stop = holes[-1]
    assert await rig.read(digest, start, stop) == BODY[start:stop]  # what is there waits for nothing
    await held.reached.wait()  # before, a client would ask for a range itself, which the whole leaves to that
    held.gate.set()
    assert await rig.read(digest, 0, SIZE) == BODY
    await rig.fills.ended(digest)
    assert asked(upstream).count((0, 0)) == 1
    assert rig.store.files.path(digest).read_bytes() == BODY


@pytest.mark.parametrize("after", [None, 20_000])
async def test_the_whole_brings_what_a_client_asks_for_in_vain(
    rig: Rig, upstream: Upstream, after: int | None
) -> None:
    digest = Digest(upstream.blob("a/b", BODY))
    await leave_holes(rig, digest, upstream, *HOLES)
    refused, fault = Hold(asyncio.Event(), after=None), RetryAfter(0, 503)
    cut = Hold(refused.reached, after=20_000), Reset(after=20_000)
    upstream.next("GET", lambda request: request.range == "bytes=1000-49999", *cut)
    upstream.next("GET", lambda request: request.range == "bytes=200000-200000", fault, refused)
    upstream.next("GET", to_ranges, fault, times=100)
    held = Hold(asyncio.Event(), after)
    upstream.next("GET", lambda request: not to_ranges(request), held)
    reader = asyncio.create_task(rig.read(digest, 200_000, 200_001))
    await held.reached.wait()
    refused.gate.set()
    held.gate.set()
    assert await reader == BODY[200_000:200_001]
    await rig.fills.ended(digest)
    assert asked(upstream).count((0, 0)) == 1
    assert rig.store.files.path(digest).read_bytes() == BODY


@pytest.mark.parametrize("status", [429, 502, 503])
async def test_a_cut_after_which_ranges_fail(
    tmp_path: Path, upstream: Upstream, clock: Clock, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    rig, sleep = Rig(tmp_path, upstream, clock, clock), asyncio.sleep
    waited = []

    async def pass_time(seconds: float) -> None:
        if seconds > fetcher.HEARING:
            waited.append(seconds)
            clock.advance(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", pass_time)
    monkeypatch.setattr(readers, "LOOK", 0.0)  # the client asks whenever it may
    digest = Digest(upstream.blob("a/b", BODY))
    upstream.next("GET", digest, Reset(after=200_000))
    upstream.next("GET", to_ranges, Status(status, {"Retry-After": "7"}), times=100)
    assert await rig.read(digest, 0, SIZE) == BODY
    await rig.fills.ended(digest)
    assert asked(upstream) == [(0, 0), (0, 0), *[(200_000, SIZE)] * fetcher.WHOLE]
    assert waited == [7] * fetcher.WHOLE
    assert counted(rig)[2] == 200_000
    assert rig.store.files.path(digest).read_bytes() == BODY
    await rig.close()


@pytest.mark.parametrize("status", [429, 502, 503])
async def test_a_cut_image_whose_ranges_fail_comes_whole(
    tmp_path: Path, upstream: Upstream, clock: Clock, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    rig, sleep = Rig(tmp_path, upstream, clock, clock), asyncio.sleep
    rig.turns = Slots(12)
    rig.fills = Fills(rig.store, rig.metrics, rig.turns, ticks=clock)

    async def pass_time(seconds: float) -> None:
        if seconds > fetcher.HEARING:
            clock.advance(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", pass_time)
    monkeypatch.setattr(readers, "LOOK", 0.0)
    layers = [content_of(SIZE // 4, number) for number in range(12)]
    digests = [Digest(upstream.blob("a/b", layer)) for layer in layers]
    for digest in digests:
        upstream.next("GET", digest, Reset(after=200_000))
    upstream.next("GET", to_ranges, Status(status, {"Retry-After": "2"}), times=1000)
    reads = [rig.read(digest, 0, SIZE // 4) for digest in digests]
    assert await asyncio.gather(*reads) == layers
    for digest in digests:
        await rig.fills.ended(digest)
    await rig.close()


async def test_an_upstream_that_is_down_for_seconds_is_asked_for_the_rest(
    tmp_path: Path, upstream: Upstream, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, sleep, waited = Rig(tmp_path, upstream, clock, clock), asyncio.sleep, 0.0

    async def pass_time(seconds: float) -> None:
        nonlocal waited
        if seconds > fetcher.HEARING:
            clock.advance(seconds)
            waited += seconds
            if waited - seconds < 6 <= waited:
                await upstream.start()
        await sleep(0)

    digest = Digest(upstream.blob("a/b", BODY))
    held = Hold(asyncio.Event(), after=200_000)
    upstream.next("GET", digest, held)
    reader = asyncio.create_task(rig.read(digest, 0, SIZE))
    await held.reached.wait()
    await upstream.stop()
    monkeypatch.setattr(asyncio, "sleep", pass_time)
    assert await reader == BODY
    await rig.fills.ended(digest)
    assert asked(upstream) == [(0, 0), (200_000, SIZE)]
    await rig.close()


@pytest.mark.errors("fill.failed")
async def test_what_fails_for_ranges_and_for_all_of_it(rig: Rig, upstream: Upstream) -> None:
    digest = Digest(upstream.blob("a/b", BODY))
    await leave_holes(rig, digest, upstream, *HOLES)
    upstream.next("GET", digest, RetryAfter(0, 500), times=100)
    with pytest.raises(OriginFailed, match="up answered 500 for a/b"):
        await rig.read(digest, 0, SIZE)
    with suppress(RegistryError):
        await rig.fills.ended(digest)
    assert asked(upstream).count((0, 0)) == fetcher.RETRIES + 1 - fetcher.WHOLE
    upstream.clear()
    upstream.next("GET", digest, RetryAfter(0, 500), times=100)
    upstream.next("HEAD", digest, RetryAfter(0, 500), times=100)
    with pytest.raises(OriginFailed, match="up answered 500 for a/b"):
        await rig.read(digest, 0, SIZE)
    assert (0, 0) not in asked(upstream)  # who waits for headers may go elsewhere
    await (await rig.store.files.resume(digest)).cancel()


async def test_a_beginning_that_is_missing_and_refused(rig: Rig, upstream: Upstream) -> None:
    digest = Digest(upstream.blob("a/b", BODY))
    await leave_holes(rig, digest, upstream, *HOLES[1:])
    upstream.next("GET", to_ranges, Status(403), times=100)
    assert await rig.read(digest, 0, SIZE) == BODY
    await rig.fills.ended(digest)
    assert asked(upstream) == [(0, 0), (0, 50_000)]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, impatient: None) -> None:
    """Pieces are small, and who waits says so often."""
    monkeypatch.setattr(readers, "LOOK", 0.01)
    for name, value in {"LEAST": 50_000, "LONG": 100_000, "PIECE": 150_000}.items():
        monkeypatch.setattr(parts, name, value)


@pytest.mark.parametrize("after", [30_000, 1])
async def test_a_piece_that_breaks_off_is_continued_without_a_pause(
    rig: Rig, upstream: Upstream, small: None, after: int
) -> None:
    digest, gate = Digest(upstream.blob("a/b", BODY)), asyncio.Event()
    upstream.next("GET", digest, Hold(gate, after=1000))
    assert await rig.read(digest, 0, 999) == BODY[:999]
    upstream.next(
        "GET", lambda request: (request.range or "").startswith("bytes=8"), Truncate(after), times=3
    )
    assert await rig.read(digest, 800_000, 1_300_000) == BODY[800_000:1_300_000]  # no time has passed
    starts = [each for each in asked(upstream) if 800_000 <= each[0] < 900_000]
    assert starts == [(800_000 + number * after, 900_000) for number in range(4)]
    gate.set()
    await rig.fills.ended(digest)
    assert rig.store.files.path(digest).read_bytes() == BODY


@pytest.mark.parametrize("status", [503, 500, 403])
async def test_a_refused_transfer_holds_up_no_other(
    rig: Rig, upstream: Upstream, clock: Clock, small: None, status: int
) -> None:
    digest, gates = Digest(upstream.blob("a/b", BODY)), [asyncio.Event() for _ in range(2)]
    upstream.next("GET", digest, Hold(gates[0], after=1000))
    assert await rig.read(digest, 0, 999) == BODY[:999]
    works, refused = Hold(gates[1], after=1000), heard("fill.range_refused")
    upstream.next("GET", to_ranges, works)
    working = asyncio.create_task(rig.read(digest, 400_000, 900_000))
    await works.reached.wait()
    upstream.next("GET", to_ranges, Status(status, {"Retry-After": "3"}))
    waiting = asyncio.create_task(rig.read(digest, 1_000_000, 1_400_000))
    await refused.wait()
    gates[1].set()
    assert await working == BODY[400_000:900_000]  # all pieces, though no time has passed
    clock.advance(3)
    assert await waiting == BODY[1_000_000:1_400_000]
    gates[0].set()
    await rig.fills.ended(digest)
    assert rig.store.files.path(digest).read_bytes() == BODY


@pytest.mark.parametrize("length", [50_000, 500_000])
async def test_a_transfer_that_ends_gives_its_place_to_who_waits(
    rig: Rig, upstream: Upstream, small: None, length: int
) -> None:
    """The origin accepts three transfers; time does not pass, so that none begins beside them."""
    digest, gates = Digest(upstream.blob("a/b", BODY)), [asyncio.Event() for _ in range(2)]
    upstream.next("GET", digest, Hold(gates[0], after=1000))
    assert await rig.read(digest, 0, 999) == BODY[:999]
    works, refused = Hold(gates[1], after=1000), heard("fill.range_refused")
    upstream.next("GET", to_ranges, works)
    working = asyncio.create_task(rig.read(digest, 200_000, 200_000 + length))
    await works.reached.wait()
    upstream.next("GET", to_ranges, Status(503, {"Retry-After": "3"}))
    starts = (1_000_000, 1_200_000, 1_400_000)
    waiting = [asyncio.create_task(rig.read(digest, start, start + 50_000)) for start in starts]
    await refused.wait()
    gates[1].set()
    assert await asyncio.gather(*waiting) == [BODY[start : start + 50_000] for start in starts]
    assert await working == BODY[200_000 : 200_000 + length]
    later = 1_500_000  # who comes when nobody waits
    assert await rig.read(digest, later, later + 50_000) == BODY[later : later + 50_000]
    gates[0].set()
    await rig.fills.ended(digest)
    assert rig.store.files.path(digest).read_bytes() == BODY


async def test_after_a_pause_one_transfer_begins_after_the_other(
    rig: Rig, upstream: Upstream, clock: Clock, small: None
) -> None:
    digest, gates = Digest(upstream.blob("a/b", BODY)), [asyncio.Event() for _ in range(2)]
    upstream.next("GET", digest, Hold(gates[0], after=1000))
    assert await rig.read(digest, 0, 999) == BODY[:999]
    fault, accepted = Status(503, {"Retry-After": "3"}), Hold(gates[1], after=1000)
    refused, again = heard("fill.range_refused"), heard("fill.range_refused", times=2)
    for each in (fault, accepted, fault):
        upstream.next("GET", to_ranges, each)
    starts = (1_000_000, 1_200_000, 1_400_000)
    waiting = [asyncio.create_task(rig.read(digest, start, start + 50_000)) for start in starts]
    await refused.wait()
    clock.advance(3)
    await accepted.reached.wait()
    await again.wait()
    for start in starts:
        (fill,) = rig.fills.in_flight()
        fill.want(rig.source, start, start + 50_000)
    assert await rig.read(digest, 0, 999) == BODY[:999]
    assert len(asked(upstream)) == 1 + 3
    gates[1].set()
    assert await asyncio.gather(*waiting) == [BODY[start : start + 50_000] for start in starts]
    gates[0].set()
    await rig.fills.ended(digest)
    assert rig.store.files.path(digest).read_bytes() == BODY


@pytest.mark.parametrize(("fault", "seconds"), [(Status(503, {"Retry-After": "3"}), 3), (Status(403), 0.25)])
async def test_a_refused_range_is_asked_for_again_soon(
    rig: Rig, upstream: Upstream, clock: Clock, small: None, fault: Fault, seconds: float
) -> None:
    digest, gate = Digest(upstream.blob("a/b", BODY)), asyncio.Event()
    upstream.next("GET", digest, Hold(gate, after=1000))
    assert await rig.read(digest, 0, 999) == BODY[:999]
    refused = heard("fill.range_refused")
    upstream.next("GET", to_ranges, fault)
    waiting = asyncio.create_task(rig.read(digest, 1_000_000, 1_400_000))
    await refused.wait()
    clock.advance(seconds / 2)
    (fill,) = rig.fills.in_flight()
    fill.want(rig.source, 1_000_000, 1_400_000)
    assert await rig.read(digest, 0, 999) == BODY[:999]
    assert len(asked(upstream)) == 2
    clock.advance(seconds / 2)
    assert await waiting == BODY[1_000_000:1_400_000]
    gate.set()
    await rig.fills.ended(digest)
    assert rig.store.files.path(digest).read_bytes() == BODY


@pytest.mark.parametrize("spans", [[(0, SIZE)], [(5000, SIZE)], [(0, 900_000), (SIZE - 9, SIZE)]], ids=str)
async def test_what_others_bring_ends_the_wait_of_the_fill(
    rig: Rig,
    upstream: Upstream,
    clock: Clock,
    small: None,
    monkeypatch: pytest.MonkeyPatch,
    spans: list[tuple[int, int]],
) -> None:
    monkeypatch.setattr(fetcher, "HELD", 0.0)
    rig.fills = Fills(rig.store, rig.metrics, rig.turns, backoff=100_000, ticks=clock)
    digest = Digest(upstream.blob("a/b", BODY))
    refused = heard("fill.interrupted", times=2)
    upstream.next("GET", digest, Truncate(1000))
    upstream.next("GET", digest, RetryAfter(0, 503))
    assert await rig.read(digest, 0, 999) == BODY[:999]
    await refused.wait()
    for start, stop in spans:
        assert await rig.read(digest, start, stop) == BODY[start:stop]
    await rig.fills.ended(digest)
    assert rig.store.files.path(digest).read_bytes() == BODY
    assert upstream.bytes_sent == SIZE


async def test_pieces_by_way_of_a_redirect_cost_one_request_each(
    rig: Rig, upstream: Upstream, small: None
) -> None:
    upstream.cdn = True
    digest, gate = Digest(upstream.blob("a/b", BODY)), asyncio.Event()
    upstream.next("GET", digest, Hold(gate, after=1000))
    assert await rig.read(digest, 0, 999) == BODY[:999]
    held = Hold(asyncio.Event(), after=1000)
    upstream.next("GET", lambda request: request.kind == "cdn" and to_ranges(request), held)
    pull = asyncio.create_task(rig.read(digest, 800_000, 1_500_000))
    await held.reached.wait()
    assert [each.kind for each in upstream.requests] == ["blob", "cdn", "cdn"]
    upstream.lapse_signatures()
    held.gate.set()
    assert await pull == BODY[800_000:1_500_000]
    gate.set()
    await rig.fills.ended(digest)
    kinds = [each.kind for each in upstream.requests]
    assert 2 <= kinds.count("blob") <= 3  # two transfers were under way when the URL lapsed
    assert kinds.count("cdn") >= 6
    assert rig.store.files.path(digest).read_bytes() == BODY


class Untold(Fault):
    """The size of the blob is missing from Content-Range."""

    def strike(self, answer: Answer, request: Request) -> Answer:
        if found := answer.headers.get("Content-Range"):
            answer.headers["Content-Range"] = found.rpartition("/")[0] + "/*"
        return answer


async def test_a_range_of_a_blob_of_untold_size_begins_no_fill(rig: Rig, upstream: Upstream) -> None:
    digest = Digest(upstream.blob("a/b", BODY))
    upstream.content_length, answered = False, Hold(asyncio.Event(), after=None)
    upstream.next("GET", digest, Untold(), answered)
    async with rig.turns.turn("up"):
        pull = asyncio.create_task(rig.read(digest, 5000, 9000))
        await answered.reached.wait()
        answered.gate.set()
    assert await pull == BODY[5000:9000]
    await rig.fills.ended(digest)
    assert rig.store.files.path(digest).read_bytes() == BODY


async def test_a_range_that_the_blob_has_not_holds_up_no_other(rig: Rig, upstream: Upstream) -> None:
    digest = Digest(upstream.blob("a/b", BODY))
    refused = heard("fill.range_refused")
    async with rig.turns.turn("up"):
        wrong = asyncio.create_task(rig.read(digest, 2 * SIZE, 3 * SIZE))
        await refused.wait()
        assert await rig.read(digest, 5000, 9000) == BODY[5000:9000]
    assert await wrong == b""
    await rig.fills.ended(digest)


@pytest.mark.clients
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    spans=st.lists(st.tuples(st.integers(0, 9999), st.integers(1, 3000), st.booleans()), max_size=12),
    pace=st.sampled_from([1, 16 << 20]),
    turn=st.integers(0, 12),
)
async def test_whatever_is_read_and_dropped(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    spans: list[tuple[int, int, bool]],
    pace: int,
    turn: int,
) -> None:
    content, written = BODY[:10_000], 0
    accept = SparseUpload.write_at

    async def counted(self: SparseUpload, position: int, chunk: bytes) -> None:
        nonlocal written
        written += len(chunk)
        await accept(self, position, chunk)

    async with Upstream() as upstream:
        digest = Digest(upstream.blob("a/b", content))
        rig = Rig(tmp_path_factory.mktemp("rig"), upstream, Clock())
        with monkeypatch.context() as patch:
            patch.setattr(parts, "ASSUMED", pace)
            for name, value in {"LEAST": 100, "LONG": 200, "PIECE": 500}.items():
                patch.setattr(parts, name, value)
            patch.setattr(SparseUpload, "write_at", counted)
            pulls = []
            async with rig.turns.turn("up"):
                for number, (start, length, dropped) in enumerate(spans):
                    pulls.append(asyncio.create_task(rig.read(digest, start, start + length)))
                    await asyncio.sleep(0)
                    if dropped:
                        pulls[number].cancel()
                    if number == turn:
                        await asyncio.sleep(0.001)
            assert await rig.read(digest, 0, 10_000) == content
            found = await asyncio.gather(*pulls, return_exceptions=True)
            with suppress(KeyError):
                await rig.fills.ended(digest)
        for (start, length, _), body in zip(spans, found, strict=True):
            assert isinstance(body, asyncio.CancelledError) or body == content[start : start + length]
        assert rig.store.files.path(digest).read_bytes() == content
        assert written == len(content)
        if pace > 1:
            assert upstream.bytes_sent == len(content)
        assert list(rig.partial.iterdir()) == []
        await rig.close()
