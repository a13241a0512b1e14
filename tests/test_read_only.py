"""A disk that is read-only or full when the server starts: what can be read is served."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import aiohttp
import pytest
from structlog.testing import LogCapture

from storage.disk.health import DiskHealth
from storage.disk.read_only import ReadOnlyDatabase
from storage.disk.records import SQLiteRecords
from storage.errors import StorageFailed
from storage.oci import Digest
from tests.conftest import Serve
from tests.preloaded import PROGRAM
from tests.processes import Place, place
from tests.test_disk import FULL, disk, leave, mount, read_only, ready, said, unmount  # noqa: F401  a fixture
from tests.upstream import Upstream

__all__ = ["place"]  # a fixture

CONTENT = b"a layer"
DIGEST = Digest.of(CONTENT)
BLOB = f"/v2/local/app/blobs/{DIGEST}"
UPLOAD = f"/v2/local/app/blobs/uploads/?digest={DIGEST}"


@pytest.mark.errors("disk.failed")
async def test_what_was_pushed_and_pulled_is_served_by_the_next_server(
    serve: Serve,
    upstream: Upstream,
    disk: Path,  # noqa: F811
) -> None:
    image = upstream.image("library/alpine", "3", [b"cached"])
    site = await serve(upstream, more={"local": {"store": {}}}, directory=disk / "d")
    async with site.request("POST", UPLOAD, data=CONTENT) as response:
        assert response.status == 201
    assert (await site.get("/v2/library/alpine/manifests/3"))[0] == 200
    assert (await site.get(f"/v2/library/alpine/blobs/{image.layers[0]}"))[2] == b"cached"
    await site.app.stop()
    upstream.clear()
    with read_only(disk):
        site = await serve(upstream, more={"local": {"store": {}}}, directory=disk / "d", fresh_for="1h")
        assert (await site.get(BLOB))[2] == CONTENT
        assert (await site.get("/v2/library/alpine/manifests/3"))[0] == 200
        assert (await site.get(f"/v2/library/alpine/blobs/{image.layers[0]}"))[2] == b"cached"
        assert upstream.log == []
        async with site.request("POST", UPLOAD, data=CONTENT) as response:
            assert response.status == 503
            assert str(disk) not in await response.text()
        await site.app.stop()


@pytest.mark.errors("disk.failed")
@pytest.mark.parametrize("logged", [False, True], ids=["closed", "killed"])
def test_records_can_be_read_and_written_once_the_disk_can(disk: Path, logged: bool) -> None:  # noqa: F811
    directory = disk / "store" / "records"
    first = SQLiteRecords(directory)
    first.put("tag a 1", b"x")
    if logged:  # as a killed process leaves them
        shutil.copytree(directory, disk / "copy")
    first.close()
    if logged:
        shutil.rmtree(directory)
        (disk / "copy").rename(directory)
        assert (directory / "cache.db-wal").stat().st_size
    with read_only(disk):
        records = SQLiteRecords(directory, disk=DiskHealth(disk))
        assert records.get("tag a 1") == b"x"
        assert list(records.scan("tag a ")) == [("tag a 1", b"x")]
        assert (records.holds("tag a 1"), records.first("tag ")) == (True, "tag a 1")
        for write in (lambda: records.put("b", b"c"), lambda: records.delete("tag a 1")):
            with pytest.raises(StorageFailed, match="Read-only"):
                write()
        with pytest.raises(StorageFailed, match="Read-only"):
            records.transaction(lambda batch: batch.put("b", b"c"))
    records.put("b", b"c")
    assert (records.get("tag a 1"), records.get("b")) == (b"x", b"c")
    records.close()


def test_a_read_only_database_does_not_write(tmp_path: Path) -> None:
    with closing(SQLiteRecords(tmp_path / "records")) as records:
        records.put("a", b"b")
    before = sorted(each.name for each in (tmp_path / "records").iterdir())
    reason = OSError(30, os.strerror(30))
    found = ReadOnlyDatabase(tmp_path / "records" / "cache.db", reason)
    assert len(found._sql("SELECT value FROM Cache WHERE key = ?", ("a",))) == 1
    for refused in (found.set, found.delete, found.transact):
        with pytest.raises(OSError, match=os.strerror(30)):
            refused("a", b"c")
    assert sorted(each.name for each in (tmp_path / "records").iterdir()) == before


def fill_inodes(path: Path) -> None:
    """Make empty files until there is no room for another one."""
    for number in range(10_000):
        try:
            (path / f"filler-{number}").touch()
        except OSError:
            return
    raise AssertionError("the disk has room for any number of files")


@pytest.fixture
def few_inodes(tmp_path: Path) -> Iterator[Path]:
    """A file system for two hundred files."""
    path = tmp_path / "few"
    path.mkdir()
    mount("-t", "tmpfs", "-o", "size=40m,nr_inodes=200", "tmpfs", str(path))
    yield path
    unmount(path)


@pytest.mark.errors("disk.failed")
@pytest.mark.parametrize("killed", [False, True], ids=["closed", "killed"])
@pytest.mark.parametrize("of", ["bytes", "inodes"])
@pytest.mark.housekeeping
async def test_what_was_pushed_is_served_from_a_full_disk(
    serve: Serve,
    upstream: Upstream,
    disk: Path,  # noqa: F811
    few_inodes: Path,
    events: LogCapture,
    of: str,
    killed: bool,
) -> None:
    home = disk if of == "bytes" else few_inodes
    site = await serve(upstream, more={"local": {"store": {}}}, directory=home / "d")
    async with site.request("POST", UPLOAD, data=CONTENT) as response:
        assert response.status == 201
    if killed:
        shutil.copytree(home / "d", home / "copy")
    await site.app.stop()
    if killed:
        shutil.rmtree(home / "d")
        (home / "copy").rename(home / "d")
    if of == "bytes":
        leave(home, 0)
    else:
        fill_inodes(home)
    site = await serve(upstream, more={"local": {"store": {}}}, directory=home / "d")
    for _ in range(2):
        assert (await site.get(BLOB))[2] == CONTENT
        async with site.request("POST", UPLOAD, data=CONTENT) as response:
            assert response.status == 507
            assert FULL in await response.text()
    found = await ready(site)
    assert found["status"] == "degraded" and FULL in found["store"]
    for filler in home.glob("filler*"):
        filler.unlink()
    assert await ready(site) == {"status": "ready"}
    async with site.request("POST", UPLOAD, data=CONTENT) as response:
        assert response.status == 201
    assert said(events, "disk.failed", "disk.recovered") == [("disk.failed", FULL), ("disk.recovered", FULL)]


@pytest.mark.clients
@pytest.mark.errors("disk.failed")
async def test_a_server_of_several_processes_says_once_that_its_disk_is_full(
    disk: Path,  # noqa: F811
    place: Place,
) -> None:
    place.tree["disk"]["path"] = str(disk / "d")
    place.tree["namespaces"]["local"] = {"store": {}}
    first = await place.start()
    async with aiohttp.ClientSession() as session:
        async with session.post(first.url + UPLOAD, data=CONTENT) as response:
            assert response.status == 201
        await first.stop()
        filler = leave(disk, 0)
        server = await place.start()
        for worker in await server.workers():
            assert await worker.get(BLOB) == CONTENT
            async with worker.ask(UPLOAD, "POST", CONTENT) as response:
                assert response.status == 507
        async with session.get(f"{server.admin_url}/readyz") as response:
            assert FULL in (await response.json())["store"]
        filler.unlink()
        async with session.get(f"{server.admin_url}/readyz") as response:
            assert await response.json() == {"status": "ready"}
        await server.heard("disk.recovered")
        await server.stop()
    assert len(server.said("disk.failed")) == len(server.said("disk.recovered")) == 1


WRITER = """
import sys
from pathlib import Path
from storage.disk.records import SQLiteRecords
records = SQLiteRecords(Path(sys.argv[1]))
for line in sys.stdin:
    key, value = line.split()
    if value == "close":
        records.close()
    records.put(key, value.encode() * 5000) if value != "close" else None
    print("done", flush=True)
