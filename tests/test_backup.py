"""`entrepot backup` and `entrepot restore`: what was acknowledged is in a backup, whatever happens."""

from __future__ import annotations

import asyncio
import errno
import itertools
import json
import os
import signal
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from proxy.cli.main import main
from proxy.transfer.backups import sources
from storage.disk import format, placing, snapshot
from storage.disk.records import SQLiteRecords
from storage.errors import StorageFailed
from storage.keys import LINK, PIN, SIGNING
from storage.migration import backup as backing
from storage.migration import restore as restoring
from storage.migration.backup import BackupRefused, BackupRun, BackupSource, read_head
from storage.migration.restore import RestoreRun
from storage.oci import OCI_MANIFEST, Digest
from storage.writers import KEY, LEFT, OBJECTS, Writers
from tests.collecting import Place
from tests.conftest import OPEN, Clock, Serve, Site, configuration
from tests.test_push import image
from tests.upstream import Upstream

LAYER = b"a layer" * 1000


class Ground:
    """A data directory with a private store, a backup of it, and a directory to restore into."""

    def __init__(self, directory: Path, clock: Clock) -> None:
        self.disk, self.backup, self.restored = (directory / name for name in ("disk", "backup", "restored"))
        self.place = Place(self.disk / "private", clock)
        self.source = BackupSource("private", self.disk / "private")

    def back_up(self, run: BackupRun | None = None) -> BackupRun:
        run = run or BackupRun(self.backup)
        run.run([self.source], 1, "1.2.3", 4.0)
        return run

    def restore(self, **options: bool) -> RestoreRun:
        run = RestoreRun(self.backup, self.restored)
        run.run(**options)
        return run

    def blob(self, digest: Digest) -> Path:
        return backing.blob_path(self.backup / "content" / "private", digest)

    def held(self) -> dict[str, bytes | None]:
        """The blobs that the restored records name, with their content."""
        found: dict[str, bytes | None] = {}
        for key, _ in snapshot.records(self.restored / "private/records/cache.db", LINK.prefix()):
            path = backing.blob_path(self.restored / "private/blobs", Digest(LINK.parse(key)[1]))
            found[LINK.parse(key)[1]] = path.read_bytes() if path.exists() else None
        return found


@pytest.fixture
def ground(tmp_path: Path, clock: Clock) -> Ground:
    return Ground(tmp_path, clock)


@pytest.fixture
def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing, "_link", lambda source, target: False)


async def test_all_of_it_is_restored(ground: Ground) -> None:
    digest = await ground.place.blob(LAYER)
    run = ground.back_up()
    assert (run.report.new, run.report.linked, run.report.damaged) == (1, 1, {})
    head = read_head(ground.backup)
    assert head is not None
    part = head.parts["private"]
    assert (head.entrepot, head.made, part.blobs, part.bytes) == ("1.2.3", 4.0, 1, len(LAYER))
    assert ground.restore().report.new == 1
    assert ground.held() == {str(digest): LAYER}
    assert sorted(each.name for each in ground.restored.iterdir()) == ["format", "private"]


async def test_a_second_backup_copies_only_what_is_new(ground: Ground, no_links: None) -> None:
    first = await ground.place.blob(LAYER)
    assert ground.back_up().report.new == 1
    inode = ground.blob(first).stat().st_ino
    second = await ground.place.blob(b"another")
    run = ground.back_up()
    assert (run.report.new, run.report.new_bytes, run.report.linked) == (1, 7, 0)
    assert ground.blob(first).stat().st_ino == inode
    assert ground.back_up().report.new == 0
    ground.restore()
    assert ground.held() == {str(first): LAYER, str(second): b"another"}
    assert len(list((ground.backup / "records").iterdir())) == 1


async def test_what_was_collected_leaves_the_backup(ground: Ground, clock: Clock) -> None:
    digest = await ground.place.blob(LAYER)
    ground.back_up()
    clock.advance(365 * 86400)
    ground.place.collect()
    assert ground.blob(digest).read_bytes() == LAYER  # until the next backup
    ground.back_up()
    assert not ground.blob(digest).exists()


