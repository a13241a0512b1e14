"""Restoring a backup into an empty data directory.

    <root>/restoring/backup.json          the head of the backup that is being restored
    <root>/restoring/<store>/             a store that is not complete yet

1. The head is written: from here on no server starts with the directory.
2. Records and blobs are linked or copied below `restoring`, and verified.
3. If all is whole, the stores get their names, and the head is removed.

A restore that is killed is continued by the next one.  It does not copy again what is there, but verifies it.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from storage.concurrency import Cancelled
from storage.disk import format
from storage.disk.database import FILE
from storage.disk.format import HEAD, RESTORING
from storage.disk.health import sync
from storage.disk.modes import create_file, make_directory
from storage.disk.placing import place, verify
from storage.errors import DigestInvalid
from storage.migration.backup import (
    CONTENT,
    RECORDS,
    BackupHead,
    BackupPart,
    BackupRefused,
    BackupReport,
    blob_path,
    file_digest,
    locked,
    named,
    read_head,
    write_head,
)
from storage.oci import Digest

_IGNORED = {RESTORING, "lost+found"}


class RestoreRun:
    """Restores the backup in `directory` as the data directory `root`.

    run() blocks, and raises BackupRefused, StorageFailed, OSError, and Cancelled after stop().  Damaged blobs
    are in the report; unless they are to be left out, nothing is restored then.
    """

    def __init__(self, directory: Path, root: Path) -> None:
        self.report = BackupReport()
        self._directory = directory
        self._root = root
        self._new = root / RESTORING
        self._stopped = False
        self._touched: set[Path] = set()

    def stop(self) -> None:
        self._stopped = True

    def run(self, without_damaged: bool = False) -> BackupHead:
        head = read_head(self._directory)
        if head is None:
            raise BackupRefused(f"{self._directory} holds no complete backup: it has no {HEAD}")
        if head.directory > format.FORMAT:
            raise BackupRefused(
                f"{self._directory} is of a data directory of format {head.directory}, and this version knows"
                f" format {format.FORMAT}: use entrepot {head.entrepot}, or a later version"
            )
        make_directory(self._root)
        with locked(self._root):
            self._begin(head)
            for name, part in head.parts.items():
                if not (self._root / name).exists():
                    self._part(name, part)
            if not self.report.damaged or without_damaged:
                self._end(head)
        return head

    def _begin(self, head: BackupHead) -> None:
        """Step 1.  Raises BackupRefused if the directory has something else."""
        content = (self._directory / HEAD).read_bytes()
        resumed = (self._new / HEAD).exists()
        same = resumed and (self._new / HEAD).read_bytes() == content
        allowed = _IGNORED | (head.parts.keys() | {format.FILE} if same else set())
        if other := {each.name for each in self._root.iterdir()} - allowed:
            cause = "another backup was being restored there" if resumed and not same else "it is not empty"
            raise BackupRefused(
                f"{self._root} (disk.path): {cause} ({min(other)}); name another directory, or"
                " move away what it has"
            )
        if not same:
            shutil.rmtree(self._new, ignore_errors=True)
        make_directory(self._new)
        write_head(self._new, content)
        sync(self._root)

    def _part(self, name: str, part: BackupPart) -> None:
        self.report.store = name
        target = self._new / name
        records = self._directory / RECORDS / part.records
        found = file_digest(records) if records.is_file() else "missing"
        if found != part.digest:
            raise BackupRefused(
                f"{records} is damaged ({found}): nothing of {name} can be restored without it"
            )
        self._copy_records(records, target / RECORDS / FILE)
        linked, known = named(records)
        absent = set(part.absent)
        for digest in sorted(linked - absent):
            self._blob(name, Digest.parse(digest))
        for digest in sorted(known | absent):  # which nobody relies on, or which came back
            path = blob_path(self._directory / CONTENT / name, Digest.parse(digest))
            if path.exists():
                self._blob(name, Digest.parse(digest))
        for each in sorted(self._touched | {target}):
            sync(each)

    def _copy_records(self, source: Path, target: Path) -> None:
        make_directory(target.parent)
        for each in target.parent.iterdir():
            each.unlink()
        file = create_file(target, os.O_WRONLY | os.O_EXCL)
        with source.open("rb") as read, os.fdopen(file, "wb") as write:
            shutil.copyfileobj(read, write)
            write.flush()
            os.fsync(write.fileno())
        self._touched |= {target.parent}

    def _blob(self, store: str, digest: Digest) -> None:
        if self._stopped:
            raise Cancelled
        source = blob_path(self._directory / CONTENT / store, digest)
        path = blob_path(self._new / store / "blobs", digest)
        self.report.blobs += 1
        try:
            if path.exists():
                with suppress(DigestInvalid):
                    verify(path, digest)
                    return
                path.unlink()
            # A file of another user could not be read by the server.
            link = source.stat().st_uid == self._root.stat().st_uid
            linked = place(source, path, self._new / "partial", digest, link)
            if linked:
                verify(path, digest)
        except FileNotFoundError:
            self.report.damaged[str(digest)] = f"{source} is missing"
            return
        except DigestInvalid as error:
            path.unlink(missing_ok=True)
            self.report.damaged[str(digest)] = str(error)
            return
        self._touched |= {path.parent, *path.parents[1:4]}
        self.report.new += 1
        self.report.new_bytes += path.stat().st_size
        self.report.linked += linked

    def _end(self, head: BackupHead) -> None:
        """Step 3."""
        for name in head.parts:
            if not (self._root / name).exists():
                (self._new / name).replace(self._root / name)
        format.write(self._new, head.directory)
        (self._new / format.FILE).replace(self._root / format.FILE)
        sync(self._root)
        (self._new / HEAD).unlink()
        with suppress(OSError):
            shutil.rmtree(self._new)
