"""The totals are what the records add up to, whoever writes, and whenever they are counted."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import LogCapture

from storage.disk.blobs import BlobFiles
from storage.disk.records import SQLiteRecords
from storage.errors import StorageFailed
from storage.keys import BLOB, EVERY, LINK, MANIFEST, STORED, TAG, TOTAL, USE
from storage.maintenance import counting as module
from storage.maintenance.counting import Counting
from storage.maintenance.eviction import Eviction, EvictionRules
from storage.oci import OCI_MANIFEST, Digest, Manifest, Tag
from storage.records import Batch
from storage.store import Store
from storage.totals import Total, Totals
from storage.values import BlobUse
from tests.conftest import Clock
from tests.counted import assert_counted, counts, plain, totals
from tests.preloaded import PROGRAM

A, B = "docker.io/library/a", "docker.io/library/b"
DIGEST = Digest.of(b"content")


def opened(root: Path, clock: Clock, private: bool = False) -> Store:
    return Store(BlobFiles(root, clock, private=private), SQLiteRecords(root / "records", clock), clock)


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    found = opened(tmp_path / "cache", clock)
    yield found
    found.records.close()


async def put(store: Store, content: bytes, *repositories: str) -> Digest:
    digest = Digest.of(content)
    for repository in repositories:
        upload = await store.start_upload(repository)
        await upload.write(content)
        await upload.commit(digest)
    return digest


async def push(store: Store, repository: str, tag: str, text: str = "") -> Digest:
    manifest = Manifest.of(
        OCI_MANIFEST, json.dumps({"schemaVersion": 2, "annotations": {"x": text}}).encode()
    )
    await store.push_manifest(repository, Tag(tag), manifest)
    return manifest.digest


def total(store: Store, repository: str) -> Total:
    return dict(Totals(store.records).repositories())[repository]


def as_former(store: Store) -> None:
    """Leave only what a former version wrote."""
    for kind in (BLOB, TOTAL, STORED):
        for key in list(store.records.keys(kind.prefix())):
            raw(store).delete(key)
    raw(store).delete("counted")


def raw(store: Store) -> SQLiteRecords:
    """Its records, which change no total."""
    return SQLiteRecords(store.files.root / "records")


# What they count


async def test_what_is_stored_is_counted_with_it(store: Store) -> None:
    await put(store, b"content", A, B)
    await put(store, b"more", A)
    digest = await push(store, A, "1")
    await push(store, A, "latest")
    counted = total(store, A).counted
    assert counted is not None
    assert counted.numbers == {"link": 2, "manifest": 1, "tag": 2}
    size = len(store.manifest(A, digest)[0].content)
    assert counted.bytes == {"link": 11, "manifest": size}
    assert counted.size == 11 + size
    assert Totals(store.records).stored() == 11, "each blob once"
    assert_counted(store)
    await store.delete_manifest(A, digest)
    await store.delete_blob(A, DIGEST)
    assert_counted(store)
    await store.delete_blob(B, DIGEST)
    assert [name for name, _ in Totals(store.records).repositories()] == [A]
    assert Totals(store.records).stored() == 11, "the files are there"


async def test_what_is_put_again_counts_once(store: Store, clock: Clock) -> None:
    for _ in range(3):
        clock.advance(60)
        await put(store, b"content", A)
        await push(store, A, "1")
    await push(store, A, "1", "another")
    counted = total(store, A).counted
    assert counted is not None
    assert counted.numbers == {"link": 1, "manifest": 2, "tag": 1}
    assert_counted(store)


async def test_what_fails_counts_nothing(store: Store) -> None:
    await put(store, b"content", A)

    def work(batch: Batch) -> None:
        batch.put(TAG.key(A, "1"), b"x 1")
        raise StorageFailed("no")

    before = plain(totals(store))
    with pytest.raises(StorageFailed):
        store.records.transaction(work)
    assert plain(totals(store)) == before
    assert_counted(store)


def test_a_time_of_use_is_the_last_one(store: Store) -> None:
    for at in (5.0, 9.0, 7.0):
        store.records.put(USE.key(A, "1"), json.dumps([1, at, 1.0]).encode())
    counted = total(store, A).counted
    assert counted is not None
    assert counted.used == 9.0
    assert counted.numbers == {"use": 1}


def test_two_names_of_which_one_begins_with_the_other_are_two(store: Store) -> None:
    for name in (A, f"{A}-x", f"{A}/y"):
        store.records.put(TAG.key(name, "1"), b"x 1")
    assert [name for name, _ in Totals(store.records).repositories(A)] == [A, f"{A}-x", f"{A}/y"]
    assert [name for name, _ in Totals(store.records).repositories(f"{A}-")] == [f"{A}-x"]
    assert_counted(store)


KEYS = [kind.key(each, "1") for kind in (TAG, LINK, MANIFEST) for each in (A, B)]
VALUES = [None, b"10 5.0", b"20 6.0", b"x 1.0\ncontent", b"[1,2.0,3.0]", b"00000000000009 7"]
changes = st.lists(
    st.tuples(st.sampled_from([*KEYS, USE.key(A, "1"), BLOB.key(DIGEST)]), st.sampled_from(VALUES)),
    max_size=12,
)


@pytest.mark.clients
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(changes, max_size=5), st.booleans())
def test_whatever_is_written_while_they_are_counted(
    store: Store, monkeypatch: pytest.MonkeyPatch, groups: list[list[tuple[str, bytes | None]]], known: bool
) -> None:
    """One step of each count, some writes, and so on."""
    monkeypatch.setattr(module, "BATCH", 2)
    monkeypatch.setattr(type(store.files), "holds", lambda files, digest: True)

    def write(group: list[tuple[str, bytes | None]]) -> None:
        def work(batch: Batch) -> None:
            for key, value in group:
                if value is None:
                    batch.delete(key)
                else:
                    batch.put(key, value)

        store.records.transaction(work)

    write([(TAG.key(A, str(number)), b"x 1.0") for number in range(5)])
    if not known:
        as_former(store)
    counting = Counting(store)
    running = [counting.check(TOTAL.key(A)), counting.check(TOTAL.key(B))]
    for group in groups:
        write(group)
        for each in running:
            next(each, None)
    for each in running:
        list(each)
    counting.run()
    for key in (TOTAL.key(A), TOTAL.key(B)):
        assert plain(totals(store)).get(key) == plain(counts(store)).get(key)
    for kind in (TAG, LINK, MANIFEST, USE, BLOB):
        write([(key, None) for key in store.records.keys(kind.prefix())])
    assert totals(store) == {}


# A directory of a former version


async def test_a_former_directory_is_counted_once(store: Store, events: LogCapture) -> None:
    await put(store, b"content", A, B)
    await push(store, A, "1")
    right = plain(totals(store))
    as_former(store)
    assert Totals(store.records).stored() is None
    Counting(store).run()
    assert plain(totals(store)) == right
    assert [each["totals"] for each in events.entries if each["event"] == "totals.counted"] == [3]
    Counting(store).run()
    assert len(events.entries) == 1


async def test_what_comes_before_they_are_counted_is_counted_with_the_others(
    tmp_path: Path, clock: Clock, store: Store
) -> None:
    await put(store, b"content", A)
    as_former(store)
    with closing(SQLiteRecords(store.files.root / "records")) as records:
        newer = Store(store.files, records, clock)  # opened when there were records already
        await put(newer, b"more", A, B)
        assert Totals(newer.records).stored() is None
        assert {each and each.size for each in totals(newer).values()} == {None}
        Counting(newer).run()
        await put(newer, b"third", "docker.io/library/c")
        assert_counted(newer)
        assert Totals(newer.records).stored() == len(b"contentmorethird")


async def test_a_count_that_was_interrupted_goes_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(7):
        await push(store, A, str(number))
    right = plain(totals(store))
    as_former(store)
    monkeypatch.setattr(module, "BATCH", 2)
    steps = Counting(store).check(TOTAL.key(A))
    for _ in range(3):
        next(steps)
    reached = total(store, A).reached
    assert total(store, A).counted is None
    Counting(store).run()
    assert reached > TAG.prefix(A)
    assert plain(totals(store)) == right


# What is wrong is put right


def test_a_wrong_total_is_told_of_and_corrected(store: Store, events: LogCapture) -> None:
    store.records.put(TAG.key(A, "1"), b"x 1")
    raw(store).put(TAG.key(A, "2"), b"x 1")  # as a former version does
    Counting(store).run(everything=True)
    assert_counted(store)
    told = [each for each in events.entries if each["event"] == "totals.corrected"]
    assert [(each["of"], each["known"], each["found"]) for each in told] == [
        (A, ({"tag": 1}, {}), ({"tag": 2}, {}))
    ]


def test_what_is_written_during_a_count_is_no_correction(
    store: Store, events: LogCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.records.put(TAG.key(A, "1"), b"x 1")
    scan = store.records.scan

    def written_before(prefix: str, after: str = "") -> Iterator[tuple[str, bytes]]:
        monkeypatch.undo()
        store.records.put(TAG.key(A, "2"), b"x 1")
        return scan(prefix, after)

    monkeypatch.setattr(store.records, "scan", written_before)
    for _ in Counting(store).check(TOTAL.key(A)):
        pass
    assert_counted(store)
    assert [each for each in events.entries if each["event"] == "totals.corrected"] == []


@pytest.mark.parametrize("record", [b"", b"{}", b"[]", b'{"changes": "x"}', b"\xff" * 9])
def test_a_total_that_cannot_be_read_is_counted_again(store: Store, record: bytes) -> None:
    store.records.put(TAG.key(A, "1"), b"x 1")
    raw(store).put(TOTAL.key(A), record)
    Counting(store).run(everything=True)
    assert_counted(store)


async def test_links_to_what_is_gone_go_from_a_cache_alone(tmp_path: Path, clock: Clock) -> None:
    for private in (False, True):
        store = opened(tmp_path / str(private), clock, private)
        await put(store, b"content", A, B)
        await put(store, b"more", A)
        store.files.path(DIGEST).unlink()
        Counting(store).run(everything=True)
        assert len(list(store.records.keys(LINK.prefix()))) == (3 if private else 1)
        assert Totals(store.records).stored() == len(b"more")
        assert_counted(store)
        store.records.close()


async def test_a_file_without_a_record_is_found(store: Store) -> None:
    upload = store.files.create()
    await upload.write(b"content")
    await upload.commit(DIGEST)
    assert Totals(store.records).stored() is None
    Counting(store).run(everything=True)
    assert Totals(store.records).stored() == 7
    assert BlobUse.parse(store.records.get(BLOB.key(DIGEST))) is not None


# Death between a file and its record

DOOMED = """
import asyncio, math, os, signal, sys
from pathlib import Path
from storage.disk import records
from storage.disk.blobs import BlobFiles
from storage.maintenance import blob_order, eviction
from storage.maintenance.eviction import Eviction, EvictionRules
from storage.oci import Digest
from storage.store import Store

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

