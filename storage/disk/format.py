"""The version of a data directory: a file that says in which format everything in it is.

    <disk.path>/format                    the number of the format
    <disk.path>/restoring/backup.json     a restore that has not ended

A directory without the file is of a version that wrote none; it is taken over as it is.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from storage.disk.health import translated
from storage.disk.modes import make_directory, replace_file
from storage.errors import StorageFailed

FORMAT = 1
FILE = "format"
RESTORING, HEAD = "restoring", "backup.json"


def take_over(root: Path) -> None:
    """Mark the directory as one of this format, after a check.  A missing one is made.

    A disk that cannot be written to is no error here: it may still be read.
    """
    if check(root) < FORMAT:
        with suppress(OSError):
            make_directory(root)
            write(root, FORMAT)


def check(root: Path) -> int:
    """The format of the directory; 0 if it does not say.

    Raises StorageFailed if it is of a later format, or not restored completely.
    """
    with translated(root):
        restoring = (root / RESTORING / HEAD).exists()
    if restoring:
        raise StorageFailed(f"it is not restored completely: run entrepot restore again ({root / RESTORING})")
    found = _read(root)
    if found > FORMAT:
        raise StorageFailed(
            f"it has format {found}, and this version knows format {FORMAT}: use the version of entrepot that"
            " wrote it, or a later one"
        )
    return found


def _read(root: Path) -> int:
    path = root / FILE
    with translated(path):
        try:
            return int(path.read_text())
        except FileNotFoundError:
            return 0
        except ValueError:
            raise StorageFailed(f"{path} does not hold the number of a format: restore that file") from None


def write(root: Path, number: int) -> None:
    """Record the format.  Raises OSError."""
    replace_file(root / FILE, b"%d\n" % number, root / f"{FILE}.{os.getpid()}")
