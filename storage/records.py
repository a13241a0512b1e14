"""Small named records on disk: tags, manifests, links, listings.  Bytes in, bytes out.

A key is its kind and fields, joined by spaces, which neither names nor tags nor digests hold; a space
sorts before every character that they do hold, so a scan over a prefix is in the order of the fields.
A read takes about 10 µs and may be done on the event loop; a write is a transaction: call it in a thread.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diskcache

from storage.errors import StorageFailed

_INLINE = 1 << 30  # bytes; larger values would go to files of their own, whose loss SQLite does not notice
_BATCH = 500


class _BytesOnly(diskcache.Disk):  # type: ignore[misc]
    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Any:
        # Never unpickle: whoever can write the file could run code (CVE-2025-69872).
        if mode == diskcache.core.MODE_PICKLE:
            raise StorageFailed("a pickled record was refused: somebody else wrote to the records")
        return super().fetch(mode, filename, value, read)


@contextmanager
def _translated(directory: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, sqlite3.Error, diskcache.Timeout) as error:
        raise StorageFailed(f"records in {directory}: {error or type(error).__name__}") from error


class Records:
    """Every method raises StorageFailed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        with _translated(directory):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Culling may throw away the value just stored, and an LRU read is a write: hence neither.
            self._cache = diskcache.Cache(
                str(directory),
                disk=_BytesOnly,
                disk_min_file_size=_INLINE,
                eviction_policy="none",
                cull_limit=0,
            )

    def get(self, key: str) -> bytes | None:
        with _translated(self._directory):
            value: bytes | None = self._cache.get(key)
            return value

    def put(self, key: str, value: bytes) -> None:
        with _translated(self._directory):
            self._cache.set(key, value)

    def delete(self, key: str) -> bool:
        """Whether it was there."""
        with _translated(self._directory):
            return bool(self._cache.delete(key))

    def scan(self, prefix: str, after: str = "") -> Iterator[tuple[str, bytes]]:
        """Keys that start with `prefix` and come after `prefix + after`, in order, with their values."""
        last = prefix + after
        while rows := self._rows("SELECT key, value", last, prefix + "\U0010ffff", _BATCH):
            yield from rows
            last = rows[-1][0]

    def first(self, prefix: str, after: str = "") -> str | None:
        """The first key of scan(); a way to skip from group to group."""
        rows = self._rows("SELECT key, NULL", prefix + after, prefix + "\U0010ffff", 1)
        return rows[0][0] if rows else None

    def _rows(self, select: str, above: str, below: str, limit: int) -> list[tuple[str, bytes]]:
        # diskcache lists keys only from end to end; its index on (key, raw) serves ranges as well.
        with _translated(self._directory):
            statement = f"{select} FROM Cache WHERE key > ? AND key < ? AND raw = 1 ORDER BY key LIMIT ?"
            rows: list[tuple[str, bytes]] = self._cache._sql(statement, (above, below, limit)).fetchall()
            return rows

    def close(self) -> None:
        self._cache.close()
