"""Locks on open files, which one process holds at a time.

A lock ends with its process.  It belongs to the file, not to the name: a process that gets the lock checks
whether the name still leads to the file, since the former holder may have renamed or removed the file before
it released the lock.  The kernel sends no notification when a lock is released; hence callers poll.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from storage.disk.modes import create_file, make_directory

POLL = 0.02  # seconds between two looks at a file that another process has locked


def try_lock(file: int) -> bool:
    """Lock the file exclusively; False if another process holds a lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(file: int) -> None:
    """Release the lock.  Closing the file does not: duplicates of the descriptor keep the lock."""
    fcntl.flock(file, fcntl.LOCK_UN)


def leads_to(path: Path, file: int) -> bool:
    """Whether `path` is still the name of the open file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(found, os.fstat(file))


class ProcessLock:
    """A lock file, shared or exclusive, between processes and between threads."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = create_file(path, os.O_RDONLY)
        except FileNotFoundError:
            make_directory(path.parent)
            self._file = create_file(path, os.O_RDONLY)

    def take(self, how: int) -> bool:
        """Take the lock if it is free; `how` is fcntl.LOCK_SH or fcntl.LOCK_EX."""
        try:
            fcntl.flock(self._file, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        os.close(self._file)
