"""What the writer of a file says of itself to those who follow it, by a file beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from storage.disk.extents import beside
from storage.disk.modes import create_file

SUFFIX = ".writer"
MOST = 4096  # bytes of it that are read


class WriterNote:
    """Texts by their names.  Nothing depends on it: what cannot be written or read is left out."""

    def __init__(self, of: Path, file: int) -> None:
        self._path = beside(of, file, SUFFIX)

    def write(self, texts: Mapping[str, str]) -> None:
        """Replace what is said.  Only the writer of the file calls this."""
        with suppress(OSError):
            file = create_file(self._path, os.O_WRONLY | os.O_TRUNC)
            try:
                os.write(file, json.dumps(dict(texts)).encode())
            finally:
                os.close(file)

    def read(self) -> Mapping[str, str]:
        with suppress(OSError, ValueError):
            file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                found = json.loads(os.pread(file, MOST, 0))
            finally:
                os.close(file)
            if isinstance(found, dict) and all(isinstance(each, str) for each in found.values()):
                return found
        return {}

    def remove(self) -> None:
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
