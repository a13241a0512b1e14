"""Backups of the stores below a data directory, consistent while servers write to them.

    <backup>/backup.json                              the head: what the backup holds, and in which formats
    <backup>/records/<store>.<id>.db                  the records of each store
    <backup>/content/<store>/<algorithm>/<ab>/<encoded>   its blobs
    <backup>/partial/                                 what is being written

1. All blobs of the store are linked or copied.  None is removed from the backup before step 4.
2. A snapshot of the records is taken: at this moment the backup is consistent.
3. What the snapshot names and step 1 has not seen is linked or copied.  It was pushed meanwhile, so it is too
   young to be collected.  If any is gone nevertheless, 2 follows again: then the records may not name it
   any more.
4. The new head replaces the former one.  Then what only the former one named is removed.

So a backup that is killed leaves the former one whole, and the next one goes on with the blobs that it has.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import msgspec

from storage.concurrency import Cancelled
from storage.disk import snapshot
from storage.disk.database import FILE
from storage.disk.format import HEAD
from storage.disk.health import sync
from storage.disk.locks import try_lock
from storage.disk.modes import make_directory, replace_file
from storage.disk.placing import is_placed, place
from storage.disk.records import SQLiteRecords
from storage.disk.tree import directories, read_directory
from storage.errors import DigestInvalid
from storage.keys import BLOB, LINK, RecordKind
from storage.oci import Digest
from storage.records import batches
from storage.writers import FILES, KEY, Writers

FORMAT = 1
RECORDS, CONTENT, PARTIAL = "records", "content", "partial"
TRIES = 3  # snapshots of a store, while blobs are gone that they name


class BackupRefused(Exception):
    """The backup cannot be made or restored; the message says why, and what to do."""


class BackupPart(msgspec.Struct, frozen=True, kw_only=True):
    """One store in a backup.

    records: the name of the file with its records
    digest: the SHA-256 of that file
    blobs, bytes: what the records name
    absent: what they name, and was damaged or missing in the store
    """

    records: str
    digest: str
    blobs: int
    bytes: int
    absent: list[str]


class BackupHead(msgspec.Struct, frozen=True, kw_only=True):
    """What a backup holds.

    backup, directory: the versions of the formats of the backup and of the data directory
    entrepot: the version that made it
    made: in seconds since the epoch
    """

    backup: int
    directory: int
    entrepot: str
    made: float
    parts: dict[str, BackupPart]


class _BackupVersion(msgspec.Struct):
    backup: int


class BackupSource(NamedTuple):
    """A store to back up.

    kinds: if they are given, only records of these kinds are in the backup, and no blobs
    complete: whether what its records name must be there; what is missing in a cache, it fetches
    """

    name: str
    root: Path
    kinds: Sequence[RecordKind] = ()
    complete: bool = True


@dataclass
class BackupReport:
    """What a backup or a restore has done so far.  `new` blobs were linked or copied, the others present."""

    store: str = ""
    blobs: int = 0
    new: int = 0
    new_bytes: int = 0
    linked: int = 0
    damaged: dict[str, str] = field(default_factory=dict)


def read_head(directory: Path) -> BackupHead | None:
    """The head of a backup; None if there is none.  Raises BackupRefused, and OSError."""
    path = directory / HEAD
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        found = msgspec.json.decode(content, type=_BackupVersion).backup
        if found > FORMAT:
            raise BackupRefused(
                f"{directory} is a backup of format {found}, and this version knows format {FORMAT}: use the"
                " version of entrepot that made it, or a later one"
            )
        return msgspec.json.decode(content, type=BackupHead)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BackupRefused(f"{path} is damaged: {error}") from error


def blob_path(directory: Path, digest: Digest) -> Path:
    """The path of a blob below the directory of all blobs of a store."""
    return directory / digest.algorithm / digest.encoded[:2] / digest.encoded


def _blob(directory: Path, digest: str) -> Path:
    return blob_path(directory, Digest.parse(digest))


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return str(Digest.of_hash(hashlib.file_digest(file, "sha256")))


def named(records: Path) -> tuple[set[str], set[str]]:
    """The digests of the blobs that a snapshot links, and of those that it knows besides."""
    linked = {LINK.parse(key)[1] for key, _ in snapshot.records(records, LINK.prefix())}
    return linked, {BLOB.parse(key)[0] for key, _ in snapshot.records(records, BLOB.prefix())} - linked


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Be the only one that writes to the directory.  Raises BackupRefused."""
    file = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if not try_lock(file):
            raise BackupRefused(f"another entrepot backup or restore is writing to {directory}: wait for it")
        yield
    finally:
        os.close(file)


def write_head(directory: Path, content: bytes) -> None:
    """Replace the head of a backup, durably.  Raises OSError."""
    replace_file(directory / HEAD, content, directory / f"{HEAD}.new")
    sync(directory)


