"""Threads that hash what other threads have written, so that one transfer keeps two cores busy.

A hash takes as long as receiving and writing together.  The bytes stay in memory until they are hashed, so
that nothing is read again from the file.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from queue import SimpleQueue

from storage.concurrency import run_in_thread

PIECE = 256 << 10  # bytes that are read and written at a time
BLOCK = 4 * PIECE  # handed over at once: to wake a thread costs as much as to hash 30 KiB
BLOCKS = 3  # that one hasher has memory for
HASHERS = 2  # of one process

Update = Callable[[int, memoryview], None]
_memory = threading.local()


def thread_memory(number: int) -> memoryview:
    """So many bytes of memory of this thread.

    The memory is kept: to take new memory each time costs as much as to read.
    """
    if not hasattr(_memory, "kept"):
        _memory.kept = {}
    kept: dict[int, memoryview] = _memory.kept
    if number not in kept:
        kept[number] = memoryview(bytearray(number))
    return kept[number]


class Hasher:
    """A thread that hashes, and the memory of what it is handed."""

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, "hash")
        self.free: SimpleQueue[memoryview] = SimpleQueue()
        for _ in range(BLOCKS):
            self.free.put(memoryview(bytearray(BLOCK)))

    async def finish(self) -> None:
        """Wait until all that it was handed is hashed."""
        await run_in_thread(int, threads=self.thread)


@contextmanager
def held_if_free(lock: threading.Lock) -> Iterator[bool]:
    """Hold a lock, if it is free."""
    ours = lock.acquire(blocking=False)
    try:
        yield ours
    finally:
        if ours:
            lock.release()


def hash_later(position: int, chunk: memoryview) -> None:
    """An Update for what is hashed from the file."""


class HashedFromFile:
    """A hasher hashes what is in a file, in steps; `step` returns whether more is there.

    What a step could not read, an OSError, is left to who needs the hash.
    """

    def __init__(self, hasher: Hasher, step: Callable[[], bool]) -> None:
        self.hasher = hasher
        self._step = step
        self._lock = threading.Lock()
        self._working = False
        self._more = False  # has come since the step began

    def hash_on(self) -> None:
        """More may be there."""
        with self._lock:
            self._more = self._working
            begin, self._working = not self._working, True
        if begin:
            self.hasher.thread.submit(self._work)

    def _work(self) -> None:
        more = False
        with suppress(OSError):
            more = self._step()
        with self._lock:
            self._working = more or self._more
            self._more = False
        if self._working:
            self.hasher.thread.submit(self._work)

    async def finish(self) -> None:
        """Wait until all that is there is hashed."""
        while self._working:
            await self.hasher.finish()


class HashedInPlace:
    """Pieces that are hashed by the thread that writes them."""

    def __init__(self, update: Update) -> None:
        self._update = update
        self._piece = thread_memory(PIECE)

    def memory(self) -> memoryview:
        """Memory for the next piece, of at most PIECE bytes.  May wait until some is free."""
        return self._piece

    def add(self, position: int, number: int) -> None:
        """The first `number` bytes of memory() have been written at `position`: hash them."""
        if number:
            self._update(position, self._piece[:number])


class HashedBehind:
    """As HashedInPlace, of pieces that follow one another; a hasher hashes them, in order."""

    def __init__(self, hasher: Hasher, update: Update) -> None:
        self._hasher = hasher
        self._update = update
        self._block: memoryview | None = None
        self._filled = 0  # bytes of the block
        self._end = 0  # of the last piece

    def memory(self) -> memoryview:
        if self._block is None:
            self._block = self._hasher.free.get()
        return self._block[self._filled : self._filled + PIECE]

    def add(self, position: int, number: int) -> None:
        self._filled += number
        self._end = position + number
        if self._filled > BLOCK - PIECE:
            self.hand_over()

    def hand_over(self) -> None:
        """Have the hasher hash what was added."""
        if self._block is not None:
            self._hasher.thread.submit(self._hash, self._end - self._filled, self._block, self._filled)
            self._block, self._filled = None, 0

    def _hash(self, position: int, block: memoryview, number: int) -> None:
        try:
            self._update(position, block[:number])
        finally:
            self._hasher.free.put(block)


@contextmanager
def pieces_for(
    hasher: Hasher | None, update: Update, *, behind: bool = False
) -> Iterator[HashedInPlace | HashedBehind]:
    """What one thread writes, to be hashed by `update`: by the hasher, if there is one, and a core for it.

    `behind`: the hasher may have pieces that come before these.
    """
    with _writing as writers:
        if hasher is None or not (behind or 2 * writers <= len(os.sched_getaffinity(0))):
            yield HashedInPlace(update)
            return
        pieces = HashedBehind(hasher, update)
        try:
            yield pieces
        finally:
            pieces.hand_over()


class _Writers:
    """The threads of this process that write what is to be hashed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._number = 0

    def __enter__(self) -> int:
        with self._lock:
            self._number += 1
            return self._number

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._number -= 1


_writing = _Writers()


@cache
def _hashers() -> Iterator[Hasher]:
    return itertools.cycle([Hasher() for _ in range(HASHERS)])


def next_hasher() -> Hasher:
    """The hasher for one more upload."""
    return next(_hashers())
