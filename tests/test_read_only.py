"""A disk that is read-only when the server starts: what can be read is served."""

from __future__ import annotations

import os
import shutil
from contextlib import closing
from pathlib import Path

import pytest

from storage.disk.health import DiskHealth
from storage.disk.read_only import ReadOnlyDatabase
from storage.disk.records import Records
from storage.errors import StorageFailed
from storage.oci import Digest
from tests.conftest import Serve
from tests.test_disk import disk, mount, read_only  # noqa: F401  a fixture
from tests.upstream import Upstream

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
            assert response.status == 500
            assert str(disk) not in await response.text()
        await site.app.stop()


@pytest.mark.errors("disk.failed")
@pytest.mark.parametrize("logged", [False, True], ids=["closed", "killed"])
def test_records_can_be_read_and_written_once_the_disk_can(disk: Path, logged: bool) -> None:  # noqa: F811
    directory = disk / "store" / "records"
    first = Records(directory)
    first.put("tag a 1", b"x")
    if logged:  # as a killed process leaves them
        shutil.copytree(directory, disk / "copy")
    first.close()
    if logged:
        shutil.rmtree(directory)
        (disk / "copy").rename(directory)
        assert (directory / "cache.db-wal").stat().st_size
    with read_only(disk):
        records = Records(directory, disk=DiskHealth(disk))
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
    with closing(Records(tmp_path / "records")) as records:
        records.put("a", b"b")
    before = sorted(each.name for each in (tmp_path / "records").iterdir())
    found = ReadOnlyDatabase(tmp_path / "records" / "cache.db")
    assert len(found._sql("SELECT value FROM Cache WHERE key = ?", ("a",))) == 1
    for refused in (found.set, found.delete, found.transact):
        with pytest.raises(OSError, match=os.strerror(30)):
            refused("a", b"c")
    assert sorted(each.name for each in (tmp_path / "records").iterdir()) == before
