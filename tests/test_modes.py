"""What the server stores is for its own user, and clients hear of no path."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from storage.archives.exporter import named, placed
from storage.disk.blobs import BlobFiles
from storage.disk.modes import create_file, make_directory
from storage.disk.records import SQLiteRecords
from storage.errors import OriginDenied, RegistryError, StorageFailed
from storage.oci import OCI_MANIFEST, Digest
from tests.conftest import Serve
from tests.upstream import Basic, Upstream

CONTENT = b"a layer that is nobody else's"
DIGEST = Digest.of(CONTENT)
UPLOADS = "/v2/local/app/blobs/uploads/"


@pytest.fixture(params=[0o000, 0o022, 0o077], autouse=True)
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    former = os.umask(request.param)
    yield
    os.umask(former)


def readable(directory: Path) -> list[Path]:
    """All that other users may read, write or enter."""
    return [each for each in (directory, *directory.rglob("*")) if stat.S_IMODE(each.lstat().st_mode) & 0o077]


async def test_what_is_pushed_pulled_and_recorded(serve: Serve, upstream: Upstream) -> None:
    upstream.image("library/alpine", "3", layers=[b"layer"])
    webhooks = [{"name": "a", "url": upstream.url, "actions": ["delete"]}]
    site = await serve(upstream, more={"local": {"store": {}}}, top={"webhooks": webhooks})
    async with site.request("POST", f"{UPLOADS}?digest={DIGEST}", data=CONTENT) as response:
        assert response.status == 201
    async with site.request("POST", UPLOADS) as response:
        location = response.headers["Location"]
    async with site.request("PATCH", location, data=b"half") as response:
        assert response.status == 202
    assert (await site.get("/v2/library/alpine/manifests/3"))[0] == 200
    assert (await site.get(f"/v2/library/alpine/blobs/{Digest.of(b'layer')}"))[0] == 200
    manifest = (
        b'{"schemaVersion": 2, "config": {"mediaType": "a/b", "digest": "%s", "size": %d}, "layers": []}'
        % (
            DIGEST.encode(),
            len(CONTENT),
        )
    )
    types = {"Content-Type": OCI_MANIFEST}
    async with site.request("PUT", "/v2/local/app/manifests/1", data=manifest, headers=types) as response:
        assert response.status == 201
    found = {each.name for each in site.directory.rglob("*")}
    assert {"cache.db", "cache.db-wal", DIGEST.encoded, "events"} <= found
    assert readable(site.directory) == []
    async with site.request("DELETE", location) as response:
        assert response.status == 204


@pytest.mark.errors("blob.damaged")
async def test_damaged_content_that_is_set_aside(tmp_path: Path) -> None:
    files = BlobFiles(tmp_path / "new" / "private", private=True)
    upload = files.create()
    await upload.write(CONTENT)
    await upload.commit(DIGEST)
    os.truncate(files.path(DIGEST), 3)
    with pytest.raises(RegistryError):
        files.open(DIGEST, len(CONTENT))
    assert len(list((files.root / "damaged").iterdir())) == 1
    assert readable(tmp_path / "new") == []


@pytest.mark.errors("records.damaged")
def test_records_that_are_rebuilt(tmp_path: Path) -> None:
    directory = tmp_path / "store" / "records"
    with closing(SQLiteRecords(directory)) as records:
        records.put("a", b"b")
    (directory / "cache.db").write_bytes(b"nothing that SQLite knows" * 1000)
    (directory / "cache.db").chmod(0o600)
    with closing(SQLiteRecords(directory)) as records:
        records.put("c", b"d")
    assert len(list(directory.parent.glob("records.damaged-*"))) == 1
    assert readable(directory.parent) == []


def test_a_directory_of_a_former_version_is_closed_to_others(tmp_path: Path) -> None:
    root = tmp_path / "private"
    for each in (root, root / "blobs", root / "partial"):
        each.mkdir(exist_ok=True)
        each.chmod(0o755)
    BlobFiles(root, private=True)
    assert stat.S_IMODE(root.stat().st_mode) == 0o700


def test_missing_parents_are_as_closed(tmp_path: Path) -> None:
    make_directory(tmp_path / "a" / "b" / "c")
    make_directory(tmp_path / "a" / "b" / "c")
    with pytest.raises(FileNotFoundError, match=r"/proc/absent\b"):  # where nobody can create one
        make_directory(Path("/proc/absent/a/b"))
    assert readable(tmp_path / "a") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root changes owners")
@pytest.mark.parametrize("how", ["symbolic", "hard"])
def test_root_gives_away_no_file_that_a_link_leads_to(tmp_path: Path, how: str) -> None:
    secret, directory = tmp_path / "secret", tmp_path / "directory"
    secret.write_bytes(b"of root")
    directory.mkdir()
    os.chown(directory, 65534, 65534)
    if how == "symbolic":
        (directory / "a.lock").symlink_to(secret)
        with pytest.raises(OSError, match="symbolic links"):
            create_file(directory / "a.lock", os.O_RDWR)
    else:
        (directory / "a.lock").hardlink_to(secret)
        os.close(create_file(directory / "a.lock", os.O_RDWR))
    assert secret.stat().st_uid == 0
    os.close(create_file(directory / "b.lock", os.O_RDWR))
    assert (directory / "b.lock").stat().st_uid == 65534


@pytest.mark.parametrize("name", ["bundle.tar", "bundle"])
def test_bundles_are_private_until_their_owner_shares_them(tmp_path: Path, name: str) -> None:
    with named(tmp_path / name) as sink:
        sink.put("blobs/sha256/a", 4, [b"what"])
    assert readable(tmp_path / name) == []
    with placed(tmp_path / "key") as (partial, _):
        assert readable(partial) == []


@pytest.mark.parametrize("broken", ["blobs", "partial", "records"])
@pytest.mark.errors("disk.failed", "records.damaged")
async def test_a_failure_of_the_disk_names_no_path_to_clients(
    serve: Serve, upstream: Upstream, broken: str, tmp_path: Path
) -> None:
    site = await serve(upstream, more={"local": {"store": {}}})
    async with site.request("POST", f"{UPLOADS}?digest={DIGEST}", data=CONTENT) as response:
        assert response.status == 201
    place = site.directory / "private" / broken
    place.rename(place.with_name("away"))
    place.write_bytes(b"")  # not a directory
    texts = []
    for method, path in (("GET", f"/v2/local/app/blobs/{DIGEST}"), ("POST", UPLOADS)):
        async with site.request(method, path) as response:
            texts.append((response.status, await response.text()))
    assert any(status == 500 for status, _ in texts)
    assert not any(str(tmp_path) in text or "/private" in text for _, text in texts), texts
    place.unlink()
    place.with_name("away").rename(place)
    for each in (site.directory / "private" / "partial").iterdir():
        each.unlink()


def test_what_an_error_says_in_public() -> None:
    assert "/srv" not in StorageFailed("/srv/a: no").public
    assert StorageFailed("/srv/a: no", cause="no").public.endswith(": no")
    assert StorageFailed("/srv/a: no", cause="no").copy().public.endswith(": no")
    assert OriginDenied("password file /srv/b: no", public="password file").copy().public == "password file"


@pytest.mark.errors("credentials.failed")
async def test_a_missing_password_file_is_not_named_to_clients(
    serve: Serve, upstream: Upstream, tmp_path: Path
) -> None:
    upstream.auth = Basic("ci", "right")
    upstream.image("library/alpine", "3")
    secret = tmp_path / "password"
    secret.write_text("right")
    site = await serve(
        upstream,
        options={"username": "ci", "password_file": str(secret)},
        top={"fallback": "deny"},
    )
    secret.unlink()
    status, _, body = await site.get("/v2/library/alpine/manifests/3")
    assert status == 403
    assert str(tmp_path).encode() not in body
    assert b"password file" in body
