"""Threads that write one upload at the same time."""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from itertools import repeat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.disk import hashing, sparse
from storage.disk.blobs import BlobFiles
from storage.disk.extents import Extents
from storage.disk.hashing import PIECE, Hasher
from storage.disk.sparse import SparseUpload
from storage.errors import StorageFailed
from storage.oci import OCTETS, Descriptor
from storage.registry import ReadInto
from tests.test_extents import CONTENT, DIGEST, files

__all__ = ["files"]
STEP = 30_000


def source(start: int, stop: int, pieces: int = 7_000) -> ReadInto:
    """Reads CONTENT[start:stop], at most so many bytes each time."""
    position = start

    def readinto(buffer: memoryview) -> int:
        nonlocal position
        chunk = CONTENT[position : min(stop, position + pieces, position + len(buffer))]
        buffer[: len(chunk)] = chunk
        position += len(chunk)
        return len(chunk)

    return readinto


async def write(upload: SparseUpload, start: int, stop: int, pieces: int = 7_000) -> None:
    readinto = source(start, stop, pieces)
    while start < stop:
        start += await upload.write_from(readinto, start, stop - start)


@pytest.mark.parametrize("pieces", [999, 7_000, 100_000])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10)
@given(order=st.permutations(range(10)), first=st.integers(0, 10), in_chunks=st.sets(st.integers(0, 9)))
async def test_parts_in_any_order(
    monkeypatch: pytest.MonkeyPatch, pieces: int, order: list[int], first: int, in_chunks: set[int]
) -> None:
    monkeypatch.setattr(hashing, "PIECE", 4096)
    monkeypatch.setattr(hashing, "BLOCK", 16384)
    monkeypatch.setattr(hashing, "_memory", threading.local())
    hasher = Hasher()
    monkeypatch.setattr(hashing, "_hashers", lambda: repeat(hasher))
    monkeypatch.setattr(sparse, "SYNC", 20_000)

    async def part(upload: SparseUpload, number: int) -> None:
        start, stop = number * STEP, (number + 1) * STEP
        if number in in_chunks:
            await upload.write_at(start, CONTENT[start:stop])
        else:
            await write(upload, start, stop, pieces)

    with tempfile.TemporaryDirectory() as root:
        files = BlobFiles(Path(root))
        upload = await files.resume(DIGEST)
        upload.expect(len(CONTENT))
        await asyncio.gather(*(part(upload, each) for each in order[:first]))
        await upload._flushed()
        spans = sorted(Extents((each * STEP, (each + 1) * STEP) for each in order[:first]))
        assert sorted(upload.extents) == spans
        upload.close()  # as the kernel does
        upload = await files.resume(DIGEST)
        assert sorted(upload.extents) == spans
        assert upload.offset == first * STEP
        upload.expect(len(CONTENT))
        await asyncio.gather(*(part(upload, each) for each in order[first:]))
        assert await upload.commit(DIGEST) == Descriptor(OCTETS, DIGEST, len(CONTENT))
        assert files.path(DIGEST).read_bytes() == CONTENT
        assert list((files.root / "partial").iterdir()) == []


