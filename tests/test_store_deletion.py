"""What an operator deletes of a private store, what goes with it, and what stays."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest

from storage.errors import StorageFailed
from storage.maintenance.deletion import Deletion, DeletionReport, DeletionRequest
from storage.maintenance.pins import Pin
from storage.maintenance.retention import RetentionRules
from storage.oci import Digest, Tag
from tests.collecting import APP, DAY, GONE, Interruption, Place, place, push_now

__all__ = ["place"]  # the fixture

FIXED = (re.compile("v.*"),)

Delete = Callable[..., DeletionReport]


@pytest.fixture
def delete(place: Place) -> Delete:
    """Delete what matches; tags that begin with v are immutable."""
    deletion = Deletion(place.store, place.leases, lambda repository: FIXED, place.clock)

    def run(pattern: str, dry_run: bool = False, **keys: float) -> DeletionReport:
        return deletion.run(DeletionRequest(Pin(pattern), **keys), dry_run)  # type: ignore[arg-type]

    return run


async def test_a_tag_goes_with_what_only_it_keeps(place: Place, delete: Delete) -> None:
    base, top = await place.blob(b"base"), await place.blob(b"top")
    children = [await place.image(None, base, top), await place.image(None, top)]
    index = await place.index("1", *children)
    await place.image(None, await place.blob(b"signature"), subject=index)
    other = await place.image("2", base)
    dry = delete(f"{APP}:1", dry_run=True)
    assert len(place.manifests()) == 5
    found = delete(f"{APP}:1")
    assert found == dry == DeletionReport([f"{APP}:1"], {}, 4, 2, len(b"top") + len(b"signature"))
    assert place.tags() == {"2"}
    assert place.manifests() == {other}
    assert not await place.store.referrers(APP, index)
    # The blobs stay until the collection, which then frees just them.
    assert place.held(base, top) == [True, True]
    place.clock.advance(GONE)
    collected = place.collect()
    assert (collected.blobs, collected.bytes) == (found.blobs, found.bytes)
    assert place.held(base, top) == [True, False]


async def test_what_another_tag_keeps_stays(place: Place, delete: Delete) -> None:
    image = await place.image("1", await place.blob(b"layer"))
    await place.store.push_manifest(APP, Tag("2"), (await place.store.get_manifest(APP, image)))
    assert delete(f"{APP}:1") == DeletionReport([f"{APP}:1"], {}, 0, 0, 0)
    assert place.manifests() == {image}
    child = await place.image("child")
    await place.index("index", child)
    assert delete(f"{APP}:child").manifests == 0
    assert child in place.manifests()


async def test_what_an_untagged_manifest_names_stays(place: Place, delete: Delete) -> None:
    child = await place.image("1", await place.blob(b"layer"))
    index = await place.index(None, child)
    assert delete(f"{APP}:1") == DeletionReport([f"{APP}:1"], {}, 0, 0, 0)
    assert place.manifests() == {child, index}


async def test_a_manifest_goes_with_its_tags(place: Place, delete: Delete) -> None:
    image = await place.image("1", await place.blob(b"layer"))
    await place.store.push_manifest(APP, Tag("2"), (await place.store.get_manifest(APP, image)))
    found = delete(f"{APP}@{image}")
    assert found == DeletionReport([f"{APP}:1", f"{APP}:2", f"{APP}@{image}"], {}, 1, 1, 5)
    assert place.manifests() == place.tags() == set()


async def test_a_part_of_another_image_is_kept(place: Place, delete: Delete) -> None:
    child = await place.image(None)
    await place.index("1", child)
    found = delete(f"{APP}@{child}")
    assert found == DeletionReport([], {f"{APP}@{child}": "part of another image"})
    assert child in place.manifests()


async def test_immutable_tags_and_what_they_keep_stay(place: Place, delete: Delete) -> None:
    child = await place.image(None, await place.blob(b"layer"))
    index = await place.index("v1", child)
    loose = await place.image(None, await place.blob(b"loose"))
    await place.image("1", await place.blob(b"other"))
    assert delete(f"{APP}:v1") == DeletionReport([], {f"{APP}:v1": "immutable"})
    found = delete(f"{APP}@{child}")
    assert found.kept == {f"{APP}@{child}": "part of an image whose tag is immutable"}
    found = delete(APP)
    assert (found.references, found.manifests) == ([f"{APP}:1", f"{APP}@{loose}"], 2)
    assert found.kept == {f"{APP}:v1": "immutable"}
    assert place.manifests() == {index, child}
    assert place.tags() == {"v1"}


async def test_repositories_by_glob(place: Place, delete: Delete) -> None:
    layer = await place.blob(b"layer", "local/a")
    for name in ("local/a", "local/b", "other/c"):
        await place.image("1", layer, repository=name)
        await place.image("2", layer, repository=name)
        if name != "local/a":
            await place.store.mount_blob(name, layer, "local/a")
    assert delete("local/*:1", dry_run=True).references == ["local/a:1", "local/b:1"]
    found = delete("local/*")
    assert found.references == ["local/a:1", "local/a:2", "local/b:1", "local/b:2"]
    assert found.blobs == 0  # another repository shows it
    assert place.tags("other/c") == {"1", "2"}
    place.clock.advance(GONE)
    place.collect()  # until then the others show it still
    assert delete("other/?") == DeletionReport(["other/c:1", "other/c:2"], {}, 1, 1, 5)
    assert delete("*") == DeletionReport()


@pytest.mark.parametrize(
    ("request_", "gone"),
    [
        ({"older_than": 2.5 * DAY}, {"ci-1", "ci-2"}),
        ({"older_than": 0.0}, {"ci-1", "ci-2", "ci-3", "ci-4", "ci-5"}),
        ({"older_than": 9 * DAY}, set()),
        ({"keep": 2}, {"ci-1", "ci-2", "ci-3"}),
        ({"keep": 0}, {"ci-1", "ci-2", "ci-3", "ci-4", "ci-5"}),
        ({"keep": 9}, set()),
        ({"keep": 4, "older_than": 2.5 * DAY}, {"ci-1"}),
        ({"keep": 1, "older_than": 2.5 * DAY}, {"ci-1", "ci-2"}),
    ],
)
async def test_by_age_and_number(
    place: Place, delete: Delete, request_: dict[str, float], gone: set[str]
) -> None:
    loose = await place.image(None)
    for number in range(1, 6):
        await place.image(f"ci-{number}", await place.blob(b"%d" % number))
        await place.image(f"v{number}", await place.blob(b"v%d" % number))
        place.clock.advance(DAY)
    before = place.tags()
    place.clock.advance(-0.9 * DAY)  # ci-5 was pushed a tenth of a day ago
    for pattern in (f"{APP}:ci-*", APP):
        dry = delete(pattern, dry_run=True, **request_)
        assert {each.partition(":")[2] for each in dry.references} == gone
    found = delete(f"{APP}:ci-*", **request_)
    assert {each.partition(":")[2] for each in found.references} == gone
    assert place.tags() == before - gone
    assert loose in place.manifests()  # a request for tags means no others


async def test_what_is_young_can_be_deleted(place: Place, delete: Delete) -> None:
    image = await place.image("1")
    await place.leases.manifest(APP, image, 0.0)
    assert delete(f"{APP}:1").manifests == 1
    assert place.all_keys() == set()


async def test_nothing_is_found(place: Place, delete: Delete) -> None:
    await place.image("1")
    for pattern in (f"{APP}:2", f"{APP}@{Digest.of(b'x')}", "local/other", "nowhere/*", f"{APP}:z*"):
        assert delete(pattern) == DeletionReport()


async def test_a_push_in_the_middle_keeps_what_it_names(
    place: Place, delete: Delete, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = await place.image("1", await place.blob(b"layer"))
    manifest = await place.store.get_manifest(APP, image)
    Interruption(monkeypatch, 1, lambda: place.store._push(APP, manifest, [Tag("2")], None))
    found = delete(f"{APP}:1")
    assert found == DeletionReport([f"{APP}:1"], {}, 0, 0, 0)
    assert place.tags() == {"2"}
    assert place.manifests() == {image}


async def test_pushes_without_an_end_do_not_delay_it_for_ever(
    place: Place, delete: Delete, monkeypatch: pytest.MonkeyPatch
) -> None:
    await place.image("1")
    pushes = iter(range(1000))

    class Endless(Interruption):
        def push(self) -> None:
            self.number = 2  # again: the push itself is a transaction
            push_now(place, None, {"annotations": {"push": str(next(pushes))}})

    endless = Endless(monkeypatch, 1, lambda: endless.push())
    assert delete(f"{APP}:1").references == [f"{APP}:1"]
    assert 1 < next(pushes) < 10


async def test_many_images_go_in_several_transactions(
    place: Place, delete: Delete, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.maintenance.deletion.GROUPS", 3)
    for number in range(10):
        await place.push({"annotations": {"number": str(number)}}, f"ci-{number}")
    Interruption(monkeypatch, 3, lambda: push_now(place, "ci-new", {"annotations": {"new": ""}}))
    found = delete(f"{APP}:ci-*")
    assert (len(found.references), found.manifests) == (11, 11)
    assert place.all_keys() == set()


async def test_a_damaged_record_is_named(place: Place, delete: Delete) -> None:
    await place.image("1")
    place.records.put(f"tag {APP} 2", b"damaged")
    with pytest.raises(StorageFailed, match=f"the record 'tag {APP} 2' is damaged: push it again"):
        delete(APP)


async def test_a_collection_beside_it_changes_nothing(place: Place, delete: Delete) -> None:
    await place.image("1", await place.blob(b"layer"))
    place.rules = RetentionRules(keep_untagged_for=DAY)
    await place.image("2", await place.blob(b"other"))
    delete(f"{APP}:1")
    place.clock.advance(GONE)
    place.collect()
    assert place.tags() == {"2"}
    assert len(place.links()) == 1
    assert json.loads(place.records.get("collected") or b"")["manifests"] == 0