root, step = Path(sys.argv[1]), sys.argv[2]
store = Store(BlobFiles(root), records.SQLiteRecords(root / "records"))
if step == "before the records":
    eviction.forget_blob = die
elif step == "before the end of the transaction":
    records.SQLiteBatch.delete = die
elif step == "before the link":
    Store.put_link = die

async def main():
    if step == "before the link":
        upload = await store.start_upload("docker.io/library/a")
        await upload.write(b"another")
        await upload.commit(Digest.of(b"another"))
    else:
        rules = EvictionRules(keep_for=lambda repository: math.inf)
        Eviction(store, rules).shrink(to=5)

asyncio.run(main())
"""


@pytest.mark.clients
@pytest.mark.parametrize(
    "step", ["before the records", "before the end of the transaction", "before the link"]
)
async def test_a_death_between_a_file_and_its_record_is_made_up_for(
    store: Store, clock: Clock, step: str
) -> None:
    for number in range(10):
        clock.advance(1)
        await put(store, b"%d" % number, A, B)
    root = str(store.files.root)
    ended = subprocess.run([*PROGRAM, DOOMED, root, step], check=False)  # noqa: ASYNC221
    assert ended.returncode == -signal.SIGKILL
    files = sum(each.stat().st_size for each in store.files.root.glob("blobs/*/*/*"))
    assert files == (17 if step == "before the link" else 5)
    assert Totals(store.records).stored() == 10, "it does not know yet"
    Counting(store).run(everything=True)
    assert Totals(store.records).stored() == files
    assert_counted(store)
    links = {LINK.parse(key)[1] for key in store.records.keys(LINK.prefix())}
    assert all(store.holds(Digest(each)) for each in links)
    Eviction(store, EvictionRules(keep_for=lambda repository: 0.0), clock=clock).shrink(to=0)
    assert not list(store.files.root.glob("blobs/*/*/*")), "what nobody linked goes as well"
    assert_counted(store)


async def test_an_eviction_goes_on_past_what_is_gone(store: Store, clock: Clock) -> None:
    """The order meets what is gone already, and goes on."""
    digests = [await put(store, b"%d" % number, A) for number in range(4)]
    store.files.path(digests[0]).unlink()
    eviction = Eviction(store, EvictionRules(keep_for=lambda repository: 0.0), clock=clock)
    eviction.shrink(to=2)
    left = sum(store.holds(each) for each in digests)
    assert 0 < left <= 2
    assert Totals(store.records).stored() == left
    assert_counted(store)


@pytest.mark.errors("records.damaged")
async def test_a_database_that_was_damaged_is_counted_anew(
    tmp_path: Path, clock: Clock, store: Store
) -> None:
    def fill(batch: Batch) -> None:
        for number in range(300):
            batch.put(TAG.key(A, f"v{number}"), b"x 1")
            batch.put(MANIFEST.key(A, f"d{number}"), b"x 1\ncontent %d" % number)

    store.records.transaction(fill)
    root = store.files.root / "records"
    store.records.close()
    with closing(sqlite3.connect(root / "cache.db")) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("PRAGMA journal_mode=DELETE")
    content = (root / "cache.db").read_bytes()
    with (root / "cache.db").open("r+b") as file:  # a page with rows, not of an index
        file.seek(content.index(b"content 150") // 4096 * 4096)
        file.write(b"\xa5" * 4096)
    with closing(SQLiteRecords(root, clock)) as records:
        with suppress(StorageFailed):
            list(records.scan(EVERY))
        for thread in threading.enumerate():
            if thread.name == "records":
                thread.join()
    with closing(SQLiteRecords(root, clock)) as records:
        damaged = Store(store.files, records, clock)
        assert 0 < sum(1 for _ in records.keys(TAG.prefix(A))) <= 300
        assert 0 < sum(1 for _ in records.keys(MANIFEST.prefix(A))) < 300
        assert totals(damaged) == {}
        await push(damaged, A, "new")
        await push(damaged, B, "new")
        assert plain(totals(damaged)) == {TOTAL.key(A): None, TOTAL.key(B): None}
        Counting(damaged).run()
        assert_counted(damaged)
        await push(damaged, "docker.io/library/c", "new")
        assert_counted(damaged)


# What they cost


@pytest.mark.parametrize("stored", [10, 1000])
def test_a_listing_costs_what_it_shows(store: Store, stored: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(batch: Batch) -> None:
        for number in range(stored):
            batch.put(LINK.key(A, f"sha256:{number:064}"), b"10 1.0")
            batch.put(BLOB.key(f"sha256:{number:064}"), BlobUse(1, 10).encode())

    store.records.transaction(work)
    rows: list[Callable[[], None]] = []
    read = SQLiteRecords._rows
    monkeypatch.setattr(
        SQLiteRecords, "_rows", lambda records, *given: rows.extend(found := read(records, *given)) or found
    )
    assert [name for name, _ in Totals(store.records).repositories()] == [A]
    assert Totals(store.records).stored() == 10 * stored
    assert len(rows) == 2
