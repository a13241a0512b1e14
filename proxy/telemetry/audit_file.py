"""The file of the audit log, which several processes append to.

A line is one write at the end of the file, so the lines of several processes do not mix.  When the file is
full, one process renames it to `<file>.1`, the former `<file>.1` to `<file>.2`, and so on.  Every process
sees before it writes whether the name stands for another file by now, and opens that: so a program such as
logrotate may rename the file, too.
"""

from __future__ import annotations

import fcntl
import os
import stat
import threading
from contextlib import suppress
from pathlib import Path

import structlog

log = structlog.get_logger()

MODE = 0o640  # a group may read it, such as that of a program which collects logs


class AuditFile:
    """Appends lines to the file at `path`, and begins a new one above `max_size` bytes.

    `keep` former files are kept.  What cannot be written is lost: `audit.failed` is logged for the first such
    line, and `audit.recovered` when a line is written again.  A file that cannot be renamed grows.
    """

    def __init__(self, path: Path, max_size: int, keep: int) -> None:
        self._path = path
        self._max_size = max_size
        self._keep = keep
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._whole = False  # whether what was written last ends with the end of a line
        self._lost = 0  # lines since the last that was written
        self._stuck = False  # whether the file could not be renamed

    def open(self) -> None:
        """Open the file, or make it.  Raises OSError."""
        with self._lock:
            self._current()

    def append(self, line: bytes) -> None:
        """Write a line, given without its end.  Raises nothing."""
        with self._lock:
            try:
                self._append(line + b"\n")
            except OSError as error:
                self._failed(error)
                return
            if self._lost:
                log.info("audit.recovered", path=str(self._path), lost=self._lost)
                self._lost = 0

    def close(self) -> None:
        with self._lock:
            self._close()

    def _append(self, line: bytes) -> None:
        descriptor = self._current()
        size = os.fstat(descriptor).st_size
        if size and size + len(line) > self._max_size:
            self._try_to_rotate(descriptor)
            descriptor = self._current()
        size = 0 if self._whole else os.fstat(descriptor).st_size
        # A full disk, or the end of a process, may have cut a line.
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        self._whole = False
        if os.write(descriptor, line) < len(line):
            raise OSError("the disk has no space for a whole line")
        self._whole = True

    def _current(self) -> int:
        """The descriptor of the file that the path names now.  Raises OSError."""
        if self._descriptor is not None:
            with suppress(FileNotFoundError):
                if os.path.samestat(self._path.stat(), os.fstat(self._descriptor)):
                    return self._descriptor
            self._close()
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(self._path, flags, MODE)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError("it is no regular file")
        self._descriptor, self._whole = descriptor, False
        return descriptor

    def _try_to_rotate(self, descriptor: int) -> None:
        try:
            self._rotate(descriptor)
        except OSError as error:
            if not self._stuck:
                reason = f"it grows above max_size, as it cannot be renamed: {error.strerror or error}"
                log.error("audit.failed", path=str(self._path), reason=reason)
            self._stuck = True
        else:
            self._stuck = False

    def _rotate(self, descriptor: int) -> None:
        """Rename the files, unless another process does.  Raises OSError."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # the line goes to the end of the old file
        try:
            # Another process may have renamed it before it was locked.
            if not os.path.samestat(self._path.stat(), os.fstat(descriptor)):
                return
            for number in range(self._keep, 0, -1):
                older = self._path if number == 1 else self._numbered(number - 1)
                with suppress(FileNotFoundError):
                    older.replace(self._numbered(number))
        except FileNotFoundError:
            return
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")

    def _failed(self, error: OSError) -> None:
        self._lost += 1
        if self._lost == 1:
            log.error("audit.failed", path=str(self._path), reason=error.strerror or str(error))

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