@pytest.mark.parametrize("links", [True, False])
async def test_content_that_a_push_repaired_is_good_in_the_next_backup(
    ground: Ground, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:
        monkeypatch.setattr(placing, "_link", lambda source, target: False)
    digest = await ground.place.blob(LAYER)
    ground.back_up()
    path = ground.place.store.files.path(digest)
    content = bytearray(LAYER)
    content[5] ^= 1
    path.write_bytes(content)  # the disk damages it: here that of a hard link
    path.rename(path.with_name("aside"))  # as a scrub does
    path.write_bytes(LAYER)  # as a push does
    path.with_name("aside").rename(ground.disk / "aside")
    ground.back_up()
    assert ground.restore().report.damaged == {}
    assert ground.held() == {str(digest): LAYER}


def at(monkeypatch: pytest.MonkeyPatch, what: Callable[[], object]) -> None:
    """Do something between the first look at the blobs and the snapshot."""
    real = BackupRun._snapshot
    done = itertools.count()

    def after(run: BackupRun, source: BackupSource) -> Path:
        if next(done) == 0:
            what()
        return real(run, source)

    monkeypatch.setattr(BackupRun, "_snapshot", after)


async def test_a_push_that_ends_before_the_snapshot_is_in_it(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ground.place.blob(LAYER)
    at(monkeypatch, lambda: in_thread(ground.place.blob(b"meanwhile")))
    ground.back_up()
    ground.restore()
    assert sorted(ground.held().values(), key=str) == [LAYER, b"meanwhile"]


def in_thread(work: Any) -> None:
    """Run a coroutine, while the event loop of the test waits."""
    thread = threading.Thread(target=asyncio.run, args=(work,))
    thread.start()
    thread.join()


async def test_a_collection_meanwhile_takes_nothing_from_it(
    ground: Ground, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    """Whether it ends before the snapshot, or between that and the second look at the blobs."""
    digest = await ground.place.blob(LAYER)
    clock.advance(365 * 86400)
    real, taken = snapshot.take, []

    def take(directory: Path, target: Path) -> None:
        real(directory, target)
        taken.append(target)
        if len(taken) == 1:
            ground.place.collect()

    monkeypatch.setattr(snapshot, "take", take)
    monkeypatch.setattr(BackupRun, "_place_all", lambda run, blobs, target: None)  # it was listed too early
    run = ground.back_up()
    assert (run.report.damaged, len(taken)) == ({}, 2)
    ground.restore()
    assert ground.held() == {}
    assert not ground.place.store.files.holds(digest)


async def test_what_is_missing_is_named(ground: Ground) -> None:
    kept, lost = await ground.place.blob(LAYER), await ground.place.blob(b"lost")
    ground.place.store.files.path(lost).unlink()
    assert list(ground.back_up().report.damaged) == [str(lost)]
    assert ground.restore().report.damaged == {}  # the backup is as good as it was
    assert ground.held() == {str(kept): LAYER, str(lost): None}


async def test_damage_is_not_copied(ground: Ground, no_links: None) -> None:
    digest = await ground.place.blob(LAYER)
    ground.place.store.files.path(digest).write_bytes(LAYER[::-1])
    assert list(ground.back_up().report.damaged) == [str(digest)]
    assert not ground.blob(digest).exists()


@pytest.mark.parametrize("damage", ["changed", "short", "gone"])
async def test_a_damaged_backup_is_not_restored(ground: Ground, no_links: None, damage: str) -> None:
    whole, bad = await ground.place.blob(LAYER), await ground.place.blob(b"to be damaged")
    ground.back_up()
    path = ground.blob(bad)
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"to be damagee" if damage == "changed" else b"to be")
    assert list(ground.restore().report.damaged) == [str(bad)]
    assert not (ground.restored / "private").exists()
    run = ground.restore(without_damaged=True)
    assert list(run.report.damaged) == [str(bad)]
    assert ground.held() == {str(whole): LAYER, str(bad): None}


async def test_damaged_records_are_not_restored(ground: Ground) -> None:
    await ground.place.blob(LAYER)
    ground.back_up()
    [path] = (ground.backup / "records").iterdir()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BackupRefused, match=r"private\.\w+\.db is damaged"):
        ground.restore(without_damaged=True)
    assert not (ground.restored / "private").exists()


async def test_damaged_records_are_not_backed_up(ground: Ground) -> None:
    """The former backup stays."""
    digest = await ground.place.blob(LAYER)
    ground.back_up()
    before = read_head(ground.backup)
    path = ground.disk / "private/records/cache.db"
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(path.stat().st_size - 4096))
    with pytest.raises(StorageFailed, match="private/records"):
        ground.back_up()
    assert read_head(ground.backup) == before
    ground.restore()
    assert ground.held() == {str(digest): LAYER}


