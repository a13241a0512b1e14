"""Modes and owners of files and directories: only the server's user may read them, whatever the umask is.

What root creates, in a command beside the server, belongs to the owner of the directory that it is in: so the
server can use it.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

FILE_MODE = 0o600
DIRECTORY_MODE = 0o700
_OTHERS = 0o077


def make_directory(path: Path) -> None:
    """Create a directory and its missing parents, for our user only.  Raises OSError."""
    try:
        _make(path)
    except FileNotFoundError:
        make_directory(path.parent)  # mkdir(parents=True) would not give them this mode
        _make(path)  # fails again where no directory can be created, as in /proc


def _make(path: Path) -> None:
    try:
        path.mkdir(DIRECTORY_MODE)
    except FileExistsError:
        if not path.is_dir():
            raise
    else:
        if (owner := _other_owner(path.parent)) is not None:
            os.chown(path, *owner, follow_symlinks=False)


def create_file(path: Path, flags: int) -> int:
    """Open a file, which is created for our user only if it is missing.  Raises OSError.

    flags: further flags of open(2)
    """
    # A link could lead to any file, which would change its owner.
    file = os.open(path, flags | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
    try:
        if (owner := _other_owner(path.parent)) is not None:
            status = os.fstat(file)
            if status.st_uid == 0 and status.st_nlink == 1:
                os.fchown(file, *owner)
    except OSError:
        os.close(file)
        raise
    return file


def replace_file(path: Path, content: bytes, fresh: Path) -> None:
    """Give a file new content, durably, or none at all: it is first written as `fresh`.  Raises OSError."""
    with os.fdopen(create_file(fresh, os.O_WRONLY | os.O_TRUNC), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def _other_owner(directory: Path) -> tuple[int, int] | None:
    """The user and group of a directory that is not ours, if we may give it something."""
    if os.geteuid() != 0:
        return None
    status = directory.stat()
    return (status.st_uid, status.st_gid) if status.st_uid != 0 else None


def restrict(directory: Path) -> None:
    """Take the permissions on an existing directory from other users, if we may."""
    with suppress(OSError):
        mode = stat.S_IMODE(directory.stat().st_mode)
        if mode & _OTHERS:
            directory.chmod(mode & ~_OTHERS)
