"""The store of the private registry.

Its records are on the disk, or in a database that servers share; its content is on the disk, or in a bucket.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

from proxy.config.errors import StartError
from proxy.config.schema import Config
from proxy.namespaces.engines import bucket_blobs, database
from storage.content import BlobContent
from storage.disk.blobs import BlobFiles
from storage.disk.database import FILE
from storage.disk.health import DiskHealth
from storage.disk.modes import create_file, make_directory
from storage.disk.records import SQLiteRecords
from storage.disk.troubles import Troubles
from storage.errors import StorageFailed
from storage.keys import LINK, MANIFEST, OBJECT
from storage.records import Records
from storage.store import Store

DATABASE = "records.database"  # the file that has the identity of the database of a directory


def private_store(
    config: Config, clock: Callable[[], float] = time.time, troubles: Troubles | None = None
) -> Store:
    """Open the store of what clients push; only unreachable content is removed.

    Raises StorageFailed, and StartError if the records in the database that is configured, or on the disk,
    are not those of the content: all of it would seem unreachable, or missing.
    """
    root = config.disk.path / "private"
    troubles = Troubles() if troubles is None else troubles
    disk = DiskHealth(root, clock, troubles)
    if config.shared.records is not None:
        check = partial(_check_identity, root, disk)
        records = database(config.shared, clock, troubles, check)
    elif (file := root / DATABASE).exists():
        raise StartError(f"{root} has its records in a database ({file}): set shared.records to its URL")
    else:
        records = SQLiteRecords(root / "records", clock, disk, durable=True)
    try:
        content = _content(config, records, disk, clock, troubles)
    except BaseException:
        records.close()
        raise
    return Store(content, records, clock, collected=True)


def _content(
    config: Config, records: Records, disk: DiskHealth, clock: Callable[[], float], troubles: Troubles
) -> BlobContent:
    root = config.disk.path / "private"
    if config.shared.bucket is not None:
        if any(path.is_file() for path in (root / "blobs").rglob("*")):
            raise StartError(
                f"{root}/blobs has content, and shared.bucket is set: start with another disk.path, and copy"
                " the images by entrepot copy"
            )
        return bucket_blobs(config, records, root, disk, clock, troubles)
    if isinstance(records, SQLiteRecords):
        with suppress(StorageFailed):  # which is seen again
            if records.first(OBJECT.prefix()) is not None:
                raise StartError(f"{root}: its content is in a bucket: set shared.bucket to its URL")
    return BlobFiles(root, clock, disk, private=True)


def _check_identity(root: Path, disk: DiskHealth, identity: str) -> None:
    """Raise StorageFailed unless the content in this directory is that of the records."""
    file = root / DATABASE
    with disk.guard("records", file):
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
