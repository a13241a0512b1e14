"""What is collected and what stays: by reach, by rule, by grace; and what is told of it."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Callable

import msgspec
import pytest
from structlog.testing import LogCapture

from storage.disk.records import SQLiteRecords
from storage.errors import BlobUnknown, ManifestUnknown
from storage.maintenance import collection as module
from storage.maintenance import pace
from storage.maintenance.collection import CollectionRow
from storage.maintenance.nodes import node, prefix_of
from storage.maintenance.reachability import Reachability
from storage.maintenance.retention import KeepTags, RetentionRules
from storage.maintenance.watched_time import WatchedTime
from storage.oci import OCI_MANIFEST, Digest, Manifest, Tag
from storage.records import Batch
from tests.collecting import (
    APP,
    DAY,
    GONE,
    GRACE,
    Interruption,
    Place,
    counts,
    descriptor,
    place,
    push_now,
)

__all__ = ["place"]  # the fixture

ARTIFACT = "application/vnd.oci.artifact.manifest.v1+json"


# By reach


async def test_what_no_manifest_names_goes_with_its_bytes(place: Place) -> None:
    wanted, unwanted = await place.blob(b"wanted"), await place.blob(b"unwanted")
    await place.image("v1", wanted)
    place.clock.advance(GONE)
    report = place.collect()
    assert counts(report) == (0, 0, 1, 1)
    assert report.bytes == len(b"unwanted")
    assert report.rows == [CollectionRow(repository=APP, links=1)]
    assert place.held(wanted, unwanted) == [True, False]
    assert place.links() == {wanted}


async def test_a_tag_keeps_its_index_its_children_and_theirs(place: Place) -> None:
    layer = await place.blob(b"layer")
    inner = await place.index(None, await place.image(None, layer))
    await place.index("v1", inner)
    place.rules = RetentionRules(keep_untagged_for=DAY)
    place.clock.advance(9 * GONE)
    assert counts(place.collect()) == (0, 0, 0, 0)
    await place.store.delete_manifest(APP, Tag("v1"))
    assert counts(place.collect()) == (0, 3, 1, 1)
    assert place.all_keys() == set()
    assert place.held(layer) == [False]


async def test_what_refers_to_what_stays_stays_and_goes_with_it(place: Place) -> None:
    image = await place.image("v1", await place.blob(b"layer"))
    signature = await place.image(None, await place.blob(b"signature"), subject=image)
    await place.image(None, await place.blob(b"of the signature"), subject=signature)
    place.rules = RetentionRules(keep_untagged_for=DAY)
    place.clock.advance(9 * GONE)
    assert counts(place.collect()) == (0, 0, 0, 0)
    assert len(await place.store.referrers(APP, image)) == 1
    await place.store.delete_manifest(APP, Tag("v1"))
    assert counts(place.collect()) == (0, 3, 3, 3)
    assert place.all_keys() == set()


async def test_a_referrer_does_not_keep_its_subject(place: Place) -> None:
    image = await place.image(None, await place.blob(b"layer"))
    signature = await place.image("signature", await place.blob(b"signature"), subject=image)
    place.rules = RetentionRules(keep_untagged_for=DAY)
    place.clock.advance(9 * GONE)
    assert counts(place.collect()) == (0, 1, 1, 1)
    assert place.manifests() == {signature}
    assert [each.digest for each in await place.store.referrers(APP, image)] == [signature]


async def test_a_manifest_keeps_what_it_names_in_whatever_way(place: Place) -> None:
    blobs = [await place.blob(b"%d" % number) for number in range(5)]
    # An artifact manifest, which 1.1 has no more; no JSON at all; blobs in an index, as BuildKit's caches.
    await place.push({"blobs": [descriptor(blobs[0])]}, "a", media_type=ARTIFACT)
    odd = Manifest.of("text/x-list", f"layers: {blobs[1]} {blobs[2]}".encode())
    await place.store.push_manifest(APP, Tag("b"), odd)
    await place.push({"manifests": [descriptor(blobs[3])]}, "c")
    escaped = json.dumps({"layers": [descriptor(blobs[4])]}).replace("sha256:", "sha256\\u003a")
    await place.store.push_manifest(APP, Tag("d"), Manifest.of(OCI_MANIFEST, escaped.encode()))
    place.clock.advance(GONE)
    assert counts(place.collect()) == (0, 0, 0, 0)
    assert all(place.held(*blobs))


async def test_of_a_type_that_is_not_known_what_is_named_is_kept_but_the_subject(place: Place) -> None:
    child, subject = await place.image(None), await place.push({"annotations": {"a": "b"}})
    tree = {"blobs": [descriptor(child)], "subject": descriptor(subject)}
    artifact = await place.push(tree, "a", media_type=ARTIFACT)
    place.rules = RetentionRules(keep_untagged_for=DAY)
    place.clock.advance(GONE)
    place.collect()
    assert place.manifests() == {artifact, child}


async def test_an_annotation_keeps_no_manifest(place: Place) -> None:
    base = await place.image(None)
    image = await place.push({"annotations": {"org.opencontainers.image.base.digest": str(base)}}, "v1")
    place.rules = RetentionRules(keep_untagged_for=DAY)
    place.clock.advance(GONE)
    place.collect()
    assert place.manifests() == {image}


async def test_a_blob_stays_while_any_repository_shows_it(place: Place) -> None:
    layer = await place.blob(b"layer", "local/a")
    await place.image("v1", layer, repository="local/a")
    await place.store.mount_blob("other/b", layer, "local/a")
    await place.image("v1", layer, repository="other/b")
    place.clock.advance(GONE)
    await place.store.delete_manifest(
        "local/a", (await place.store.resolve_manifest("local/a", Tag("v1"))).digest
    )
    report = place.collect()
    assert counts(report) == (0, 0, 1, 0)
    assert report.repositories == 2
    await (await place.store.get_blob("other/b", layer)).close()
    with pytest.raises(BlobUnknown):
        await place.store.get_blob("local/a", layer)


async def test_sparse_manifests_are_no_obstacle(place: Place) -> None:
    absent = Digest.of(b"absent")
    await place.index("v1", absent)
    await place.image("v2", absent)
    place.clock.advance(GONE)
    assert counts(place.collect()) == (0, 0, 0, 0)


async def test_what_reaches_itself_goes_as_a_whole(place: Place) -> None:
    """An index whose subject is its own child: each keeps the other."""
    child = await place.image(None)
    named = descriptor(child, OCI_MANIFEST)
    await place.push({"manifests": [named], "subject": named})
    place.rules = RetentionRules(keep_untagged_for=DAY)
    place.clock.advance(GONE)
    assert counts(place.collect()) == (0, 2, 0, 0)
    assert place.all_keys() == set()


def test_names_are_told_by_64_bits() -> None:
    digests = [Digest.of(b"1"), Digest.of(b"2", "sha512")]
    found = node(Manifest.of("text/plain", " ".join(digests).encode()))
    assert set(found.names) == set(map(prefix_of, digests))
    assert found.names.itemsize == 8


@pytest.mark.clients
def test_the_graph_takes_little_memory(place: Place) -> None:
    count = 1000

    def push(batch: Batch) -> None:
        for number in range(count):
            layers = [descriptor(Digest.of(b"%d %d" % (number, layer))) for layer in range(4)]
            manifest = Manifest.of(OCI_MANIFEST, json.dumps({"layers": layers}).encode())
            place.store.put_manifest(batch, APP, manifest)
            place.store.put_tags(batch, APP, {Tag(f"v{number}"): manifest.digest})

    place.records.transaction(push)
    marks = Reachability(place.store, place.leases, APP)
    tracemalloc.start()
    try:
        marks.refresh()
        assert marks.removable(RetentionRules(), WatchedTime(0.0), 500) == ([], 0)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert held < 500 * count  # bytes


# By rule


async def test_untagged_is_kept_for_its_time_since_it_was_used_last(place: Place) -> None:
    digest = await place.image(None, await place.blob(b"layer"))
    place.rules = RetentionRules(keep_untagged_for=30 * DAY)
    place.clock.advance(29 * DAY)
    await place.leases.manifest(APP, digest, 0.0)
    place.clock.advance(29 * DAY)
    assert counts(place.collect()) == (0, 0, 0, 0)
    place.clock.advance(2 * DAY)
    assert counts(place.collect()) == (0, 1, 1, 1)


async def test_untagged_that_is_kept_keeps_its_children(place: Place) -> None:
    child = await place.image(None, await place.blob(b"layer"))
    place.clock.advance(20 * DAY)
    await place.index(None, child)
    place.rules = RetentionRules(keep_untagged_for=30 * DAY)
    place.clock.advance(20 * DAY)
    assert counts(place.collect()) == (0, 0, 0, 0)


async def test_untagged_is_kept_for_ever_unless_a_rule_says_else(place: Place) -> None:
    await place.image(None, await place.blob(b"layer"))
    place.clock.advance(9999 * DAY)
    assert counts(place.collect()) == (0, 0, 0, 0)


async def tagged(place: Place, *tags: str) -> list[Digest]:
    found = []
    for tag in tags:
        place.clock.advance(60)
        found.append(await place.image(tag, await place.blob(tag.encode())))
    return found


def rules(*kept: tuple[str, int], immutable: str = "", **keys: float) -> RetentionRules:
    return RetentionRules(
        keep_tags=tuple(KeepTags((re.compile(pattern),), last) for pattern, last in kept),
        immutable=(re.compile(immutable),) if immutable else (),
        **keys,
    )


async def test_of_the_tags_that_match_the_last_that_were_pushed_stay(place: Place) -> None:
    await tagged(place, "ci-1", "ci-2", "ci-3", "ci-4", "v1")
    await tagged(place, "ci-1")  # again: it is the newest now
    place.rules = rules(("ci-.*", 2))
    place.clock.advance(GONE)
    report = place.collect()
    # What only they held goes with them, though what is untagged is kept for ever.
    assert counts(report) == (2, 2, 2, 2)
    assert place.tags() == {"ci-1", "ci-4", "v1"}


async def test_the_first_rule_that_matches_counts(place: Place) -> None:
    await tagged(place, "ci-1", "ci-2", "ci-main-1", "ci-main-2", "ci-main-3")
    place.rules = rules(("ci-main-.*", 2), ("ci-.*", 1))
    place.clock.advance(GONE)
    place.collect()
    assert place.tags() == {"ci-2", "ci-main-2", "ci-main-3"}


async def test_immutable_tags_neither_go_nor_count(place: Place) -> None:
    await tagged(place, "ci-1", "ci-2-final", "ci-3", "ci-4-final")
    place.rules = rules(("ci-.*", 1), immutable=".*-final")
    place.clock.advance(GONE)
    place.collect()
    assert place.tags() == {"ci-2-final", "ci-3", "ci-4-final"}


async def test_what_another_tag_holds_stays_when_a_tag_goes(place: Place) -> None:
    (digest, _, _) = await tagged(place, "ci-1", "ci-2", "ci-3")
    manifest = await place.store.get_manifest(APP, digest)
    await place.store.push_manifest(APP, Tag("stable"), manifest)
    place.rules = rules(("ci-.*", 1))
    place.clock.advance(GONE)
    assert counts(place.collect()) == (2, 1, 1, 1)
    assert place.tags() == {"ci-3", "stable"}
    await place.store.get_manifest(APP, Tag("stable"))


async def test_an_index_keeps_what_it_lists_whatever_its_type(place: Place) -> None:
    kind = "application/vnd.example.thing+json"
    thing = await place.push({"thing": 1}, media_type=kind)
    layer = await place.blob(b"a layer")
    await place.push({"manifests": [descriptor(thing, kind), descriptor(layer)]}, "things")
    place.rules = RetentionRules(keep_untagged_for=DAY)
    place.clock.advance(GONE)
    assert counts(place.collect()) == (0, 0, 0, 0)
    assert str(thing) in place.manifests()
    assert place.held(layer) == [True]


async def test_what_several_tags_hold_goes_with_the_last_of_them(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after any transaction, no tag lacks what it held."""
    shared = await place.image(None, await place.blob(b"shared"))
    for number in range(5):
        place.clock.advance(60)
        await place.index(f"ci-{number}", shared, await place.image(None, await place.blob(b"%d" % number)))
    place.rules = rules(("ci-.*", 1))
    place.clock.advance(GONE)
    monkeypatch.setattr(module, "BATCH", 1)
    transaction, steps = SQLiteRecords.transaction, 0

    def step(records: SQLiteRecords, work: Callable[[Batch], object], shared: bool = False) -> object:
        nonlocal steps
        steps += 1
        found = transaction(records, work, shared)
        for tag in place.tags():
            pointer = place.store.pointer(APP, Tag(tag))
            assert pointer is not None
            index = place.store.manifest(APP, pointer.digest)[0]
            assert set(node(index).children) <= place.manifests()
        return found

    monkeypatch.setattr(SQLiteRecords, "transaction", step)
    report = place.collect()
    assert counts(report) == (4, 8, 4, 4)
    assert steps >= 4
    assert shared in place.manifests()


