"""Collection in every order with pushes, leases and mounts; what is killed in it; many processes at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage.disk import blobs
from storage.disk.records import SQLiteRecords
from storage.maintenance import collection as module
from storage.maintenance.retention import RetentionRules
from storage.oci import OCTETS, Descriptor, Digest
from storage.records import Batch
from tests.collecting import APP, BOTH, DAY, GONE, Interruption, Place, counts, descriptor, place, push_now

__all__ = ["place"]  # the fixture


@BOTH
async def test_what_is_named_between_mark_and_sweep_stays(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, other = await place.blob(b"layer"), await place.blob(b"other")
    place.clock.advance(GONE)
    tree = {"layers": [descriptor(layer)]}
    interruption = Interruption(monkeypatch, 1, lambda: push_now(place, "v1", tree))
    assert counts(place.collect()) == (0, 0, 1, 1)
    assert interruption.number < 0
    assert place.held(layer, other) == [True, False]
    assert place.links() == {layer}


@BOTH
async def test_what_is_tagged_between_mark_and_sweep_stays(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = await place.blob(b"layer")
    tree = {"layers": [descriptor(layer)]}
    digest = await place.push(tree)
    place.rules = RetentionRules(keep_untagged_for=DAY)
    place.clock.advance(GONE)
    interruption = Interruption(monkeypatch, 1, lambda: push_now(place, "v1", tree))
    assert counts(place.collect()) == (0, 0, 0, 0)
    assert interruption.number < 1
    assert place.manifests() == {digest}
    assert place.held(layer) == [True]


@BOTH
async def test_what_is_pushed_again_untagged_between_mark_and_sweep_stays(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = await place.image(None)
    tree: dict[str, Any] = {"layers": []}
    place.rules = RetentionRules(keep_untagged_for=1.0)
    place.clock.advance(GONE)

    def push() -> None:
        push_now(place, None, tree)
        place.clock.advance(60)

    Interruption(monkeypatch, 1, push)
    report = place.collect()
    assert counts(report) == (0, 0, 0, 0)
    assert report.young == 1
    assert place.manifests() == {digest}


@BOTH
async def test_what_is_leased_between_mark_and_sweep_stays(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = await place.blob(b"layer")
    digest = await place.image(None, await place.blob(b"untagged"))
    place.rules = RetentionRules(keep_untagged_for=DAY)
    place.clock.advance(GONE)

    def lease() -> None:
        monkeypatch.undo()
        place.leases._manifest(APP, digest)
        place.leases._blob(APP, layer)

    Interruption(monkeypatch, 1, lease)
    assert counts(place.collect()) == (0, 0, 0, 0)
    assert all(place.held(layer))
    assert place.manifests() == {digest}


@BOTH
async def test_a_blob_leased_between_mark_and_sweep_stays(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    leased, other = await place.blob(b"leased"), await place.blob(b"other")
    place.clock.advance(GONE)
    Interruption(monkeypatch, 1, lambda: place.leases._blob(APP, leased))
    assert counts(place.collect()) == (0, 0, 1, 1)
    assert place.held(leased, other) == [True, False]
    assert place.links() == {leased}


@BOTH
async def test_a_repository_that_is_pushed_to_all_the_time_is_collected_too(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        await place.blob(b"unwanted %d" % number)
    layer = await place.blob(b"layer")
    place.clock.advance(GONE)
    transaction, pushed = SQLiteRecords.transaction, 0

    def busy(records: SQLiteRecords, work: Callable[[Batch], object], shared: bool = False) -> object:
        nonlocal pushed
        pushed += 1
        monkeypatch.setattr(SQLiteRecords, "transaction", transaction)
        push_now(place, f"v{pushed}", {"layers": [descriptor(layer)], "annotations": {"n": str(pushed)}})
        monkeypatch.setattr(SQLiteRecords, "transaction", busy)
        return transaction(records, work, shared)

    monkeypatch.setattr(SQLiteRecords, "transaction", busy)
    monkeypatch.setattr(module, "BATCH", 1)
    assert counts(place.collect()) == (0, 0, 4, 4)
    assert pushed > module.TRIES + 4
    assert place.links() == {layer}


async def test_a_commit_over_an_unlinked_file_keeps_it(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """See Unlinked.remove()."""
    content = b"left behind"
    digest = await place.blob(content)
    await place.store.delete_blob(APP, digest)
    place.clock.advance(GONE)
    upload = await place.store.start_upload(APP)
    await upload.write(content)
    rename = Path.rename

    def commit_first(path: Path, target: Path) -> Path:
        monkeypatch.undo()
        # What publish() does, in another process: a new file, of now, under the name.
        path.unlink()
        path.write_bytes(content)
        os.utime(path, (place.clock.now, place.clock.now))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", commit_first)
    assert counts(place.collect()) == (0, 0, 0, 0)
    assert place.held(digest) == [True]
    await upload.commit(digest)
    await (await place.store.get_blob(APP, digest)).close()


async def test_a_file_that_is_linked_just_before_its_removal_is_not_moved(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = await place.blob(b"left behind")
    await place.store.delete_blob(APP, digest)
    place.clock.advance(GONE)
    interruption = Interruption(
        monkeypatch, 1, lambda: place.store._link(APP, Descriptor(OCTETS, digest, len(b"left behind")))
    )

    def refuse(path: Path, target: Path) -> Path:
        raise AssertionError(f"{path} is moved to {target}: a client may just open it")

    monkeypatch.setattr(Path, "rename", refuse)
    assert counts(place.collect()) == (0, 0, 0, 0)
    assert interruption.number < 0
    assert place.held(digest) == [True]


async def test_a_commit_succeeds_while_its_file_is_aside(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """See BlobFiles.remove_old()."""
    digest, aside = Digest.of(b"content"), place.files.root / "aside"
    path, publish, transaction = place.files.path(digest), place.files.publish, SQLiteRecords.transaction
    assert path is not None

    async def publish_and_move(*arguments: Any) -> None:
        await publish(*arguments)
        path.rename(aside)

    def moved_back_before(records: SQLiteRecords, *arguments: Any, **keys: Any) -> Any:
        if aside.exists():
            aside.rename(path)
        return transaction(records, *arguments, **keys)

    monkeypatch.setattr(place.files, "publish", publish_and_move)
    monkeypatch.setattr(SQLiteRecords, "transaction", moved_back_before)
    assert await place.blob(b"content") == digest
    assert place.links() == {digest}


@pytest.mark.parametrize("takes", [0.0, 3 * DAY])
async def test_what_is_linked_after_the_links_were_looked_at_stays(
    place: Place, monkeypatch: pytest.MonkeyPatch, takes: float
) -> None:
    """However long it takes from there to its file."""
    digest = await place.blob(b"left behind")
    await place.store.delete_blob(APP, digest)
    place.clock.advance(GONE)
    look = blobs.read_directory

    def mount_first(*arguments: Any) -> Any:
        place.store._link("other/app", place.files.open(digest).descriptor)
        place.clock.advance(takes)
        return look(*arguments)

    opened = place.files.open

    def open_and_close(*arguments: Any) -> Any:
        blob = opened(*arguments)
        os.close(blob.fileno())
        blob._file = -1
        return blob

    monkeypatch.setattr(place.files, "open", open_and_close)
    monkeypatch.setattr(blobs, "read_directory", mount_first)
    place.clock.advance(1)
    assert counts(place.collect()) == (0, 0, 0, 0)
    assert place.held(digest) == [True]


@BOTH
async def test_who_reads_it_reads_it_to_its_end(place: Place) -> None:
    content = os.urandom(3 << 20)
    digest = await place.blob(content)
    blob = await place.store.get_blob(APP, digest)
    place.clock.advance(GONE)
    place.collect()
    assert place.held(digest) == [False]
    assert b"".join([chunk async for chunk in blob.chunks()]) == content
    await blob.close()
