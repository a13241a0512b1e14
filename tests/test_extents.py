"""Which bytes of a file with holes are there: as a value, as a list on the disk, and of an upload."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.cache.fill import awaited
from storage.disk import extents as module
from storage.disk import wanted
from storage.disk.blobs import BlobFiles
from storage.disk.extents import ExtentList, Extents
from storage.disk.locks import leads_to
from storage.disk.sparse import SparseUpload
from storage.disk.wanted import Wish
from storage.errors import DigestInvalid, OriginFailed, StorageFailed, Unavailable
from storage.oci import OCTETS, Descriptor, Digest
from tests.conftest import Clock

CONTENT = os.urandom(300_000)
DIGEST = Digest.of(CONTENT)
WHOLE = Descriptor(OCTETS, DIGEST, len(CONTENT))
PARTIAL = f"sha256-{DIGEST.encoded}"

SPANS = st.tuples(st.integers(0, 30), st.integers(0, 30))


@given(st.lists(st.tuples(st.booleans(), SPANS), max_size=20), SPANS)
def test_a_set_of_bytes(changes: list[tuple[bool, tuple[int, int]]], asked: tuple[int, int]) -> None:
    extents, expected = Extents(), set[int]()
    for added, (start, stop) in changes:
        if added:
            extents.add(start, stop)
            expected |= set(range(start, stop))
        else:
            extents.remove(start, stop)
            expected -= set(range(start, stop))
    assert [at for start, stop in extents for at in range(start, stop)] == sorted(expected)
    assert extents.total == len(expected)
    assert all(start < stop for start, stop in extents)
    offset, stop = asked
    assert [at for start, stop in extents.gaps(0, 25) for at in range(start, stop)] == [
        at for at in range(25) if at not in expected
    ]
    assert extents.has([asked]) == (expected >= set(range(*asked)))
    assert extents.end(offset) == next(at for at in range(offset, 32) if at not in expected)
    first, last = extents.gap(offset, max(offset, stop))
    missing = [at for at in range(offset, stop) if at not in expected]
    assert list(range(first, last)) == missing[: last - first]
    assert (first < last) == bool(missing)
    assert last == stop or last in expected or not missing


def loaded(path: Path) -> tuple[int, list[tuple[int, int]]]:
    found = ExtentList.find(path)
    assert found is not None
    extents = found.load()
    found.close()
    return found.size, list(extents)


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A list of [0, 10) and [20, 30), of which only the first is synchronized."""
    path = tmp_path / "x.1.extents"
    made = ExtentList.create(path, 100, Extents([(0, 5)]))
    made.append([(5, 10)])
    made.sync()
    made.append([(20, 30)])
    made.close()
    return path


def test_what_is_listed_is_read(listed: Path) -> None:
    assert loaded(listed) == (100, [(0, 10), (20, 30)])
    assert list(listed.parent.iterdir()) == [listed]