async def test_a_tag_stays_while_what_it_holds_is_asked_for(place: Place) -> None:
    child = await place.image(None, await place.blob(b"layer"))
    await place.index("ci-1", child)
    place.clock.advance(60)
    await place.image("ci-2")
    place.rules = rules(("ci-.*", 1))
    place.clock.advance(GONE)
    await place.leases.manifest(APP, child, 0.0)
    report = place.collect()
    assert counts(report) == (0, 0, 0, 0)
    assert report.young == 3
    place.clock.advance(GONE)
    assert counts(place.collect()) == (1, 2, 1, 1)


# By grace


async def test_nothing_that_is_young_goes(place: Place) -> None:
    place.rules = rules(("ci-.*", 1), keep_untagged_for=1.0)
    await place.blob(b"unnamed")
    await place.image(None, await place.blob(b"untagged"))
    await tagged(place, "ci-1", "ci-2")
    place.clock.advance(GRACE)
    report = place.collect()
    assert counts(report) == (0, 0, 0, 0)
    assert report.young == 3  # the tag ci-1, what is untagged, and the link
    place.clock.advance(GRACE)
    assert counts(place.collect()) == (1, 2, 3, 3)


async def test_a_blob_that_a_client_was_told_of_stays(place: Place) -> None:
    layer = await place.blob(b"layer")
    place.clock.advance(GONE)
    await place.leases.blob(APP, layer, 0.0)
    place.clock.advance(GRACE)
    assert counts(place.collect()) == (0, 0, 0, 0)
    assert place.collect().young == 1
    await place.image("v1", layer)
    place.clock.advance(GONE)
    assert counts(place.collect()) == (0, 0, 0, 0)


