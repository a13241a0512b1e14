"""Stores whose database refuses to answer, or says nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from storage import patient
from storage.concurrency import run_in_thread
from storage.disk.blobs import BlobFiles
from storage.disk.records import SQLiteRecords
from storage.errors import BlobUnknown, ManifestUnknown, StorageFailed, StorageUnavailable
from storage.keys import TAG
from storage.maintenance.leases import Leases
from storage.maintenance.pulls import Pulls
from storage.oci import OCI_MANIFEST, Digest, Manifest, Tag
from storage.patient import PatientStore, RememberingStore
from storage.remembered import RecordMemory, RememberedRecords
from tests.conftest import Clock
from tests.test_remembered import Database

NAME, LATEST = "local/a", Tag("latest")
MANIFEST = Manifest.of(OCI_MANIFEST, b"{}")
LAYER = b"a layer"


class Distant(Database):
    """A database that can be silent, or fail; `asked` counts reads."""

    remote = True
    failure: Callable[[], StorageFailed] | None = None
    asked = 0

    def __init__(self, directory: Path, clock: Clock) -> None:
        self.answers = threading.Event()
        self.answers.set()
        super().__init__(directory, clock)

    def get(self, key: str) -> bytes | None:
        self.asked += 1
        self.answers.wait()
        if self.failure is not None:
            raise self.failure()
        return super().get(key)

    def holds(self, key: str) -> bool:
        return self.get(key) is not None


@pytest.fixture
def there(tmp_path: Path, clock: Clock) -> Distant:
    return Distant(tmp_path / "there", clock)


@pytest.fixture
async def store(tmp_path: Path, there: Distant, clock: Clock) -> AsyncIterator[RememberingStore]:
    """It has an image that was pulled."""
    here = SQLiteRecords(tmp_path / "here", clock)
    records = RememberedRecords(there, RecordMemory(here, 3600.0, clock))
    store = RememberingStore(BlobFiles(tmp_path / "files", clock), records, records, clock)
    upload = await store.start_upload(NAME)
    await upload.write(LAYER)
    await upload.commit(Digest.of(LAYER))
    await store.push_manifest(NAME, LATEST, MANIFEST)
    await pull(store)
    yield store
    there.answers.set()
    await close(store)
    here.close()


async def close(store: PatientStore) -> None:
    await store.close()
    assert store._threads is not None
    store._threads.shutdown()  # the threads close what they have open of the databases


async def pull(store: RememberingStore) -> None:
    for reference in (LATEST, MANIFEST.digest):
        assert await store.get_manifest(NAME, reference) == MANIFEST
    blob = await store.get_blob(NAME, Digest.of(LAYER))
    await blob.close()


async def test_a_database_that_refuses_is_asked_by_each_request(
    store: RememberingStore, there: Distant
) -> None:
    there.failure = lambda: StorageUnavailable("no connection")
    before = there.asked
    for _ in range(2):
        await pull(store)
        assert store.cut_off
    assert there.asked == before + 6
    with pytest.raises(StorageUnavailable, match="no connection"):
        await store.get_manifest(NAME, Tag("other"))
    assert store.troubles() == []  # the records say so
    there.failure = None
    with pytest.raises(ManifestUnknown):
        await store.get_manifest(NAME, Tag("other"))
    assert not store.cut_off


async def test_a_silent_database_is_asked_by_nobody_else(
    store: RememberingStore, there: Distant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patient, "PATIENCE", 0.0)
    there.answers.clear()
    before = there.asked
    for _ in range(10):
        await pull(store)
    assert there.asked <= before + 2  # by the first request, and by who waits for an answer
    assert store.cut_off
    assert store.troubles() == ["the database of records does not answer"]
    with pytest.raises(StorageUnavailable, match="does not answer") as caught:
        await store.get_manifest(NAME, Tag("other"))
    assert caught.value.retry_after
    there.answers.set()
    assert store._looking is not None
    await store._looking
    assert (store.cut_off, store.troubles()) == (False, [])
    monkeypatch.setattr(patient, "PATIENCE", None)
    before = there.asked
    await pull(store)
    assert there.asked == before + 4


async def test_it_is_looked_for_until_it_answers(
    store: RememberingStore, there: Distant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patient, "PATIENCE", 0.0)
    monkeypatch.setattr(patient, "PAUSE", 0.0)
    there.answers.clear()
    await pull(store)
    there.failure = lambda: StorageUnavailable("no connection")
    there.answers.set()
    looking, before = store._looking, there.asked
    assert looking is not None
    while there.asked < before + 3:
        await run_in_thread(lambda: None)
    assert not looking.done()
    there.failure = None
    await looking


async def test_what_is_noted_during_a_write_is_written_after_it(
    store: RememberingStore, there: Distant, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, taken, written = store._remembered.memory, threading.Semaphore(0), threading.Event()
    write = memory.write

    def slowly() -> None:
        write()
        taken.release()
        written.wait()

    monkeypatch.setattr(memory, "write", slowly)
    for name in ("first", "second"):
        there.put(TAG.key(NAME, name), there.get(TAG.key(NAME, LATEST)) or b"")
        await store.get_manifest(NAME, Tag(name))
        if name == "first":
            await run_in_thread(taken.acquire)
    written.set()
    while store._writing is not None:
        await asyncio.wait([store._writing])
    assert not memory.waits
    await asyncio.get_running_loop().shutdown_default_executor()  # whose threads have the records open


async def test_another_database_is_no_outage(store: RememberingStore, there: Distant) -> None:
    there.failure = lambda: StorageFailed("it is another database")
    with pytest.raises(StorageFailed, match="another database"):
        await store.get_manifest(NAME, LATEST)
    assert not store.cut_off


async def test_what_another_server_has_deleted_is_gone_once_it_was_looked_for(
    store: RememberingStore, there: Distant
) -> None:
    there.delete(f"link {NAME} {Digest.of(LAYER)}")
    with pytest.raises(BlobUnknown):
        await store.get_blob(NAME, Digest.of(LAYER))
    there.failure = lambda: StorageUnavailable("no connection")
    with pytest.raises(StorageUnavailable):
        await store.get_blob(NAME, Digest.of(LAYER))


async def test_nothing_is_written_about_a_pull_that_was_answered_so(
    store: RememberingStore, there: Distant, clock: Clock
) -> None:
    leases, pulls = Leases(store, 3600.0, clock), Pulls(store, clock)
    there.failure = lambda: StorageUnavailable("no connection")
    await pull(store)
    before = there.asked
    await leases.blob(NAME, Digest.of(LAYER), 0.0)
    await leases.manifest(NAME, MANIFEST.digest, 0.0)
    await pulls.pulled(NAME, LATEST)
    assert there.asked == before
    assert pulls.due(NAME, LATEST)


async def test_a_store_that_remembers_nothing(
    tmp_path: Path, there: Distant, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patient, "PATIENCE", 0.0)
    store = PatientStore(BlobFiles(tmp_path / "files", clock), there, clock)
    there.answers.clear()
    for _ in range(3):
        with pytest.raises(StorageUnavailable, match="does not answer"):
            await store.ask(there.get, "a")
    assert there.asked <= 2
    there.answers.set()
    await close(store)
