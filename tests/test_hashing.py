"""Threads that hash what others have written: the order, the memory, and when a blob is complete."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import repeat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.disk import hashing
from storage.disk.blobs import BlobFiles
from storage.disk.hashing import BLOCK, BLOCKS, PIECE, HashedBehind, HashedInPlace, Hasher, pieces_for
from storage.errors import DigestInvalid
from storage.oci import OCTETS, Descriptor, Digest
from tests.test_extents import CONTENT, DIGEST, files
from tests.test_sparse import write

__all__ = ["files"]
HASHER = Hasher()


class Sink:
    """What an upload does with the bytes: it hashes those that follow one another."""

    def __init__(self) -> None:
        self.found = bytearray()

    def update(self, position: int, piece: memoryview) -> None:
        assert position == len(self.found)
        self.found += piece

    def write(self, hasher: Hasher | None, content: bytes, sizes: Iterator[int], start: int = 0) -> None:
        with pieces_for(hasher, self.update, behind=True) as pieces:
            while start < len(content):
                memory = pieces.memory()
                part = content[start : start + min(next(sizes), len(memory))]
                memory[: len(part)] = part
                pieces.add(start, len(part))
                start += len(part)


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Hasher, threading.Event]]:
    """The hasher of all uploads, on two cores; its thread waits for the event."""
    hasher, proceed = Hasher(), threading.Event()
    monkeypatch.setattr(hashing, "_hashers", lambda: repeat(hasher))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    hasher.thread.submit(proceed.wait)
    yield hasher, proceed
    proceed.set()
    hasher.thread.shutdown()


def idle(hasher: Hasher) -> bool:
    """Wait until it has hashed all, and return whether it has all its memory again."""
    hasher.thread.submit(int).result()
    return hasher.free.qsize() == BLOCKS


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(0, PIECE), min_size=1, max_size=5).filter(any), cuts=st.integers(1, 4))
@pytest.mark.parametrize("hasher", [None, HASHER])
def test_all_is_hashed_in_order(hasher: Hasher | None, sizes: list[int], cuts: int) -> None:
    content, sink = os.urandom(min(3 * BLOCK, 40 * max(sizes))), Sink()
    for number in range(1, cuts + 1):
        stop = len(content) * number // cuts
        sink.write(hasher, content[:stop], (size for _ in repeat(None) for size in sizes), len(sink.found))
        assert idle(HASHER)
        assert sink.found == content[:stop]


def test_who_writes_waits_until_memory_is_free(busy: tuple[Hasher, threading.Event]) -> None:
    hasher, proceed = busy
    content, sink = os.urandom(BLOCKS * BLOCK + PIECE), Sink()
    writing = threading.Thread(target=sink.write, args=(hasher, content, repeat(PIECE)))
    written = threading.Thread(target=sink.write, args=(hasher, content[: BLOCKS * BLOCK], repeat(PIECE)))
    written.start()
    written.join()  # so much it takes
    assert hasher.free.empty()
    sink.found.clear()
    writing.start()
    assert not sink.found
    proceed.set()
    writing.join()
    assert idle(hasher)
    assert bytes(sink.found[-len(content) :]) == content


def test_many_that_share_one_do_not_wait_for_each_other() -> None:
    sinks = [Sink() for _ in range(3 * BLOCKS)]
    content = os.urandom(2 * BLOCK + 12_345)
    threads = [threading.Thread(target=each.write, args=(HASHER, content, repeat(77_777))) for each in sinks]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert idle(HASHER)
    assert all(each.found == content for each in sinks)


def test_the_memory_is_free_again_after_a_failure() -> None:
    def update(position: int, piece: memoryview) -> None:
        raise MemoryError

    with pytest.raises(OSError, match="full"), pieces_for(HASHER, update, behind=True) as pieces:
        pieces.memory()
        pieces.add(0, PIECE)
        pieces.memory()
        raise OSError("the disk is full")
    assert idle(HASHER)


@pytest.mark.parametrize(("cores", "behind"), [(1, 0), (2, 1), (3, 1), (8, 4)])
def test_so_many_are_hashed_behind_as_there_are_cores_for(
    monkeypatch: pytest.MonkeyPatch, cores: int, behind: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    for _ in range(2):  # what ends counts no more
        with ExitStack() as writing:
            kinds = [
                type(writing.enter_context(pieces_for(HASHER, lambda position, piece: None)))
                for _ in range(6)
            ]
            # Who has pieces there already must not overtake them.
            late = writing.enter_context(pieces_for(HASHER, lambda position, piece: None, behind=True))
        assert kinds == [HashedBehind] * behind + [HashedInPlace] * (6 - behind)
        assert isinstance(late, HashedBehind)


@pytest.mark.parametrize("digest", [DIGEST, Digest.of(b"something else")], ids=["right", "wrong"])
async def test_the_last_byte_is_withheld_until_all_is_hashed(
    files: BlobFiles, busy: tuple[Hasher, threading.Event], digest: Digest
) -> None:
    _, proceed = busy
    upload = await files.resume(digest)
    upload.expect(len(CONTENT))
    await write(upload, 0, len(CONTENT), len(CONTENT))
    reader = upload.follow(Descriptor(OCTETS, digest, len(CONTENT)))
    commit = asyncio.create_task(upload.commit(digest))
    assert await reader.readable(0) == len(CONTENT) - 1
    last = asyncio.create_task(reader.readable(len(CONTENT) - 1))
    await asyncio.sleep(0)
    assert not files.holds(digest)
    assert not (last.done() or commit.done())
    proceed.set()
    if digest == DIGEST:
        await commit
        assert await last == len(CONTENT)
    else:
        for each in (commit, last):
            with pytest.raises(DigestInvalid):
                await each
    await reader.close()


async def test_an_upload_that_is_suspended_keeps_all(
    files: BlobFiles, busy: tuple[Hasher, threading.Event]
) -> None:
    _, proceed = busy
    upload = await files.resume(DIGEST)
    upload.expect(len(CONTENT))
    await write(upload, 0, 100_000, 100_000)
    suspending = asyncio.create_task(upload.suspend())
    await asyncio.sleep(0)
    proceed.set()
    await suspending
    upload = await files.resume(DIGEST)
    assert (upload.offset, upload._hash.hexdigest()) == (
        100_000,
        hashlib.sha256(CONTENT[:100_000]).hexdigest(),
    )
    upload.expect(len(CONTENT))
    await write(upload, 100_000, len(CONTENT))
    await upload.commit(DIGEST)