"""


@pytest.mark.clients
@pytest.mark.parametrize("logged", [False, True], ids=["closed", "open"])
def test_a_read_only_database_shows_what_another_process_writes(tmp_path: Path, logged: bool) -> None:
    """With a log, and without one, in which case nothing locks the file that is read."""
    directory = tmp_path / "records"
    with closing(SQLiteRecords(directory)) as records:
        for number in range(200):
            records.put(f"tag {number}", b"old")
    command = [*PROGRAM, WRITER, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdin is not None and writer.stdout is not None

        def write(key: str, value: str) -> None:
            assert writer.stdin is not None and writer.stdout is not None
            print(key, value, file=writer.stdin, flush=True)
            assert writer.stdout.readline() == "done\n"

        if logged:
            write("first", "x")
        found = ReadOnlyDatabase(directory / "cache.db", OSError())
        with closing(found):

            def values(key: str) -> list[bytes]:
                return [row[0][4:] for row in found.execute("SELECT value FROM Cache WHERE key = ?", (key,))]

            assert (values("tag 1"), values("new")) == ([b"old"], [])
            write("new", "n")
            write("tag/1", "t")
            assert (values("new"), values("tag/1")) == ([b"n" * 5000], [b"t" * 5000])
            write("-", "close")  # which moves the log into the database
            assert (values("new"), values("tag 1")) == ([b"n" * 5000], [b"old"])
            assert found.execute("PRAGMA integrity_check").fetchone() == ("ok",)
