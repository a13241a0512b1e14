"""Blobs as files: what readers of a growing one may see, what stays after a failure, who writes where."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import gc
import hashlib
import os
import resource
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.disk.blobs import TOUCH, BlobFiles
from storage.disk.uploads import BACKLOG, CHUNK, FileBlob, FileUpload
from storage.errors import BlobUnknown, DigestInvalid, OriginFailed, StorageFailed, Unavailable
from storage.oci import OCTETS, Descriptor, Digest
from tests.conftest import Clock
from tests.preloaded import PROGRAM

CONTENT = b"the content of a blob"
DIGEST = Digest.of(CONTENT)
LARGE = bytes(range(256)) * (3 * CHUNK // 256) + b"and some"
WHOLE = Descriptor(OCTETS, DIGEST, len(CONTENT))


@pytest.fixture
def files(tmp_path: Path, clock: Clock) -> BlobFiles:
    return BlobFiles(tmp_path, clock, ticks=clock)


@pytest.fixture
def complaints() -> Iterator[list[dict[str, Any]]]:
    """What the loop would have printed, of exceptions that nobody looked at."""
    found: list[dict[str, Any]] = []
    yield found
    gc.collect()
    assert found == []


def partial_files(files: BlobFiles) -> list[str]:
    return sorted(path.name for path in (files.root / "partial").iterdir())


async def put(files: BlobFiles, content: bytes) -> Digest:
    upload = await files.resume(Digest.of(content))
    await upload.write(content)
    return (await upload.commit(Digest.of(content))).digest


async def read(blob: FileBlob, start: int = 0, stop: int | None = None) -> bytes:
    """To its end, and close it."""
    try:
        return b"".join([chunk async for chunk in blob.chunks(start, stop)])
    finally:
        await blob.close()


async def write_through(upload: FileUpload, content: bytes) -> None:
    """Write, and wait until it is in the file."""
    await upload.write(content)
    blob = upload.follow(Descriptor(OCTETS, WHOLE.digest, -1))
    await blob.readable(upload.offset - 2)
    await blob.close()


async def seen(blob: FileBlob) -> tuple[bytes, BaseException | None]:
    """What a reader gets, and what then ends it."""
    got = bytearray()
    try:
        async for chunk in blob.chunks():
            got += chunk
    except Exception as error:
        return bytes(got), error
    finally:
        await blob.close()
    return bytes(got), None


class Gate:
    """Holds a thread where a function is called, until the test opens it."""

    def __init__(self, function: Callable[..., Any], error: Exception | None = None) -> None:
        self.reached = asyncio.Event()
        self._function, self._error = function, error
        self._opened = threading.Event()
        self._loop = asyncio.get_running_loop()

    def __call__(self, *arguments: Any) -> Any:
        self._loop.call_soon_threadsafe(self.reached.set)
        assert self._opened.wait(30), "the gate was never opened"
        if self._error is not None:
            raise self._error
        return self._function(*arguments)

    def open(self) -> None:
        self._opened.set()


# Writing, committing, reading


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
@pytest.mark.parametrize("content", [b"", b"x", CONTENT, LARGE], ids=len)
async def test_what_is_committed_is_what_was_written(
    files: BlobFiles, content: bytes, algorithm: str
) -> None:
    digest = Digest.of(content, algorithm)
    upload = await files.resume(digest)
    for position in range(0, len(content), 100_000):
        await upload.write(content[position : position + 100_000])
    assert not files.holds(digest)
    assert await upload.commit(digest) == Descriptor(OCTETS, digest, len(content))
    assert upload.complete
    assert partial_files(files) == []
    assert files.path(digest) == files.root / "blobs" / algorithm / digest.encoded[:2] / digest.encoded
    blob = files.open(digest, len(content))
    assert blob.descriptor == Descriptor(OCTETS, digest, len(content))
    assert await read(blob) == content


async def test_an_upload_may_be_committed_by_either_algorithm(files: BlobFiles) -> None:
    for algorithm in ("sha256", "sha512"):
        upload = files.create()
        await upload.write(CONTENT)
        await upload.commit(Digest.of(CONTENT, algorithm))
        assert await read(files.open(Digest.of(CONTENT, algorithm))) == CONTENT
    upload = files.create()
    await upload.write(CONTENT)
    with pytest.raises(DigestInvalid):
        await upload.commit(Digest.of(b"other", "sha512"))


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 1), (5, 5), (7, 3), (1, CHUNK + 1), (CHUNK, None), (len(LARGE) - 1, None)]
)
async def test_chunks_of_a_part(files: BlobFiles, start: int, stop: int | None) -> None:
    digest = await put(files, LARGE)
    assert await read(files.open(digest), start, stop) == LARGE[start : max(start, stop or len(LARGE))]


async def test_the_last_byte_is_withheld_until_the_commit(files: BlobFiles) -> None:
    upload = await files.resume(DIGEST)
    blob = upload.follow(WHOLE)
    await upload.write(CONTENT)
    assert await blob.readable(0) == len(CONTENT) - 1
    last = asyncio.create_task(blob.readable(len(CONTENT) - 1))
    assert await read(upload.follow(WHOLE), 0, len(CONTENT) - 1) == CONTENT[:-1]
    assert not last.done()
    await upload.commit(DIGEST)
    assert await last == len(CONTENT)
    assert await read(blob) == CONTENT


async def test_a_wrong_digest_leaves_nothing_and_no_reader_a_whole_blob(files: BlobFiles) -> None:
    upload = await files.resume(DIGEST)
    reader = asyncio.create_task(seen(upload.follow(WHOLE)))
    wrong = b"X" + CONTENT[1:]
    await upload.write(wrong)
    with pytest.raises(DigestInvalid, match=Digest.of(wrong)):
        await upload.commit(DIGEST)
    got, error = await reader
    assert isinstance(error, DigestInvalid)
    assert wrong[:-1].startswith(got)
    assert not files.holds(DIGEST) and not files.holds(Digest.of(wrong))
    assert partial_files(files) == []
    with pytest.raises(DigestInvalid):
        await upload.write(b"more")


async def test_a_digest_that_was_not_reached_yet_is_wrong(files: BlobFiles) -> None:
    upload = await files.resume(DIGEST)
    await upload.write(CONTENT[:-1])
    with pytest.raises(DigestInvalid):
        await upload.commit(DIGEST)
    assert partial_files(files) == []


# Following


async def test_followers_go_at_their_own_pace(files: BlobFiles) -> None:
    digest = Digest.of(LARGE)
    upload = await files.resume(digest)
    descriptor = Descriptor(OCTETS, digest, len(LARGE))
    quick = asyncio.create_task(read(upload.follow(descriptor)))
    gone, slow, late = (upload.follow(descriptor) for _ in range(3))
    await upload.write(LARGE[:10])
    position = 0
    async for chunk in gone.chunks():
        assert chunk == LARGE[:9]
        break
    await gone.close()
    chunks = slow.chunks()
    parts = [await anext(chunks)]
    for position in range(10, len(LARGE), 300_000):
        await upload.write(LARGE[position : position + 300_000])
    await upload.commit(digest)
    assert await quick == LARGE
    parts += [chunk async for chunk in chunks]
    assert b"".join(parts) == LARGE
    await slow.close()
    files.path(digest).unlink()  # evicted: whoever has it open reads on
    assert await read(late) == LARGE


@pytest.mark.parametrize("end", ["cancel", "suspend"])
@pytest.mark.parametrize("error", [None, OriginFailed("cut")])
async def test_followers_learn_why_it_ended(files: BlobFiles, end: str, error: Exception | None) -> None:
    upload = await files.resume(DIGEST)
    behind, ahead = upload.follow(WHOLE), upload.follow(WHOLE)
    await write_through(upload, CONTENT[:10])
    waiting = asyncio.create_task(ahead.readable(9))
    await getattr(upload, end)(error)
    expected = type(error) if error else BlobUnknown
    with pytest.raises(expected):
        await waiting
    await ahead.close()
    got, raised = await seen(behind)
    assert (got, type(raised)) == (CONTENT[:9], expected)
    assert partial_files(files) == ([f"sha256-{DIGEST.encoded}"] if end == "suspend" else [])
    await (await files.resume(DIGEST)).cancel()


async def test_an_upload_that_has_ended_cannot_be_followed(files: BlobFiles) -> None:
    for end in ("commit", "cancel", "suspend"):
        upload = files.create()
        await upload.write(CONTENT)
        await getattr(upload, end)(*([DIGEST] if end == "commit" else []))
        with pytest.raises(BlobUnknown):
            upload.follow(WHOLE)
    await (await files.reopen(upload.id)).cancel()


# Going on where a former upload was cut


async def test_a_suspended_upload_is_resumed(files: BlobFiles) -> None:
    digest = Digest.of(LARGE)
    upload = await files.resume(digest)
    assert upload.offset == 0
    await write_through(upload, LARGE[: 2 * CHUNK + 5])
    await upload.suspend()
    assert not files.holds(digest)

    upload = await files.resume(digest)
    assert upload.offset == 2 * CHUNK + 5
    reader = asyncio.create_task(read(upload.follow(Descriptor(OCTETS, digest, len(LARGE)))))
    await upload.write(LARGE[upload.offset :])
    await upload.commit(digest)
    assert await reader == LARGE
    assert await read(files.open(digest)) == LARGE


async def test_a_suspended_upload_that_was_whole_needs_no_more(files: BlobFiles) -> None:
    upload = await files.resume(DIGEST)
    await write_through(upload, CONTENT)
    assert upload.matches(DIGEST)
    await upload.suspend()
    upload = await files.resume(DIGEST)
    assert upload.offset == len(CONTENT)
    assert upload.matches(DIGEST)
    await upload.commit(DIGEST)
    assert await read(files.open(DIGEST)) == CONTENT


async def test_what_is_damaged_in_the_meantime_is_not_committed(files: BlobFiles) -> None:
    upload = await files.resume(DIGEST)
    await write_through(upload, CONTENT[:10])
    await upload.suspend()
    (files.root / "partial" / f"sha256-{DIGEST.encoded}").write_bytes(b"\0" * 10)
    upload = await files.resume(DIGEST)
    await upload.write(CONTENT[10:])
    with pytest.raises(DigestInvalid):
        await upload.commit(DIGEST)
    assert partial_files(files) == []
    assert (await put(files, CONTENT)) == DIGEST


async def test_nothing_is_kept_of_nothing_but_of_an_upload_with_an_id(files: BlobFiles) -> None:
    await (await files.resume(DIGEST)).suspend()
    assert partial_files(files) == []
    upload = files.create()
    await upload.write(CONTENT)
    await upload.suspend()
    assert partial_files(files) == [upload.id]
    await (await files.reopen(upload.id)).cancel()
    assert partial_files(files) == []


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    max_examples=25,
    deadline=None,
)
@given(
    content=st.binary(max_size=60), cuts=st.lists(st.tuples(st.integers(0, 60), st.booleans()), max_size=6)
)
async def test_however_it_is_cut_the_content_is_right(content: bytes, cuts: list[tuple[int, bool]]) -> None:
    """`cuts` are positions at which a chunk ends; where True, the upload is suspended there and resumed."""
    with tempfile.TemporaryDirectory() as directory:
        files, digest = BlobFiles(Path(directory)), Digest.of(content)
        upload = await files.resume(digest)
        for position, suspend in sorted(cuts):
            await upload.write(content[upload.offset : position])
            if suspend:
                await upload.suspend()
                upload = await files.resume(digest)
        await upload.write(content[upload.offset :])
        assert await upload.commit(digest) == Descriptor(OCTETS, digest, len(content))
        assert files.path(digest).read_bytes() == content


# Several processes on one directory


_OTHER = """
import asyncio, sys
from pathlib import Path
from storage.disk.blobs import BlobFiles
from storage.oci import OCTETS, Descriptor, Digest