@pytest.mark.parametrize("found", ["a file", "a store"])
async def test_a_directory_that_is_not_empty_is_refused(ground: Ground, found: str) -> None:
    await ground.place.blob(LAYER)
    ground.back_up()
    other = ground.restored / ("private/records/cache.db" if found == "a store" else "notes")
    other.parent.mkdir(parents=True)
    other.write_text("mine")
    with pytest.raises(BackupRefused, match="is not empty"):
        ground.restore()
    assert other.read_text() == "mine"
    with pytest.raises(BackupRefused, match="holds no backup, and is not empty"):
        BackupRun(ground.restored).run([ground.source], 1, "1", 1.0)


def test_a_directory_without_a_backup_is_refused(ground: Ground) -> None:
    ground.backup.mkdir()
    with pytest.raises(BackupRefused, match="holds no complete backup"):
        ground.restore()
    (ground.backup / "backup.json").write_text("{")
    with pytest.raises(BackupRefused, match=r"backup\.json is damaged"):
        ground.restore()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backup": 2, "parts": "of another kind"}, "of format 2, and this version knows format 1"),
        ({"directory": 7}, r"data directory of format 7.*use entrepot 1\.2\.3"),
    ],
)
async def test_a_backup_of_a_later_version_is_refused(
    ground: Ground, change: dict[str, Any], message: str
) -> None:
    await ground.place.blob(LAYER)
    ground.back_up()
    head = ground.backup / "backup.json"
    head.write_text(json.dumps(json.loads(head.read_text()) | change))
    with pytest.raises(BackupRefused, match=message):
        ground.restore()
    assert not ground.restored.exists()
    if "backup" in change:
        with pytest.raises(BackupRefused, match=message):
            ground.back_up()


@pytest.mark.parametrize("content", [LEFT, OBJECTS])
async def test_a_registry_that_was_moved_is_refused(ground: Ground, content: str) -> None:
    await ground.place.blob(LAYER)
    ground.place.store.records.put(KEY, Writers(content).encode())
    with pytest.raises(BackupRefused, match="entrepot migrate has moved it"):
        ground.back_up()


