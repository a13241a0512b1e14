"""Files that one process at a time has, by a lock on the open file, and the names that lead to them.

A lock ends with its process, so that what the dead held is free.  It is of the file, not of its name: whoever
has got it looks whether the name still leads there, since the one before may have renamed or removed the
file, and then let go.  Nobody is told when a lock is free; it is tried again every now and then.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

POLL = 0.02  # seconds between looks at what another process holds or writes


def try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(file: int) -> None:
    """Closing alone does not: duplicates go on holding the lock."""
    fcntl.flock(file, fcntl.LOCK_UN)


def leads_to(path: Path, file: int) -> bool:
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(found, os.fstat(file))


class ProcessLock:
    """Of several processes, and threads; gone with whoever holds it."""

    def __init__(self, path: Path) -> None:
        flags = os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC
        try:
            self._file = os.open(path, flags, 0o600)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, flags, 0o600)

    def take(self, how: int) -> bool:
        try:
            fcntl.flock(self._file, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        os.close(self._file)
