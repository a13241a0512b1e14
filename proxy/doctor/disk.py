"""The checks of the server's disk: what the server does there works, and there is room."""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from proxy.config.quantities import format_share, format_size
from proxy.config.schema import DiskConfig
from proxy.connections.failures import reason
from proxy.doctor.checks import Check, failed, ok, warning
from storage.disk.health import SPARE

MOUNTS = Path("/proc/self/mountinfo")
MIN_INODES = 0.05  # of all inodes
# File systems where locks, and thereby SQLite, depend on the server at the other end.
REMOTE = frozenset(
    ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "glusterfs", "lustre", "afs", "gfs2")
)
# File systems whose content is lost with a restart, or with the container.
VOLATILE = {"tmpfs": "is memory", "ramfs": "is memory", "overlay": "belongs to a container"}
_OCTAL = re.compile(r"\\([0-7]{3})")


def check(disk: DiskConfig, mounts: Path = MOUNTS) -> list[Check]:
    """All checks of the disk.  Their files are removed again."""
    path = str(disk.path)
    if not disk.path.is_dir():
        return [_check_missing(disk.path)]
    found = [*_check_files(disk.path)]
    try:
        found.append(_check_file_system(disk.path, mounts))
        status = os.statvfs(disk.path)
    except OSError as error:
        advice = "give the user of the server read permission"
        return [*found, failed("room", path, reason(error), advice)]
    free, whole = status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize
    found.append(_check_room(disk, free, whole))
    if status.f_files:  # some file systems have no fixed number of inodes
        found.append(_check_inodes(path, status.f_favail, status.f_files))
    return found


def _check_missing(path: Path) -> Check:
    if path.exists():
        return failed("disk", str(path), "is not a directory", "set disk.path to a directory")
    parent = next(each for each in path.absolute().parents if each.exists())
    if parent.is_dir() and os.access(parent, os.W_OK | os.X_OK):
        return ok("disk", str(path), "does not exist yet; the first start creates it")
    advice = f"create it, owned by the user of the server; this process is user {os.geteuid()}"
    return failed("disk", str(path), f"does not exist, and cannot be created in {parent}", advice)


def _check_files(path: Path) -> Iterator[Check]:
    """Whether files, locks and hard links work."""
    subject = str(path)
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=path) as directory:
            file = Path(directory) / "file"
            with file.open("wb") as written:
                written.write(b"doctor")
                written.flush()
                os.fsync(written.fileno())
                yield ok("disk", subject, "can be written")
                yield _check_locks(subject, written.fileno())
            yield _check_links(subject, file)
    except OSError as error:
        advice = (
            f"make the user of the server its owner, and run doctor as that user, not as user {os.geteuid()}"
        )
        yield failed("disk", subject, f"cannot be written: {reason(error)}", advice)


def _check_locks(subject: str, descriptor: int) -> Check:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        message = f"files cannot be locked: {reason(error)}"
        return failed("locks", subject, message, "put disk.path on a local file system, such as ext4 or xfs")
    return ok("locks", subject, "files can be locked")


def _check_links(subject: str, file: Path) -> Check:
    try:
        file.with_name("link").hardlink_to(file)
    except OSError as error:
        message = f"hard links do not work: {reason(error)}"
        return warning(
            "links", subject, message, "imports copy files instead of linking them; use a local file system"
        )
    return ok("links", subject, "hard links work")


def _check_file_system(path: Path, mounts: Path) -> Check:
    subject, kind = str(path), file_system(path, mounts)
    if kind in REMOTE or kind.startswith("fuse."):
        message = f"{kind} is a network or user-space file system: locks and speed depend on its server"
        return warning("file system", subject, message, "put disk.path on a local disk, and never share it")
    if kind in VOLATILE:
        message = f"{kind} {VOLATILE[kind]}: the content is lost with it"
        return warning("file system", subject, message, "put disk.path on a disk, or mount a volume there")
    return ok("file system", subject, kind or "is of an unknown type")


def file_system(path: Path, mounts: Path = MOUNTS) -> str:
    """The type of the file system of a path; "" if it is unknown.  proc_pid_mountinfo(5)"""
    real, best, kind = path.resolve(), -1, ""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return ""
    for line in lines:
        before, _, after = line.partition(" - ")
        words = before.split(" ")
        if len(words) < 5 or not after:
            continue
        point = Path(_OCTAL.sub(lambda found: chr(int(found[1], 8)), words[4]))
        # A later mount on the same point hides the earlier one.
        if real.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), after.split(" ")[0]
    return kind


def _check_room(disk: DiskConfig, free: int, whole: int) -> Check:
    path, kept = str(disk.path), disk.min_free.of(whole)
    room = f"{format_size(free)} of {format_size(whole)} are free"
    if free <= SPARE:
        return failed(
            "room", path, f"{room}: pulls are not cached", "free space with entrepot evict --to SIZE"
        )
    if free < kept:
        message = f"{room}, less than disk.min_free ({format_size(kept)})"
        return warning("room", path, message, "a running server evicts to reach it; else remove other files")
    if disk.cache_limit is not None and disk.cache_limit > whole:
        message = f"{room}, and disk.cache_limit is {format_size(disk.cache_limit)}"
        return warning(
            "room", path, message, "set it below the size of the disk; now only min_free has an effect"
        )
    return ok("room", path, f"{room}; disk.min_free keeps {format_size(kept)} free")


def _check_inodes(path: str, free: int, whole: int) -> Check:
    message = f"{format_share(free / whole)} of the inodes are free"
    if not free:
        return failed(
            "inodes", path, message, "remove small files, or create the file system again with more inodes"
        )
    if free < whole * MIN_INODES:
        return warning("inodes", path, message, "each blob takes one: free some before none are left")
    return ok("inodes", path, message)