def test_after_a_failure_of_the_machine_only_what_was_synchronized_counts(
    listed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_boot", lambda: "another")
    assert loaded(listed) == (100, [(0, 10)])


@pytest.mark.parametrize("more", [b"40 50", b"x y\n40 50\n", b"\0\0\0\n40 50\n", b"4 0 50\n", b"-4 50\n"])
def test_what_is_no_line_ends_the_list(listed: Path, more: bytes) -> None:
    with listed.open("ab") as file:
        file.write(more)
    assert loaded(listed) == (100, [(0, 10), (20, 30)])


@pytest.mark.parametrize(
    "head", [b"", b"\n", b"extents 2 100 x\n", b"extents 1 many x\n", b"extents 1 100\n"]
)
def test_without_its_first_line_nothing_counts(listed: Path, head: bytes) -> None:
    listed.write_bytes(head + b"0 10\nsynced\n")
    assert loaded(listed)[1] == []


def test_a_reader_sees_what_is_appended(listed: Path) -> None:
    reader, extents = ExtentList.find(listed), Extents()
    assert reader is not None
    reader.read(extents)
    with listed.open("ab", buffering=0) as writer:
        writer.write(b"50 60\n70")
        reader.read(extents)
        assert list(extents)[-1] == (50, 60)
        writer.write(b" 80\nsynced\n")
        reader.read(extents)
    assert list(extents)[-1] == (70, 80)
    reader.close()


# An upload with holes


@pytest.fixture
def files(tmp_path: Path, clock: Clock) -> BlobFiles:
    return BlobFiles(tmp_path, clock, ticks=clock)


def partial_files(files: BlobFiles) -> list[str]:
    return sorted(path.name for path in (files.root / "partial").iterdir())


async def put(upload: SparseUpload, *spans: tuple[int, int], content: bytes = CONTENT) -> None:
    upload.expect(len(content))
    for start, stop in spans:
        await upload.write_at(start, content[start:stop])
    await upload._flushed()


@pytest.mark.clients
@given(st.permutations(range(10)), st.integers(0, 10), st.booleans())
async def test_any_order_and_a_break(order: list[int], killed: int, kindly: bool) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as root:
        files = BlobFiles(Path(root))
        upload = await files.resume(DIGEST)
        parts = [(each * 30_000, (each + 1) * 30_000) for each in order]
        await put(upload, *parts[:killed])
        if kindly:
            await upload.suspend(OriginFailed("cut"))
        else:
            upload.close()  # as the kernel does
        upload = await files.resume(DIGEST)
        assert sorted(upload.extents) == sorted(Extents(parts[:killed]))
        assert upload.offset == 30_000 * killed
        await put(upload, *parts[killed:])
        assert await upload.commit(DIGEST) == WHOLE
        assert files.path(DIGEST).read_bytes() == CONTENT
        assert partial_files(files) == []


async def test_what_is_there_is_read_and_the_last_byte_withheld(files: BlobFiles) -> None:
    upload = await files.resume(DIGEST)
    await put(upload, (200_000, 300_000), (50, 60))
    blob = upload.follow(WHOLE)
    assert await blob.readable(50) == 60
    assert await blob.readable(250_000) == 299_999
    await put(upload, (0, 50), (60, 200_000))
    assert await blob.readable(0) == 299_999
    await upload.commit(DIGEST)
    assert await blob.readable(0) == 300_000
    await blob.close()


async def test_who_waits_for_the_last_byte_waits_for_the_first_that_is_missing(files: BlobFiles) -> None:
    upload, size = await files.resume(DIGEST), len(CONTENT)
    upload.expect(size)
    await put(upload, (0, 1000), (2000, 5000), (size - 10, size))
    other = await files.resume(DIGEST)
    other._look()
    for each in (upload, other):
        assert awaited(each, size - 1, size) == (1000, 2000)
        assert awaited(each, size - 2, size) == (size - 2, size)
        assert awaited(each, 1000, 1500) == (1000, 1500)
    await put(upload, (1000, 2000), (5000, size - 10))
    assert awaited(upload, size - 1, size) == (size, size)
    other.close()
    await upload.cancel()


async def test_wrong_bytes_in_the_middle_leave_nothing(files: BlobFiles) -> None:
    upload = await files.resume(DIGEST)
    await put(upload, (100_000, 300_000))
    await put(upload, (0, 100_000), content=bytes(300_000))
    with pytest.raises(DigestInvalid):
        await upload.commit(DIGEST)
    assert partial_files(files) == []


async def test_without_holes_there_is_no_list(files: BlobFiles) -> None:
    upload = await files.resume(DIGEST)
    await put(upload, (0, 100), (100, 5000))
    assert partial_files(files) == [PARTIAL]
    await upload.cancel()


@pytest.mark.parametrize("damage", ["shorter file", "lost head"])
async def test_a_file_that_is_not_as_listed_is_begun_again(files: BlobFiles, damage: str) -> None:
    upload = await files.resume(DIGEST)
    await put(upload, (0, 1000), (5000, 9000))
    await upload.suspend(OriginFailed("cut"))
    name = next(each for each in partial_files(files) if each != PARTIAL)
    if damage == "shorter file":
        os.truncate(files.root / "partial" / PARTIAL, 6000)
    else:
        (files.root / "partial" / name).write_bytes(b"\0" * 50)
    former = os.open(files.root / "partial" / PARTIAL, os.O_RDONLY)  # so that its number is not used again
    upload = await files.resume(DIGEST)
    assert list(upload.extents) == []
    assert not leads_to(files.root / "partial" / PARTIAL, former)
    os.close(former)
    await put(upload, (0, 300_000))
    assert await upload.commit(DIGEST) == WHOLE
    assert partial_files(files) == []


async def test_a_list_that_a_former_file_left_is_not_of_this_one(files: BlobFiles) -> None:
    upload = await files.resume(DIGEST)
    await put(upload, (5000, 9000))
    name = next(each for each in partial_files(files) if each != PARTIAL)
    left = (files.root / "partial" / name).read_bytes()
    await upload.cancel()
    upload = await files.resume(DIGEST)
    number = (files.root / "partial" / PARTIAL).stat().st_ino
    upload.close()
    (files.root / "partial" / f"{PARTIAL}.{number}.extents").write_bytes(left)
    upload = await files.resume(DIGEST)
    assert list(upload.extents) == []
    await upload.cancel()
    assert partial_files(files) == []


async def test_a_copy_of_a_file_with_holes_is_begun_again(files: BlobFiles) -> None:
    """It has another number than the file that the list is of: a copy may have zeros for the holes."""
    upload = await files.resume(DIGEST)
    await put(upload, (0, 1000), (5000, 9000))
    await upload.suspend(OriginFailed("cut"))
    with (files.root / "partial" / PARTIAL).open("rb") as former:  # so that its number is not used again
        content = former.read()
        for name in partial_files(files):
            path = files.root / "partial" / name
            held = path.read_bytes()
            path.unlink()
            path.write_bytes(content if name == PARTIAL else held)
        upload = await files.resume(DIGEST)
    assert list(upload.extents) == []
    await put(upload, (0, 300_000))
    assert await upload.commit(DIGEST) == WHOLE
    assert partial_files(files) == []


async def test_who_follows_an_empty_file_does_not_believe_the_list_of_a_former_one(files: BlobFiles) -> None:
    upload = await files.resume(DIGEST)
    following = await files.resume(DIGEST)
    path = ExtentList.path(files.root / "partial" / PARTIAL, following._file)
    ExtentList.create(path, 300_000, Extents([(5000, 9000)])).close()
    following._look()
    assert list(following.extents) == []
    following.close()
    upload.close()
    upload = await files.resume(DIGEST)
    assert partial_files(files) == [PARTIAL]
    await upload.cancel()


def test_a_list_that_cannot_be_written_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: int) -> None:
        raise OSError(28, "full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="full"):
        ExtentList.create(tmp_path / "x.1.extents", 100, Extents([(0, 5)]))
    assert list(tmp_path.iterdir()) == []


async def test_an_upload_with_holes_is_followed_and_taken_over(files: BlobFiles) -> None:
    upload = await files.resume(DIGEST)
    await put(upload, (0, 1000))
    following = await files.resume(DIGEST)
    assert not following.ours
    following._look()
    assert list(following.extents) == [(0, 1000)]
    await put(upload, (5000, 9000))
    following._look()
    assert list(following.extents) == [(0, 1000), (5000, 9000)]
    assert (following.listed_size, following.offset) == (300_000, 5000)
    upload.close()
    assert await following.watch(DIGEST) is False
    await put(following, (1000, 5000), (9000, 300_000))
    await following.commit(DIGEST)
    assert files.path(DIGEST).read_bytes() == CONTENT
    assert partial_files(files) == []


async def test_a_list_is_reaped_with_its_file(files: BlobFiles, clock: Clock) -> None:
    upload = await files.resume(DIGEST)
    await put(upload, (5000, 9000))
    await upload.suspend(OriginFailed("cut"))
    now = clock.now
    for name in partial_files(files):
        os.utime(files.root / "partial" / name, (now - 500, now - (0 if name == PARTIAL else 500)))
    assert files.reap(100) == 0
    clock.advance(200)
    assert files.reap(100) == 2
    assert partial_files(files) == []


def tell_from_elsewhere(files: BlobFiles, upload: SparseUpload) -> Path:
    """What another process leaves that waits for bytes of the upload."""
    other = SparseUpload(files, upload._path, os.open(upload._path, os.O_RDWR), "sha256", ours=False)
    other.wanted.tell(5, 90)
    other.close()
    return other.wanted._path


def age(path: Path, now: float) -> None:
    os.utime(path, (now - 500, now - 500))


async def test_what_is_wanted_of_an_upload_is_reaped_with_it(files: BlobFiles, clock: Clock) -> None:
    upload = await files.resume(DIGEST)
    await put(upload, (0, 4000))
    note = tell_from_elsewhere(files, upload)
    upload.close()  # as if it was killed
    age(files.root / "partial" / PARTIAL, clock())
    assert files.reap(100) == 1
    assert partial_files(files) == [note.name]  # it was told just now
    clock.advance(200)
    assert files.reap(100) == 1
    assert partial_files(files) == []


async def test_what_is_wanted_is_not_reaped_before_the_upload(files: BlobFiles, clock: Clock) -> None:
    upload = await files.resume(DIGEST)
    await put(upload, (0, 4000))
    note = tell_from_elsewhere(files, upload)
    for path in (note, files.root / "partial" / PARTIAL):
        age(path, clock())
    assert files.reap(100) == 0  # somebody writes it, slowly
    assert upload.wanted.hear() == [Wish(5, 90)]
    await upload.cancel()
    assert partial_files(files) == []


async def test_what_was_wanted_of_a_former_file_is_reaped_alone(files: BlobFiles, clock: Clock) -> None:
    former = await files.resume(DIGEST)
    stale = tell_from_elsewhere(files, former)
    kept = os.dup(former._file)  # so that no other file gets its number
    former.close()
    (files.root / "partial" / PARTIAL).unlink()
    upload = await files.resume(DIGEST)
    note = tell_from_elsewhere(files, upload)
    assert note != stale
    for path in (note, stale):
        age(path, clock())
    assert files.reap(100) == 1
    assert partial_files(files) == sorted([PARTIAL, note.name])
    await upload.cancel()
    os.close(kept)


async def test_what_is_wanted_of_an_upload_that_has_just_ended_is_not_left(
    files: BlobFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = await files.resume(DIGEST)
    await put(upload, (0, 300_000))
    other = SparseUpload(files, upload._path, os.open(upload._path, os.O_RDWR), "sha256", ours=False)
    looks = iter((True, False))  # it is renamed between the two
    monkeypatch.setattr(wanted, "leads_to", lambda path, file: next(looks))
    other.wanted.tell(5, 90)
    other.close()
    assert partial_files(files) == [PARTIAL]
    await upload.commit(DIGEST)
    assert partial_files(files) == []


# Followers


class Follower:
    """Another process that follows an upload, and has read some bytes."""

    def __init__(self, files: BlobFiles) -> None:
        self.files = files

    async def begin(self, offset: int, end: int) -> None:
        self.upload = await self.files.resume(DIGEST)
        assert not self.upload.ours
        self.watching = asyncio.create_task(self.upload.watch(DIGEST))
        self.blob = self.upload.follow(WHOLE)
        assert await self.blob.readable(offset) == end

    async def end(self, outcome: bool | str) -> None:
        if isinstance(outcome, bool):
            assert await self.watching is outcome
            return
        with pytest.raises(Unavailable, match=outcome):
            await self.watching
        await self.upload.cancel(StorageFailed("gave up"))
        with pytest.raises(StorageFailed):
            await self.blob.readable(299_000)


async def test_who_follows_sees_what_the_next_but_one_writer_writes(files: BlobFiles) -> None:
    upload = await files.resume(DIGEST)
    await put(upload, (0, 1000), (5000, 9000))
    one, two = Follower(files), Follower(files)
    await one.begin(5000, 9000)
    await two.begin(5000, 9000)
    upload.close()
    done, _ = await asyncio.wait((one.watching, two.watching), return_when=asyncio.FIRST_COMPLETED)
    if two.watching in done:
        one, two = two, one
    await one.end(False)
    await put(one.upload, (1000, 5000), (9000, 200_000))
    assert await two.blob.readable(9000) == 200_000
    await put(one.upload, (200_000, 300_000))
    await one.upload.commit(DIGEST)
    await two.end(True)
    assert await two.blob.readable(200_000) == 300_000
    await one.blob.close()
    await two.blob.close()


async def test_who_has_read_what_is_thrown_away_gets_no_more(files: BlobFiles) -> None:
    upload = await files.resume(DIGEST)
    await put(upload, (5000, 9000), content=bytes(300_000))
    follower = Follower(files)
    await follower.begin(5000, 9000)
    await upload.cancel(OriginFailed("other content"))
    upload = await files.resume(DIGEST)
    await put(upload, (0, 300_000))
    await upload.commit(DIGEST)
    await follower.end("gave up")
    await follower.blob.close()


@pytest.mark.parametrize("here", [False, True])
async def test_a_writer_on_another_machine_spoils_what_was_read(
    files: BlobFiles, monkeypatch: pytest.MonkeyPatch, here: bool
) -> None:
    upload = await files.resume(DIGEST)
    await put(upload, (0, 1000), (5000, 9000))
    follower = Follower(files)
    await follower.begin(5000, 9000)
    monkeypatch.setattr(module, "_boot", lambda: "another")
    if here:  # it takes over, and does not know whether the bytes are on the disk
        upload.close()
        await follower.end("damaged")
    else:
        assert upload._list is not None
        ExtentList.create(upload._list._path, 300_000, Extents()).close()
        await follower.end("another machine")
        upload.close()
    await follower.blob.close()
    upload = await files.resume(DIGEST)
    assert list(upload.extents) == []
    await upload.cancel()


async def test_a_list_that_was_removed_makes_no_hole_readable(files: BlobFiles) -> None:
    upload = await files.resume(DIGEST)
    following = await files.resume(DIGEST)
    await put(upload, (5000, 9000))
    for path in (files.root / "partial").iterdir():  # 1. its writer removes both  2. it releases the lock
        path.unlink()
    following._look()
    assert list(following.extents) == []
    following.close()
    upload.close()


# What other processes wait for


async def test_what_is_wanted_is_heard_once_a_second(
    files: BlobFiles, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    monkeypatch.setattr(wanted.time, "monotonic", clock)
    clock.advance(10)
    upload, other = await files.resume(DIGEST), await files.resume(DIGEST)
    other.wanted.tell(5, 90)
    other.wanted.tell(50, 90)
    other.wanted.tell(95, 100)
    far, whole = 5 * wanted.STEP, 9 * wanted.STEP
    other.wanted.tell(0, whole)
    other.wanted.tell(far, far + 10)  # another reader, far ahead of that of all
    other.wanted.tell(far, whole)
    heard = [(5, 90), (95, 100), (0, whole), (far, far + 10), (far, whole)]
    assert upload.wanted.hear() == [Wish(start, stop) for start, stop in heard]
    assert upload.wanted.hear() == []
    clock.advance(wanted.AGAIN + 0.1)
    other.wanted.tell(50, 90)
    assert upload.wanted.hear() == [Wish(50, 90)]
    await upload.cancel(OriginFailed("gone"))
    other.wanted.tell(1, 2)
    assert partial_files(files) == []
    other.close()


NINES = b"9" * 5000  # more than int() takes


@pytest.mark.parametrize(
    "content", [b"1 2", b"a b\n", b"1 2 3\n", b"\xff\xb2 1\n", b"-1 2\n", b"1 " + NINES + b"\n"]
)
async def test_a_wish_that_is_none(files: BlobFiles, content: bytes) -> None:
    upload = await files.resume(DIGEST)
    upload.wanted._path.write_bytes(content)
    assert upload.wanted.hear() == []
    upload.wanted._path.write_bytes(bytes(200_000) + b"\n" + content + b"\n1 2\n")
    assert [each for _ in range(9) for each in upload.wanted.hear()][-1] == Wish(1, 2)
    await upload.cancel(OriginFailed("gone"))
    assert partial_files(files) == []
