"""Memory that all processes of a server share, so that limits and what is known of upstreams hold for all.

A process makes it and forks the others, which inherit it: there is no file, and nothing is left behind.  A
lock makes each change atomic.  A process that is killed releases the lock, and leaves a record that it was
writing as if it did not exist.
"""

from __future__ import annotations

import asyncio
import fcntl
import functools
import hashlib
import mmap
import os
import select
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import TypeVar

import msgspec

T = TypeVar("T")

WINDOW = 32  # records, one after the other, in which a key may be
LENGTH = 2  # bytes before each value: how many it has
DISKS, DISK_BYTES = 64, 12 << 10  # a failure has two paths, of 4 KiB at most
HOLDERS = 4096  # bytes of a record with a number for each of about 500 processes

_encode = msgspec.msgpack.Encoder().encode
_decoder = functools.cache(msgspec.msgpack.Decoder)


class MemoryLock:
    """A lock between a process and those forked from it; its holder may enter it again.

    It is released when its process ends.  A process uses it in one thread, and only for microseconds.
    """

    def __init__(self) -> None:
        self._file = os.memfd_create("entrepot-lock")
        self._depth = 0

    def __enter__(self) -> None:
        if not self._depth:
            fcntl.lockf(self._file, fcntl.LOCK_EX)  # a lock by flock() would be one for all forked processes
        self._depth += 1

    def __exit__(self, *exception: object) -> None:
        self._depth -= 1
        if not self._depth:
            fcntl.lockf(self._file, fcntl.LOCK_UN)

    def fileno(self) -> int:
        return self._file

    def close(self) -> None:
        os.close(self._file)


class SharedTable:
    """Records by key, in memory that forked processes share.  Without `lock` it is for one process.

    Values are what msgspec encodes, in at most `size` bytes.  If there are too many, the ones written least
    recently are dropped.  Hold `lock` from reading a value until it is changed.
    """

    def __init__(
        self, lock: AbstractContextManager[None] | None = None, records: int = 256, size: int = 1024
    ) -> None:
        self.lock = nullcontext() if lock is None else lock
        self._size = size
        self._secret = os.urandom(16)
        self._starts = records - WINDOW + 1
        self._keys = memoryview(mmap.mmap(-1, 8 * records)).cast("Q")  # 0: no record
        self._written = memoryview(mmap.mmap(-1, 8 * records)).cast("Q")  # when, in nanoseconds
        self._values = mmap.mmap(-1, size * records)

    def key(self, *parts: object) -> int:
        """The key for what `parts` name.  Clients, who choose some, cannot find two with the same key."""
        digest = hashlib.blake2b(repr(parts).encode(), digest_size=8, key=self._secret).digest()
        return int.from_bytes(digest, "little") or 1

    def __iter__(self) -> Iterator[int]:
        """The keys of the records that there are now."""
        return iter([each for each in self._keys.tolist() if each])

    def get(self, key: int, kind: type[T]) -> T | None:
        """The value of the record, a `kind`; None if there is no record."""
        with self.lock:
            at = self._find(key)
            content = b"" if at is None else self._content(at)
        return _decoder(kind).decode(content) if content else None  # type: ignore[arg-type]

    def put(self, key: int, value: object) -> None:
        """Write a record.  Raises ValueError if the value is too long."""
        content = _encode(value)
        if len(content) > self._size - LENGTH:
            raise ValueError(f"a record of {len(content)} bytes is too long")
        with self.lock:
            if (at := self._find(key)) is None:
                at = self._free(key)
            start = at * self._size
            # A process that is killed here leaves a record without a value.
            self._values[start : start + LENGTH] = bytes(LENGTH)
            self._keys[at], self._written[at] = key, time.monotonic_ns()
            self._values[start + LENGTH : start + LENGTH + len(content)] = content
            self._values[start : start + LENGTH] = len(content).to_bytes(LENGTH, "little")

    def discard(self, key: int) -> None:
        with self.lock:
            if (at := self._find(key)) is not None:
                self._keys[at] = 0

    def _content(self, at: int) -> bytes:
        start = at * self._size
        length = int.from_bytes(self._values[start : start + LENGTH], "little")
        return self._values[start + LENGTH : start + LENGTH + length]

    def _find(self, key: int) -> int | None:
        start = key % self._starts
        window = self._keys[start : start + WINDOW].tolist()
        return start + window.index(key) if key in window else None

    def _free(self, key: int) -> int:
        """Where a new record goes: where none is, else in the place of the one written least recently."""
        start = key % self._starts
        window = self._keys[start : start + WINDOW].tolist()
        if 0 in window:
            return start + window.index(0)
        written = self._written[start : start + WINDOW].tolist()
        return start + written.index(min(written))


