"""The disk: full, read-only, failing, gone.  Pulls go on, it is told once, and it heals by itself.

The disks are real: small file systems in memory, mounted by the test; so it has to be root.
"""

from __future__ import annotations

import asyncio
import os
import random
import resource
import shutil
import sqlite3
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from structlog.testing import LogCapture

from storage.disk.blobs import BlobFiles
from storage.disk.health import FORGOTTEN, SPARE, DiskHealth
from storage.disk.records import AGAIN, SQLiteRecords
from storage.errors import StorageFailed
from storage.oci import Digest
from tests.conftest import Clock, Serve, Site
from tests.events import Ear
from tests.processes import Place, digest, place
from tests.upstream import Hold, Upstream

__all__ = ["place"]  # a fixture

MIB = 1 << 20
DISK = 40 * MIB
SMALL = random.Random(2).randbytes(100_000)
NAME = "library/alpine"
PAGE = 4096  # bytes, of a database
FULL = "No space left on device"


@cache
def random_bytes() -> bytes:
    return random.Random(1).randbytes(100 * MIB)


Fill = Callable[[int], None]


def mount(*arguments: str) -> None:
    """Skips the test where that is not allowed; fails it if ENTREPOT_REQUIRE_CLIENTS=1 asks for all."""
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = f"nothing can be mounted here: {done.stderr.strip()}"
        if os.environ.get("ENTREPOT_REQUIRE_CLIENTS") == "1":
            pytest.fail(reason)
        pytest.skip(reason)


