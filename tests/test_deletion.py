"""A manifest is deleted with its tags, also those pushed meanwhile; reading them blocks nobody."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest

from storage.disk.blobs import BlobFiles
from storage.disk.records import Batch, Records
from storage.errors import Denied, ManifestUnknown
from storage.oci import OCI_INDEX, Digest, Manifest, Tag
from storage.store import Store

MANIFEST = Manifest.of(OCI_INDEX, b'{"schemaVersion": 2, "manifests": []}')
OTHER = Manifest.of(OCI_INDEX, b'{"schemaVersion": 2, "manifests": [], "annotations": {}}')


@pytest.fixture(params=[True, False], ids=["collected", "cache"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    store = Store(BlobFiles(tmp_path), Records(tmp_path / "records"), collected=request.param)
    await store.push_manifest("a", Tag("1"), MANIFEST, [Tag("2")])
    await store.push_manifest("a", Tag("3"), OTHER)
    yield store
    await store.close()


def meanwhile(store: Store, monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> list[bool]:
    """Let `act` happen after the tags have been read for the first time; the list gets an entry a reading."""
    read, readings = store.tags_of, list[bool]()

    def tags_of(repository: str, digest: Digest) -> list[Tag]:
        found = read(repository, digest)
        readings.append(True)
        if len(readings) == 1:
            act()
        return found

    monkeypatch.setattr(store, "tags_of", tags_of)
    return readings


async def test_all_its_tags_go_and_no_other(store: Store) -> None:
    await store.delete_manifest("a", MANIFEST.digest)
    assert await store.tags("a") == ["3"]
    with pytest.raises(ManifestUnknown):
        await store.delete_manifest("a", MANIFEST.digest)


async def test_a_tag_pushed_while_they_are_read_goes_too(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    meanwhile(store, monkeypatch, lambda: store._push("a", MANIFEST, [Tag("0")], None))
    await store.delete_manifest("a", MANIFEST.digest)
    assert await store.tags("a") == ["3"]


async def test_a_tag_that_moved_away_meanwhile_stays(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    meanwhile(store, monkeypatch, lambda: store._push("a", OTHER, [Tag("2")], None))
    await store.delete_manifest("a", MANIFEST.digest)
    assert await store.tags("a") == ["2", "3"]


async def test_a_check_is_given_the_tags_of_the_transaction(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Sequence[Tag]] = []

    def refuse(batch: Batch, tags: Sequence[Tag]) -> None:
        seen.append(tags)
        raise Denied("immutable")

    meanwhile(store, monkeypatch, lambda: store._push("a", MANIFEST, [Tag("9")], None))
    with pytest.raises(Denied):
        await store.delete_manifest("a", MANIFEST.digest, refuse)
    with pytest.raises(Denied):
        await store.delete_manifest("a", Tag("3"), refuse)
    assert [list(each) for each in seen] == [["1", "2", "9"], ["3"]]
    assert await store.tags("a") == ["1", "2", "3", "9"]


async def test_nothing_is_read_within_the_transaction_unless_something_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(BlobFiles(tmp_path), Records(tmp_path / "records"), collected=True)
    for change, times in ((lambda: None, 1), (lambda: store._push("a", OTHER, [Tag("x")], None), 2)):
        await store.push_manifest("a", Tag("1"), MANIFEST)
        with monkeypatch.context() as patch:
            readings = meanwhile(store, patch, change)
            await store.delete_manifest("a", MANIFEST.digest)
        assert len(readings) == times
    await store.close()
