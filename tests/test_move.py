"""A private registry that is moved between the disk and the engines that servers share."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from proxy.cli.moves import migrate
from proxy.config.errors import StartError
from proxy.config.loader import load
from proxy.config.schema import Config
from proxy.namespaces.access_records import access_records_on_disk
from proxy.namespaces.hosted import Hosted
from proxy.namespaces.private import is_shared, private_store
from proxy.transfer.engine_moves import EngineMoves, NotMovable
from storage import keys
from storage.disk.blobs import BlobFiles
from storage.disk.records import SQLiteRecords
from storage.errors import StorageUnavailable
from storage.keys import API_KEY, KEY_USED, LEASE, LINK, PIN, SIGNING, RecordKind
from storage.maintenance.leases import Leases
from storage.migration.move import OF_ENGINES, OF_SERVERS, EngineMove, MoveReport
from storage.oci import OCI_MANIFEST, Digest, Manifest, Tag
from storage.records import Records
from storage.store import Store
from storage.writers import FILES, GuardedRecords
from tests.objects import FakeBucket
from tests.postgres import PostgresServer

CONFIG = b"{}"
LARGE = os.urandom(6 << 20)  # of several parts
KINDS = {each.name: each for each in vars(keys).values() if isinstance(each, RecordKind)}
# What becomes of each kind of record that a private registry may have.  A new kind has to be considered: one
# that says where content is, or who is at work, belongs into OF_ENGINES, and any other is copied as it is.
COPIED = {
    *("tag", "manifest", "link", "blobs", "referrers", "listing", "pushed", "lease", "pulled", "watched"),
    *("use", "moves", "resolved", "asked", "override", "held", "stats", "scrub", "warmed", "collected"),
    *("total", "stored", "counted", "outbox"),
}
MADE_ANEW = {"object", "leftover", "upload", "writers", "identity"}
OF_A_SERVER = {"pin", "signing", "apikey", "keyused"}  # wherever it keeps them: see EngineMoves.settle
OF_CACHES = {"absent", "deposit", "reported"}  # of the store of caches, which is copied by what it serves
OF_WEBHOOKS = {"event", "pending", "webhook", "number"}  # in a database of their own, which stays
OF_A_REPLICA = {"act", "confirmed", "remembered"}  # with its cache on its disk, which stays


def configured(directory: Path, **shared: Any) -> Config:
    """A configuration; `shared` may be empty."""
    path = directory / ("shared.yml" if shared else "alone.yml")
    tree: dict[str, Any] = {"disk": {"path": str(directory)}, "namespaces": {"local": {"store": {}}}}
    path.write_text(yaml.safe_dump({**tree, **({"shared": shared} if shared else {})}))
    return load(path)


def in_bucket(fake: FakeBucket) -> dict[str, str]:
    settings = fake.settings("regis/try")
    return {
        "bucket": settings.url,
        "endpoint": settings.endpoint,
        "access_key": settings.access_key,
        "secret_key": settings.secret_key,
    }


@pytest.fixture
async def fake() -> AsyncIterator[FakeBucket]:
    async with FakeBucket() as fake:
        yield fake


async def push(store: Store, *contents: bytes) -> None:
    for content in contents:
        upload = await store.start_upload("local/a")
        await upload.write(content)
        await upload.commit(Digest.of(content))


async def fill(store: Store) -> None:
    """Push an image with a referrer and its records, and begin an upload."""
    await push(store, CONFIG, LARGE, b"")
    manifest = Manifest.of(OCI_MANIFEST, _manifest(LARGE))
    await store.push_manifest("local/a", Tag("1"), manifest)
    await store.push_manifest("local/a", Tag("old"), manifest)
    subject = b', "subject": %s' % _descriptor(manifest.media_type, manifest.content)
    signature = Manifest.of(OCI_MANIFEST, _manifest(CONFIG, subject))
    await store.push_manifest("local/a", signature.digest, signature)
    await store.delete_manifest("local/a", Tag("old"))
    store.records.put(LEASE.key("local/a", manifest.digest), b"12.5")


def _manifest(layer: bytes, more: bytes = b"") -> bytes:
    config, content = (_descriptor("application/octet-stream", each) for each in (CONFIG, layer))
    return b'{"schemaVersion": 2, "config": %s, "layers": [%s]%s}' % (config, content, more)


def _descriptor(media_type: str, content: bytes) -> bytes:
    text = f'{{"mediaType": "{media_type}", "digest": "{Digest.of(content)}", "size": {len(content)}}}'
    return text.encode()


def records_of(records: Records) -> dict[str, bytes]:
    """Those that every engine has."""
    own = tuple(each.prefix() for each in (*OF_ENGINES, *OF_SERVERS))
    return {key: value for key, value in records.scan("") if not f"{key} ".startswith(own)}


def content_of(store: Store) -> dict[Digest, bytes]:
    found = {}
    for portion in store.files.portions():
        for each in portion:
            with store.files.reader(each.digest) as file:
                found[each.digest] = file.read()
    return found


async def look(config: Config) -> tuple[dict[str, bytes], dict[Digest, bytes]]:
    """The registry as a server finds it."""
    store = private_store(config)
    try:
        return await asyncio.to_thread(records_of, store.records), await asyncio.to_thread(content_of, store)
    finally:
        await store.close()


async def moved(config: Config, where: str) -> MoveReport:
    async with EngineMoves(config, where == "shared") as moves:
        ((_, job),) = moves.jobs(caches=True)
        assert job is not None
        report = await job.run()
        if not report.damaged:
            await moves.settle()
    return report


def test_every_kind_of_record_is_considered() -> None:
    known = COPIED | MADE_ANEW | OF_A_SERVER | OF_CACHES | OF_WEBHOOKS | OF_A_REPLICA
    assert set(KINDS) == known
    assert {each.name for each in OF_ENGINES} == MADE_ANEW
    assert {each.name for each in OF_SERVERS} == OF_A_SERVER


@pytest.fixture(
    params=["bucket", *(pytest.param(each, marks=pytest.mark.clients) for each in ("database", "both"))]
)
def engines(request: pytest.FixtureRequest, fake: FakeBucket) -> dict[str, str]:
    """What `shared` may name."""
    found = {} if request.param == "database" else in_bucket(fake)
    if request.param != "bucket":
        server: PostgresServer = request.getfixturevalue("postgres_server")
        found["records"] = server.database()
    return found


@pytest.mark.clients
async def test_there_and_back_all_is_the_same(tmp_path: Path, engines: dict[str, str]) -> None:
    alone, config = configured(tmp_path), configured(tmp_path, **engines)
    store = private_store(alone)
    await fill(store)
    for name in COPIED:
        kind = KINDS[name]
        store.records.transaction(
            lambda batch, kind=kind: batch.put(kind.key(*["x"] * kind.fields), b"1 2.0 3")  # type: ignore[misc]
        )
    await store.close()
    before = await look(alone)
    assert before == await look(config)  # from the disk, as long as it is not moved
    assert not is_shared(config)
    report = await moved(config, "shared")
    assert (report.blobs, report.damaged) == (3 if "bucket" in engines else 0, {})
    assert is_shared(config)
    assert await look(config) == before
    await moved(config, "shared")  # changes nothing
    assert await look(config) == before
    await moved(config, "local")
    assert await look(config) == before
    assert await look(alone) == before
    await moved(config, "local")
    assert await look(alone) == before
    await moved(config, "shared")  # over what is left there
    assert await look(config) == before


async def test_what_was_used_before_a_move_is_used_after_it(tmp_path: Path, fake: FakeBucket) -> None:
    """A blob that a client has just pushed is not collected for what its file was when the registry left."""
    alone, config = configured(tmp_path), configured(tmp_path, **in_bucket(fake))
    store = private_store(alone)
    await push(store, b"a blob")
    digest = Digest.of(b"a blob")
    await store.close()
    await moved(config, "shared")
    file = store.files.path(digest)
    os.utime(file, (1000.0, 1000.0))
    store = private_store(config)
    await push(store, b"a blob")
    used = store.files.find(digest)
    assert used is not None
    await store.close()
    await moved(config, "local")
    assert file.stat().st_mtime == pytest.approx(used.used_at, abs=1)


async def test_objects_that_a_move_leaves_serve_again_or_are_deleted(
    tmp_path: Path, fake: FakeBucket
) -> None:
    alone, config = configured(tmp_path), configured(tmp_path, **in_bucket(fake))
    store = private_store(alone)
    await push(store, b"kept", b"deleted")
    await store.close()
    await moved(config, "shared")
    first = dict(fake.objects)
    assert sorted(first.values()) == [b"deleted", b"kept"]
    before = private_store(config)
    await moved(config, "local")
    blob = await before.get_blob("local/a", Digest.of(b"deleted"))  # by a server that has not reloaded
    assert b"".join([bytes(each) async for each in blob.chunks()]) == b"deleted"
    await blob.close()
    await before.close()
    store = private_store(alone)
    removed = partial(store.files.remove_old, Digest.of(b"deleted"), lambda at: True)
    await store.run(store.records.transaction, removed)
    await store.close()
    fake.asked.clear()
    await moved(config, "shared")
    assert not [each for each in fake.asked if each.startswith("PUT ")]
    store = private_store(config)
    await store.run(store.files.reap, 86400.0)
    await store.close()
    assert fake.objects == {key: content for key, content in first.items() if content == b"kept"}


async def test_a_last_step_that_seems_to_fail_is_said_to_and_is_not_repeated(
    tmp_path: Path, fake: FakeBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tmp_path, **in_bucket(fake))
    store = private_store(configured(tmp_path))
    await push(store, b"one")
    await store.close()
    leave = EngineMove._leave

    def lost(move: EngineMove) -> bool:
        leave(move)
        raise StorageUnavailable("the connection was lost")

    with monkeypatch.context() as patched:
        patched.setattr(EngineMove, "_leave", lost)
        with pytest.raises(StorageUnavailable, match="the connection was lost"):
            await moved(config, "shared")
    report = await moved(config, "shared")
    assert (report.passes, report.damaged) == (0, {})
    assert is_shared(config)
    assert (await look(config))[1] == {Digest.of(b"one"): b"one"}


@pytest.mark.clients
@pytest.mark.parametrize("where", ["shared", "local"])
async def test_a_move_that_is_killed_at_any_step_goes_on(
    tmp_path: Path, fake: FakeBucket, postgres_server: PostgresServer, where: str
) -> None:
    config = configured(tmp_path, records=postgres_server.database(), **in_bucket(fake))
    store = private_store(configured(tmp_path))
    await fill(store)
    await store.close()
    if where == "local":
        await moved(config, "shared")
    records, content = await look(config)
    if where == "local":  # nothing of before is left
        for name in ("blobs", "records"):
            shutil.rmtree(tmp_path / "private" / name)
    program = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.moving", str(tmp_path / "shared.yml"), where),
        cwd=Path(__file__).parent.parent,
        stdout=asyncio.subprocess.PIPE,
    )
    out = (await program.communicate())[0].decode().splitlines()[-1].split()
    assert program.returncode == 0
    assert int(out[0]) > 10
    assert is_shared(config) == (where == "shared")
    found, blobs = await look(config)
    for key, value in records.items():
        if key.partition(" ")[0] in ("tag", "manifest", "link", "referrers", "lease"):
            assert found[key] == value
    assert blobs.keys() == content.keys() | set(out[1:])
    assert {LINK.key("local/pushed", each) for each in out[1:]} <= found.keys()
    assert all(Digest.of(each) == digest for digest, each in blobs.items())


@pytest.fixture
def both(tmp_path: Path, fake: FakeBucket, postgres_server: PostgresServer) -> Config:
    return configured(tmp_path, records=postgres_server.database(), **in_bucket(fake))


async def test_whoever_wrote_the_source_before_cannot_afterwards(tmp_path: Path, both: Config) -> None:
    """A worker that drains: what it answered would be lost."""
    store = private_store(configured(tmp_path))
    await fill(store)
    await moved(both, "shared")
    before = await look(both)
    with pytest.raises(StorageUnavailable, match="no longer") as caught:
        await push(store, b"late")
    assert caught.value.status == 503
    assert caught.value.retry_after
    with pytest.raises(StorageUnavailable):
        await store.run(store.records.put, "watched", b"1")
    with pytest.raises(StorageUnavailable):
        await store.run(store.records.delete, "watched")
    hosted = Hosted("local", store, Leases(store, 3600.0))
    assert (await hosted.get_manifest("a", Tag("1"))).media_type == OCI_MANIFEST  # it goes on with pulls
    for finding in (  # but for what may have been pushed elsewhere since
        hosted.get_manifest("a", Tag("late")),
        hosted.resolve_blob("a", Digest.of(b"late")),
        hosted.tags("late"),
    ):
        with pytest.raises(StorageUnavailable, match="no longer"):
            await finding
    await store.close()
    assert await look(both) == before


async def test_a_pause_ends_by_itself_and_the_move_looks_again(tmp_path: Path, both: Config) -> None:
    """A move that was stopped for longer than its pause must not leave what was written meanwhile."""
    now = 1000.0
    store = private_store(configured(tmp_path), lambda: now)
    await fill(store)
    async with EngineMoves(both, True) as moves:
        ((_, made),) = moves.jobs(caches=False)
        assert isinstance(made, EngineMove)
        move = EngineMove(*made.engines, clock=lambda: now)
        leave, late = move._leave, [b"first", b"second"]

        def stopped() -> bool:
            nonlocal now
            with pytest.raises(StorageUnavailable, match="paused"):
                asyncio.run(push(store, b"refused"))
            while late:
                now += 31.0
                asyncio.run(push(store, late.pop()))
            return leave()

        move._leave = stopped  # type: ignore[method-assign]
        report = await move.run()
        await moves.settle()
    await store.close()
    assert report.damaged == {}
    records, content = await look(both)
    assert {b"first", b"second"} <= set(content.values())
    assert {Digest.of(each) for each in (b"first", b"second", b"refused")} & {
        LINK.parse(key)[1] for key in records if key.startswith(LINK.prefix())
    } == {Digest.of(b"first"), Digest.of(b"second")}


@pytest.mark.errors("blob.damaged")
async def test_damaged_content_is_not_moved_and_keeps_the_registry_where_it_is(
    tmp_path: Path, both: Config
) -> None:
    store = private_store(configured(tmp_path))
    await fill(store)
    path = store.files.path(Digest.of(LARGE))
    assert path is not None
    path.write_bytes(b"!" + LARGE[1:])
    report = await moved(both, "shared")
    assert report.damaged.keys() == {Digest.of(LARGE)}
    assert not is_shared(both)
    await push(store, b"still here")
    path.unlink()  # as a scrub sets it aside
    report = await moved(both, "shared")
    assert report.damaged == {}
    await store.close()
    _, content = await look(both)
    assert set(content.values()) == {CONFIG, b"", b"still here"}


@pytest.mark.parametrize(
    ("room", "told", "options"),
    [(len(LARGE), "[0-9.]+ [KM]iB", ["--dry-run"]), (0, "0 B", ["--dry-run"]), (-(5 << 20), "0 B", [])],
)
async def test_a_disk_without_room_is_not_filled(
    tmp_path: Path,
    both: Config,
    monkeypatch: pytest.MonkeyPatch,
    room: int,
    told: str,
    options: list[str],
) -> None:
    store = private_store(configured(tmp_path))
    await fill(store)
    await push(store, b"beside it")
    await store.close()
    await moved(both, "shared")
    shutil.rmtree(both.disk.path / "private" / "blobs")
    monkeypatch.setattr(BlobFiles, "room", lambda self: room)
    arguments = ["--to", "local", *options, "--config", str(tmp_path / "shared.yml")]
    found = await asyncio.to_thread(CliRunner().invoke, migrate, arguments)
    assert found.exit_code == 1
    assert re.search(rf"are to be copied, and the disk has room for {told}: make room$", found.stderr.strip())
    assert is_shared(both)


@pytest.mark.parametrize("where", ["shared", "local"])
async def test_a_directory_that_is_not_there_is_not_made(
    tmp_path: Path, fake: FakeBucket, where: str
) -> None:
    directory = tmp_path / "misspelt"
    directory.mkdir()
    config = configured(directory, **in_bucket(fake))
    shutil.rmtree(directory)
    with pytest.raises(NotMovable, match=f"{directory} does not exist"):
        await moved(config, where)
    assert not directory.exists()


async def test_a_full_disk_has_room_for_what_is_there(
    tmp_path: Path, both: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = private_store(configured(tmp_path))
    await fill(store)
    await store.close()
    await moved(both, "shared")
    monkeypatch.setattr(BlobFiles, "room", lambda self: -1)
    async with EngineMoves(both, False) as moves:
        ((_, job),) = moves.jobs(caches=True)
        await moves.check_room(job)


async def test_an_object_that_is_damaged_or_missing_stops_the_way_back(
    tmp_path: Path, both: Config, fake: FakeBucket
) -> None:
    store = private_store(configured(tmp_path))
    await fill(store)
    await store.close()
    await moved(both, "shared")
    shutil.rmtree(tmp_path / "private" / "blobs")
    (large,) = [key for key, value in fake.objects.items() if len(value) == len(LARGE)]
    fake.objects[large] = b"!" + LARGE[1:]
    report = await moved(both, "local")
    assert report.damaged.keys() == {Digest.of(LARGE)}
    assert is_shared(both)
    fake.objects[large] = LARGE
    assert (await moved(both, "local")).damaged == {}
    _, content = await look(configured(tmp_path))
    assert set(content.values()) == {CONFIG, b"", LARGE}


@pytest.mark.parametrize("parts", [1, 2])
async def test_an_upload_goes_on_after_the_move(tmp_path: Path, both: Config, parts: int) -> None:
    """There, and back again: the client knows its id, and what it has sent."""
    alone = configured(tmp_path)
    store = private_store(alone)
    await push(store, CONFIG)
    upload = await store.start_upload("local/a")
    await upload.write(b"a")
    await upload.suspend()
    for config, where in ((both, "shared"), (alone, "local")):
        await store.close()
        await moved(both, where)
        store = private_store(config)
        for number in range(parts):
            resumed = await store.resume_upload("local/a", upload.id)
            await resumed.write(b"%d" % number * 10)
            await resumed.suspend()
    content = b"a" + b"".join(b"%d" % number * 10 for number in range(parts)) * 2
    resumed = await store.resume_upload("local/a", upload.id)
    assert resumed.offset == len(content)
    assert (await resumed.commit(Digest.of(content))).size == len(content)
    await store.close()


async def test_what_is_there_already_is_not_overwritten(
    tmp_path: Path, both: Config, postgres_server: PostgresServer, fake: FakeBucket
) -> None:
    (tmp_path / "other").mkdir()
    theirs = private_store(
        configured(tmp_path / "other", records=str(both.shared.records), **in_bucket(fake))
    )
    await push(theirs, b"theirs")
    ours = private_store(configured(tmp_path))
    await push(ours, b"ours")
    with pytest.raises(NotMovable, match="there is a registry already"):
        await moved(both, "shared")
    for store in (theirs, ours):
        await push(store, b"more")
        await store.close()
    elsewhere = configured(tmp_path, records=postgres_server.database())
    async with EngineMoves(elsewhere, shared=False) as moves:
        assert [job for _, job in moves.jobs(caches=True)] == [None]  # it is on the disk


async def test_a_registry_that_is_there_already_stays(tmp_path: Path, fake: FakeBucket) -> None:
    async def run(where: str, *options: str) -> str:
        arguments = ["--to", where, *options, "--config", str(tmp_path / "shared.yml")]
        found = await asyncio.to_thread(CliRunner().invoke, migrate, arguments)
        assert found.exit_code == 0, found.output
        return found.stdout

    store = private_store(configured(tmp_path))
    await push(store, b"here")
    await store.close()
    configured(tmp_path, **in_bucket(fake))
    for options in ([], ["--dry-run"]):
        assert "private registry: it is already on the disk\n" in await run("local", *options)
    assert "1 blob of" in await run("shared")
    for _ in range(2):
        assert "private registry: it is already in the engines of `shared`\n" in await run("shared")
    assert "1 blob of" in await run("local")
    assert "private registry: it is already on the disk\n" in await run("local")


async def test_a_server_elsewhere_does_not_use_half_a_registry(
    tmp_path: Path, both: Config, fake: FakeBucket
) -> None:
    (tmp_path / "other").mkdir()
    elsewhere = configured(tmp_path / "other", records=str(both.shared.records), **in_bucket(fake))
    early = private_store(elsewhere)
    store = private_store(configured(tmp_path))
    await fill(store)
    await store.close()
    async with EngineMoves(both, True) as moves:
        ((_, job),) = moves.jobs(caches=False)
        assert isinstance(job, EngineMove)
        await asyncio.to_thread(job._begin)
        with pytest.raises(StartError, match="being moved into"):
            private_store(elsewhere)
        with pytest.raises(StorageUnavailable):
            await push(early, b"too early")
        async with EngineMoves(elsewhere, False) as others:
            with pytest.raises(NotMovable):
                await next(others.jobs(caches=False))[1].run()
        await job.run()
    await push(early, b"now")
    await early.close()
    private_store(elsewhere).records.close()
    await moved(both, "local")
    with pytest.raises(StartError, match="was moved from"):
        private_store(elsewhere)
    assert b"now" in (await look(both))[1].values()


async def test_one_move_at_a_time(tmp_path: Path, both: Config) -> None:
    async with EngineMoves(both, True):
        with pytest.raises(NotMovable, match="another entrepot migrate"):
            async with EngineMoves(both, True):
                pass


async def test_pins_of_commands_are_those_of_all_servers(tmp_path: Path, both: Config) -> None:
    store = private_store(configured(tmp_path))
    await fill(store)
    await store.close()
    with closing(SQLiteRecords(tmp_path / "cache" / "records")) as cache:
        cache.put(PIN.key("docker.io/a:1"), b"{}")
    await moved(both, "shared")
    shared = private_store(both)
    assert shared.records.get(PIN.key("docker.io/a:1")) == b"{}"
    await shared.run(shared.records.put, PIN.key("docker.io/b:1"), b"{}")
    await shared.close()
    await moved(both, "local")
    with closing(SQLiteRecords(tmp_path / "cache" / "records")) as cache:
        assert {PIN.parse(key)[0] for key in cache.keys(PIN.prefix())} >= {"docker.io/a:1", "docker.io/b:1"}


async def test_keys_of_clients_go_with_the_registry_and_what_is_revoked_stays_so(
    tmp_path: Path, both: Config
) -> None:
    store = private_store(configured(tmp_path))
    await fill(store)
    await store.close()
    disk = access_records_on_disk(both)
    own = GuardedRecords(disk, FILES)
    for kind in (API_KEY, SIGNING, KEY_USED):
        own.put(kind.key("a"), b"1")
    await moved(both, "shared")
    shared = private_store(both)
    assert {shared.records.get(kind.key("a")) for kind in (API_KEY, SIGNING, KEY_USED)} == {b"1"}
    with pytest.raises(StorageUnavailable):  # of a process that drains
        own.put(API_KEY.key("late"), b"1")
    await shared.run(shared.records.delete, API_KEY.key("a"))
    await shared.run(shared.records.put, API_KEY.key("b"), b"2")
    await shared.close()
    await moved(both, "local")
    assert list(disk.keys(API_KEY.prefix())) == [API_KEY.key("b")]
    own.delete(API_KEY.key("b"))
    own.put(API_KEY.key("c"), b"3")
    disk.close()
    await moved(both, "shared")
    shared = private_store(both)
    assert list(shared.records.keys(API_KEY.prefix())) == [API_KEY.key("c")]
    await shared.close()
