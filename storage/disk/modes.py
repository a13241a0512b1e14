"""Modes of files and directories: only the user of the server may read them, whatever the umask is."""

from __future__ import annotations

import stat
from contextlib import suppress
from pathlib import Path

FILE_MODE = 0o600
DIRECTORY_MODE = 0o700
_OTHERS = 0o077


def make_directory(path: Path) -> None:
    """Create a directory and its missing parents, for our user only.  Raises OSError."""
    try:
        path.mkdir(DIRECTORY_MODE, exist_ok=True)
    except FileNotFoundError:
        make_directory(path.parent)  # mkdir(parents=True) would not give them this mode
        path.mkdir(DIRECTORY_MODE, exist_ok=True)


def restrict(directory: Path) -> None:
    """Take the permissions on an existing directory from other users, if we may."""
    with suppress(OSError):
        mode = stat.S_IMODE(directory.stat().st_mode)
        if mode & _OTHERS:
            directory.chmod(mode & ~_OTHERS)
