"""What readers in other processes wait for, told to the writer of a file by a file beside it."""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from storage.disk.extents import beside
from storage.disk.locks import leads_to
from storage.disk.modes import create_file

SUFFIX = ".wanted"
AGAIN = 1.0  # seconds after which a reader says the same again: there may be another writer
MOST = 1 << 16  # bytes heard at once
STEP = 4 << 20  # bytes; a reader that has come so much further tells it
_WISH = re.compile(rb"^(\d{1,18}) (\d{1,18})(?: ([0-9a-f]{16}))?$", re.MULTILINE)


class Wish(NamedTuple):
    """A reader waits for [start, stop); an empty span is all of it.  `client` are 16 hex digits, or empty."""

    start: int
    stop: int
    client: str = ""


class Wanted:
    """The list of the bytes of a file that readers wait for: they tell, and its writer hears."""

    def __init__(self, of: Path, file: int) -> None:
        self._of = of
        self._file = file
        self._path = beside(of, file, SUFFIX)
        self._position = 0  # up to where it is heard
        self._told: set[Wish] = set()  # by step and end: readers of the same bytes may be far apart
        self._since = 0.0

    def tell(self, start: int, stop: int, client: str = "") -> None:
        """A reader waits for [start, stop), which the writer may bring at once, or later."""
        far = stop - start > STEP
        self._tell(
            Wish(start, stop, client), Wish(start // STEP if far or not client else start, stop, client)
        )

    def tell_all(self) -> None:
        """The rest is wanted as well, whether or not anybody waits for it."""
        self._tell(Wish(0, 0), Wish(0, 0))

    def _tell(self, wish: Wish, key: Wish) -> None:
        now = time.monotonic()
        if now - self._since > AGAIN:
            self._told, self._since = set(), now
        if key in self._told or not leads_to(self._of, self._file):
            return
        self._told.add(key)
        with suppress(OSError):
            file = create_file(self._path, os.O_WRONLY | os.O_APPEND)
            try:
                os.write(file, f"{wish.start} {wish.stop} {wish.client}".rstrip().encode() + b"\n")
            finally:
                os.close(file)
            # 1. we look  2. the writer ends, and removes the list  3. we create it
            if not leads_to(self._of, self._file):
                self.remove()

    def hear(self) -> list[Wish]:
        """What was told since the last call."""
        try:
            file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return []
        try:
            content = os.pread(file, MOST, self._position)
        finally:
            os.close(file)
        lines = content[: content.rfind(b"\n") + 1]
        self._position += len(lines) or (MOST if len(content) == MOST else 0)  # no line of ours is so long
        return [Wish(int(start), int(stop), client.decode()) for start, stop, client in _WISH.findall(lines)]

    def remove(self) -> None:
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
