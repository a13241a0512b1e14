"""The last lines of the audit log, out of its file and the former ones."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from proxy.config.audit import AuditConfig
from proxy.telemetry.audit import AuditRecord

BLOCK = 1 << 16  # bytes
LONGEST = 1 << 20  # bytes of a line; a longer one is no line of ours
MOST = 64 << 20  # bytes that are read at most, to find what is rare


def last_records(config: AuditConfig, most: int = MOST) -> Iterator[AuditRecord]:
    """The records, the latest first, of the last `most` bytes.  Blocks; raises OSError.

    Lines that cannot be read are left out.
    """
    names = [config.file, *(Path(f"{config.file}.{number}") for number in range(1, config.keep + 1))]
    for path in names:
        # 1. a file is read  2. it is renamed  3. it is read again: a line may come twice, and none is lost
        with suppress(FileNotFoundError):
            for line in _backwards(path, most):
                most -= len(line) + 1
                with suppress(msgspec.DecodeError, UnicodeDecodeError):
                    yield msgspec.json.decode(line, type=AuditRecord)
        if most <= 0:
            return


def _backwards(path: Path, most: int) -> Iterator[bytes]:
    """The lines of a file, the last first; of its last `most` bytes only."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        start = max(0, end - most)
        rest = b""
        while end > start:
            begin = max(start, end - BLOCK)
            file.seek(begin)
            first, *lines = (file.read(end - begin) + rest).split(b"\n")
            yield from (line for line in reversed(lines) if line)
            rest, end = first if len(first) <= LONGEST else b"", begin
        if rest and not start:
            yield rest
