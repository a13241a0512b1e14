"""A manifest is deleted with its tags, which an index tells."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.disk.blobs import BlobFiles
from storage.disk.records import SQLiteRecords
from storage.disk.salvage import checksum
from storage.errors import Denied, ManifestUnknown
from storage.keys import TAG
from storage.oci import OCI_INDEX, Digest, Manifest, Tag
from storage.records import Batch
from storage.store import Store
from storage.values import Pointer

MANIFEST = Manifest.of(OCI_INDEX, b'{"schemaVersion": 2, "manifests": []}')
OTHER = Manifest.of(OCI_INDEX, b'{"schemaVersion": 2, "manifests": [], "annotations": {}}')


@pytest.fixture(params=[True, False], ids=["collected", "cache"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    store = Store(BlobFiles(tmp_path), SQLiteRecords(tmp_path / "records"), collected=request.param)
    await store.push_manifest("a", Tag("1"), MANIFEST, [Tag("2")])
    await store.push_manifest("a", Tag("3"), OTHER)
    yield store
    await store.close()


async def test_all_its_tags_go_and_no_other(store: Store) -> None:
    await store.delete_manifest("a", MANIFEST.digest)
    assert await store.tags("a") == ["3"]
    with pytest.raises(ManifestUnknown):
        await store.delete_manifest("a", MANIFEST.digest)


async def test_a_check_is_given_the_tags_of_the_transaction(store: Store) -> None:
    seen: list[Sequence[Tag]] = []

    def refuse(batch: Batch, tags: Sequence[Tag]) -> None:
        seen.append(tags)
        raise Denied("immutable")

    with pytest.raises(Denied):
        await store.delete_manifest("a", MANIFEST.digest, allowed=refuse)
    with pytest.raises(Denied):
        await store.delete_manifest("a", Tag("3"), allowed=refuse)
    assert [list(each) for each in seen] == [["1", "2"], ["3"]]
    assert await store.tags("a") == ["1", "2", "3"]


async def test_a_tag_that_another_process_pushes_or_moves_meanwhile(store: Store) -> None:
    """The other one waits for the transaction: what it pushes then is not deleted."""
    other = Store(BlobFiles(store.files.root), SQLiteRecords(store.files.root / "records"))
    with ThreadPoolExecutor(1) as process:

        def push(batch: Batch, tags: Sequence[Tag]) -> None:
            pushes.append(process.submit(other._push, "a", MANIFEST, [Tag("0"), Tag("3")], None))

        pushes: list[Future[None]] = []
        await store.delete_manifest("a", MANIFEST.digest, allowed=push)
        pushes[0].result()
        process.submit(other.records.close).result()
    assert await store.tags("a") == ["0", "3"]
    await store.delete_manifest("a", MANIFEST.digest)
    with pytest.raises(ManifestUnknown):
        await other.resolve_manifest("a", Tag("3"))
    await other.close()


# The index


def scanned(records: SQLiteRecords, repository: str, digest: Digest) -> list[str]:
    """What the index must say."""
    found = records.scan(TAG.prefix(repository))
    return [key for key, value in found if (at := Pointer.parse(value)) and at.digest == digest]


def asked(records: SQLiteRecords, repository: str, digest: Digest) -> list[str]:
    return records.transaction(lambda batch: batch.tags_at(repository, digest))


DIGESTS = [Digest.of(b"1"), Digest.of(b"2"), Digest.of(b"1", "sha512")]
names, tags, targets = st.sampled_from(["a", "a/b", "a0"]), st.sampled_from("abcd"), st.sampled_from(DIGESTS)
steps = st.one_of(
    st.tuples(st.just("push"), names, st.lists(tags, max_size=3), targets),
    st.tuples(st.just("point"), names, tags, targets),
    st.tuples(st.just("delete"), names, tags),
    st.tuples(st.just("drop"), names, targets),
    st.tuples(st.just("break"), names, tags),
    st.tuples(st.just("fail"), names, tags, targets),
)


@pytest.mark.clients
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(done=st.lists(steps, max_size=25), made=st.integers(0, 25))
def test_the_index_has_what_a_scan_finds(tmp_path: Path, done: list[Any], made: int) -> None:
    with TemporaryDirectory(dir=tmp_path) as directory:
        stores = [
            Store(BlobFiles(Path(directory)), SQLiteRecords(Path(directory) / "records")) for _ in range(2)
        ]
        for number, (what, repository, *rest) in enumerate(done):
            store = stores[number % 2]  # two processes write
            if number >= made:
                asked(store.records, repository, DIGESTS[0])  # here at the latest the index is made
            with suppress(ManifestUnknown, Denied):
                act(store, what, repository, *rest)
        for repository in ("a", "a/b", "a0"):
            for digest in DIGESTS:
                expected = scanned(stores[0].records, repository, digest)
                assert asked(stores[0].records, repository, digest) == expected
                assert asked(stores[1].records, repository, digest) == expected
        for store in stores:
            store.records.close()


def act(store: Store, what: str, repository: str, *rest: Any) -> None:
    records = store.records
    if what == "push":
        digests = dict.fromkeys(map(Tag, rest[0]), rest[1])
        records.transaction(lambda batch: store.put_tags(batch, repository, digests))
    elif what == "point":
        records.put(TAG.key(repository, rest[0]), Pointer(rest[1], 1.5).encode())
    elif what == "delete":
        store._delete(repository, Tag(rest[0]), None)
    elif what == "drop":
        store._delete(repository, rest[0], None)
    elif what == "break":
        records.put(TAG.key(repository, rest[0]), DIGESTS[0].encode())
    else:

        def fail(batch: Batch) -> None:
            store.put_tags(batch, repository, {Tag(rest[0]): rest[1]})
            raise Denied("not today")

        records.transaction(fail)


def test_what_a_former_version_wrote_is_in_the_index(tmp_path: Path) -> None:
    with closing(SQLiteRecords(tmp_path / "records")) as records:
        for number in range(3):
            records.put(TAG.key("a", f"v{number}"), Pointer(DIGESTS[number % 2], 1.0).encode())
        assert asked(records, "a", DIGESTS[0]) == [TAG.key("a", "v0"), TAG.key("a", "v2")]
        # A former version runs again: it knows nothing of the index.
        key, value = TAG.key("a", "v1"), Pointer(DIGESTS[0], 2.0).encode()
        with closing(sqlite3.connect(tmp_path / "records" / "cache.db")) as former, former:
            former.execute("UPDATE Cache SET value = ? WHERE key = ?", (checksum(key, value) + value, key))
            former.execute("DELETE FROM Cache WHERE key = ?", (TAG.key("a", "v0"),))
        assert asked(records, "a", DIGESTS[0]) == [key, TAG.key("a", "v2")]


def test_a_damaged_tag_is_not_found(tmp_path: Path) -> None:
    with closing(SQLiteRecords(tmp_path / "records")) as records:
        for tag in ("1", "2"):
            records.put(TAG.key("a", tag), Pointer(DIGESTS[0], 1.0).encode())
        with closing(sqlite3.connect(tmp_path / "records" / "cache.db")) as other, other:
            damage = "UPDATE Cache SET value = CAST(value || '9' AS BLOB) WHERE key = ?"
            other.execute(damage, (TAG.key("a", "1"),))
        assert asked(records, "a", DIGESTS[0]) == scanned(records, "a", DIGESTS[0]) == [TAG.key("a", "2")]


def test_it_reads_only_the_tags_of_the_manifest(tmp_path: Path) -> None:
    def steps(batch: Batch) -> int:
        """How much SQLite works."""
        count = 0

        def step() -> int:
            nonlocal count
            count += 1
            return 0

        connection = batch._cache._con
        batch.tags_at("a", DIGESTS[0])  # makes the index
        connection.set_progress_handler(step, 1)
        assert batch.tags_at("a", DIGESTS[0]) == [TAG.key("a", "wanted")]
        connection.set_progress_handler(None, 1)
        return count

    with closing(SQLiteRecords(tmp_path / "records")) as records:
        records.put(TAG.key("a", "wanted"), Pointer(DIGESTS[0], 1.0).encode())
        few = records.transaction(steps)
        others = {TAG.key("a", f"v{number}"): Pointer(DIGESTS[1], 1.0).encode() for number in range(2000)}
        others |= {TAG.key(f"b{number}", "1"): Pointer(DIGESTS[0], 1.0).encode() for number in range(2000)}
        records.transaction(lambda batch: [batch.put(*each) for each in others.items()])
        assert records.transaction(steps) < few + 100