async def main(root, digest, half, rest):
    upload = await BlobFiles(Path(root)).resume(Digest(digest))
    await upload.write(half.encode())
    blob = upload.follow(Descriptor(OCTETS, Digest(digest), -1))
    await blob.readable(len(half) - 2)
    print(upload.id, upload.offset, flush=True)
    if sys.stdin.readline() == "commit\\n":
        await upload.write(rest.encode())
        await upload.commit(Digest(digest))
    else:
        await upload.cancel()

asyncio.run(main(*sys.argv[1:]))
"""
HALF = CONTENT[:10]


@contextmanager
def another_process(files: BlobFiles) -> Iterator[subprocess.Popen[str]]:
    """One that has written HALF of DIGEST, and waits to be told "commit" or "cancel"."""
    with subprocess.Popen(
        [*PROGRAM, _OTHER, str(files.root), DIGEST, HALF.decode(), CONTENT[10:].decode()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().split() == [f"sha256-{DIGEST.encoded}", str(len(HALF))]
            yield process
        finally:
            process.kill()


def tell(process: subprocess.Popen[str], what: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{what}\n")
    process.stdin.flush()


@pytest.mark.clients
async def test_what_another_process_writes_is_followed_to_its_commit(files: BlobFiles) -> None:
    with another_process(files) as process:
        upload = await files.resume(DIGEST)
        assert not upload.ours
        reader = asyncio.create_task(read(upload.follow(WHOLE)))
        blob = upload.follow(WHOLE)
        watch = asyncio.create_task(upload.watch(DIGEST))
        assert await blob.readable(0) == len(HALF) - 1
        assert not watch.done()
        tell(process, "commit")
        assert await watch is True
        assert await reader == CONTENT
        assert await read(blob) == CONTENT
    assert (upload.complete, upload.offset) == (True, len(CONTENT))
    assert await read(files.open(DIGEST)) == CONTENT


@pytest.mark.clients
async def test_what_a_killed_process_has_left_is_taken_over(files: BlobFiles) -> None:
    with another_process(files) as process:
        upload = await files.resume(DIGEST)
        reader = asyncio.create_task(read(upload.follow(WHOLE)))
        process.send_signal(signal.SIGKILL)
        assert await upload.watch(DIGEST) is False
    assert (upload.ours, upload.offset) == (True, len(HALF))
    await upload.write(CONTENT[upload.offset :])
    await upload.commit(DIGEST)
    assert await reader == CONTENT
    assert await read(files.open(DIGEST)) == CONTENT


@pytest.mark.clients
async def test_what_another_process_has_thrown_away_cannot_be_had_now(files: BlobFiles) -> None:
    with another_process(files) as process:
        upload = await files.resume(DIGEST)
        reader = asyncio.create_task(seen(upload.follow(WHOLE)))
        tell(process, "cancel")
        with pytest.raises(Unavailable) as raised:
            await upload.watch(DIGEST)
    await upload.suspend(raised.value)
    got, error = await reader
    assert HALF.startswith(got)
    assert isinstance(error, Unavailable)
    assert await put(files, CONTENT) == DIGEST


@pytest.mark.clients
@pytest.mark.parametrize("end", ["cancel", "suspend"])
async def test_who_follows_another_process_does_not_take_its_file_away(files: BlobFiles, end: str) -> None:
    with another_process(files) as process:
        upload = await files.resume(DIGEST)
        watch = asyncio.create_task(upload.watch(DIGEST))
        blob = upload.follow(WHOLE)
        await blob.readable(0)
        await blob.close()
        watch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await watch
        await getattr(upload, end)()
        assert partial_files(files) == [f"sha256-{DIGEST.encoded}"]
        tell(process, "commit")
        assert process.wait() == 0
    assert await read(files.open(DIGEST)) == CONTENT


async def test_a_second_upload_of_a_digest_in_one_process_watches_the_first(files: BlobFiles) -> None:
    first, second = await files.resume(DIGEST), await files.resume(DIGEST)
    assert (first.ours, second.ours) == (True, False)
    await first.write(CONTENT)
    await first.commit(DIGEST)
    assert await second.watch(DIGEST) is True
    assert await read(files.open(DIGEST)) == CONTENT
    assert partial_files(files) == []


async def test_a_reader_does_not_hold_the_lock_of_an_upload_that_has_ended(files: BlobFiles) -> None:
    upload = await files.resume(DIGEST)
    await write_through(upload, HALF)
    blob = upload.follow(WHOLE)
    await upload.suspend(OriginFailed("cut"))
    following = await files.resume(DIGEST)
    assert following.ours
    await following.cancel()
    got, error = await seen(blob)
    assert got == HALF[:-1]
    assert isinstance(error, OriginFailed)


async def test_the_lock_of_a_file_that_was_committed_meanwhile_is_not_taken(
    files: BlobFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. we open  2. its writer renames it into its place and lets go  3. we lock a committed blob."""
    path, lock = files.root / "partial" / f"sha256-{DIGEST.encoded}", fcntl.flock

    def race(file: int, operation: int) -> None:
        monkeypatch.undo()
        path.write_bytes(CONTENT)
        files.path(DIGEST).parent.mkdir(parents=True)
        path.rename(files.path(DIGEST))
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", race)
    upload = await files.resume(DIGEST)
    assert (upload.ours, upload.offset) == (True, 0)
    await write_through(upload, b"other")
    assert await read(files.open(DIGEST)) == CONTENT
    assert path.read_bytes() == b"other"
    await upload.cancel()


