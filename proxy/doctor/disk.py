"""The disk below a server: whether what it does there works, and for how long there is room."""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from proxy.config.quantities import format_share, format_size
from proxy.config.schema import DiskConfig
from proxy.doctor.checks import Check, cause, failed, ok, warning
from storage.disk.health import SPARE

MOUNTS = Path("/proc/self/mountinfo")
FEW = 0.05  # of the inodes
# Where locks between processes and SQLite's files are as good as who wrote the server at the other end.
REMOTE = frozenset(
    ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "glusterfs", "lustre", "afs", "gfs2")
)
# What is gone with the machine's next start, or with the container.
PASSING = {"tmpfs": "is memory", "ramfs": "is memory", "overlay": "is a container's own"}
_OCTAL = re.compile(r"\\([0-7]{3})")


def look(disk: DiskConfig, mounts: Path = MOUNTS) -> list[Check]:
    """All checks of it; nothing of them stays there."""
    path = str(disk.path)
    if not disk.path.is_dir():
        return [_absent(disk.path)]
    found = [*_works(disk.path)]
    try:
        found.append(_kind(disk.path, mounts))
        status = os.statvfs(disk.path)
    except OSError as error:
        advice = "let the user of the server read it"
        return [*found, failed("room", path, cause(error), advice)]
    free, whole = status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize
    found.append(_room(disk, free, whole))
    if status.f_files:  # some file systems make them as they are needed
        found.append(_inodes(path, status.f_favail, status.f_files))
    return found


def _absent(path: Path) -> Check:
    if path.exists():
        return failed("disk", str(path), "is no directory", "let disk.path be one")
    parent = next(each for each in path.absolute().parents if each.exists())
    if parent.is_dir() and os.access(parent, os.W_OK | os.X_OK):
        return ok("disk", str(path), "is not there yet; it is made at the first start")
    advice = f"make it, and give it to the user of the server, who is user {os.geteuid()} here"
    return failed("disk", str(path), f"is not there, and cannot be made in {parent}", advice)


def _works(path: Path) -> Iterator[Check]:
    """Whether files, locks and links do what they should."""
    subject = str(path)
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=path) as directory:
            file = Path(directory) / "file"
            with file.open("wb") as written:
                written.write(b"doctor")
                written.flush()
                os.fsync(written.fileno())
                yield ok("disk", subject, "can be written")
                yield _locks(subject, written.fileno())
            yield _links(subject, file)
    except OSError as error:
        advice = (
            f"give it to the user of the server, and call this as that user; now it is user {os.geteuid()}"
        )
        yield failed("disk", subject, f"cannot be written: {cause(error)}", advice)


def _locks(subject: str, descriptor: int) -> Check:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        message = f"files cannot be locked there: {cause(error)}"
        return failed("locks", subject, message, "put disk.path on a local file system, such as ext4 or xfs")
    return ok("locks", subject, "files can be locked")


def _links(subject: str, file: Path) -> Check:
    try:
        file.with_name("link").hardlink_to(file)
    except OSError as error:
        message = f"a file cannot have two names there: {cause(error)}"
        return warning(
            "links", subject, message, "what is imported is copied; a local file system can link it"
        )
    return ok("links", subject, "a file can have two names")


def _kind(path: Path, mounts: Path) -> Check:
    subject, kind = str(path), kind_of(path, mounts)
    if kind in REMOTE or kind.startswith("fuse."):
        message = f"{kind} is a file system across the network or of a program: locks and speed depend on it"
        return warning("file system", subject, message, "put disk.path on a local disk; never share it")
    if kind in PASSING:
        message = f"{kind} {PASSING[kind]}: what is stored there is lost with it"
        return warning("file system", subject, message, "put disk.path on a disk, or mount a volume there")
    return ok("file system", subject, kind or "of a kind that is not told")


def kind_of(path: Path, mounts: Path = MOUNTS) -> str:
    """The type of the file system that a path lies on; "" if that is not told.  proc_pid_mountinfo(5)"""
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
        # Of two mounts on one point the later one is seen.
        if real.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), after.split(" ")[0]
    return kind


def _room(disk: DiskConfig, free: int, whole: int) -> Check:
    path, kept = str(disk.path), disk.min_free.of(whole)
    said = f"{format_size(free)} of {format_size(whole)} are free"
    if free <= SPARE:
        return failed(
            "room", path, f"{said}: pulls go through uncached", "make room: entrepot evict --to SIZE"
        )
    if free < kept:
        message = f"{said}, less than disk.min_free ({format_size(kept)})"
        return warning("room", path, message, "a running server evicts until it is; else other files take it")
    if disk.cache_limit is not None and disk.cache_limit > whole:
        message = f"{said}, and disk.cache_limit is {format_size(disk.cache_limit)}"
        return warning(
            "room", path, message, "set it below the size of the disk; min_free is what bounds it now"
        )
    return ok("room", path, f"{said}; disk.min_free keeps {format_size(kept)} so")


def _inodes(path: str, free: int, whole: int) -> Check:
    message = f"{format_share(free / whole)} of the inodes are free"
    if not free:
        return failed(
            "inodes", path, message, "remove small files there, or make the file system anew with more"
        )
    if free < whole * FEW:
        return warning("inodes", path, message, "each blob takes one: make room before there are none")
    return ok("inodes", path, message)
