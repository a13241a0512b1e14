"""The store of the private registry, and the engines that it can be in.

Its records are on the disk, or in a database that servers share; its content is on the disk, or in a bucket.
The configuration says which engines are shared; whether the registry is in them is what the directory says:

    <disk.path>/private/records             records on the disk, or what is left of them after a move
    <disk.path>/private/records.database    the identity of the database that has the records instead

A registry that was on the disk before it was to be shared is served from there until `entrepot migrate` has
moved it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import structlog

from proxy.cache.copies import BlobCopies
from proxy.config.errors import StartError
from proxy.config.schema import Config
from proxy.extensions.extension import Extensions
from proxy.namespaces.engines import bucket_blobs, database
from proxy.upstream.signed_objects import SignedObjects
from storage.content import BlobContent
from storage.disk.blobs import BlobFiles
from storage.disk.database import FILE
from storage.disk.health import DiskHealth
from storage.disk.modes import make_directory, replace_file
from storage.disk.records import SQLiteRecords
from storage.disk.troubles import Troubles
from storage.errors import StorageFailed
from storage.keys import LINK, MANIFEST, OBJECT
from storage.migration.move import Engine, complete
from storage.patient import RememberingStore
from storage.records import Records
from storage.remembered import RecordMemory, RememberedRecords
from storage.store import Store
from storage.writers import COMING, FILES, LEFT, OBJECTS, GuardedRecords, Writers

log = structlog.get_logger()

DATABASE = "records.database"


def private_store(
    config: Config,
    clock: Callable[[], float] = time.time,
    troubles: Troubles | None = None,
    copies: BlobCopies | None = None,
    extensions: Extensions | None = None,
    reader: SignedObjects | None = None,
    here: Records | None = None,
) -> Store:
    """Open the store of what clients push; only unreachable content is removed.

    `copies` get what is pushed to a bucket, which may be one of the `extensions`; `reader` reads it.  What
    is remembered of records in a database is kept in those `here`, if there are some.

    Raises StorageFailed, and StartError if the records in the database that is configured, or on the disk,
    are not those of the content: all of it would seem unreachable, or missing.
    """
    _complete_move(config, clock)
    shared = is_shared(config, troubles)
    if not shared and (config.shared.bucket or config.shared.records):
        log.warning("registry.not_shared", path=str(config.disk.path / "private"), action="served from there")
    objects = partial(bucket_blobs, copies=copies, extensions=extensions, reader=reader)
    opened = engine(config, shared, clock, troubles, guarded=True, objects=objects, here=here)
    try:
        if shared:
            with suppress(StorageFailed):  # of a database that cannot be asked now
                _check_ready(Writers.of(opened.records), config)
    except BaseException:
        opened.records.close()
        raise
    if opened.remembered is not None:
        return RememberingStore(opened.content, opened.records, opened.remembered, clock)
    return Store(opened.content, opened.records, clock, collected=True)


def _check_ready(writers: Writers | None, config: Config) -> None:
    """Raises StartError if the registry is not, or no longer, in the shared engines."""
    former = _on_disk(config.disk.path / "private")[0]
    if writers is None and former is not None and former.content == LEFT:
        raise StartError("shared.records is not the database that the registry was moved to: set its URL")
    if writers is not None and writers.content == COMING:
        raise StartError(
            "a registry is being moved into shared.records: start this server when that has ended"
        )
    if writers is not None and writers.content == LEFT:
        raise StartError(
            "the registry was moved from shared.records to the disk of a server: use that server"
        )


def _complete_move(config: Config, clock: Callable[[], float]) -> None:
    """Take the last step of a move between the disk and a database that was killed before it."""
    root, shared = config.disk.path / "private", config.shared
    if shared.records is None or not (root / "records" / FILE).exists():
        return
    with suppress(StorageFailed), closing(SQLiteRecords(root / "records", durable=True)) as here:
        found = Writers.of(here)
        left = found is not None and found.content == LEFT and not (root / DATABASE).exists()
        if left or (found is not None and found.content == COMING):
            with closing(database(shared, clock, Troubles())) as there:
                complete(here, there, OBJECTS if shared.bucket is not None else FILES)
                complete(there, here, FILES)


def is_shared(config: Config, troubles: Troubles | None = None) -> bool:
    """Whether the registry is in the engines that `shared` names, as far as they are configured.

    Raises StartError if it is elsewhere than the configuration can say.
    """
    root, shared = config.disk.path / "private", config.shared
    try:
        found, content, objects = _on_disk(root, troubles)
    except StorageFailed:  # which is seen again, where nothing has to be decided by what they say
        if shared.records is not None:
            raise
        return shared.bucket is not None
    if found is None and (root / DATABASE).exists():
        found = Writers(LEFT)
    elif found is None and objects:
        found = Writers(OBJECTS)
    where = found.content if found is not None else FILES if content else ""
    if where in (LEFT, COMING) and shared.records is None:
        raise StartError(
            f"{root} has its records in a database ({root / DATABASE}): set shared.records to its URL"
        )
    if where == OBJECTS and shared.bucket is None:
        raise StartError(f"{root}: its content is in a bucket: set shared.bucket to its URL")
    if where == OBJECTS and shared.records is not None:
        raise StartError(
            f"{root} has its records on the disk and its content in a bucket: unset shared.records, move it"
            " to the disk by entrepot migrate --to local, and then to both"
        )
    return (shared.records is not None or shared.bucket is not None) and where != FILES


def _on_disk(root: Path, troubles: Troubles | None = None) -> tuple[Writers | None, bool, bool]:
    """What the records on the disk say; whether they name content, and objects.  Raises StorageFailed."""
    if not (root / "records" / FILE).exists():
        return None, any(path.is_file() for path in (root / "blobs").rglob("*")), False
    disk = DiskHealth(root, troubles=troubles)
    with closing(SQLiteRecords(root / "records", disk=disk, durable=True)) as records:
        kinds = [records.first(kind.prefix()) is not None for kind in (LINK, MANIFEST, OBJECT)]
        return Writers.of(records), any(kinds[:2]), kinds[2]


def engine(
    config: Config,
    shared: bool,
    clock: Callable[[], float] = time.time,
    troubles: Troubles | None = None,
    guarded: bool = False,
    objects: Callable[..., BlobContent] = bucket_blobs,
    here: Records | None = None,
) -> Engine:
    """What holds the registry on the disk, or as `shared` says.  Raises StorageFailed, StartError.

    Guarded records are those of a server: see storage/writers.py.  `objects` makes the content in a bucket.
    """
    root = config.disk.path / "private"
    troubles = Troubles() if troubles is None else troubles
    disk = DiskHealth(root, clock, troubles)
    in_bucket = shared and config.shared.bucket is not None
    kind = OBJECTS if in_bucket else FILES
    records: Records
    remembered: RememberedRecords | None = None
    if shared and config.shared.records is not None:
        memory = _memory(config, root, clock, here)
        check = partial(check_identity, root, disk, memory) if guarded else _any
        records = there = database(config.shared, clock, troubles, check)
        if memory is not None:
            records = remembered = RememberedRecords(there, memory)
    else:
        records = SQLiteRecords(root / "records", clock, disk, durable=True)
    if guarded:
        records = GuardedRecords(records, kind, clock)
    try:
        content = (
            objects(config, records, root, disk, clock, troubles)
            if in_bucket
            else BlobFiles(root, clock, disk, private=True)
        )
    except BaseException:
        records.close()
        raise
    return Engine(records, content, kind, remembered)


def _memory(
    config: Config, root: Path, clock: Callable[[], float], here: Records | None
) -> RecordMemory | None:
    """What is remembered of the database that belongs to the directory, if there is to be a memory."""
    if here is None or not (keep := config.shared.remember_for):
        return None
    memory = RecordMemory(here, keep, clock)
    if not (root / DATABASE).exists():
        memory.clear()
    return memory


def _any(identity: str) -> None:
    """Of a database that is the source or the target of a move."""


def check_identity(root: Path, disk: DiskHealth, memory: RecordMemory | None, identity: str) -> None:
    """Raise StorageFailed unless the content in this directory is that of the records.

    `memory` forgets what it has of other records than those.
    """
    file = root / DATABASE
    with disk.guard("records", file):
        known = file.read_text() if file.exists() else None
        if memory is not None and known != identity:
            memory.clear()
        if known is not None:
            if known != identity:
                raise StorageFailed(
                    f"{root} belongs to another database, whose identity {file} has: use that one",
                    cause="its database is another one",
                )
            return
        found, content, _ = _on_disk(root)
        if content and found is None:
            raise StorageFailed(
                f"{root} has content whose records are on the disk, and not in the database: move it there by"
                " entrepot migrate --to shared",
                cause="its database is another one",
            )
        make_directory(root)
        replace_file(file, identity.encode(), file.with_name(f"{file.name}.{os.getpid()}"))
