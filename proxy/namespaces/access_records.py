"""The records of access control: in the database that servers share, or else on the disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AsyncExitStack

from proxy.config.schema import Config
from proxy.namespaces.composition import Composition
from storage.disk.health import DiskHealth
from storage.disk.records import SQLiteRecords
from storage.records import Records
from storage.writers import FILES, GuardedRecords

DIRECTORY = "access"  # below disk.path


def access_records(parts: Composition, closing: AsyncExitStack) -> Records:
    """The records, which `closing` closes if they are nobody else's.  Raises StorageFailed.

    They are durable, and no part of a cache: an API key is not to be had again.
    """
    for store in (parts.private, parts.common):
        if store is not None and store.records.remote:
            return store.records
    records = access_records_on_disk(parts.config, parts.clock)
    closing.callback(records.close)
    return GuardedRecords(records, FILES, parts.clock)


def access_records_on_disk(config: Config, clock: Callable[[], float] = time.time) -> Records:
    """Those that count while no server shares any.  Raises StorageFailed."""
    root = config.disk.path / DIRECTORY
    return SQLiteRecords(root / "records", clock, DiskHealth(root, clock), durable=True)