async def test_those_in_order_are_hashed_as_they_come(
    files: BlobFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = await files.resume(DIGEST)
    upload.expect(len(CONTENT))
    await write(upload, 0, len(CONTENT))

    def read_again(*arguments: object) -> bytes:
        raise AssertionError("it is hashed a second time")

    monkeypatch.setattr(os, "preadv", read_again)
    await upload.commit(DIGEST)


async def test_what_is_there_is_hashed_before_the_rest_comes(files: BlobFiles) -> None:
    upload = await files.resume(DIGEST)
    upload.expect(len(CONTENT))
    await write(upload, 100_000, 250_000)
    assert upload._hashed == 0
    await write(upload, 0, 100_000)
    await write(upload, 260_000, len(CONTENT))
    await upload._behind().finish()
    assert upload._hashed == 250_000
    await write(upload, 250_000, 260_000)
    await upload.commit(DIGEST)
    assert files.path(DIGEST).read_bytes() == CONTENT


@pytest.mark.errors("disk.failed")
async def test_what_cannot_be_read_to_be_hashed(files: BlobFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> int:
        raise OSError(5, "broken")

    upload = await files.resume(DIGEST)
    upload.expect(len(CONTENT))
    monkeypatch.setattr(os, "preadv", fail)
    for start in (100_000, 0, 200_000):  # a write can find out no more than that it is left to commit()
        await write(upload, start, min(start + 100_000, len(CONTENT)))
    with pytest.raises(StorageFailed):
        await upload.commit(DIGEST)
    await upload.cancel()


async def test_nothing_is_there(files: BlobFiles) -> None:
    upload = await files.resume(DIGEST)
    upload.expect(len(CONTENT))
    assert await upload.write_from(lambda buffer: 0, 5, 100) == 0
    assert list(upload.extents) == []
    assert upload.offset == 0
    await upload.cancel()


async def test_no_more_is_written_than_is_asked_for(files: BlobFiles) -> None:
    upload = await files.resume(DIGEST)
    upload.expect(len(CONTENT))
    assert await upload.write_from(source(0, len(CONTENT), 100_000), 0, 12_345) == 12_345
    assert list(upload.extents) == [(0, 12_345)]
    await upload.cancel()


async def test_what_is_written_when_it_is_cancelled_is_there(files: BlobFiles) -> None:
    upload = await files.resume(DIGEST)
    upload.expect(len(CONTENT))
    loop, reading, proceed = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    read = source(0, len(CONTENT))

    def readinto(buffer: memoryview) -> int:
        loop.call_soon_threadsafe(reading.set)
        proceed.wait()
        return read(buffer)

    writing = asyncio.create_task(upload.write_from(readinto, 0, len(CONTENT)))
    await reading.wait()
    writing.cancel()
    flushed = asyncio.create_task(upload._flushed())
    await asyncio.sleep(0)
    assert not flushed.done(), "the file is still in use"
    proceed.set()
    with pytest.raises(asyncio.CancelledError):
        await writing
    await flushed
    assert list(upload.extents) == [(0, 7_000)]
    await write(upload, 7_000, len(CONTENT))
    await upload.commit(DIGEST)


@pytest.mark.parametrize("first", [1, 100_000, PIECE])
async def test_writes_are_aligned_again_after_one_that_is_not(
    files: BlobFiles, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    upload = await files.resume(DIGEST)
    upload.expect(len(CONTENT))
    written, pwrite = [], os.pwrite

    def write_out(file: int, content: memoryview, position: int) -> int:
        written.append(position)
        return pwrite(file, content, position)

    monkeypatch.setattr(os, "pwrite", write_out)
    await write(upload, 0, first, first)
    await write(upload, first, len(CONTENT), len(CONTENT))
    assert written == sorted({0, first, PIECE})
    await upload.commit(DIGEST)


@pytest.mark.errors("disk.failed")
async def test_a_disk_that_fails(files: BlobFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = await files.resume(DIGEST)
    upload.expect(len(CONTENT))
    await write(upload, 0, 1000)
    reader = upload.follow(Descriptor(OCTETS, DIGEST, len(CONTENT)))

    def full(file: int, content: object, position: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageFailed):
        await upload.write_from(source(1000, 5000), 1000, 4000)
    assert upload.failed
    with pytest.raises(StorageFailed):
        await upload.write_from(source(1000, 5000), 1000, 4000)
    with pytest.raises(StorageFailed):
        await reader.readable(1000)
    await reader.close()
    await upload.cancel()


async def test_what_is_written_during_a_sync_is_listed_after_its_mark(
    files: BlobFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "SYNC", 50_000)
    upload = await files.resume(DIGEST)
    upload.expect(len(CONTENT))
    loop, syncing, proceed, sync = (
        asyncio.get_running_loop(),
        asyncio.Event(),
        threading.Event(),
        os.fdatasync,
    )

    def slow(file: int) -> None:
        loop.call_soon_threadsafe(syncing.set)
        proceed.wait()
        sync(file)

    monkeypatch.setattr(os, "fdatasync", slow)
    first = asyncio.create_task(upload.write_from(source(100_000, 160_000, 60_000), 100_000, 60_000))
    await syncing.wait()
    await write(upload, 0, 20_000)
    assert list(upload.extents) == [(0, 20_000)]
    proceed.set()
    assert await first == 60_000
    (listed,) = (files.root / "partial").glob("*.extents")
    lines = listed.read_text().splitlines()[1:]
    assert lines[:2] == ["100000 160000", "synced"]
    assert Extents(tuple(map(int, line.split())) for line in lines[2:]).has([(0, 20_000)])  # type: ignore[misc]
    await write(upload, 20_000, 100_000)
    await write(upload, 160_000, len(CONTENT))
    await upload.commit(DIGEST)