@pytest.mark.errors("disk.failed")
async def test_a_file_system_without_locks_is_a_disk_that_fails(
    files: BlobFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(StorageFailed, match=os.strerror(errno.ENOLCK)):
        await files.resume(DIGEST)
    (files.root / "partial" / f"sha256-{DIGEST.encoded}").unlink()


@pytest.mark.parametrize("end", ["commit", "cancel", "suspend"])
async def test_the_end_of_one_upload_does_not_touch_the_next_ones_file(
    files: BlobFiles, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """1. the one is renamed into its place  2. the next begins under the name  3. the one ends."""
    upload = await files.resume(DIGEST)
    await upload.write(CONTENT)
    gate = Gate(os.fsync)  # of the directory, after the renaming
    monkeypatch.setattr(os, "fsync", gate)
    commit = asyncio.create_task(upload.commit(DIGEST))
    await gate.reached.wait()
    following = await files.resume(DIGEST)
    await write_through(following, CONTENT)
    if end != "commit":
        await getattr(upload, end)()
    gate.open()
    await commit
    assert partial_files(files) == [f"sha256-{DIGEST.encoded}"]
    await following.commit(DIGEST)
    assert await read(files.open(DIGEST)) == CONTENT


# Whoever leaves in the middle


async def test_a_writer_who_is_cancelled_loses_and_repeats_nothing(
    files: BlobFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"x" * (BACKLOG + CHUNK) + CONTENT
    digest = Digest.of(content)
    upload = await files.resume(digest)
    gate = Gate(upload._append)
    monkeypatch.setattr(upload, "_append", gate)
    await upload.write(content[:CHUNK])
    await gate.reached.wait()
    writer = asyncio.create_task(upload.write(content[CHUNK:-5]))
    await asyncio.sleep(0)
    assert not writer.done()  # the disk is behind by more than may wait for it
    writer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writer
    assert upload.offset == len(content) - 5
    gate.open()
    await upload.write(content[-5:])
    await upload.commit(digest)
    assert await read(files.open(digest)) == content


@pytest.mark.parametrize("end", ["cancel", "suspend"])
async def test_the_file_is_not_closed_under_a_write(
    files: BlobFiles, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    upload = await files.resume(DIGEST)
    gate = Gate(upload._append)
    monkeypatch.setattr(upload, "_append", gate)
    await upload.write(CONTENT)
    await gate.reached.wait()
    commit = asyncio.create_task(upload.commit(DIGEST))
    await asyncio.sleep(0)
    commit.cancel()
    with pytest.raises(asyncio.CancelledError):
        await commit
    ending = asyncio.create_task(getattr(upload, end)())
    await asyncio.sleep(0)
    assert not ending.done()
    gate.open()
    await ending
    upload = await files.resume(DIGEST)
    assert upload.offset == (len(CONTENT) if end == "suspend" else 0)
    await upload.cancel()


@pytest.mark.parametrize("error", [None, OSError(errno.EIO, "broken")])
async def test_a_commit_cancelled_while_it_publishes_ends_what_it_began(
    files: BlobFiles,
    monkeypatch: pytest.MonkeyPatch,
    complaints: list[dict[str, Any]],
    error: OSError | None,
) -> None:
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    upload = await files.resume(DIGEST)
    await upload.write(CONTENT)
    gate = Gate(os.fdatasync, error)
    monkeypatch.setattr(os, "fdatasync", gate)
    commit = asyncio.create_task(upload.commit(DIGEST))
    await gate.reached.wait()
    for _ in range(3):  # however often: the thread works on the file
        commit.cancel()
        await asyncio.sleep(0)
    assert not commit.done()
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await commit
    assert files.holds(DIGEST) == (error is None)
    assert partial_files(files) == []
    await upload.suspend()
    await upload.cancel()


async def test_a_resumption_cancelled_while_it_hashes_keeps_what_is_there(
    files: BlobFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = files.root / "partial" / f"sha256-{DIGEST.encoded}"
    path.write_bytes(CONTENT[:10])
    gate = Gate(os.preadv)
    monkeypatch.setattr(os, "preadv", gate)
    resumption = asyncio.create_task(files.resume(DIGEST))
    await gate.reached.wait()
    resumption.cancel()
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await resumption
    upload = await files.resume(DIGEST)
    assert upload.offset == 10
    await upload.cancel()


# Disks that fail


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    path = tmp_path / "small"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "entrepot-test", str(path)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", str(path)], check=True)


async def failing_upload(
    upload: FileUpload, digest: Digest, content: bytes
) -> tuple[bytes, BaseException | None]:
    """Write and commit, which must fail; what a follower saw of it."""
    reader = asyncio.create_task(seen(upload.follow(Descriptor(OCTETS, digest, len(content)))))
    with pytest.raises(StorageFailed) as raised:
        for position in range(0, len(content), 10_000):
            await upload.write(content[position : position + 10_000])
        await upload.commit(digest)
    await upload.cancel(raised.value)
    return await reader


@pytest.mark.errors("disk.failed")
async def test_a_file_that_may_not_grow(files: BlobFiles) -> None:
    digest = Digest.of(LARGE)
    with largest_file(CHUNK):
        got, error = await failing_upload(await files.resume(digest), digest, LARGE)
    assert isinstance(error, StorageFailed)
    assert LARGE[:CHUNK].startswith(got)
    assert partial_files(files) == []
    assert await put(files, LARGE) == digest


@pytest.mark.errors("disk.failed")
async def test_a_disk_that_is_full(small_disk: Path) -> None:
    files, digest = BlobFiles(small_disk), Digest.of(LARGE)
    got, error = await failing_upload(await files.resume(digest), digest, LARGE)
    assert isinstance(error, StorageFailed)
    assert os.strerror(errno.ENOSPC) in str(error)
    assert LARGE[: 64 << 10].startswith(got)
    assert partial_files(files) == []
    assert await read(files.open(await put(files, CONTENT))) == CONTENT  # there is room again


@pytest.mark.errors("disk.failed")
async def test_a_blob_that_cannot_be_put_into_its_place(files: BlobFiles) -> None:
    """Its followers have it all the same: all of it was written, and right."""
    (files.root / "blobs").rmdir()
    (files.root / "blobs").write_bytes(b"")
    got, error = await failing_upload(await files.resume(DIGEST), DIGEST, CONTENT)
    assert (got, error) == (CONTENT, None)
    assert partial_files(files) == []
    with pytest.raises(StorageFailed):
        files.open(DIGEST)


@pytest.mark.errors("disk.failed")
async def test_a_directory_that_went(files: BlobFiles) -> None:
    (files.root / "partial").rmdir()
    (files.root / "partial").write_bytes(b"")
    with pytest.raises(StorageFailed, match=str(files.root)):
        await files.resume(DIGEST)
    with pytest.raises(StorageFailed):
        files.create()
    with pytest.raises(StorageFailed):
        files.reap(0)
    with pytest.raises(StorageFailed):
        files.check()
    with pytest.raises(StorageFailed):
        BlobFiles(files.root / "partial" / "below")


async def test_reading_what_cannot_be_read(files: BlobFiles) -> None:
    blob = FileBlob(os.open(files.root, os.O_RDONLY), WHOLE)
    got, error = await seen(blob)
    assert got == b""
    assert isinstance(error, StorageFailed)
    assert DIGEST in str(error)


async def test_hashing_again_what_cannot_be_read(files: BlobFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    upload = files.create()
    await upload.write(CONTENT)
    with monkeypatch.context() as patch, pytest.raises(StorageFailed):
        patch.setattr(os, "preadv", fail)
        await upload.commit(Digest.of(CONTENT, "sha512"))
    await upload.cancel()
    (files.root / "partial" / f"sha256-{DIGEST.encoded}").write_bytes(CONTENT)
    with monkeypatch.context() as patch, pytest.raises(StorageFailed):
        patch.setattr(os, "preadv", fail)
        await files.resume(DIGEST)


async def test_a_file_truncated_under_a_reader_is_no_clean_end(files: BlobFiles) -> None:
    blob = files.open(await put(files, CONTENT))
    os.truncate(files.path(DIGEST), 5)
    got, error = await seen(blob)
    assert got == CONTENT[:5]
    assert isinstance(error, StorageFailed)


# What is stored


async def test_what_is_not_stored_is_unknown(files: BlobFiles) -> None:
    assert not files.holds(DIGEST)
    with pytest.raises(BlobUnknown, match=DIGEST):
        files.open(DIGEST)


@pytest.mark.parametrize("left", [b"", CONTENT[:-1], CONTENT + b"\0"], ids=len)
async def test_a_file_of_another_size_is_no_blob_and_is_removed(files: BlobFiles, left: bytes) -> None:
    await put(files, CONTENT)
    files.path(DIGEST).write_bytes(left)
    with pytest.raises(BlobUnknown, match=f"{len(left)} of {len(CONTENT)}"):
        files.open(DIGEST, len(CONTENT))
    assert not files.holds(DIGEST)
    await put(files, CONTENT)
    assert await read(files.open(DIGEST, len(CONTENT))) == CONTENT


async def test_what_is_read_over_again_is_right_or_removed(files: BlobFiles) -> None:
    await put(files, CONTENT)
    files.verify(DIGEST)
    assert files.holds(DIGEST)
    files.path(DIGEST).write_bytes(b"X" + CONTENT[1:])
    with pytest.raises(BlobUnknown, match="damaged"):
        files.verify(DIGEST)
    assert not files.holds(DIGEST)
    with pytest.raises(BlobUnknown):
        files.verify(DIGEST)


async def test_use_is_noted_once_a_minute(files: BlobFiles, clock: Clock) -> None:
    await put(files, CONTENT)

    async def used_at() -> float:
        await files.open(DIGEST).close()
        return files.path(DIGEST).stat().st_mtime

    first = clock.now
    assert await used_at() == first
    clock.advance(TOUCH - 1)
    assert await used_at() == first
    clock.advance(1)
    assert await used_at() == first + TOUCH
    clock.advance(-3600)  # set back: what is in the future would else count as used for an hour
    assert await used_at() == clock.now


async def test_a_disk_that_takes_no_note_of_use_serves_all_the_same(
    files: BlobFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    await put(files, CONTENT)
    monkeypatch.setattr(os, "utime", fail)
    assert await read(files.open(DIGEST)) == CONTENT


async def test_what_nobody_went_on_with_is_reaped(files: BlobFiles, clock: Clock) -> None:
    ages = {"old": 101.0, "due": 100.0, "young": 99.0, "of the future": -500.0}
    for name, age in ages.items():
        path = files.root / "partial" / name
        path.write_bytes(CONTENT)
        os.utime(path, (clock.now - age, clock.now - age))
    await put(files, CONTENT)
    os.utime(files.path(DIGEST), (0, 0))
    assert files.reap(100) == 1
    assert partial_files(files) == ["due", "of the future", "young"]
    clock.advance(1)
    assert files.reap(100) == 1
    assert files.reap(100) == 0
    assert files.holds(DIGEST)
    clock.advance(10_000)
    assert files.reap(100) == 2


async def test_what_is_being_written_is_not_reaped_when_the_clock_jumps(
    files: BlobFiles, clock: Clock
) -> None:
    fill, push = await files.resume(DIGEST), files.create("a/b")
    await fill.write(CONTENT[:10])
    await push.write(CONTENT[:10])
    async with files.exclusive("a tag"):
        for path in (*(files.root / "partial").iterdir(), *(files.root / "locks").iterdir()):
            os.utime(path, (clock.now, clock.now))
        clock.advance(10 * 86400)
        assert files.reap(86400) == 0
        assert BlobFiles(files.root, clock).reap(86400) == 0  # of another process
        assert len(list((files.root / "locks").iterdir())) == 1
    await push.suspend()
    assert files.reap(86400) == 0
    clock.advance(86401)
    assert files.reap(86400) == 1  # nobody writes it now
    await fill.write(CONTENT[10:])
    await fill.commit(DIGEST)
    assert await read(files.open(DIGEST)) == CONTENT


@pytest.mark.parametrize("looked", [True, False], ids=["seen before", "written since the last look"])
@pytest.mark.parametrize("days", [1, 400])
async def test_an_upload_is_resumed_after_the_clock_jumped(tmp_path: Path, days: int, looked: bool) -> None:
    wall, ticks = Clock(time.time()), Clock(7.0)
    files = BlobFiles(tmp_path, wall, ticks=ticks)
    assert files.reap(86400) == 0
    upload = files.create("a/b")
    await upload.write(CONTENT[:10])
    await upload.suspend()
    if looked:
        assert files.reap(86400) == 0
    wall.advance(days * 86400 + 1)
    ticks.advance(300)
    assert files.reap(86400) == 0
    upload = await files.reopen(upload.id, "a/b")
    await upload.write(CONTENT[10:15])
    await upload.suspend()
    wall.advance(days * 86400 + 1)
    ticks.advance(86399)
    assert files.reap(86400) == 0
    upload = await files.reopen(upload.id, "a/b")
    await upload.write(CONTENT[15:])
    await upload.commit(DIGEST)
    assert await read(files.open(DIGEST)) == CONTENT


@pytest.mark.parametrize("jump", [0, -86400, -400 * 86400, 86400], ids=str)
async def test_an_abandoned_upload_is_reaped_whatever_the_clock_says(tmp_path: Path, jump: float) -> None:
    wall, ticks = Clock(time.time()), Clock(7.0)
    files = BlobFiles(tmp_path, wall, ticks=ticks)
    upload = files.create()
    await upload.write(CONTENT)
    await upload.suspend()
    assert files.reap(86400) == 0
    wall.advance(jump)
    ticks.advance(86400)
    assert files.reap(86400) == 0
    ticks.advance(1)
    assert files.reap(86400) == 1
    assert partial_files(files) == []


async def test_a_lock_counts_as_progress(tmp_path: Path) -> None:
    wall, ticks = Clock(time.time()), Clock(7.0)
    files = BlobFiles(tmp_path, wall, ticks=ticks)
    fill = await files.resume(DIGEST)
    await fill.write(CONTENT[:10])
    for _ in range(3):
        ticks.advance(86401)
        assert files.reap(86400) == 0
    await fill.suspend()
    assert files.reap(86400) == 0
    ticks.advance(86400)
    assert files.reap(86400) == 0
    ticks.advance(1)
    assert files.reap(86400) == 1


async def test_what_was_there_at_the_start_is_as_old_as_the_clock_says(tmp_path: Path) -> None:
    wall = Clock(time.time())
    upload = BlobFiles(tmp_path, wall).create()
    await upload.write(CONTENT)
    await upload.suspend()
    wall.advance(86000)
    ticks = Clock(7.0)
    files = BlobFiles(tmp_path, wall, ticks=ticks)
    assert files.reap(86400) == 0
    wall.advance(86400)
    ticks.advance(390)
    assert files.reap(86400) == 0
    ticks.advance(100)
    assert files.reap(86400) == 1


async def test_a_strange_file_is_reaped_unopened(files: BlobFiles, clock: Clock, tmp_path: Path) -> None:
    (files.root / "partial" / "link").symlink_to(tmp_path / "target")
    (tmp_path / "target").write_bytes(b"kept")
    os.utime(tmp_path / "target", (0, 0))
    os.mkfifo(files.root / "partial" / "pipe")
    os.utime(files.root / "partial" / "pipe", (0, 0))
    assert files.reap(100) == 2
    assert (tmp_path / "target").read_bytes() == b"kept"


async def test_check_leaves_nothing(files: BlobFiles) -> None:
    files.check()
    assert partial_files(files) == []


async def test_no_descriptor_is_inherited_by_a_child(files: BlobFiles) -> None:
    upload = await files.resume(DIGEST)
    await upload.write(CONTENT)
    blob = upload.follow(WHOLE)
    await upload.commit(DIGEST)
    other = files.open(DIGEST)
    assert not any(os.get_inheritable(file) for file in (blob.fileno(), other.fileno()))
    await blob.close()
    await other.close()
    await other.close()
    assert hashlib.sha256(files.path(DIGEST).read_bytes()).hexdigest() == DIGEST.encoded