def unmount(path: Path) -> None:
    # Lazily: the databases of threads that wait for work stay open.
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 MiB."""
    path = tmp_path / "mounted"
    path.mkdir()
    mount("-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(path))
    try:
        yield path
    finally:
        unmount(path)


@contextmanager
def read_only(path: Path) -> Iterator[None]:
    mount("--bind", str(path), str(path))
    try:
        mount("-o", "remount,bind,ro", str(path))
        yield
    finally:
        unmount(path)


def room(path: Path) -> int:
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def leave(path: Path, size: int) -> Path:
    """Fill the disk with something else, so that `size` bytes are left; the file that does it."""
    filler = path / "filler"
    with filler.open("ab") as file:
        for _ in range(100):
            with suppress(OSError):  # the server has written something since its room was asked for
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), room(path) - size)
                return filler
    raise AssertionError("the disk could not be filled")


async def kept(site: Site, wanted: str, event: str = "fill.committed") -> None:
    """Pull, and wait until it is in its place: clients have all of it before that."""
    ear = Ear()
    assert await pulled(site, wanted)
    await ear.heard(event)


def url(digest: str) -> str:
    return f"/v2/{NAME}/blobs/{digest}"


async def pulled(site: Site, wanted: str) -> bool:
    """Whether it is what was asked for; without having it in memory."""
    async with site.request("GET", url(wanted)) as response:
        assert response.status == 200
        return await digest(response) == wanted


async def ready(site: Site) -> dict[str, str]:
    assert site.app.admin_url is not None
    async with site.session.get(site.app.admin_url / "readyz") as response:
        assert response.status == 200
        found: dict[str, str] = await response.json()
        return found


def said(events: LogCapture, *names: str) -> list[Any]:
    """The events of these names, as (name, cause)."""
    return [(each["event"], each.get("cause")) for each in events.entries if each["event"] in names]


TOLD = ("disk.failed", "disk.recovered", "records.damaged", "fill.failed", "store.failed")


# Full


@pytest.mark.clients  # hundreds of MiB
@pytest.mark.errors("disk.failed")
async def test_what_does_not_fit_is_not_begun(
    disk: Path, serve: Serve, upstream: Upstream, events: LogCapture
) -> None:
    large, small = upstream.blob(NAME, random_bytes()), upstream.blob(NAME, SMALL)
    site = await serve(upstream, directory=disk)
    free = room(disk)
    gate = asyncio.Event()
    upstream.next("GET", large, Hold(gate, 30 * MIB), times=4)
    pulls = [asyncio.create_task(pulled(site, large)) for _ in range(3)]
    await Ear().heard("fill.uncached")
    assert room(disk) > free - MIB  # while they are under way
    gate.set()
    assert await asyncio.gather(*pulls) == [True] * 3
    assert site.partial == []
    assert said(events, *TOLD) == [("disk.failed", FULL)]
    assert (await ready(site))["status"] == "degraded"
    # What fits is kept all the same; that does not mean that the large one would fit now.
    assert await pulled(site, small)
    assert await pulled(site, large)
    upstream.clear()
    assert await pulled(site, small)
    assert upstream.log == []
    assert FULL in (await ready(site))["store"]
    assert said(events, *TOLD) == [("disk.failed", FULL)]


@pytest.mark.clients  # hundreds of MiB
@pytest.mark.errors("disk.failed")
@pytest.mark.parametrize("announced", [True, False])
async def test_a_disk_full_in_mid_fill(
    disk: Path, serve: Serve, upstream: Upstream, events: LogCapture, announced: bool
) -> None:
    """Clients at the frontier, before it and at the start; each goes on where it is."""
    size = (30 if announced else 100) * MIB
    wanted = upstream.blob(NAME, random_bytes()[:size])
    upstream.content_length = announced
    site = await serve(upstream, directory=disk)
    hold = Hold(gate := asyncio.Event(), 20 * MIB)
    upstream.next("GET", wanted, hold)
    ear = Ear()
    async with (
        site.request("GET", url(wanted)) as near,
        site.request("GET", url(wanted)) as far,
        site.request("GET", url(wanted)) as still,
    ):
        await hold.reached.wait()
        parts = {near: await near.content.readexactly(19 * MIB), far: await far.content.readexactly(5 * MIB)}
        if announced:
            leave(disk, 4 * MIB)  # somebody else takes what had been there for it
        gate.set()
        await ear.heard("fill.uncached")
        assert site.partial == []
        found = [await digest(each, parts.get(each, b"")) for each in (near, far, still)]
    assert found == [wanted] * 3
    asked = [request.range for request in upstream.requests if request.method == "GET"]
    assert asked[0] is None
    assert len(asked) == 4
    starts = sorted(int((each or "bytes=0-")[6:].partition("-")[0]) for each in asked[1:])
    assert starts[0] >= 0
    assert starts[-1] >= 19 * MIB
    assert said(events, *TOLD) == [("disk.failed", FULL)]
    assert room(disk) >= (24 if announced else 38) * MIB  # nobody holds what was stored of it


@pytest.mark.clients
@pytest.mark.errors("disk.failed")
async def test_a_hundred_pulls_on_a_full_disk_are_one_event_and_it_heals(
    disk: Path, serve: Serve, upstream: Upstream, events: LogCapture
) -> None:
    images = [upstream.image(NAME, f"v{number}", [SMALL[number:]]) for number in range(50)]
    site = await serve(upstream, directory=disk)
    assert await ready(site) == {"status": "ready"}
    filler = leave(disk, 0)

    async def pull(number: int) -> None:
        status, _, body = await site.get(f"/v2/{NAME}/manifests/v{number}")
        assert (status, body) == (200, images[number].content)
        assert await pulled(site, images[number].layers[0])
        if number % 5 == 0:
            assert (await ready(site))["status"] == "degraded"

    await asyncio.gather(*(pull(number) for number in range(50)))
    assert said(events, *TOLD) == [("disk.failed", FULL)]
    filler.unlink()
    await pull(1)
    assert said(events, *TOLD) == [("disk.failed", FULL), ("disk.recovered", FULL)]
    assert await ready(site) == {"status": "ready"}
    upstream.clear()
    await pull_again(site, images[1])
    assert upstream.log == []


async def pull_again(site: Site, image: Any) -> None:
    assert (await site.get(f"/v2/{NAME}/manifests/{image.digest}"))[2] == image.content
    assert await pulled(site, image.layers[0])


@pytest.mark.clients
@pytest.mark.errors("disk.failed")
async def test_fills_in_flight_have_their_room(
    disk: Path, serve: Serve, upstream: Upstream, events: LogCapture
) -> None:
    """Two that would fit, each by itself: the second passes by, and the first is not spoiled by it."""
    first, second = (upstream.blob(NAME, random_bytes()[at * MIB : (at + 25) * MIB]) for at in (0, 30))
    site = await serve(upstream, directory=disk)
    hold = Hold(gate := asyncio.Event(), MIB)
    upstream.next("GET", first, hold)
    ear = Ear()
    begun = asyncio.create_task(pulled(site, first))
    await hold.reached.wait()
    assert await pulled(site, second)
    gate.set()
    assert await begun
    await ear.heard("fill.committed")
    upstream.clear()
    assert await pulled(site, first)
    assert upstream.log == []
    assert said(events, *TOLD) == [("disk.failed", FULL)]


@pytest.mark.clients
@pytest.mark.errors("disk.failed")
async def test_who_follows_another_process_goes_on_too(disk: Path, serve: Serve, upstream: Upstream) -> None:
    """A lock belongs to an open file: two servers in one process are as far apart as two processes."""
    wanted = upstream.blob(NAME, random_bytes()[: 30 * MIB])
    slow = {"progress_timeout": "60s"}
    writer, other = [await serve(upstream, directory=disk, options=slow) for _ in range(2)]
    hold = Hold(gate := asyncio.Event(), 10 * MIB)
    upstream.next("GET", wanted, hold)
    first = asyncio.create_task(pulled(writer, wanted))
    await hold.reached.wait()
    async with other.request("GET", url(wanted)) as response:
        begun = await response.content.readexactly(9 * MIB)
        leave(disk, MIB)
        gate.set()
        assert await digest(response, begun) == wanted
    assert await first


@pytest.mark.errors("disk.failed")
async def test_a_server_starts_on_a_full_disk(disk: Path, serve: Serve, upstream: Upstream) -> None:
    wanted = upstream.blob(NAME, SMALL)
    (disk / "cache").mkdir()
    filler = leave(disk, 0)
    site = await serve(upstream, directory=disk)
    assert await pulled(site, wanted)
    assert (await ready(site))["status"] == "degraded"
    filler.unlink()
    assert await pulled(site, wanted)
    upstream.clear()
    assert await pulled(site, wanted)
    assert upstream.log == []
    assert await ready(site) == {"status": "ready"}


@pytest.mark.clients
@pytest.mark.errors("disk.failed")
async def test_files_that_may_not_grow(place: Place, upstream: Upstream) -> None:
    """RLIMIT_FSIZE on a running server, lifted later."""
    wanted, later = (
        upstream.blob(NAME, random_bytes()[: 8 * MIB]),
        upstream.blob(NAME, random_bytes()[MIB : 9 * MIB]),
    )
    place.tree["workers"] = 1
    server = await place.start()
    (pid,) = server.pids()
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (3 * MIB, hard))
    async with aiohttp.ClientSession() as session:

        async def pull(wanted: str) -> str:
            async with session.get(server.url + url(wanted)) as response:
                return await digest(response)

        for _ in range(5):
            assert await pull(wanted) == wanted
            async with session.get(f"{server.admin_url}/readyz") as response:
                assert (await response.json())["status"] == "degraded"
        assert len(server.said("disk.failed")) == 1
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))
        assert await pull(later) == later
        await server.heard("disk.recovered")
        assert await pull(wanted) == wanted
        await server.heard("fill.committed", nth=2)
        upstream.clear()
        assert await pull(wanted) == wanted
    assert upstream.log == []
    assert server.partial() == []
    await server.stop()


UPLOADS = "/v2/local/app/blobs/uploads/"


@pytest.mark.clients
async def test_what_is_cached_makes_room_for_what_is_pushed(
    disk: Path, serve: Serve, upstream: Upstream
) -> None:
    site = await serve(upstream, directory=disk, more={"local": {"store": {}}})
    cached = [upstream.blob(NAME, random_bytes()[at * MIB : (at + 10) * MIB]) for at in (0, 10, 20)]
    for each in cached:
        await kept(site, each)
    content = random_bytes()[: 25 * MIB]
    async with site.request("POST", f"{UPLOADS}?digest={Digest.of(content)}", data=content) as response:
        assert response.status == 201, await response.text()
    async with site.request("GET", f"/v2/local/app/blobs/{Digest.of(content)}") as response:
        assert await digest(response) == Digest.of(content)
    assert all([await pulled(site, each) for each in cached])


@pytest.mark.clients
@pytest.mark.errors("disk.failed")
async def test_what_cannot_be_pushed_for_lack_of_room(
    disk: Path, serve: Serve, upstream: Upstream, events: LogCapture
) -> None:
    """Whether it is known beforehand or not; what is there stays, and what fits is taken."""
    site = await serve(upstream, directory=disk, more={"local": {"store": {}}})
    content = random_bytes()[: 60 * MIB]

    async def stream() -> AsyncIterator[bytes]:
        for at in range(0, len(content), MIB):
            yield content[at : at + MIB]

    for body in (content, stream()):
        async with site.request("POST", f"{UPLOADS}?digest={Digest.of(content)}", data=body) as response:
            assert response.status == 507
            (error,) = (await response.json())["errors"]
            assert error["code"] == "UNKNOWN" and FULL in error["message"]
    assert site.partial == [] and list((disk / "private" / "partial").iterdir()) == []
    assert said(events, "disk.failed") == [("disk.failed", FULL)]
    async with site.request("POST", f"{UPLOADS}?digest={Digest.of(SMALL)}", data=SMALL) as response:
        assert response.status == 201


@pytest.mark.errors("disk.failed")
def test_records_on_a_full_disk_can_be_read(disk: Path, clock: Clock, events: LogCapture) -> None:
    records = SQLiteRecords(disk / "records", clock)
    records.put("tag r a", b"1")
    filler = leave(disk, 0)
    for _ in range(3):
        with pytest.raises(StorageFailed, match=FULL):
            records.put("tag r b", SMALL)
        assert records.get("tag r a") == b"1"
    filler.unlink()
    records.put("tag r b", SMALL)
    assert records.get("tag r b") == SMALL
    assert said(events, *TOLD) == [("disk.failed", FULL), ("disk.recovered", FULL)]
    records.close()


@pytest.mark.errors("disk.failed", "records.damaged")
def test_damaged_records_wait_where_no_others_can_be_made(disk: Path, clock: Clock) -> None:
    records = SQLiteRecords(disk / "records", clock)
    records.put("tag r a", b"1")
    os.truncate(disk / "records" / "cache.db", 5000)
    os.truncate(disk / "records" / "cache.db-wal", 0)
    filler = leave(disk, 0)
    for _ in range(2):
        with pytest.raises(StorageFailed):
            records.put("tag r a", b"2")
        for thread in threads("records"):
            thread.join()
        clock.advance(AGAIN)
    assert sorted(path.name for path in disk.iterdir()) == ["filler", "records", "records.lock"]
    filler.unlink()
    with pytest.raises(StorageFailed):
        records.put("tag r a", b"2")
    for thread in threads("records"):
        thread.join()
    records.put("tag r a", b"2")
    assert records.get("tag r a") == b"2"
    records.close()


# Read-only, gone


@pytest.mark.errors("disk.failed")
async def test_a_disk_that_turns_read_only(
    disk: Path, serve: Serve, upstream: Upstream, events: LogCapture
) -> None:
    image, missing = upstream.image(NAME, "latest", [SMALL]), upstream.image(NAME, "other", [SMALL[1:]])
    site = await serve(upstream, directory=disk)
    assert (await site.get(f"/v2/{NAME}/manifests/latest"))[2] == image.content
    await kept(site, image.layers[0])
    with read_only(disk):
        upstream.clear()
        await pull_again(site, image)
        assert upstream.log == []  # what is there is served
        for _ in range(10):
            assert (await site.get(f"/v2/{NAME}/manifests/other"))[2] == missing.content
            assert await pulled(site, missing.layers[0])
            assert (await ready(site))["status"] == "degraded"
        assert said(events, *TOLD) == [("disk.failed", "Read-only file system")]
    assert (await site.get(f"/v2/{NAME}/manifests/other"))[2] == missing.content
    await kept(site, missing.layers[0])
    assert said(events, *TOLD)[1:] == [("disk.recovered", "Read-only file system")]
    assert await ready(site) == {"status": "ready"}
    upstream.clear()
    await pull_again(site, missing)
    assert upstream.log == []


@pytest.mark.parametrize(
    "part", ["", "cache", "cache/partial", "cache/records", "cache/blobs", "cache/locks"]
)
async def test_a_directory_that_was_removed_is_made_again(
    serve: Serve, upstream: Upstream, part: str, events: LogCapture
) -> None:
    image = upstream.image(NAME, "latest", [SMALL])
    site = await serve(upstream)
    assert (await site.get(f"/v2/{NAME}/manifests/latest"))[2] == image.content
    await kept(site, image.layers[0])
    shutil.rmtree(site.directory / part)
    assert (await site.get(f"/v2/{NAME}/manifests/latest"))[2] == image.content
    if part in ("", "cache", "cache/blobs"):
        await kept(site, image.layers[0])
    elif part == "cache/records":
        await kept(site, image.layers[0], "fill.linked")
    missing = upstream.blob(NAME, SMALL[1:])
    await kept(site, missing)
    upstream.clear()
    await pull_again(site, image)
    assert await pulled(site, missing)
    assert upstream.log == []
    assert await ready(site) == {"status": "ready"}


@pytest.mark.parametrize("damage", ["truncated", "emptied", "longer", "vanished"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_blob_that_is_not_what_it_was_is_fetched_again(
    serve: Serve, upstream: Upstream, damage: str, method: str
) -> None:
    wanted = upstream.blob(NAME, SMALL)
    site = await serve(upstream)
    await kept(site, wanted)
    (file,) = (site.directory / "cache" / "blobs").glob("*/*/*")
    if damage == "vanished":
        file.unlink()
    else:
        os.truncate(file, {"truncated": 50_000, "emptied": 0, "longer": 100_001}[damage])
    upstream.clear()
    ear = Ear()
    async with site.request(method, url(wanted)) as response:
        assert response.status == 200
        assert response.headers["Content-Length"] == str(len(SMALL))
        assert await response.read() == (SMALL if method == "GET" else b"")
    assert len(upstream.log) == 1
    if method == "HEAD":
        await kept(site, wanted)
    else:
        await ear.heard("fill.committed")
    upstream.clear()
    assert await pulled(site, wanted)
    assert upstream.log == []


# SQLiteRecords


def garble(file: Path, seed: int = 1) -> None:
    """Overwrite the beginning of each page, so that nothing can be salvaged."""
    chance = random.Random(seed)
    with file.open("r+b") as opened:
        for place in range(0, file.stat().st_size, 4096):
            opened.seek(place)
            opened.write(chance.randbytes(64))


def threads(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


async def rebuilt() -> None:
    for thread in threads("records"):
        await asyncio.to_thread(thread.join)


@pytest.mark.errors("records.damaged")
@pytest.mark.parametrize("running", [False, True])
async def test_records_that_are_damaged_are_moved_aside_and_begun_anew(
    serve: Serve, upstream: Upstream, events: LogCapture, running: bool
) -> None:
    image = upstream.image(NAME, "latest", [SMALL])
    site = await serve(upstream)
    assert (await site.get(f"/v2/{NAME}/manifests/latest"))[2] == image.content
    await kept(site, image.layers[0])
    records = site.directory / "cache" / "records"
    if running:
        os.truncate(records / "cache.db", 0)
        for log in records.glob("cache.db-wal"):
            os.truncate(log, 0)
    else:
        await site.app.stop()
        garble(records / "cache.db")
        for log in records.glob("cache.db-wal"):  # where it has pages, those of the database do not count
            log.unlink()
        site = await serve(upstream)
    upstream.clear()
    assert (await site.get(f"/v2/{NAME}/manifests/latest"))[2] == image.content
    assert await pulled(site, image.layers[0])
    if not running:  # by the time it served it was rebuilt; the blob lay in the tree
        assert [line.split()[0] for line in upstream.log] == ["GET", "HEAD"]
    await rebuilt()
    (told,) = [each for each in events.entries if each["event"] == "records.damaged"]
    assert await pulled(site, image.layers[0])
    assert (await site.get(f"/v2/{NAME}/manifests/latest"))[2] == image.content
    upstream.clear()
    assert (await site.get(f"/v2/{NAME}/manifests/latest"))[2] == image.content
    assert await pulled(site, image.layers[0])
    assert upstream.log == []
    assert (Path(told["path"]) / "cache.db").exists()
    assert Path(told["path"]).parent == records.parent
    assert said(events, *TOLD) == [("records.damaged", None)]


@pytest.mark.clients
@pytest.mark.errors("records.damaged")
async def test_what_could_be_read_is_served_offline(serve: Serve, upstream: Upstream) -> None:
    images = [upstream.image(NAME, f"v{number}", [b"%d" % number]) for number in range(60)]
    site = await serve(upstream)
    for number in range(60):
        assert (await site.get(f"/v2/{NAME}/manifests/v{number}"))[0] == 200
    await site.app.stop()
    database = site.directory / "cache" / "records" / "cache.db"
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    page = database.read_bytes().index(images[40].content) // PAGE
    with database.open("r+b") as file:
        file.seek(page * PAGE)
        file.write(random.Random(3).randbytes(PAGE))
    await upstream.stop()
    site = await serve(upstream, offline=True)
    answers = [await site.get(f"/v2/{NAME}/manifests/v{number}") for number in range(60)]
    await rebuilt()
    answers = [await site.get(f"/v2/{NAME}/manifests/v{number}") for number in range(60)]
    served = [number for number in range(60) if answers[number][0] == 200]
    assert 30 < len(served) < 60
    assert all(answers[number][2] == images[number].content for number in served)
    assert {answer[0] for answer in answers} == {200, 404}


# The start


async def test_nothing_looks_through_the_tree_before_it_listens(
    serve: Serve, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = await serve(upstream)
    assert await pulled(site, upstream.blob(NAME, SMALL))
    await site.app.stop()
    looked: list[str] = []
    for name in ("scandir", "listdir", "walk"):
        plain = getattr(os, name)

        def look(path: Any = ".", *rest: Any, plain: Any = plain, **options: Any) -> Any:
            looked.append(str(path))
            return plain(path, *rest, **options)

        monkeypatch.setattr(os, name, look)
    again = await serve(upstream)
    # Not yet the housekeeping either: it begins in the next turn of the loop.
    assert [path for path in looked if path.startswith(str(site.directory))] == []
    assert await pulled(again, upstream.blob(NAME, SMALL))


async def test_a_new_directory_is_made_durable_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = BlobFiles(tmp_path)
    synced: list[Path] = []
    plain = os.fsync

    def sync(file: int) -> None:
        synced.append(Path(f"/proc/self/fd/{file}").readlink().relative_to(tmp_path))
        plain(file)

    monkeypatch.setattr(os, "fsync", sync)
    for content in (b"first", b"first again"):
        upload = files.create()
        await upload.write(content)
        await upload.commit(Digest.of(content))
    first, again = (
        files.path(Digest.of(each)).relative_to(tmp_path).parents for each in (b"first", b"first again")
    )
    assert synced == [*first, again[0], *again[1:]]


# What the disk tells


@pytest.fixture
async def watched(tmp_path: Path, clock: Clock) -> AsyncIterator[DiskHealth]:
    yield DiskHealth(tmp_path, clock)


def fail(disk: DiskHealth, number: int, size: int = 0, kind: str = "blobs") -> None:
    with pytest.raises(StorageFailed), disk.guard(kind, Path("/x"), size):
        raise OSError(number, os.strerror(number))


@pytest.mark.errors("disk.failed")
def test_a_cause_stands_until_something_as_large_works(watched: DiskHealth, events: LogCapture) -> None:
    for size in (10, 1000, 100):
        fail(watched, 27, size)
    for kind, size in (("blobs", 999), ("records", 5000)):
        watched.worked(kind, size)
        assert watched.troubles() == ["/x: File too large"]
    watched.worked("blobs", 1000)
    assert watched.troubles() == []
    watched.worked("blobs", 1000)
    assert said(events, *TOLD) == [("disk.failed", "File too large"), ("disk.recovered", "File too large")]


@pytest.mark.errors("disk.failed")
def test_a_cause_is_forgotten_when_nothing_failed_for_a_while(watched: DiskHealth, clock: Clock) -> None:
    fail(watched, 5, 1000)
    clock.advance(FORGOTTEN - 1)
    fail(watched, 5)
    clock.advance(FORGOTTEN - 1)
    watched.worked("blobs")
    assert watched.troubles()
    clock.advance(1)
    watched.worked("records")
    assert watched.troubles()  # it says nothing of the blobs
    watched.worked("blobs")
    assert not watched.troubles()


@pytest.mark.errors("disk.failed")
def test_causes_are_told_one_by_one(watched: DiskHealth, events: LogCapture) -> None:
    fail(watched, 5)
    fail(watched, 27)
    fail(watched, 5, kind="records")
    fail(watched, 30)
    fail(watched, 30, kind="records")
    assert len(watched.troubles()) == 4
    assert len(said(events, "disk.failed")) == 4


@pytest.mark.errors("disk.failed")
def test_a_disk_is_full_until_there_is_room_for_what_did_not_fit(disk: Path, clock: Clock) -> None:
    watched = DiskHealth(disk, clock)
    leave(disk, 5 * MIB + SPARE)
    fail(watched, 28, 6 * MIB)
    watched.worked("blobs", 7 * MIB)  # in room that another gave
    assert watched.troubles()
    (disk / "filler").unlink()
    watched.worked("records", 1)
    assert not watched.troubles()


def test_a_disk_without_inodes_has_no_room(tmp_path: Path) -> None:
    path = tmp_path / "mounted"
    path.mkdir()
    mount("-t", "tmpfs", "-o", "size=8m,nr_inodes=4", "tmpfs", str(path))
    try:
        assert DiskHealth(path).room() > 0
        for name in "abc":
            (path / name).touch()
        assert DiskHealth(path).room() < 0
    finally:
        unmount(path)
