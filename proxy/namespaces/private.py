"""The store of the private registry: its records are on the disk, or in a database that servers share."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial

from proxy.config.errors import StartError
from proxy.config.schema import Config
from storage.disk.blobs import BlobFiles
from storage.disk.database import FILE
from storage.disk.health import DiskHealth
from storage.disk.modes import create_file, make_directory
from storage.disk.records import SQLiteRecords
from storage.disk.troubles import Troubles
from storage.errors import StorageFailed
from storage.keys import LINK, MANIFEST
from storage.records import Records
from storage.store import Store

DATABASE = "records.database"  # the file that has the identity of the database of a directory


def private_store(
    config: Config, clock: Callable[[], float] = time.time, troubles: Troubles | None = None
) -> Store:
    """Open the store of what clients push; only unreachable content is removed.

    Raises StorageFailed, and StartError if the records in the database that is configured, or on the disk,
    are not those of the content: all of it would seem unreachable.
    """
    root = config.disk.path / "private"
    files = BlobFiles(root, clock, DiskHealth(root, clock, troubles), private=True)
    if config.shared.records is not None:
        records = _shared_records(config, files, clock, troubles)
    elif (file := root / DATABASE).exists():
        raise StartError(f"{root} has its records in a database ({file}): set shared.records to its URL")
    else:
        records = SQLiteRecords(root / "records", clock, files.disk, durable=True)
    return Store(files, records, clock, collected=True)


def _shared_records(
    config: Config, files: BlobFiles, clock: Callable[[], float], troubles: Troubles | None
) -> Records:
    try:
        # Only here: one machine needs no client of a database.
        from storage.postgres.records import PostgresRecords
    except ImportError as error:
        raise StartError(f"shared.records needs psycopg ({error}): install entrepot[fleet]") from error
    shared = config.shared
    try:
        return PostgresRecords(
            str(shared.records), clock, troubles, shared.connections, partial(_check_identity, files)
        )
    except StorageFailed as error:
        raise StartError(f"shared.records: {error}") from error


def _check_identity(files: BlobFiles, identity: str) -> None:
    """Raise StorageFailed unless the content in this directory is that of the records."""
    root, file = files.root, files.root / DATABASE
    with files.disk.guard("records", file):
        if file.exists():
            if file.read_text() != identity:
                raise StorageFailed(
                    f"{root} belongs to another database, whose identity {file} has: use that one",
                    cause="its database is another one",
                )
            return
        if (root / "records" / FILE).exists():
            with closing(SQLiteRecords(root / "records")) as former:
                if any(former.first(kind.prefix()) for kind in (LINK, MANIFEST)):
                    raise StorageFailed(
                        f"{root} has content whose records are on the disk, and not in the database:"
                        " use an empty directory, and push it again",
                        cause="its database is another one",
                    )
        make_directory(root)
        fresh = file.with_name(f"{file.name}.{os.getpid()}")
        with os.fdopen(create_file(fresh, os.O_WRONLY | os.O_TRUNC), "w") as opened:
            opened.write(identity)
        fresh.replace(file)
