"""The failures of disks that are not over, as all processes of a server know them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Protocol

import msgspec

from storage.shared import DISK_BYTES, DISKS, SharedTable

DISK = "disk"  # the kind of a failure that affects all files on a device


class Trouble(msgspec.Struct, frozen=True, array_like=True):
    """A failure that is not over.

    kind: what it affects below `root`, or on the `device` if it is DISK
    path: that of the first write that failed
    size: bytes of the largest write that failed
    failed_at: when a write failed last, in seconds since the epoch
    """

    kind: str
    device: int
    root: str
    path: str
    cause: str
    size: int
    failed_at: float


class Troubled(Protocol):
    """What may have troubles."""

    def troubles(self) -> list[str]:
        """A sentence for each cause that is not over."""
        ...


class Troubles:
    """A table of troubles; thread-safe.  `table` may be one that the processes of a server share."""

    def __init__(self, table: SharedTable | None = None) -> None:
        self._table = table or SharedTable(records=DISKS, size=DISK_BYTES)
        self._lock = threading.Lock()  # the lock of the table is for one thread

    def __bool__(self) -> bool:
        return any(self._table)

    def __iter__(self) -> Iterator[Trouble]:
        with self._lock:
            found = [self._table.get(key, Trouble) for key in self._table]
        return iter([each for each in found if each is not None])

    def add(self, trouble: Trouble) -> bool:
        """Add a trouble, or update the one of the same kind, place and cause; whether it is new."""
        key = self._key(trouble)
        with self._lock, self._table.lock:
            known = self._table.get(key, Trouble)
            if known is not None:
                size = max(trouble.size, known.size)
                trouble = msgspec.structs.replace(trouble, root=known.root, path=known.path, size=size)
            self._table.put(key, trouble)
        return known is None

    def remove(self, over: Callable[[Trouble], bool]) -> list[Trouble]:
        """Remove the troubles that are over, and return them: each is returned to one process only."""
        removed = []
        with self._lock:
            for key in self._table:
                with self._table.lock:
                    trouble = self._table.get(key, Trouble)
                    if trouble is not None and over(trouble):
                        self._table.discard(key)
                        removed.append(trouble)
        return removed

    def _key(self, trouble: Trouble) -> int:
        place = trouble.device if trouble.kind == DISK else trouble.root
        return self._table.key(trouble.kind, place, trouble.cause)
