"""Check sums of records, and reading the intact records of a damaged database."""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

LOCKED = 10.0  # seconds that a write waits for the write of another process
CHECKSUM_BYTES = 4
_ROWIDS = 1 << 62


def checksum(key: str, value: bytes) -> bytes:
    """The check sum that is stored in front of a value."""
    return zlib.crc32(value, zlib.crc32(key.encode())).to_bytes(CHECKSUM_BYTES, "big")


def checked(key: str, stored: Any) -> bytes | None:
    """The value of a stored record; None if it is damaged."""
    if not isinstance(stored, bytes):
        return None
    value = stored[CHECKSUM_BYTES:]
    # As checksum(): a list of repositories reads 100,000 records.
    sum = zlib.crc32(value, zlib.crc32(key.encode()))
    return value if stored[:CHECKSUM_BYTES] == sum.to_bytes(CHECKSUM_BYTES, "big") else None


def readable_records(file: Path) -> Iterator[tuple[str, bytes]]:
    """All intact records of a damaged database, each with its check sum."""
    uri = f"file:{quote(str(file))}?mode=ro"
    with closing(sqlite3.connect(uri, uri=True, isolation_level=None, timeout=LOCKED)) as source:
        source.text_factory = bytes
        for _, key, stored in _rows(source):
            with suppress(AttributeError, UnicodeDecodeError):  # a damaged key
                if checked(name := key.decode(), stored) is not None:
                    yield name, stored


def _rows(source: sqlite3.Connection) -> Iterator[tuple[int, Any, Any]]:
    select = "SELECT rowid, key, value FROM Cache WHERE rowid >= ? AND rowid < ? ORDER BY rowid"
    gaps: list[tuple[int, int]] = []
    at, step, missed = 0, 0, 0
    while at < _ROWIDS:
        try:
            for row in source.execute(select, (at, _ROWIDS)):
                if step:
                    gaps.append((missed, row[0]))
                at, step = row[0] + 1, 0
                yield row
            break
        except sqlite3.Error:
            # Skip the damage in ever larger steps: it may be a page with many rows.
            missed = at if step == 0 else missed
            step = step * 2 or 1
            at += step
    if step:
        gaps.append((missed, _ROWIDS))
    for gap in gaps:  # read what the steps skipped from the end backwards
        with suppress(sqlite3.Error):
            yield from source.execute(f"{select} DESC", gap)