class Holdings:
    """How many of each thing each process of a server holds.  What it held is dropped when it has died."""

    def __init__(self, table: SharedTable | None = None) -> None:
        self._table = table or SharedTable(size=HOLDERS)
        self.key = self._table.key

    def held(self, key: int) -> int:
        """How many all processes hold."""
        return sum(self._of(key).values())

    def add(self, key: int) -> int:
        """Hold one more.  Returns how many all processes hold now."""
        return self._change(key, os.getpid(), 1)

    def take(self, key: int, most: int, share: int | None = None) -> bool:
        """Hold one more if all processes hold less than `most`.  Returns whether this was so.

        With `share`, the key of a part of it, hold one more of that too, but only if less is held of it than
        is free.
        """
        with self._table.lock:
            if most - self.held(key) <= (0 if share is None else self.held(share)):
                return False
            self.add(key)
            if share is not None:
                self.add(share)
            return True

    def release(self, key: int) -> None:
        """Hold one less."""
        self._change(key, os.getpid(), -1)

    def forget(self, pid: int) -> None:
        """Drop all that a process held."""
        for key in self._table:
            with self._table.lock:
                if number := self._of(key).get(pid):
                    self._change(key, pid, -number)

    def _of(self, key: int) -> dict[int, int]:
        return self._table.get(key, dict[int, int]) or {}

    def _change(self, key: int, pid: int, number: int) -> int:
        with self._table.lock:
            held = self._of(key)
            held[pid] = max(0, held.pop(pid, 0) + number)
            if not held[pid]:
                del held[pid]
            if held:
                with suppress(ValueError):  # too many processes: this one is not counted
                    self._table.put(key, held)
            else:
                self._table.discard(key)
            return sum(held.values())


class Bell:
    """Wakes all who listen, in a process and, if it has a `file`, in those forked from it.

    The file is an eventfd, which is only written.  The kernel reports each write, once, to every epoll that
    watches it: eventfd(2), and EPOLLET in epoll(7).
    """

    def __init__(self, file: int | None = None) -> None:
        self._file = file
        self._listening: set[asyncio.Event] = set()
        self._stop: Callable[[], None] | None = None

    def ring(self) -> None:
        if self._file is not None:
            os.eventfd_write(self._file, 1)
        else:
            self._wake()

    def _wake(self) -> None:
        for each in self._listening:
            each.set()

    @contextmanager
    def listen(self) -> Iterator[asyncio.Event]:
        """An event that is set whenever the bell rings, and now and then without that.

        Raises OSError if no descriptors are left: all who listen take one together.
        """
        if self._file is not None and self._stop is None:
            self._stop = self._watch(self._file)
        rung = asyncio.Event()
        self._listening.add(rung)
        try:
            yield rung
        finally:
            self._listening.discard(rung)
            if self._stop is not None and not self._listening:
                self._stop()
                self._stop = None

    def _watch(self, file: int) -> Callable[[], None]:
        """Wake up all at each ring, until what is returned is called."""
        loop, rings = asyncio.get_running_loop(), select.epoll(1)
        rings.register(file, select.EPOLLIN | select.EPOLLET)

        def heard() -> None:
            rings.poll(0)
            self._wake()

        def stop() -> None:
            loop.remove_reader(rings)
            rings.close()

        loop.add_reader(rings, heard)
        return stop


class SharedState:
    """What all processes of a server know: made before they are forked, or by the only one there is.

    upstreams: what is known of upstreams
    logins: failed logins
    exemplars: those of metrics
    disks: failures of disks; it has a lock of its own, since threads use it
    slots, connections: what the processes hold of what is limited; `bell` rings when a slot becomes free
    secret: random bytes, for hashes that are the same in all processes
    id: of the server, for others; random, and another one after each start
    """

    def __init__(self, *, forks: bool = False) -> None:
        self._files: list[int] = []
        lock: AbstractContextManager[None] | None = None
        disks: AbstractContextManager[None] | None = None
        bell: int | None = None
        if forks:
            lock = held = MemoryLock()
            disks = threads = MemoryLock()
            bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._files = [held.fileno(), threads.fileno(), bell]
        self.upstreams = SharedTable(lock, 4096)
        self.logins = SharedTable(lock, 32768, 64)
        self.exemplars = SharedTable(lock, 1024, 512)
        self.slots = Holdings(SharedTable(lock, 1024, HOLDERS))
        self.connections = Holdings(SharedTable(lock, 8192, HOLDERS))
        self.disks = SharedTable(disks, DISKS, DISK_BYTES)
        self.bell = Bell(bell)
        self.secret = os.urandom(32)
        self.id = os.urandom(8).hex()

    def descriptors(self) -> list[int]:
        """Those that must stay open in the forked processes."""
        return self._files

    def forget(self, pid: int) -> None:
        """Free what a process held that has ended."""
        self.slots.forget(pid)
        self.connections.forget(pid)
        self.bell.ring()

    def close(self) -> None:
        for each in self._files:
            os.close(each)
        self._files = []