async def test_one_backup_at_a_time(ground: Ground) -> None:
    await ground.place.blob(LAYER)
    ground.back_up()
    with backing.locked(ground.backup), pytest.raises(BackupRefused, match="another entrepot backup"):
        ground.back_up()


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Whether a process that does the work was killed before its step of that number."""
    child = os.fork()
    if child == 0:
        steps = itertools.count(1)
        for place, name in (
            (Path, "replace"),
            (Path, "unlink"),
            (os, "link"),
            (backing, "place"),
            (restoring, "place"),
            (snapshot, "take"),
        ):

            def stopped(real: Any, *arguments: Any, **options: Any) -> Any:
                if next(steps) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)

            real = getattr(place, name)
            setattr(place, name, partial(stopped, real) if place is not Path else _method(stopped, real))
        work()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def _method(stopped: Callable[..., Any], real: Any) -> Callable[..., Any]:
    return lambda *arguments, **options: stopped(real, *arguments, **options)


@pytest.mark.clients
@pytest.mark.parametrize("links", [True, False])
async def test_a_backup_that_is_killed_leaves_the_former_one(
    ground: Ground, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """At every step: it can be restored, and the next backup is whole."""
    if not links:
        monkeypatch.setattr(placing, "_link", lambda source, target: False)
    digests = [await ground.place.blob(LAYER)]
    ground.back_up()
    await ground.place.blob(b"new")
    for number in itertools.count(1):
        killed = killed_at(number, ground.back_up)
        ground.restored = ground.disk.with_name(f"restored-{number}")
        assert ground.restore().report.damaged == {}
        assert set(map(str, digests[:-1])) <= set(ground.held())
        assert None not in ground.held().values()
        if not killed:
            break
        if number % 4 == 0:
            assert ground.back_up().report.damaged == {}
            digests.append(await ground.place.blob(b"%d" % number))
    assert number > 4
    ground.restored = ground.disk.with_name("restored")
    ground.back_up()
    ground.restore()
    assert set(map(str, digests)) < set(ground.held())
    assert None not in ground.held().values()


@pytest.mark.clients
@pytest.mark.parametrize("links", [True, False])
async def test_a_restore_that_is_killed_is_continued(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """At every step; in between no server takes the directory for its own."""
    if not links:
        monkeypatch.setattr(placing, "_link", lambda source, target: False)
    contents = {str(await ground.place.blob(each)): each for each in (LAYER, b"one")}
    keys = SQLiteRecords(tmp_path / "disk/access/records")
    keys.put(SIGNING.key("id"), b"{}")
    keys.close()
    both = [ground.source, BackupSource("access", tmp_path / "disk/access")]
    BackupRun(ground.backup).run(both, 1, "1", 1.0)
    for number in itertools.count(1):
        ground.restored = tmp_path / f"restored-{number}"
        killed = killed_at(number, ground.restore)
        names = {each.name for each in ground.restored.iterdir()} if ground.restored.exists() else set()
        if names & {"private", "access"} and "backup.json" in _names(ground.restored / "restoring"):
            with pytest.raises(StorageFailed, match="run entrepot restore again"):
                format.check(ground.restored)
        if names != {"private", "access", "format"}:
            assert ground.restore().report.damaged == {}
        assert ground.held() == contents
        assert snapshot.get(ground.restored / "access/records/cache.db", SIGNING.key("id")) == b"{}"
        assert _names(ground.restored) == {"private", "access", "format"}
        assert format.check(ground.restored) == 1
        if not killed:
            break
    assert number > 8


def _names(directory: Path) -> set[str]:
    return {each.name for each in directory.iterdir()} if directory.exists() else set()


async def test_another_backup_is_no_continuation(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = await ground.place.blob(LAYER)
    ground.back_up()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(RestoreRun, "_end", _interrupt)
        ground.restore()
    other = await ground.place.blob(b"later")
    ground.back_up()
    ground.restore()
    assert ground.held() == {str(digest): LAYER, str(other): b"later"}


def _interrupt(*arguments: object) -> None:
    raise KeyboardInterrupt


# With a server


async def push(site: Site, tag: str, layer: bytes) -> None:
    for content in (layer, b"{}"):
        path = f"/v2/local/team/app/blobs/uploads/?digest={Digest.of(content)}"
        async with site.request("POST", path, data=content) as response:
            assert response.status == 201
    manifest, kind = image(Digest.of(layer)), {"Content-Type": OCI_MANIFEST}
    path = f"/v2/local/team/app/manifests/{tag}"
    async with site.request("PUT", path, data=manifest, headers=kind) as response:
        assert response.status == 201


async def pulled(site: Site, tag: str) -> bytes:
    status, _, manifest = await site.get(f"/v2/local/team/app/manifests/{tag}")
    assert status == 200
    (layer,) = json.loads(manifest)["layers"]
    status, _, content = await site.get(f"/v2/local/team/app/blobs/{layer['digest']}")
    assert status == 200
    return content


async def test_what_was_acknowledged_before_a_backup_is_in_it(
    serve: Serve, upstream: Upstream, tmp_path: Path
) -> None:
    """Pushes go on meanwhile; whatever of them is in the backup, is whole."""
    site = await serve(upstream, more={"local": {"store": {}}})
    config = site.app.composition.config
    acknowledged: list[str] = []
    stopped = asyncio.Event()

    async def pushing(name: str) -> None:
        for number in itertools.count():
            tag = f"{name}-{number}"
            await push(site, tag, tag.encode() * 1000)
            acknowledged.append(tag)
            if stopped.is_set():
                return

    await push(site, "first", b"first")
    acknowledged.append("first")
    tasks = [asyncio.create_task(pushing(name)) for name in "ab"]
    expected: list[list[str]] = []
    for _ in range(5):
        expected.append(list(acknowledged))
        run = BackupRun(tmp_path / f"backup-{len(expected)}")
        await asyncio.to_thread(run.run, sources(config, cache=False), 1, "1", 1.0)
        assert run.report.damaged == {}
    stopped.set()
    await asyncio.gather(*tasks)
    assert len(acknowledged) > len(expected[0])
    for number, tags in enumerate(expected, 1):
        restored = tmp_path / f"restored-{number}"
        RestoreRun(tmp_path / f"backup-{number}", restored).run()
        other = await serve(upstream, directory=restored, more={"local": {"store": {}}})
        _, _, listing = await other.get("/v2/local/team/app/tags/list")
        found = json.loads(listing)["tags"]
        assert set(tags) <= set(found)
        for tag in found:
            assert await pulled(other, tag) == (tag if tag == "first" else tag * 1000).encode()


# The commands


def command(directory: Path, *arguments: str) -> Result:
    tree = {
        "disk": {"path": str(directory)},
        "admin": "off",
        "namespaces": {"docker.io": {"upstream": "http://127.0.0.1:9"}, "local": {"store": {}}},
        "access": OPEN,
    }
    path = directory.parent / f"{directory.name}.yml"
    path.write_text(json.dumps(tree))
    return CliRunner().invoke(main, [*arguments, "--config", str(path)])


@pytest.fixture
def stored(tmp_path: Path, clock: Clock) -> Path:
    place = Place(tmp_path / "disk/private", clock)
    asyncio.run(place.blob(LAYER))
    place.records.close()
    cache = SQLiteRecords(tmp_path / "disk/cache/records")
    cache.put(PIN.key("docker.io/library/alpine:3"), b"{}")
    cache.put(LINK.key("docker.io/library/alpine", Digest.of(b"evicted")), b"{}")
    cache.close()
    return tmp_path / "disk"


def test_the_commands(stored: Path, tmp_path: Path) -> None:
    done = command(stored, "backup", str(tmp_path / "backup"))
    assert done.exit_code == 0, done.output
    assert "1 new blob of 6.8 KiB, 1 as hard links" in done.output
    assert "not in it: cached content" in done.output
    assert max(map(len, done.output.splitlines())) <= 80
    again = json.loads(command(stored, "backup", str(tmp_path / "backup"), "--json").output)
    assert (again["new"], again["damaged"]) == (0, [])
    restored = tmp_path / "restored"
    done = command(restored, "restore", str(tmp_path / "backup"))
    assert done.exit_code == 0, done.output
    assert f"restored into {restored}: a backup made" in done.output
    assert "docker.io/library/alpine:3" in command(restored, "pins").output
    database = restored / "cache/records/cache.db"
    assert list(snapshot.records(database, LINK.prefix())) == []
    again = command(restored, "restore", str(tmp_path / "backup"), "--json")
    assert again.exit_code == 1
    assert "it is not empty" in json.loads(again.stderr)["error"]


def test_cached_content_is_backed_up_if_asked_for(stored: Path, tmp_path: Path) -> None:
    done = command(stored, "backup", str(tmp_path / "backup"), "--cache")
    assert done.exit_code == 0, done.output  # what is missing in a cache is no damage
    assert "cached content" not in done.output
    assert command(tmp_path / "restored", "restore", str(tmp_path / "backup")).exit_code == 0
    database = tmp_path / "restored/cache/records/cache.db"
    assert len(list(snapshot.records(database, LINK.prefix()))) == 1


def test_a_damaged_backup_is_reported(stored: Path, tmp_path: Path) -> None:
    command(stored, "backup", str(tmp_path / "backup"))
    digest = Digest.of(LAYER)
    backing.blob_path(tmp_path / "backup/content/private", digest).unlink()
    done = command(tmp_path / "restored", "restore", str(tmp_path / "backup"))
    assert done.exit_code == 1
    assert str(digest) in done.output
    assert "nothing is restored" in done.stderr
    done = command(tmp_path / "restored", "pins")
    assert done.exit_code == 1  # no command and no server makes a new registry of it
    assert (
        command(tmp_path / "restored", "restore", str(tmp_path / "backup"), "--without-damaged").exit_code
        == 0
    )


@pytest.mark.parametrize("where", ["disk", "disk/backup", "."])
def test_a_backup_within_the_data_directory_is_refused(stored: Path, tmp_path: Path, where: str) -> None:
    done = command(stored, "backup", str(tmp_path / where))
    assert done.exit_code == 1
    assert "are not apart" in done.stderr


def test_a_registry_in_shared_engines_is_refused(tmp_path: Path) -> None:
    tree = {
        "disk": {"path": str(tmp_path / "disk")},
        "namespaces": {"local": {"store": {}}},
        "access": OPEN,
        "shared": {"records": "postgresql://db.example/entrepot"},
    }
    with pytest.raises(BackupRefused, match="pg_dump"):
        sources(configuration(tmp_path, tree), cache=False)


def test_nothing_to_back_up(tmp_path: Path) -> None:
    done = command(tmp_path / "disk", "backup", str(tmp_path / "backup"))
    assert done.exit_code == 1
    assert "nothing to back up" in done.stderr


# The format of the data directory


def test_a_directory_of_a_later_version_is_refused(stored: Path, tmp_path: Path) -> None:
    (stored / "format").write_text("2\n")
    for arguments in (["ls"], ["backup", str(tmp_path / "backup")]):
        done = command(stored, *arguments)
        assert done.exit_code == 1
        assert "it has format 2, and this version knows format 1" in done.stderr
    (stored / "format").write_text("")
    assert "does not hold the number of a format" in command(stored, "ls").stderr


def test_a_directory_of_a_former_version_is_taken_over(stored: Path) -> None:
    assert format.check(stored) == 0
    assert command(stored, "ls").exit_code == 0
    assert format.check(stored) == 1


def test_a_directory_that_cannot_be_written_to_is_read(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(root: Path, number: int) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(format, "write", refuse)
    assert command(stored, "ls").exit_code == 0
    assert not (stored / "format").exists()