async def test_a_lease_costs_a_write_only_when_it_is_due(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, digest = await place.blob(b"layer"), await place.image(None)
    pushed_at, transactions = place.clock.now, []
    transaction = SQLiteRecords.transaction
    monkeypatch.setattr(
        SQLiteRecords,
        "transaction",
        lambda *arguments, **options: (
            transactions.append(place.clock.now) or transaction(*arguments, **options)
        ),
    )

    async def ask() -> int:
        transactions.clear()
        await place.leases.blob(APP, layer, place.files.path(layer).stat().st_mtime)
        await place.leases.manifest(APP, digest, pushed_at)
        return len(transactions)

    assert await ask() == 0
    place.clock.advance(GRACE * 0.6)
    assert await ask() == 2
    assert await ask() == 0
    place.clock.advance(GRACE * 0.6)
    assert await ask() == 2


async def test_a_lease_of_what_has_gone_is_refused(place: Place) -> None:
    layer, digest = await place.blob(b"layer"), await place.image(None)
    place.rules = RetentionRules(keep_untagged_for=DAY)
    place.clock.advance(GONE)
    place.collect()
    with pytest.raises(BlobUnknown):
        await place.leases.blob(APP, layer, 0.0)
    with pytest.raises(ManifestUnknown):
        await place.leases.manifest(APP, digest, 0.0)
    assert place.all_keys() == set()


# Damage


@pytest.mark.errors("collect.refused")
async def test_nothing_goes_while_a_damaged_database_lies_there(place: Place, events: LogCapture) -> None:
    digest = await place.blob(b"unwanted")
    place.clock.advance(GONE)
    aside = place.files.root / "records.damaged-17"
    aside.mkdir()
    report = place.collect()
    assert counts(report) == (0, 0, 0, 0)
    assert str(aside) in report.refused
    assert place.held(digest) == [True]
    (event,) = [each for each in events.entries if each["event"] == "collect.refused"]
    assert "remove that directory" in event["reason"]
    aside.rmdir()
    assert counts(place.collect()) == (0, 0, 1, 1)


@pytest.mark.errors("collect.refused")
async def test_nothing_goes_when_the_records_are_damaged_meanwhile(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = await place.blob(b"unwanted")
    place.clock.advance(GONE)
    Interruption(monkeypatch, 1, lambda: (place.files.root / "records.damaged-17").mkdir())
    assert place.collect().refused
    assert place.links() == {digest}
    assert place.held(digest) == [True]


@pytest.mark.errors("collect.refused")
@pytest.mark.parametrize("kind", ["manifest", "tag"])
async def test_a_repository_with_a_damaged_record_is_left_as_it_is(
    place: Place, events: LogCapture, kind: str
) -> None:
    layer, unwanted = await place.blob(b"layer"), await place.blob(b"unwanted")
    elsewhere = await place.blob(b"elsewhere", "local/other")
    await place.image("v1", layer)
    place.clock.advance(GONE)
    (key,) = place.records.keys(f"{kind} {APP} ")

    def damage(batch: Batch) -> None:
        batch._cache.set(key, b"not what was put")

    place.records.transaction(damage)
    report = place.collect()
    assert place.held(layer, unwanted, elsewhere) == [True, True, False]
    assert [each.repository for each in report.rows if each.refused] == [APP]
    (event,) = [each for each in events.entries if each["event"] == "collect.refused"]
    assert event["repository"] == APP
    assert key in event["reason"]
    await place.image("v1", layer)  # pushed anew
    assert counts(place.collect()) == (0, 0, 1, 1)


@pytest.mark.errors("collect.refused")
async def test_a_damaged_record_is_found_beside_one_whose_key_differs_in_the_last_character(
    place: Place,
) -> None:
    layer = await place.blob(b"layer")
    await place.image("v10", await place.blob(b"another"))
    await place.image("v11", layer)
    place.clock.advance(GONE)
    place.records.transaction(lambda batch: batch._cache.set(f"tag {APP} v11", b"not what was put"))
    report = place.collect()
    assert place.held(layer) == [True]
    assert [each.repository for each in report.rows if each.refused] == [APP]


async def test_a_link_that_cannot_be_read_still_keeps_the_blob(place: Place) -> None:
    layer = await place.blob(b"layer")
    await place.image("v1", layer)
    place.clock.advance(GONE)
    place.records.transaction(lambda batch: batch._cache.set(f"link {APP} {layer}", b"?"))
    assert counts(place.collect()) == (0, 0, 0, 0)
    assert place.held(layer) == [True]


# What is told


async def test_a_dry_run_tells_the_same_and_removes_nothing(place: Place) -> None:
    await tagged(place, "ci-1", "ci-2", "ci-3")
    await place.blob(b"unnamed")
    place.rules = rules(("ci-.*", 1))
    place.clock.advance(GONE)
    before = place.all_keys()
    dry = place.collect(dry_run=True)
    assert place.all_keys() == before
    assert place.collection().last().begun == 0
    report = place.collect()
    assert counts(dry) == counts(report) == (2, 2, 3, 3)
    differs = {"dry_run": False, "seconds": 0.0}
    assert msgspec.structs.replace(dry, **differs) == msgspec.structs.replace(report, **differs)
    assert place.collection().last() == report


async def test_it_works_in_slices(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):
        await place.image(f"v{number}", await place.blob(b"%d" % number))
    monkeypatch.setattr(pace, "SLICE", 0.0)
    rests: list[float] = []
    collection = place.collection(rests.append)
    collection.run()
    assert len(rests) > 20
    assert all(each > 0 for each in rests)


async def test_one_that_is_stopped_is_gone_on_with_by_the_next(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        await place.image(None, await place.blob(b"%d" % number))
    place.rules = RetentionRules(keep_untagged_for=DAY)
    place.clock.advance(GONE)
    monkeypatch.setattr(pace, "SLICE", 0.0)
    monkeypatch.setattr(module, "BATCH", 3)

    class Stopped(Exception):
        pass

    def stop(seconds: float) -> None:
        if len(place.manifests()) < 10:
            raise Stopped

    collection = place.collection(stop)
    with pytest.raises(Stopped):
        collection.run()
    assert 0 < len(place.manifests()) < 10
    place.collect()
    assert place.all_keys() == set()


# What it costs


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The repositories that were marked."""
    found: list[str] = []
    refresh = Reachability.refresh
    monkeypatch.setattr(
        Reachability,
        "refresh",
        lambda marks, *given: found.append(marks.repository) or refresh(marks, *given),
    )
    return found


async def settled(place: Place, *repositories: str) -> None:
    """Push an image to each, and collect until there is nothing more to find."""
    for repository in repositories:
        await place.image("v1", await place.blob(b"layer", repository), repository=repository)
    place.clock.advance(GONE)
    place.collect()


async def test_what_has_not_changed_is_not_looked_at_again(place: Place, looked_at: list[str]) -> None:
    await settled(place, "local/a", "local/b")
    assert looked_at == ["local/a", "local/b"]
    looked_at.clear()
    assert place.collect(dry_run=True).repositories == 2
    assert place.collect().repositories == 2
    assert looked_at == []
    await place.image("v2", repository="local/b")
    place.collect()
    assert looked_at == ["local/b"]


async def test_what_was_removed_or_is_young_is_looked_at_again(place: Place, looked_at: list[str]) -> None:
    await place.image("v1", await place.blob(b"layer"))
    await place.blob(b"named by nothing")
    for _ in range(2):
        place.collect()
    assert looked_at == [APP, APP], "while it is young"
    place.clock.advance(GONE)
    assert place.collect().links == 1
    place.collect()
    assert looked_at == [APP] * 4
    place.collect()
    assert looked_at == [APP] * 4


@pytest.mark.parametrize("way", ["delete a tag", "move a tag", "delete a manifest", "link", "push by digest"])
async def test_what_changes_it_has_it_looked_at(place: Place, looked_at: list[str], way: str) -> None:
    await settled(place, APP)
    looked_at.clear()
    if way == "delete a tag":
        await place.store.delete_manifest(APP, Tag("v1"))
    elif way == "move a tag":
        await place.image("v1", await place.blob(b"another"))
    elif way == "delete a manifest":
        (digest,) = place.manifests()
        await place.store.delete_manifest(APP, Digest(digest))
    elif way == "link":
        await place.blob(b"another")
    else:
        await place.image(None)
    place.clock.advance(GONE)
    place.rules = RetentionRules(keep_untagged_for=0.0)
    report = place.collect()
    assert looked_at[0] == APP
    assert report.manifests + report.links > 0
    assert len(place.manifests()) == (way in ("move a tag", "link", "push by digest"))


async def test_rules_for_what_is_there_apply_to_what_has_not_changed(place: Place) -> None:
    untagged = await place.image(None, await place.blob(b"untagged"))
    await settled(place, APP)
    place.collect()
    place.rules = RetentionRules(keep_untagged_for=0.0)
    assert place.collect().manifests == 1
    assert str(untagged) not in place.manifests()
    place.collect()
    place.rules = RetentionRules(keep_tags=(KeepTags((re.compile("v.*"),), 1),))
    await place.image("v2")
    place.clock.advance(GONE)
    place.rules = RetentionRules()
    for _ in range(2):
        place.collect()
    place.rules = RetentionRules(keep_tags=(KeepTags((re.compile("v.*"),), 1),))
    assert place.collect().tags == 1


async def test_a_push_during_the_last_look_is_looked_at(
    place: Place, looked_at: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    await place.image("v1", await place.blob(b"layer"))
    place.clock.advance(GONE)
    Interruption(monkeypatch, 1, lambda: push_now(place, "v2", {}))
    place.collect()
    assert place.tags() == {"v1", "v2"}
    looked_at.clear()
    place.collect()
    assert looked_at == [APP]
