"""What of a configuration's data directory a backup holds."""

from __future__ import annotations

from pathlib import Path

from proxy.config.schema import Config
from proxy.namespaces.access_records import DIRECTORY
from proxy.namespaces.private import is_shared
from storage.keys import OVERRIDE, PIN
from storage.migration.backup import BackupRefused, BackupSource, has_records

PRIVATE, CACHE = "private", "cache"
DECISIONS = (PIN, OVERRIDE)  # records of a cache that no upstream has


def check_apart(directory: Path, root: Path) -> None:
    """Raises BackupRefused if one of the two is in the other."""
    inner, outer = directory.resolve(), root.resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise BackupRefused(f"{directory} and {root} (disk.path) are not apart: name another directory")


def sources(config: Config, cache: bool) -> list[BackupSource]:
    """What to back up, cached content only with `cache`.

    Raises BackupRefused if the private registry is not on the disk alone, StartError, StorageFailed.
    """
    root = config.disk.path
    if config.hosted() and is_shared(config):
        raise BackupRefused(
            "the private registry is in the engines of `shared`: back up its records by pg_dump, and its"
            " content afterwards by the means of the bucket, or by a copy of disk.path/private/blobs"
        )
    found = [
        BackupSource(PRIVATE, root / PRIVATE),
        BackupSource(DIRECTORY, root / DIRECTORY),
        BackupSource(CACHE, root / CACHE, () if cache else DECISIONS, complete=False),
    ]
    found = [each for each in found if has_records(each.root)]
    if not found:
        raise BackupRefused(f"there is nothing to back up in {root} (disk.path)")
    return found


def left_out(config: Config, cache: bool) -> list[str]:
    """What a backup does not cover, in words."""
    found = ["the configuration and its files", "queues of webhooks"]
    if not cache:
        found.append("cached content")
    if config.shared.records is not None:
        found.append("API keys, signing keys and pins in the database of shared.records (use pg_dump)")
    return found
