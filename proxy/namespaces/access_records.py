"""The records of access control: in the database that servers share, or else on the disk."""

from __future__ import annotations

from contextlib import AsyncExitStack

from proxy.namespaces.composition import Composition
from storage.disk.health import DiskHealth
from storage.disk.records import SQLiteRecords
from storage.records import Records

DIRECTORY = "access"  # below disk.path


def access_records(parts: Composition, closing: AsyncExitStack) -> Records:
    """The records, which `closing` closes if they are nobody else's.  Raises StorageFailed.

    They are durable, and no part of a cache: an API key is not to be had again.
    """
    for store in (parts.private, parts.common):
        if store is not None and store.records.remote:
            return store.records
    root = parts.config.disk.path / DIRECTORY
    records = SQLiteRecords(root / "records", parts.clock, DiskHealth(root, parts.clock), durable=True)
    closing.callback(records.close)
    return records
