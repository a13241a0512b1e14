"""What a tag stands for, and how the answer came: without HTTP, from an origin that does as it is told."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from proxy.cache import tags as module
from proxy.cache.answered import Answered
from proxy.cache.drill import Drill
from proxy.cache.origin import RECENT, Origin
from proxy.cache.policy import Policy
from proxy.cache.tags import TagRevalidation
from storage.disk.blobs import BlobFiles
from storage.disk.records import SQLiteRecords
from storage.errors import ManifestUnknown, NameUnknown, OriginDenied, OriginFailed, RegistryError
from storage.keys import OUTBOX
from storage.oci import OCI_MANIFEST, Descriptor, Digest, Manifest, Reference, Tag
from storage.records import Batch
from storage.registry import Registry
from storage.store import Store
from tests.conftest import Clock

LATEST = Tag("latest")
FRESH = 600.0
ONE, TWO = (Manifest.of(OCI_MANIFEST, b'{"schemaVersion": 2, "n": %d}' % number) for number in (1, 2))


class FakeOrigin(Registry):
    """It has one tag, `now`, or raises `error`, and notes how it is asked.

    Its answer to a HEAD waits for `gate`, once it has `reached` it.  Its circuit is open unless
    it is `healthy`.
    """

    probe_due = False
    pause = None

    def __init__(self) -> None:
        self.now = ONE
        self.error: RegistryError | None = None
        self.asked: list[str] = []
        self.healthy = True
        self.gate: asyncio.Event | None = None
        self.reached = asyncio.Event()

    async def probe(self) -> None:
        raise AssertionError("a probe that is not due")

    async def get_manifest(self, repository: str, reference: Reference) -> Manifest:
        self.asked.append("GET")
        if self.error is not None:
            raise self.error
        return self.now

    async def resolve_manifest(self, repository: str, reference: Reference) -> Descriptor:
        self.asked.append("HEAD")
        if self.gate is not None:
            self.reached.set()
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        return self.now.descriptor


@dataclass
class Rig:
    origin: FakeOrigin
    store: Store
    clock: Clock
    moves: list[tuple[str, Digest, Digest]] = field(default_factory=list)

    def tags(
        self,
        fresh_for: float = FRESH,
        *,
        offline: bool = False,
        drop: bool = False,
        timeout: float = math.inf,
    ) -> TagRevalidation:
        policy = Policy(lambda tag: fresh_for, offline=offline, drop_deleted=drop, revalidate_timeout=timeout)
        origin = Origin("up", self.origin, self.store, policy, self.clock, Drill(self.clock))
        return TagRevalidation(origin, self.store, policy, self.clock, self)

    def record(self, batch: Batch, repository: str, tag: Tag, old: Digest, new: Digest) -> None:
        batch.put(OUTBOX.key(str(tag), "1"), f"{repository} {old} {new}".encode())

    async def moved(self, repository: str, tag: Tag, old: Digest, new: Digest) -> None:
        self.moves.append((f"{repository}:{tag}", old, new))


@pytest.fixture
async def rig(tmp_path: Path, clock: Clock) -> AsyncIterator[Rig]:
    store = Store(BlobFiles(tmp_path, clock), SQLiteRecords(tmp_path / "records", clock), clock)
    yield Rig(FakeOrigin(), store, clock)
    await store.close()


async def test_a_tag_is_a_miss_then_a_hit_then_revalidated(rig: Rig) -> None:
    tags = rig.tags()
    assert await tags.get("a/b", LATEST) == Answered(ONE, "miss", 0.0, FRESH)
    rig.clock.advance(10)
    assert await tags.get("a/b", LATEST) == Answered(ONE, "hit", 10.0, FRESH - 10)
    rig.clock.advance(FRESH)
    assert await tags.get("a/b", LATEST) == Answered(ONE, "revalidated", 0.0, FRESH)
    assert rig.origin.asked == ["GET", "HEAD"]


async def test_a_tag_that_moved_is_a_miss_and_reported(rig: Rig) -> None:
    tags = rig.tags()
    await tags.get("a/b", LATEST)
    rig.origin.now = TWO
    rig.clock.advance(FRESH)
    assert await tags.get("a/b", LATEST) == Answered(TWO, "miss", 0.0, FRESH)
    assert rig.moves == [("up/a/b:latest", ONE.digest, TWO.digest)]
    recorded = rig.store.records.get(OUTBOX.key("latest", "1"))
    assert recorded == f"up/a/b {ONE.digest} {TWO.digest}".encode()


async def test_a_stale_tag_says_why_and_the_origin_has_a_pause(rig: Rig) -> None:
    tags = rig.tags()
    await tags.get("a/b", LATEST)
    rig.clock.advance(FRESH + 5)
    rig.origin.error = OriginFailed("down")
    for _ in range(2):
        assert await tags.get("a/b", LATEST) == Answered(ONE, "stale", FRESH + 5, -5.0, "UNAVAILABLE")
    assert rig.origin.asked == ["GET", "HEAD"]


async def test_offline_any_age_is_a_hit(rig: Rig) -> None:
    await rig.tags().get("a/b", LATEST)
    rig.clock.advance(FRESH + 5)
    tags = rig.tags(offline=True)
    assert await tags.get("a/b", LATEST) == Answered(ONE, "hit", FRESH + 5, -5.0)
    with pytest.raises(ManifestUnknown, match="set offline") as raised:
        await tags.get("a/b", Tag("other"))
    assert not raised.value.remembered


async def test_a_tag_that_is_fresh_without_limit_has_no_ttl_even_stale(rig: Rig) -> None:
    tags = rig.tags(math.inf)
    assert await tags.get("a/b", LATEST) == Answered(ONE, "miss", 0.0, None)
    rig.clock.advance(-10)  # the clock was set back: it is not known how old the tag is
    rig.origin.error = OriginFailed("down")
    assert await tags.get("a/b", LATEST) == Answered(ONE, "stale", -10.0, None, "UNAVAILABLE")


async def test_an_unknown_tag_is_remembered_as_such(rig: Rig) -> None:
    tags = rig.tags()
    rig.origin.error = ManifestUnknown("no such tag")
    for remembered in (False, True):
        with pytest.raises(ManifestUnknown) as raised:
            await tags.get("a/b", LATEST)
        assert raised.value.remembered == remembered
    assert rig.origin.asked == ["GET"]


@pytest.mark.parametrize("drop", [False, True])
async def test_a_tag_that_was_deleted_is_kept_or_dropped(rig: Rig, drop: bool) -> None:
    tags = rig.tags(drop=drop)
    await tags.get("a/b", LATEST)
    rig.origin.error = ManifestUnknown("deleted")
    rig.clock.advance(FRESH)
    if drop:
        with pytest.raises(ManifestUnknown):
            await tags.get("a/b", LATEST)
    else:
        assert await tags.get("a/b", LATEST) == Answered(ONE, "stale", FRESH, 0.0, "MANIFEST_UNKNOWN")
    assert (rig.store.pointer("up/a/b", LATEST) is None) == drop


# How long a known tag waits for the origin


async def settled(tags: TagRevalidation) -> None:
    """Wait until no validation is under way."""
    while tags._origin.flights._flights:
        await asyncio.wait(tags._origin.flights._flights.values())


@pytest.mark.parametrize("seconds", [RECENT, 60.0, 86400.0])
async def test_a_failure_of_long_ago_makes_no_later_check_short(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    tags = rig.tags()
    for tag in (LATEST, Tag("other")):
        await tags.get("a/b", tag)
    rig.clock.advance(FRESH)
    rig.origin.error = OriginFailed("down")
    assert (await tags.get("a/b", LATEST)).result == "stale"
    rig.origin.error, rig.origin.now = None, TWO
    rig.clock.advance(seconds)
    rig.origin.gate = asyncio.Event()
    pulling = asyncio.create_task(tags.get("a/b", Tag("other")))
    await rig.origin.reached.wait()
    assert not pulling.done()
    rig.origin.gate.set()
    assert await pulling == Answered(TWO, "miss", 0.0, FRESH)


@pytest.mark.parametrize("why", ["just failed", "circuit open"])
async def test_a_failing_origin_is_hardly_waited_for(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    tags = rig.tags()
    for tag in (LATEST, Tag("other")):
        await tags.get("a/b", tag)
    rig.clock.advance(FRESH)
    if why == "just failed":
        rig.origin.error = OriginFailed("down")
        await tags.get("a/b", LATEST)
        rig.origin.error = None
    rig.origin.healthy = why != "circuit open"
    rig.origin.gate, rig.origin.now = asyncio.Event(), TWO
    found = await tags.get("a/b", Tag("other"))
    assert (found.value, found.result, found.detail) == (ONE, "stale", "UNAVAILABLE")
    rig.origin.gate.set()
    await settled(tags)
    # The check went on, and has updated the tag.
    assert await tags.get("a/b", Tag("other")) == Answered(TWO, "hit", 0.0, FRESH)


async def test_after_the_time_for_it_a_known_tag_is_stale_and_the_check_goes_on(rig: Rig) -> None:
    tags = rig.tags(timeout=0.0)
    await tags.get("a/b", LATEST)
    rig.clock.advance(FRESH)
    rig.origin.gate, rig.origin.now = asyncio.Event(), TWO
    for _ in range(2):  # those who come meanwhile do not wait at all
        found = await tags.get("a/b", LATEST)
        assert (found.value, found.result, found.detail) == (ONE, "stale", "UNAVAILABLE")
    assert rig.origin.asked == ["GET", "HEAD"]
    rig.origin.gate.set()
    await settled(tags)
    assert await tags.get("a/b", LATEST) == Answered(TWO, "hit", 0.0, FRESH)
    assert rig.moves == [("up/a/b:latest", ONE.digest, TWO.digest)]


async def test_a_check_that_came_late_ends_the_pause(rig: Rig) -> None:
    tags = rig.tags(0.0, timeout=0.0)  # a tag that is never fresh
    await tags.get("a/b", LATEST)
    rig.clock.advance(1)
    rig.origin.gate = asyncio.Event()
    assert (await tags.get("a/b", LATEST)).result == "stale"
    rig.origin.gate.set()
    await settled(tags)
    rig.origin.gate = None
    await tags.get("a/b", LATEST)
    await settled(tags)
    assert rig.origin.asked == ["GET", "HEAD", "HEAD"]


async def test_an_unknown_tag_waits_without_limit(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    rig.origin.healthy = False
    assert (await rig.tags(timeout=0.0).get("a/b", LATEST)).result == "miss"


@pytest.mark.parametrize("error", [OriginDenied("401"), ManifestUnknown("404"), NameUnknown("404")])
async def test_what_the_origin_refuses_follows_on_upstream_delete(rig: Rig, error: RegistryError) -> None:
    keeping, dropping = rig.tags(), rig.tags(drop=True)
    await keeping.get("a/b", LATEST)
    rig.origin.error = error
    rig.clock.advance(FRESH)
    for _ in range(2):
        found = await keeping.get("a/b", LATEST)
        assert (found.value, found.result, found.detail) == (ONE, "stale", error.code)
    with pytest.raises(type(error)):
        await dropping.get("a/b", LATEST)
    with pytest.raises(type(error)):  # it is deleted here, too
        await keeping.get("a/b", LATEST)


async def test_a_tag_that_was_refused_is_back_with_the_right_credentials(rig: Rig) -> None:
    tags = rig.tags(drop=True)
    await tags.get("a/b", LATEST)
    rig.origin.error = OriginDenied("401")
    rig.clock.advance(FRESH)
    with pytest.raises(OriginDenied):
        await tags.get("a/b", LATEST)
    rig.origin.error = None
    assert (await tags.get("a/b", LATEST)).result == "miss"