class BackupRun:
    """Makes a backup in `directory`, or brings the one that is there up to date.

    run() blocks, and raises BackupRefused, StorageFailed, OSError, and Cancelled after stop().
    """

    def __init__(self, directory: Path) -> None:
        self.report = BackupReport()
        self._directory = directory
        self._stopped = False
        self._touched: set[Path] = set()

    def stop(self) -> None:
        self._stopped = True

    def run(self, sources: Sequence[BackupSource], format: int, version: str, now: float) -> BackupHead:
        """`format` is that of the data directory, `version` that of this program."""
        directory = self._directory
        make_directory(directory)
        with locked(directory):
            former = read_head(directory)
            own = {HEAD, f"{HEAD}.new", RECORDS, CONTENT, PARTIAL}
            if former is None and (other := {each.name for each in directory.iterdir()} - own):
                raise BackupRefused(
                    f"{directory} holds no backup, and is not empty ({min(other)}): name a new directory"
                )
            for name in (RECORDS, CONTENT, PARTIAL):
                make_directory(directory / name)
            try:
                _empty(directory / PARTIAL)
                head, kept = self._gather(sources, format, version, now)
                self._commit(head, kept)
            finally:
                _empty(directory / PARTIAL)
            return head

    def _gather(
        self, sources: Sequence[BackupSource], format: int, version: str, now: float
    ) -> tuple[BackupHead, dict[str, set[str]]]:
        """Steps 1 to 3: the new head, and the digests of the blobs of each store that belong to it."""
        made = [(each.name, *self._part(each)) for each in sources]
        parts = {name: part for name, part, _ in made}
        head = BackupHead(backup=FORMAT, directory=format, entrepot=version, made=now, parts=parts)
        return head, {name: kept for name, _, kept in made}

    def _commit(self, head: BackupHead, kept: dict[str, set[str]]) -> None:
        """Step 4."""
        directory = self._directory
        for each in sorted(self._touched | {directory, directory / RECORDS, directory / CONTENT}):
            sync(each)
        write_head(directory, msgspec.json.format(msgspec.json.encode(head)))
        self._prune(head, kept)

    def _part(self, source: BackupSource) -> tuple[BackupPart, set[str]]:
        self.report.store = source.name
        target = self._directory / CONTENT / source.name
        if not source.kinds:
            self._place_all(source.root / "blobs", target)
        for _ in range(TRIES):
            records = self._snapshot(source)
            linked, known = named(records) if not source.kinds else (set(), set())
            for digest in linked | known:
                self._place(source.root / "blobs", target, digest)
            absent = [each for each in sorted(linked) if not _blob(target, each).exists()]
            if not absent or not source.complete:
                break
        there = linked.difference(absent)
        part = BackupPart(
            records=records.name,
            digest=file_digest(records),
            blobs=len(there),
            bytes=sum(_blob(target, each).stat().st_size for each in there),
            absent=absent,
        )
        for each in absent if source.complete else ():
            self.report.damaged.setdefault(each, f"it is missing in {source.root}")
        return part, linked | known

    def _place_all(self, blobs: Path, target: Path) -> None:
        for name in directories(blobs)[0]:
            for each in read_directory(blobs, name).blobs:
                self.report.blobs += 1
                self._place(blobs, target, each.digest)

    def _place(self, blobs: Path, target: Path, digest: str) -> None:
        if self._stopped:
            raise Cancelled
        parsed = Digest.parse(digest)
        source, path = blob_path(blobs, parsed), blob_path(target, parsed)
        try:
            status = source.stat()
            if is_placed(status, path):
                return
            linked = place(source, path, self._directory / PARTIAL / parsed.encoded, parsed)
        except FileNotFoundError:
            return  # collected or evicted, or set aside as damaged
        except DigestInvalid as error:
            self.report.damaged[digest] = str(error)
            return
        self._touched |= {path.parent, *path.parents[1:3]}
        self.report.new += 1
        self.report.new_bytes += status.st_size
        self.report.linked += linked

    def _snapshot(self, source: BackupSource) -> Path:
        """The records of the source at this moment.  Raises BackupRefused if they are not those in use."""
        fresh = self._directory / PARTIAL / f"{source.name}.db"
        fresh.unlink(missing_ok=True)
        if source.kinds:
            some = self._directory / PARTIAL / source.name
            shutil.rmtree(some, ignore_errors=True)
            _copy_records(source, some)
            snapshot.take(some, fresh)
        else:
            snapshot.take(source.root / RECORDS, fresh)
        found = Writers.parse(snapshot.get(fresh, KEY))
        if found is not None and found.content != FILES:
            raise BackupRefused(f"{source.root} is not all of the registry: entrepot migrate has moved it")
        target = self._directory / RECORDS / f"{source.name}.{secrets.token_hex(8)}.db"
        fresh.replace(target)
        return target

    def _prune(self, head: BackupHead, kept: dict[str, set[str]]) -> None:
        """Remove what the head does not name."""
        names = {each.records for each in head.parts.values()}
        for path in (self._directory / RECORDS).iterdir():
            if path.name not in names:
                path.unlink()
        for store in (self._directory / CONTENT).iterdir():
            for name in directories(store)[0]:
                for each in read_directory(store, name).blobs:
                    if each.digest not in kept.get(store.name, ()):
                        blob_path(store, each.digest).unlink()


def _copy_records(source: BackupSource, target: Path) -> None:
    read, write = SQLiteRecords(source.root / RECORDS), SQLiteRecords(target)
    try:
        found = (each for kind in source.kinds for each in read.scan(kind.prefix()))
        for some in batches(found):
            for key, value in some:
                write.put(key, value)
    finally:
        read.close()
        write.close()


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def has_records(root: Path) -> bool:
    """Whether there is a store with records on the disk."""
    there: bool = (root / RECORDS / FILE).is_file()
    return there
