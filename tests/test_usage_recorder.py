"""What requests do becomes history, now and then; and what is served keeps alive all that it names."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from proxy.telemetry import usage_recorder as module
from proxy.telemetry.exchange import Exchange, current_exchange
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.usage_recorder import UsageRecorder
from storage.disk.blobs import TOUCH, BlobFiles
from storage.disk.records import SQLiteRecords
from storage.errors import StorageFailed
from storage.graph import ManifestTree, walk
from storage.maintenance.pull_journal import PullJournal
from storage.maintenance.resolutions import KEPT, ResolutionJournal
from storage.maintenance.usage import HOUR, Counters, Move, Usage, Use
from storage.oci import OCI_INDEX, OCI_MANIFEST, Digest, Manifest, Tag
from storage.store import Store
from tests.conftest import Clock, Serve
from tests.upstream import Upstream

HUB, NAME = "docker.io", "library/alpine"
ALPINE = f"{HUB}/{NAME}"
LATEST = Tag("latest")
CONFIG, LAYER = b"{}", b"a base layer that every client has already"


class Rig:
    """A recorder over a store of its own; several may share a directory, as processes do."""

    def __init__(self, directory: Path, clock: Clock) -> None:
        self.clock = clock
        self.files = BlobFiles(directory, clock)
        self.records = SQLiteRecords(directory / "records")
        self.store = Store(self.files, self.records, clock)
        self.usage = Usage(self.records, clock)
        self.metrics = Metrics()
        self.recorder = UsageRecorder(self.store, self.usage, self.metrics, clock)

    def served(self, manifest: Manifest, reference: str = LATEST, status: int = 200, **keys: Any) -> None:
        given = {"result": "hit", "bytes": len(manifest.content), "digest": manifest.digest, **keys}
        self.recorder.served(Exchange("", HUB, NAME, reference, "manifest", **given), status)

    async def blob(self, content: bytes) -> Digest:
        upload = await self.store.start_upload(ALPINE)
        await upload.write(content)
        digest = (await upload.commit(Digest.of(content))).digest
        os.utime(self.files.path(digest), (self.clock(), self.clock()))
        return digest

    async def push(self, manifest: Manifest) -> Manifest:
        await self.store.push_manifest(ALPINE, manifest.digest, manifest)
        return manifest

    def last_use(self, content: bytes) -> float:
        return self.files.path(Digest.of(content)).stat().st_mtime

    async def flush(self, later: float = 0.0) -> None:
        self.clock.advance(later)
        await self.recorder.flush()


@pytest.fixture
async def rig(tmp_path: Path, clock: Clock) -> AsyncIterator[Rig]:
    found = Rig(tmp_path, clock)
    yield found
    await found.store.close()


def described(content: bytes, media_type: str) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": str(Digest.of(content)), "size": len(content)}


def image(*layers: bytes) -> Manifest:
    body = {
        "schemaVersion": 2,
        "config": described(CONFIG, "application/vnd.oci.image.config.v1+json"),
        "layers": [described(each, "application/vnd.oci.image.layer.v1.tar") for each in layers],
    }
    return Manifest.of(OCI_MANIFEST, json.dumps(body).encode())


def index(*children: Manifest) -> Manifest:
    named = [described(each.content, each.media_type) for each in children]
    return Manifest.of(OCI_INDEX, json.dumps({"schemaVersion": 2, "manifests": named}).encode())


# What is counted


async def test_a_tag_and_its_digest_are_used(rig: Rig) -> None:
    manifest, begun = image(), rig.clock()
    rig.served(manifest)
    rig.clock.advance(5)
    rig.served(manifest, status=304)
    rig.served(manifest, manifest.digest)
    await rig.flush()
    assert rig.usage.use(ALPINE, LATEST) == Use(2, begun + 5, begun)
    assert rig.usage.use(ALPINE, manifest.digest) == Use(3, begun + 5, begun)


async def test_a_tag_that_moves_between_two_recordings(rig: Rig) -> None:
    old, new = image(b"old"), image(b"new")
    rig.served(old)
    rig.recorder.moved(ALPINE, LATEST, old.digest, new.digest)
    rig.served(new)
    await rig.flush()
    uses = [rig.usage.use(ALPINE, each) for each in (LATEST, old.digest, new.digest)]
    assert [use.count for use in uses if use] == [2, 1, 1]
    assert rig.usage.moves(ALPINE, LATEST) == [Move(rig.clock(), old.digest, new.digest)]


@pytest.mark.parametrize(
    ("status", "keys"),
    [
        (404, {"digest": "", "result": "error"}),
        (499, {}),
        (500, {"result": "error"}),
        (200, {"kind": "blob"}),
    ],
)
async def test_no_use_of_a_manifest(rig: Rig, status: int, keys: dict[str, Any]) -> None:
    manifest = image()
    exchange = Exchange(
        **{"namespace": HUB, "repository": NAME, "reference": LATEST, "kind": "manifest", **keys}
    )
    exchange.digest = keys.get("digest", manifest.digest)
    rig.recorder.served(exchange, status)
    await rig.flush()
    assert list(rig.records.scan("use ")) == []
    assert rig.usage.stats(rig.clock())[HUB].requests == 1


async def test_requests_are_counted_by_result(rig: Rig) -> None:
    for result in ("hit", "hit", "miss", "revalidated", "stale", "negative", "error", ""):
        rig.recorder.served(Exchange("", HUB, NAME, result=result, bytes=10), 200)
    rig.recorder.served(Exchange("", "ghcr.io", NAME, result="hit", bytes=1), 200)
    rig.recorder.served(Exchange(result="error"), 404)  # it named no namespace
    await rig.flush()
    assert rig.usage.stats(rig.clock()) == {
        HUB: Counters(
            requests=8,
            hits=2,
            misses=1,
            revalidated=1,
            stale=1,
            negative=1,
            errors=1,
            hit_bytes=40,
            sent_bytes=80,
        ),
        "ghcr.io": Counters(requests=1, hits=1, hit_bytes=1, sent_bytes=1),
    }


async def test_what_no_client_asked_for_is_counted_apart(rig: Rig) -> None:
    traffic = rig.metrics.traffic(HUB)
    exchange = Exchange("", HUB, NAME, received=7)

    async def serve() -> None:
        current_exchange.set(exchange)
        traffic.count_request()
        traffic.count_received(100)

    await asyncio.create_task(serve())
    traffic.count_request()
    traffic.count_received(10)
    rig.recorder.served(exchange, 200)
    await rig.flush()
    assert exchange.upstream_requests == 1
    assert rig.usage.stats(rig.clock())[HUB] == Counters(
        requests=1, received_bytes=110, upstream_requests=2, pushed_bytes=7, ahead_bytes=10, ahead_requests=1
    )


async def test_what_goes_on_with_upstreams_is_counted_once(rig: Rig) -> None:
    traffic = rig.metrics.traffic(HUB)
    traffic.count_request()
    traffic.count_received(100)
    await rig.flush()
    await rig.flush()
    rig.metrics.traffic(HUB).count_received(11)  # of a fill whose request has been written down long ago
    await rig.flush()
    counted = Counters(received_bytes=111, upstream_requests=1, ahead_bytes=111, ahead_requests=1)
    assert rig.usage.stats(rig.clock()) == {HUB: counted}
    assert b'entrepot_received_bytes_total{namespace="docker.io"} 111.0' in rig.metrics.exposition()[0]


async def test_a_request_counts_in_its_hour(rig: Rig) -> None:
    rig.served(image())
    rig.clock.advance(HOUR)
    rig.served(image())
    await rig.flush()
    assert rig.usage.stats(rig.clock())[HUB].requests == 1
    assert rig.usage.stats(rig.clock() - HOUR)[HUB].requests == 2


async def test_two_processes_add_up(rig: Rig, tmp_path: Path) -> None:
    other = Rig(tmp_path, rig.clock)
    manifest = image()
    for each in (rig, other, other):
        each.served(manifest)
    await asyncio.gather(rig.flush(), other.flush())
    found = rig.usage.use(ALPINE, LATEST)
    assert found is not None
    assert found.count == 3
    assert other.usage.stats(rig.clock())[HUB].hits == 3
    await other.store.close()


async def test_nothing_is_written_where_nothing_was_asked(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.records, "transaction", None)
    await rig.flush()


async def test_closing_records_the_rest(rig: Rig) -> None:
    rig.served(image())
    await rig.recorder.close()
    assert rig.usage.use(ALPINE, LATEST) is not None


# In memory


async def test_a_request_does_no_io(clock: Clock) -> None:
    class Untouchable:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"{name} was asked for")

    store: Any = Untouchable()
    recorder = UsageRecorder(store, store, Metrics(), clock)
    exchange = Exchange("", HUB, NAME, LATEST, "manifest", "hit", digest=Digest.of(b""))
    recorder.served(exchange, 200)
    recorder.moved(ALPINE, LATEST, Digest.of(b""), Digest.of(b"new"))


async def test_memory_is_bounded(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 3)
    manifest = image()
    for number in range(5):
        rig.served(manifest, f"tag{number}")
        rig.recorder.moved(ALPINE, Tag(f"tag{number}"), manifest.digest, manifest.digest)
    rig.served(manifest, "tag0")
    await rig.flush()
    tags = [key.split(" ")[2] for key, _ in rig.records.scan(f"use {ALPINE} tag")]
    assert tags == ["tag0", "tag1", "tag2"]
    assert len(list(rig.records.scan("moves "))) == 3
    found = rig.usage.use(ALPINE, "tag0")
    assert found is not None
    assert found.count == 2
    assert rig.usage.stats(rig.clock())[HUB].requests == 6


async def test_many_uses_take_several_transactions(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH", 2)
    for number in range(4):
        rig.served(image(), f"tag{number}")
    await rig.flush()
    assert len(list(rig.records.scan("use "))) == 5
    assert rig.usage.stats(rig.clock())[HUB].requests == 4


# A disk that fails


async def test_what_cannot_be_recorded_waits(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = await rig.push(image(LAYER)), image(b"new")
    await rig.blob(LAYER)
    begun = rig.clock()
    with monkeypatch.context() as patch:

        def fail(*arguments: object, **options: object) -> None:
            raise StorageFailed("the disk is full")

        for records in (rig.records, rig.store.records):
            patch.setattr(records, "transaction", fail)
            patch.setattr(records, "get", fail)
        rig.served(old)
        rig.recorder.moved(ALPINE, LATEST, old.digest, new.digest)
        await rig.flush()
        await rig.flush(TOUCH)
        rig.served(old)
        await rig.flush()
    assert rig.last_use(LAYER) == begun
    await rig.flush()
    assert rig.usage.use(ALPINE, LATEST) == Use(2, begun + TOUCH, begun)
    assert rig.usage.moves(ALPINE, LATEST) == [Move(begun, old.digest, new.digest)]
    assert rig.usage.stats(begun)[HUB].hits == 2
    assert rig.last_use(LAYER) == begun + TOUCH
    await rig.flush()
    assert rig.usage.stats(begun)[HUB].hits == 2


async def test_what_tags_stood_for_takes_no_memory_without_end_while_nothing_can_be_recorded(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = image(b"one"), image(b"two")
    begun, seen = rig.clock(), [one] * 300 + [two] * 300 + [one]
    lengths: list[int] = []

    def fail(uses: object, moves: object, counts: object, resolved: dict[object, list[object]]) -> None:
        lengths.append(max(map(len, resolved.values())))
        raise StorageFailed("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(rig.usage, "record", fail)
        for each in seen:
            rig.served(each)
            await rig.flush(later=10.0)
        assert max(lengths) == 3
        for _ in range(KEPT):
            for each in (one, two):
                rig.served(each)
                await rig.flush(later=10.0)
        assert max(lengths) == KEPT
    await rig.flush()
    found = ResolutionJournal(rig.store).of(ALPINE, LATEST)
    assert [digest for _, digest in found[-2:]] == [one.digest, two.digest]
    assert len(found) == KEPT
    assert found[-1][0] == begun + (len(seen) + 2 * KEPT - 1) * 10.0


async def test_who_pulled_what_waits_too_and_is_counted_once(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, record = PullJournal(rig.records, 86400.0, rig.clock), PullJournal.record
    recorder = UsageRecorder(rig.store, rig.usage, rig.metrics, rig.clock, journal)
    monkeypatch.setattr(module, "BATCH", 1)
    begun, fails = rig.clock(), iter([True, False, True, False, False])

    def failing(self: PullJournal, pulled: Any) -> None:
        assert len(pulled) == 1
        if next(fails):
            raise StorageFailed("the disk is full")
        record(self, pulled)

    monkeypatch.setattr(PullJournal, "record", failing)
    for user in ("ann", "ben", "ann"):
        manifest = image()
        exchange = Exchange(
            "", HUB, NAME, LATEST, "manifest", result="hit", user=user, digest=manifest.digest
        )
        recorder.served(exchange, 200)
        if user == "ben":
            await recorder.flush()  # fails
        rig.clock.advance(1)
    await recorder.flush()  # the second one fails
    await recorder.flush()
    found = sorted((each.who, each.count, each.last - begun) for each in journal.since(3600.0))
    assert found == [("ann", 2, 2.0), ("ben", 1, 1.0)]
    await recorder.flush()
    assert next(fails, None) is False  # nothing is left to record


async def test_a_failure_in_the_middle_counts_nothing_twice(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", 2)
    record, calls = rig.usage.record, []

    def second_fails(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise StorageFailed("the disk is full")
        record(*arguments)

    monkeypatch.setattr(rig.usage, "record", second_fails)
    for number in range(4):
        rig.served(image(), f"tag{number}")
    await rig.flush()
    await rig.flush()
    uses = {key.split(" ")[2]: json.loads(value)[0] for key, value in rig.records.scan("use ")}
    assert uses == {image().digest: 4, "tag0": 1, "tag1": 1, "tag2": 1, "tag3": 1}
    assert rig.usage.stats(rig.clock())[HUB].requests == 4


async def test_who_is_cancelled_loses_nothing(rig: Rig, tmp_path: Path) -> None:
    rig.served(image())
    with closing(sqlite3.connect(tmp_path / "records" / "cache.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")  # the thread waits for this one
        flushing = asyncio.create_task(rig.recorder.flush())
        await asyncio.sleep(0)
        flushing.cancel()
        other.execute("ROLLBACK")
    await asyncio.gather(flushing, return_exceptions=True)
    assert flushing.cancelled()
    await rig.recorder.close()
    assert rig.usage.stats(rig.clock())[HUB].requests == 1


# What is served keeps alive what it names


async def test_serving_an_index_uses_all_that_it_names(rig: Rig) -> None:
    here, absent = image(LAYER), image(b"never fetched")
    inner = index(here, absent)
    outer = await rig.push(index(inner, absent))
    await rig.push(inner)
    await rig.push(here)
    for content in (CONFIG, LAYER, b"another"):
        await rig.blob(content)
    begun = rig.clock()
    rig.clock.advance(TOUCH)
    rig.served(outer)
    await rig.flush(5)
    used = begun + TOUCH
    assert [rig.last_use(each) for each in (CONFIG, LAYER, b"another")] == [used, used, begun]
    assert rig.usage.use(ALPINE, outer.digest) == Use(1, used, used)
    assert rig.usage.use(ALPINE, inner.digest) == rig.usage.use(ALPINE, here.digest) == Use(0, used, used)
    assert rig.usage.use(ALPINE, absent.digest) is None


async def test_a_hot_layer_that_nobody_asks_for_stays_young(rig: Rig) -> None:
    manifest = await rig.push(image(LAYER))
    await rig.blob(LAYER)
    for _ in range(100):
        rig.clock.advance(HOUR)
        rig.served(manifest)
        await rig.flush()
    assert rig.last_use(LAYER) == rig.clock()


async def test_it_is_touched_once_a_minute_at_most(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = await rig.push(image(LAYER))
    await rig.blob(LAYER)
    walked = []

    def counted(*arguments: Any) -> ManifestTree:
        walked.append(rig.clock())
        return walk(*arguments)

    monkeypatch.setattr(module, "walk", counted)
    begun = rig.clock()
    for _ in range(13):
        rig.served(manifest)
        rig.served(manifest, manifest.digest)
        await rig.flush()
        rig.clock.advance(10)
    assert walked == [begun, begun + TOUCH, begun + 2 * TOUCH]
    assert rig.last_use(LAYER) == begun + 2 * TOUCH


async def test_a_clock_that_was_set_back_does_not_keep_it_from_being_touched(rig: Rig) -> None:
    manifest = await rig.push(image(LAYER))
    await rig.blob(LAYER)
    rig.clock.advance(10 * HOUR)
    rig.served(manifest)
    await rig.flush()
    rig.clock.advance(-5 * HOUR)
    os.utime(rig.files.path(Digest.of(LAYER)), (0, 0))
    rig.served(manifest)
    await rig.flush()
    assert rig.last_use(LAYER) == rig.clock()


async def test_what_is_used_later_already_is_not_set_back(rig: Rig) -> None:
    manifest = await rig.push(image(LAYER))
    rig.served(manifest)
    rig.clock.advance(HOUR)
    await rig.blob(LAYER)
    await rig.flush()
    assert rig.last_use(LAYER) == rig.clock()


@pytest.mark.parametrize("content", [b"neither", b"[]", b'{"manifests": [{"digest": "md5:1"}]}'])
async def test_a_manifest_of_a_type_unknown_to_us_names_nothing(rig: Rig, content: bytes) -> None:
    manifest = await rig.push(Manifest.of("application/vnd.example", content))
    rig.served(manifest)
    await rig.flush()
    assert rig.usage.use(ALPINE, LATEST) is not None


# In the server


async def test_a_pull_is_recorded(serve: Serve, upstream: Upstream, clock: Clock) -> None:
    made = upstream.image("a/b", "latest")
    site = await serve(upstream)
    begun = clock()
    manifests = "/v2/a/b/manifests"
    await site.get(f"{manifests}/latest")
    async with site.request("HEAD", f"{manifests}/latest") as response:
        assert response.status == 200
    status, _, _ = await site.get(f"{manifests}/{made.digest}", If_None_Match=f'"{made.digest}"')
    assert status == 304
    _, _, layer = await site.get(f"/v2/a/b/blobs/{made.layers[0]}")
    await site.get(f"{manifests}/absent")
    clock.advance(HOUR)
    moved = upstream.image("a/b", "latest", [b"moved"])
    await site.get(f"{manifests}/latest")
    composition = site.app.composition
    await composition.fills.close()  # so that all of its traffic is counted
    await composition.recorder.flush()
    name = "docker.io/a/b"
    assert composition.usage.use(name, "latest") == Use(3, clock(), begun)
    assert composition.usage.use(name, made.digest) == Use(3, begun, begun)
    assert composition.usage.use(name, "absent") is None
    assert composition.usage.moves(name, "latest") == [
        Move(clock(), Digest(made.digest), Digest(moved.digest))
    ]
    found = composition.usage.stats(begun)["docker.io"]
    assert (found.requests, found.hits, found.misses, found.errors) == (6, 2, 3, 1)
    assert found.sent_bytes == len(made.content) + len(moved.content) + len(layer)
    assert found.received_bytes >= found.sent_bytes
    assert found.upstream_requests == len(upstream.log)
