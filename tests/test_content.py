"""The contract of what holds the content of blobs, for every implementation of BlobContent."""

from __future__ import annotations

import asyncio
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.store import LocalStore

from storage.bucket.blobs import BucketBlobs
from storage.bucket.objects import Bucket, BucketHealth
from storage.bucket.owner import MARKER
from storage.content import BlobContent
from storage.disk.blobs import BlobFiles
from storage.disk.records import SQLiteRecords
from storage.disk.troubles import Troubles
from storage.disk.uploads import CHUNK
from storage.errors import BlobUnknown, BlobUploadUnknown, DigestInvalid
from storage.oci import Digest
from storage.registry import NOTHING, Blob
from tests.conftest import Clock
from tests.preloaded import PROGRAM

CONTENT = b"what a blob holds"
DIGEST = Digest.of(CONTENT)
LARGE = bytes(range(251)) * (7 * CHUNK // 251)  # of more than one part
DAY = 86400.0


class Files:
    """Blobs as files; `script` makes them as `content` in another process, whose argument is `directory`."""

    script = "from storage.disk.blobs import BlobFiles; content = BlobFiles(directory, clock, private=True)"

    def __init__(self, directory: Path, clock: Clock) -> None:
        self.directory = directory
        self.records = SQLiteRecords(directory / "records", clock, durable=True)
        self.content: BlobContent = BlobFiles(directory, clock, private=True, ticks=clock)

    def objects(self) -> list[Digest]:
        """What is really there, whether it counts as a blob or not."""
        return sorted(Digest(f"{path.parts[-3]}:{path.name}") for path in self._all())

    def _all(self) -> Iterator[Path]:
        return (path for path in (self.directory / "blobs").rglob("*") if path.is_file())

    def truncate(self, digest: Digest) -> None:
        """Damage what is stored."""
        path = self.content.path(digest)
        assert path is not None
        path.write_bytes(path.read_bytes()[:-1])

    def close(self) -> None:
        self.records.close()


class Objects(Files):
    """Blobs as objects of `store`, which is one of obstore's."""

    script = """
from obstore.store import S3Store, LocalStore
from storage.bucket.blobs import BucketBlobs
from storage.bucket.objects import Bucket, healthy
from storage.bucket.settings import BucketSettings
from storage.disk.records import SQLiteRecords
import obstore
def traced(function):
    async def call(*arguments, **options):
        global under_way
        trace("obstore", ())
        under_way += 1
        try:
            return await function(*arguments, **options)
        finally:
            under_way -= 1
            trace("obstore", ())
    return call
obstore.put_async, obstore.head_async = map(traced, (obstore.put_async, obstore.head_async))
bucket = Bucket({store}, "a bucket", healthy("a bucket", directory))
records = SQLiteRecords(directory / "records", clock, durable=True)
content = BucketBlobs(bucket, records, directory, clock)
"""

    def __init__(self, directory: Path, clock: Clock, store: Any, made: str) -> None:
        self.directory = directory
        self.script = self.script.format(store=made)
        self.store = store
        self.records = SQLiteRecords(directory / "records", clock, durable=True)
        self.troubles = Troubles()
        health = BucketHealth("a bucket", directory, clock, self.troubles)
        bucket = Bucket(store, "a bucket", health)
        self.content = BucketBlobs(bucket, self.records, directory, clock, ticks=clock)

    def keys(self) -> list[str]:
        """Those of blobs: another one says whose they are."""
        found = (str(each["path"]) for portion in obstore.list(self.store) for each in portion)
        return [key for key in found if key != MARKER]

    def objects(self) -> list[Digest]:
        found = []
        for key in self.keys():
            algorithm, start, name = key.split("/")
            assert name.startswith(start)
            found.append(Digest(f"{algorithm}:{name.partition('.')[0]}"))
        return sorted(found)

    def truncate(self, digest: Digest) -> None:
        (key,) = self.keys()
        content = bytes(obstore.get(self.store, key).bytes())
        obstore.put(self.store, key, content[:-1])


@pytest.fixture(params=["files", "objects", pytest.param("seaweed", marks=pytest.mark.clients)])
def subject(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Iterator[Files]:
    made: Files
    if request.param == "files":
        made = Files(tmp_path / "content", clock)
    elif request.param == "objects":
        (tmp_path / "bucket").mkdir()
        local = f"LocalStore({str(tmp_path / 'bucket')!r})"
        made = Objects(tmp_path / "content", clock, LocalStore(tmp_path / "bucket"), local)
    else:
        server = request.getfixturevalue("seaweed")
        settings = server.settings("tests", f"some/{secrets.token_hex(8)}")
        made = Objects(tmp_path / "content", clock, settings.connect(), f"{settings}.connect()")
    yield made
    made.close()


@pytest.fixture
def content(subject: Files) -> BlobContent:
    return subject.content


async def put(content: BlobContent, data: bytes, algorithm: str = "sha256") -> Digest:
    upload = content.create("a/b", algorithm)
    await upload.write(data)
    return (await upload.commit(Digest.of(data, algorithm))).digest


async def get(content: BlobContent, digest: Digest, start: int = 0, stop: int | None = None) -> bytes:
    return await read(content.open(digest), start, stop)


async def read(blob: Blob, start: int = 0, stop: int | None = None) -> bytes:
    try:
        return b"".join([bytes(chunk) async for chunk in blob.chunks(start, stop)])
    finally:
        await blob.close()


def partial(content: BlobContent) -> list[str]:
    return [path.name for path in (content.root / "partial").iterdir()]


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
@pytest.mark.parametrize("data", [b"", CONTENT, LARGE], ids=len)
async def test_what_is_put_is_what_is_got(
    subject: Files, content: BlobContent, data: bytes, algorithm: str
) -> None:
    digest = await put(content, data, algorithm)
    assert content.holds(digest)
    blob = content.open(digest, len(data))
    assert blob.descriptor.size == len(data)
    assert await read(blob) == data
    with content.reader(digest) as file:
        assert b"".join(iter(lambda: file.read(CHUNK), b"")) == data
    content.verify(digest)
    assert subject.objects() == [digest]
    assert partial(content) == []


@pytest.mark.parametrize("start", [0, 1, CHUNK - 1, CHUNK, 6 * CHUNK, len(LARGE) - 1])
@pytest.mark.parametrize("length", [1, 2, CHUNK + 1, None])
async def test_a_range_is_got(content: BlobContent, start: int, length: int | None) -> None:
    digest = await put(content, LARGE)
    stop = None if length is None else min(len(LARGE), start + length)
    assert await get(content, digest, start, stop) == LARGE[start:stop]


async def test_a_blob_that_was_asked_to_begin_is_read_from_elsewhere(content: BlobContent) -> None:
    digest = await put(content, LARGE)
    blob = content.open(digest)
    await blob.begin(None)
    assert [await anext(aiter(blob.chunks(5, 7))), await read(blob, 0, 3)] == [LARGE[5:7], LARGE[:3]]


async def test_what_was_never_put_is_unknown(content: BlobContent) -> None:
    assert not content.holds(DIGEST)
    assert content.find(DIGEST) is None
    for ask in (content.open, content.reader, content.verify, content.renew):
        with pytest.raises(BlobUnknown):
            ask(DIGEST)
    content.touch(DIGEST, 1e9)
    assert list(content.portions()) == []


async def test_a_wrong_digest_leaves_nothing(subject: Files, content: BlobContent) -> None:
    upload = content.create()
    await upload.write(CONTENT + b"!")
    with pytest.raises(DigestInvalid):
        await upload.commit(DIGEST)
    assert not content.holds(DIGEST)
    assert subject.objects() == []
    assert partial(content) == []


async def test_two_writers_of_one_blob(subject: Files, content: BlobContent) -> None:
    uploads = [content.create("a/b"), content.create("a/c")]
    for upload in uploads:
        await upload.write(LARGE)
    digest = Digest.of(LARGE)
    committed = await asyncio.gather(*(upload.commit(digest) for upload in uploads))
    assert {each.digest for each in committed} == {digest}
    assert await get(content, digest) == LARGE
    content.reap(DAY)
    assert subject.objects() == [digest]


async def test_a_blob_that_is_put_again_is_used_again(
    subject: Files, content: BlobContent, clock: Clock
) -> None:
    await put(content, CONTENT)
    clock.advance(1000)
    await put(content, CONTENT)
    assert (found := content.find(DIGEST)) is not None and found.used_at == clock.now
    content.reap(DAY)
    assert subject.objects() == [DIGEST]
    assert await get(content, DIGEST) == CONTENT


async def test_an_upload_is_resumed_by_its_id_and_owner(content: BlobContent) -> None:
    upload = content.create("a/b")
    await upload.write(LARGE[:CHUNK])
    await upload.suspend()
    for owner in ("a/c", ""):
        with pytest.raises(BlobUploadUnknown):
            await content.reopen(upload.id, owner)
    resumed = await content.reopen(upload.id, "a/b")
    assert resumed.offset == CHUNK
    await resumed.write(LARGE[CHUNK:])
    await resumed.commit(Digest.of(LARGE))
    assert await get(content, Digest.of(LARGE)) == LARGE
    with pytest.raises(BlobUploadUnknown):
        await content.reopen(upload.id, "a/b")


async def test_a_fill_is_resumed_by_its_digest(content: BlobContent) -> None:
    digest = Digest.of(LARGE)
    upload = await content.resume(digest)
    await upload.write(LARGE[:CHUNK])
    await upload.suspend()
    resumed = await content.resume(digest)
    assert resumed.ours and resumed.offset == CHUNK
    await resumed.write(LARGE[CHUNK:])
    await resumed.commit(digest)
    assert await get(content, digest) == LARGE


async def test_who_follows_a_fill_sees_its_end(subject: Files, content: BlobContent) -> None:
    writer = await content.resume(DIGEST)
    await writer.write(CONTENT)
    follower = await content.resume(DIGEST)
    assert not follower.ours
    await writer.commit(DIGEST)
    assert await follower.watch(DIGEST)
    await follower.suspend()
    assert subject.objects() == [DIGEST]


async def test_an_upload_that_is_cancelled_leaves_nothing(subject: Files, content: BlobContent) -> None:
    upload = content.create()
    await upload.write(LARGE)
    await upload.cancel()
    assert (partial(content), subject.objects()) == ([], [])


async def test_all_blobs_are_found_by_their_first_byte(content: BlobContent, clock: Clock) -> None:
    put_at = {}
    for number in range(20):
        data = str(number).encode()
        put_at[await put(content, data, ("sha256", "sha512")[number % 2])] = (clock.now, len(data))
        clock.advance(60)
    found = list(content.portions())
    assert {each.digest: (each.used_at, each.size) for portion in found for each in portion} == put_at
    assert all(len({each.digest.encoded[:2] for each in portion}) == 1 for portion in found if portion)
    for digest, (at, size) in put_at.items():
        assert content.find(digest) == (at, size, digest)


async def test_a_use_is_recorded(content: BlobContent, clock: Clock) -> None:
    await put(content, CONTENT)
    for record in (content.renew, lambda digest: content.touch(digest, clock.now)):
        clock.advance(1000)
        record(DIGEST)
        assert (found := content.find(DIGEST)) is not None and found.used_at == clock.now


async def test_only_what_is_old_is_removed(subject: Files, content: BlobContent, clock: Clock) -> None:
    await put(content, CONTENT)
    at = clock.now

    def remove(before: float) -> int | None:
        return subject.records.transaction(
            lambda batch: content.remove_old(DIGEST, lambda used_at: used_at < before, batch)
        )

    assert remove(at) is None
    assert await get(content, DIGEST) == CONTENT
    assert remove(at + 1) == len(CONTENT)
    assert not content.holds(DIGEST)
    assert remove(at + 1) is None
    content.reap(DAY)
    assert (subject.objects(), partial(content)) == ([], [])
    await put(content, CONTENT)
    assert await get(content, DIGEST) == CONTENT


@pytest.mark.errors("blob.damaged")
async def test_a_blob_of_another_size_is_unknown_and_put_again(subject: Files, content: BlobContent) -> None:
    await put(content, CONTENT)
    subject.truncate(DIGEST)
    with pytest.raises(BlobUnknown):
        await content.open(DIGEST, len(CONTENT)).begin(NOTHING)
    await put(content, CONTENT)
    assert await get(content, DIGEST) == CONTENT


async def test_abandoned_uploads_are_reaped_after_a_day(content: BlobContent, clock: Clock) -> None:
    for suspended in (content.create(), await content.resume(DIGEST)):
        await suspended.write(CONTENT[:5])
        await suspended.suspend()
    content.check()
    assert content.reap(DAY) == 0
    clock.advance(DAY + 1)
    assert content.reap(DAY) == 2
    assert partial(content) == []


async def test_only_one_at_a_time_does_what_is_exclusive(content: BlobContent) -> None:
    async with content.exclusive("a") as waited, content.exclusive("b") as waited_for_another:
        second = asyncio.create_task(content.exclusive("a").__aenter__())
        await asyncio.sleep(0)
        assert (waited, waited_for_another, second.done()) == (False, False, False)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)


# Processes that are killed

KILLED = """
import asyncio, os, sys, threading
from pathlib import Path
from storage.oci import Digest
directory = Path(sys.argv[1])
count = int(sys.argv[2])
def clock():
    return float(sys.argv[4])
def step(*found):
    global count
    count -= 1
    if count == 0:
        print("reached", *found[:1], flush=True)
        threading.Event().wait()
counting, under_way = False, 0
def trace(event, arguments):
    # A server may serve a request after the death of its client, when the test has looked.
    if counting and event in EVENTS and not under_way:
        step(event)
EVENTS = ("os.rename", "os.mkdir", "os.remove", "os.utime", "os.chmod", "sqlite3.connect", "obstore")
{script}
async def main():
    global counting
    data = Path(sys.argv[3]).read_bytes()
    upload = await content.resume(Digest.of(data))
    await upload.write(data)
    sys.addaudithook(trace)
    counting = True
    await upload.commit(Digest.of(data))
    print("done", flush=True)
asyncio.run(main())
"""


def killed(arguments: list[str]) -> list[str]:
    """Run a program until it says something, and kill it then; the words that it says."""
    with subprocess.Popen([*PROGRAM, *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.readline().split()
        process.kill()
    return said


@pytest.mark.clients
async def test_a_commit_that_is_killed_anywhere_is_whole_or_nothing(
    subject: Files, content: BlobContent, clock: Clock, tmp_path: Path
) -> None:
    (tmp_path / "data").write_bytes(LARGE)
    digest, steps = Digest.of(LARGE), []
    while True:
        program = KILLED.format(script=subject.script)
        more = str(len(steps) + 1), str(tmp_path / "data"), str(clock())
        said = killed([program, str(subject.directory), *more])
        if content.holds(digest):
            assert await get(content, digest) == LARGE
        if said == ["done"]:
            break
        assert said[0] == "reached"
        steps.append(said[1])
        upload = await content.resume(digest)  # who comes next goes on
        if not content.holds(digest):
            assert upload.offset == len(LARGE)
        await upload.cancel()
        subject.records.transaction(lambda batch: content.remove_old(digest, lambda used_at: True, batch))
        clock.now += 2 * DAY
        content.reap(DAY)
        assert (subject.objects(), partial(content)) == ([], [])
    assert len(steps) >= 3, steps
