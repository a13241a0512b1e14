"""What goes and what stays: by age, by room, by namespace; and what it costs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import LogCapture

from storage.disk.blobs import BlobFiles
from storage.disk.records import SQLiteRecords
from storage.disk.tree import StoredBlob
from storage.errors import BlobUnknown, ManifestUnknown
from storage.maintenance import blob_tree
from storage.maintenance.blob_order import BlobOrder
from storage.maintenance.blob_tree import BlobTree, oldest
from storage.maintenance.counting import Counting
from storage.maintenance.eviction import Eviction, EvictionReport, EvictionRules
from storage.maintenance.pins import PinnedContent
from storage.maintenance.usage import Usage, Use
from storage.oci import OCI_INDEX, OCI_MANIFEST, Digest, Manifest, Tag
from storage.records import BATCH, Batch
from storage.store import Store
from tests.conftest import Clock
from tests.counted import assert_counted

DAY = 86400.0
NOTHING = PinnedContent(frozenset(), frozenset())


class Place:
    """A store and its eviction; time is `clock`."""

    def __init__(self, root: Path, clock: Clock) -> None:
        self.clock = clock
        self.store = Store(BlobFiles(root, clock), SQLiteRecords(root / "records", clock), clock)
        self.pinned = NOTHING
        self.counting = Counting(self.store)

    def eviction(self, **rules: Any) -> Eviction:
        given = EvictionRules(**{"keep_for": lambda repository: math.inf, **rules})
        return Eviction(self.store, given, lambda: self.pinned, self.clock, lambda seconds: None)

    async def blob(self, content: bytes, *repositories: str) -> Digest:
        digest = Digest.of(content)
        if not self.store.holds(digest):
            upload = self.store.files.create()
            await upload.write(content)
            await upload.commit(digest)
        self.use(digest)
        for repository in repositories:
            await self.store.link(repository, digest)
        if not repositories:
            self.counting.run(everything=True)  # as a scrub finds it
        return digest

    async def image(
        self, repository: str, tag: str | None, *layers: Digest, subject: Digest | None = None
    ) -> Digest:
        named = [
            {"mediaType": "x", "digest": str(each), "size": self.store.files.path(each).stat().st_size}
            for each in layers
        ]
        tree: dict[str, Any] = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "layers": named}
        if subject:
            tree["subject"] = {"mediaType": OCI_MANIFEST, "digest": str(subject), "size": 1}
        manifest = Manifest.of(OCI_MANIFEST, json.dumps(tree).encode())
        await self.store.push_manifest(repository, Tag(tag) if tag else manifest.digest, manifest)
        return manifest.digest

    async def index(self, repository: str, tag: str, *children: Digest) -> Digest:
        named = [{"mediaType": OCI_MANIFEST, "digest": str(each), "size": 1} for each in children]
        manifest = Manifest.of(OCI_INDEX, json.dumps({"schemaVersion": 2, "manifests": named}).encode())
        await self.store.push_manifest(repository, Tag(tag), manifest)
        return manifest.digest

    def use(self, digest: Digest) -> None:
        os.utime(self.store.files.path(digest), (self.clock.now, self.clock.now))

    def holds(self, *digests: Digest) -> list[bool]:
        return [self.store.holds(each) for each in digests]

    def keys(self) -> set[str]:
        kinds = ("link", "manifest", "tag", "use", "moves", "referrers", "listing")
        return {key for kind in kinds for key, _ in self.store.records.scan(f"{kind} ")}


@pytest.fixture
def place(tmp_path: Path, clock: Clock) -> Iterator[Place]:
    place = Place(tmp_path / "cache", clock)
    yield place
    assert_counted(place.store)
    place.store.records.close()


def keep(**days: float) -> Callable[[str], float]:
    return lambda repository: days[repository.partition("/")[0]] * DAY


# By age


async def test_what_is_not_used_goes_with_all_that_hangs_on_it(place: Place) -> None:
    layer = await place.blob(b"layer", "a/x")
    digest = await place.image("a/x", "v1", layer)
    await place.image("a/x", None, layer, subject=digest)
    await place.store.listings.put("a/x", "tags", ["v1"])
    Usage(place.store.records, place.clock).record({("a/x", "v1"): Use(1, place.clock.now, 1.0)}, [], {})
    eviction = place.eviction(keep_for=keep(a=30))
    place.clock.advance(29 * DAY)
    assert replace(eviction.expire(), seconds=0) == EvictionReport()
    place.clock.advance(2 * DAY)
    dry = eviction.expire(dry_run=True)
    assert place.holds(layer) == [True]
    report = eviction.expire()
    assert (report.blobs, report.bytes, report.manifests, report.tags, report.links) == (1, 5, 2, 1, 1)
    assert replace(dry, seconds=0) == replace(report, seconds=0)
    assert place.holds(layer) == [False]
    assert place.keys() == set()


async def test_a_shared_layer_stays_while_anybody_keeps_it(place: Place) -> None:
    shared = await place.blob(b"shared", "a/x", "b/x")
    await place.image("a/x", "v1", shared)
    await place.image("b/x", "v1", shared)
    place.clock.advance(10 * DAY)
    place.eviction(keep_for=keep(a=1, b=30)).expire()
    assert place.holds(shared) == [True]
    with pytest.raises(BlobUnknown):
        await place.store.get_blob("a/x", shared)
    with pytest.raises(ManifestUnknown):
        await place.store.get_manifest("a/x", Tag("v1"))
    await (await place.store.get_blob("b/x", shared)).close()
    await place.store.get_manifest("b/x", Tag("v1"))


async def test_a_changed_rule_applies_at_once_and_never_is_never(place: Place) -> None:
    layer = await place.blob(b"layer", "a/x")
    place.clock.advance(9999 * DAY)
    place.eviction(keep_for=keep(a=math.inf)).expire()
    assert place.holds(layer) == [True]
    place.eviction(keep_for=keep(a=1)).expire()
    assert place.holds(layer) == [False]


async def test_the_children_of_an_index_that_is_used_stay(place: Place) -> None:
    child = await place.image("a/x", None)
    index = await place.index("a/x", "v1", child)
    other = await place.image("a/x", None, await place.blob(b"other", "a/x"))
    place.clock.advance(9 * DAY)
    Usage(place.store.records).record({("a/x", "v1"): Use(1, place.clock.now, place.clock.now)}, [], {})
    place.eviction(keep_for=keep(a=7)).expire()
    await place.store.get_manifest("a/x", index)
    await place.store.get_manifest("a/x", child)
    with pytest.raises(ManifestUnknown):
        await place.store.get_manifest("a/x", other)


async def test_pins_and_offline_namespaces_stay(place: Place) -> None:
    pinned = await place.blob(b"pinned", "a/x")
    manifest = await place.image("a/x", "v1", pinned)
    offline = await place.blob(b"offline", "b/x")
    plain = await place.blob(b"plain", "a/x")
    place.pinned = PinnedContent(
        frozenset({("a/x", "v1"), ("a/x", str(manifest))}), frozenset({manifest, pinned})
    )
    place.clock.advance(99 * DAY)
    rules: dict[str, Any] = {"keep_for": keep(a=1, b=1), "kept": frozenset({"b"}), "limit": 1}
    eviction = place.eviction(**rules)
    eviction.expire()
    assert place.holds(pinned, offline, plain) == [True, True, False]
    await place.store.get_manifest("a/x", Tag("v1"))
    report = eviction.shrink()
    assert place.holds(pinned, offline) == [True, True]
    assert report.short == len(b"pinnedoffline")


async def test_what_no_repository_shows_is_kept_by_default(place: Place) -> None:
    layer = await place.blob(b"layer")
    place.clock.advance(9 * DAY)
    place.eviction(default_keep_for=10 * DAY).expire()
    assert place.holds(layer) == [True]
    place.clock.advance(2 * DAY)
    place.eviction(default_keep_for=10 * DAY).expire()
    assert place.holds(layer) == [False]


async def test_a_clock_that_was_set_back_ages_nothing(place: Place) -> None:
    layer = await place.blob(b"layer", "a/x")
    place.clock.advance(-99 * DAY)
    place.eviction(keep_for=keep(a=1)).expire()
    assert place.holds(layer) == [True]


# By room


async def test_the_least_recently_used_go_until_there_is_room(place: Place) -> None:
    blobs = []
    for number in range(10):
        place.clock.advance(60)
        blobs.append(await place.blob(bytes([number]) * 100, "a/x"))
    place.clock.advance(60)
    place.use(blobs[0])
    eviction = place.eviction(limit=1000, evict_to=0.8)
    assert eviction.over() == 0
    assert eviction.shrink().blobs == 0
    assert eviction.over(coming=100) == 100
    report = eviction.shrink(coming=100)
    assert (report.blobs, report.bytes, report.links, report.short) == (3, 300, 3, 0)
    assert place.holds(*blobs[:5]) == [True, False, False, False, True]
    assert eviction.stored() == 700
    assert eviction.shrink(to=150, dry_run=True).bytes == 600
    assert eviction.shrink(to=150).bytes == 600
    assert place.holds(blobs[0]) == [True]


async def test_what_does_not_fit_even_so_takes_nothing_away(place: Place) -> None:
    layer = await place.blob(b"x" * 100, "a/x")
    assert place.eviction(limit=1000).shrink(coming=2000).blobs == 0
    assert place.holds(layer) == [True]


async def test_room_that_others_take_counts(place: Place) -> None:
    await place.blob(b"x" * 100, "a/x")
    eviction = place.eviction(min_free=lambda size: 1 << 60)
    assert eviction.over() > 0
    report = eviction.shrink()
    assert report.blobs == 1
    assert report.short > 0


async def test_a_namespaces_limit_takes_from_it_alone(place: Place) -> None:
    old = await place.blob(b"o" * 100, "a/x")
    place.clock.advance(60)
    shared = await place.blob(b"s" * 100, "a/x", "b/x")
    place.clock.advance(60)
    young = await place.blob(b"y" * 100, "a/x")
    foreign = await place.blob(b"f" * 1000, "b/x")
    eviction = place.eviction(limits={"a": 250}, evict_to=0.5)
    assert eviction.over() == 50
    report = eviction.shrink()
    assert (report.blobs, report.links) == (1, 2)
    assert place.holds(old, shared, young, foreign) == [False, True, True, True]
    with pytest.raises(BlobUnknown):
        await place.store.get_blob("a/x", shared)
    await (await place.store.get_blob("b/x", shared)).close()
    assert eviction.over() == 0


async def test_a_namespaces_links_are_read_once_and_only_if_it_may_have_too_much(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(10):
        await place.blob(b"%100d" % number, "a/x", "a/y")
        place.clock.advance(60)
    reads: list[str] = []
    keys = place.store.records.keys

    def noted(prefix: str) -> Iterator[str]:
        reads.append(prefix)
        return keys(prefix)

    monkeypatch.setattr(place.store.records, "keys", noted)
    assert place.eviction(limits={"a": 2000, "b": 1}).shrink().blobs == 0
    assert reads == []
    assert place.eviction(limits={"a": 1000}).shrink().blobs == 0  # though repositories have 2000 together
    assert reads == ["link a/"]
    assert place.eviction(limits={"a": 999}).shrink().blobs == 2
    assert reads == ["link a/"] * 2


async def test_what_was_used_since_it_was_looked_at_stays(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = await place.blob(b"layer", "a/x")
    place.clock.advance(60)
    in_order = BlobOrder.__iter__

    def used(order: BlobOrder) -> Iterator[StoredBlob]:
        for each in in_order(order):
            place.use(layer)
            yield each

    monkeypatch.setattr(BlobOrder, "__iter__", used)
    assert place.eviction(limit=1).shrink().blobs == 0
    assert place.holds(layer) == [True]


async def test_who_reads_it_reads_on(place: Place) -> None:
    layer = await place.blob(b"layer" * 1000, "a/x")
    blob = await place.store.get_blob("a/x", layer)
    place.eviction(limit=1).shrink()
    assert b"".join([chunk async for chunk in blob.chunks()]) == b"layer" * 1000
    await blob.close()


async def test_what_goes_is_told(place: Place, events: LogCapture) -> None:
    digest = await place.blob(b"layer", "a/x")
    place.eviction(limit=1).shrink()
    names = [each["event"] for each in events.entries]
    assert names == ["blob.evicted", "evict.done"]
    assert events.entries[0]["digest"] == digest


# What it costs


@pytest.mark.clients
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 50)), max_size=40))
def test_what_is_stored_is_known_after_a_look_at_what_changed_without_a_record(
    place: Place, changes: list[tuple[int, int]]
) -> None:
    eviction = place.eviction()
    for number, size in changes:
        path = place.store.files.path(Digest.of(bytes([number])))
        path.parent.mkdir(parents=True, exist_ok=True)
        if size:
            (place.store.files.root / "new").write_bytes(b"x" * size)
            (place.store.files.root / "new").rename(path)  # as a blob is committed
        else:
            path.unlink(missing_ok=True)
        place.counting.run(everything=True)
        blobs = (place.store.files.root / "blobs").glob("*/*/*")
        assert eviction.stored() == sum(each.stat().st_size for each in blobs)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 30))), st.integers(1, 200))
def test_the_oldest_are_enough_and_no_more(found: list[tuple[int, int]], enough: int) -> None:
    candidates = [StoredBlob(float(at), size, Digest(str(number))) for number, (at, size) in enumerate(found)]
    taken = oldest(iter(candidates), enough)
    assert taken == sorted(taken)
    rest = set(candidates) - set(taken)
    total = sum(each.size for each in taken)
    assert total >= min(enough, sum(size for _, size in found))
    if taken and rest:
        assert total - taken[-1].size < enough
        assert max(each.used_at for each in taken) <= min(each.used_at for each in rest)


@pytest.mark.clients
def test_many_blobs(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    number = 5_000
    digests = [f"{each * 7919 % 256:02x}{each:062x}" for each in range(number)]
    root = place.store.files.root / "blobs" / "sha256"
    for each in range(256):
        (root / f"{each:02x}").mkdir(parents=True)
    long_ago = place.clock.now - 999_999
    for each in digests:  # by plain text: to make so many paths takes longer than to make the files
        os.close(os.open(f"{root}/{each[:2]}/{each}", os.O_CREAT | os.O_WRONLY))
    for each in digests[:1000]:
        path = root / each[:2] / each
        os.truncate(path, 10)
        os.utime(path, (long_ago, long_ago))
    for start in range(0, number, 5_000):

        def link(batch: Batch, start: int = start) -> None:
            for each in digests[start : start + 5_000]:
                batch.put(f"link a/x sha256:{each}", b"10 1.0")

        place.store.records.transaction(link)
    place.counting.run(everything=True)
    reads: list[str] = []
    looked_at: list[str] = []
    scan, find = blob_tree.read_directory, BlobTree.find
    monkeypatch.setattr(
        blob_tree, "read_directory", lambda root, name: reads.append(name) or scan(root, name)
    )
    monkeypatch.setattr(BlobTree, "find", lambda tree, digest: looked_at.append(digest) or find(tree, digest))
    eviction = place.eviction(limit=9000, evict_to=1.0)
    assert eviction.stored() == 10_000
    looked_at.clear()
    report = eviction.shrink()
    assert (report.blobs, report.bytes, report.links) == (100, 1000, 100)
    assert eviction.stored() == 9000
    assert reads == []
    assert len(looked_at) <= 2 * BATCH


async def test_what_comes_next_is_what_goes_first(place: Place) -> None:
    ages = {"a/x": 100.0, "b/x": 1000.0}
    eviction = place.eviction(
        keep_for=lambda repository: ages.get(repository, math.inf), default_keep_for=50.0
    )
    begun = place.clock.now
    old = await place.blob(b"oldest", "a/x", "b/x")
    place.clock.advance(10)
    pinned = await place.blob(b"pinned", "a/x")
    place.clock.advance(10)
    kept = await place.blob(b"for ever", "c/x")
    place.clock.advance(10)
    alone = await place.blob(b"nobody's")
    place.pinned = PinnedContent(frozenset(), frozenset([pinned]))
    assert [(each.digest, named, until) for each, named, until in eviction.upcoming()] == [
        (old, ["a/x", "b/x"], begun + 1000),
        (kept, ["c/x"], math.inf),
        (alone, [], begun + 80),
    ]
    eviction.shrink(to=len(b"pinned") + len(b"for ever") + len(b"nobody's"))
    assert place.holds(old, pinned, kept, alone) == [False, True, True, True]
