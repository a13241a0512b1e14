"""Taking over what lies on this machine, as a command does: where to, by which rules, telling of it."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path

from proxy.admin.api.client import Failed
from proxy.cli.console import Progress
from proxy.cli.context import quiet
from proxy.config.loader import load
from proxy.config.quantities import format_size, plural
from proxy.config.schema import Config
from proxy.namespaces.composition import private_store
from proxy.transfer.results import DamageRow, Migrated
from storage.concurrency import Cancelled
from storage.errors import StorageFailed
from storage.migration.distribution import DistributionTree
from storage.migration.migration import Migration
from storage.store import Store

LOOK = 0.5  # seconds between two looks at how far it is


async def migrate(
    path: Path | None, directory: Path, namespace: str | None, match: str, *, dry_run: bool, quietly: bool
) -> Migrated:
    """Of a directory of Distribution the repositories that `match`.  Raises Failed, ConfigError."""
    config = load(path)
    quiet(config.log.format)
    name = _chosen(config, namespace)
    begun = time.monotonic()
    try:
        source = DistributionTree(directory)
        names = [each for each in source.repositories() if fnmatchcase(each, match)]
        store = private_store(config)
        _hand_over(config)
    except (ValueError, OSError, StorageFailed) as error:
        raise Failed(str(error), "UNKNOWN") from error
    try:
        intake = _intake(config, name, store, source, dry_run)
        await _run(intake, names, name, quietly)
    except StorageFailed as error:
        raise Failed(f"{error}; what was taken stays, and the next run goes on", error.code) from error
    finally:
        await store.close()
        _hand_over(config)
    taken = intake.taken
    return Migrated(
        namespace=name,
        repositories=taken.repositories,
        tags=taken.tags,
        manifests=taken.manifests,
        blobs=taken.blobs,
        bytes=taken.bytes,
        linked=taken.linked,
        present=taken.present,
        kept=[DamageRow(**asdict(each)) for each in taken.kept],
        damaged=[DamageRow(**asdict(each)) for each in taken.damaged],
        seconds=time.monotonic() - begun,
        dry_run=dry_run,
    )


def _hand_over(config: Config) -> None:
    """Where root takes over, what it makes belongs to the server's user: whose disk.path is."""
    root = config.disk.path / "private"
    owner = config.disk.path.stat().st_uid
    if os.geteuid() == 0 and owner != 0:
        for path in (root, *root.iterdir(), *(root / "records").iterdir()):
            if path.stat().st_uid == 0:
                os.chown(path, owner, -1)


def _chosen(config: Config, namespace: str | None) -> str:
    hosted = list(config.hosted())
    if namespace is None and len(hosted) == 1:
        return hosted[0]
    if namespace in hosted:
        return namespace
    if not hosted:
        raise Failed(
            "no namespace has a store to take it into: the configuration needs one, such as"
            " namespaces: {local: {store: {}}}",
            "NAME_UNKNOWN",
            usage=True,
        )
    asked = f"{namespace} has no store" if namespace else "several namespaces have a store: say --namespace"
    raise Failed(f"{asked}; there are {', '.join(hosted)}", "NAME_UNKNOWN", usage=True)


def _intake(
    config: Config, namespace: str, store: Store, source: DistributionTree, dry_run: bool
) -> Migration:
    hosting = config.hosted()[namespace]
    return Migration(
        store,
        source,
        sparse=hosting.sparse,
        immutable=lambda tag: any(each.fullmatch(tag) for each in hosting.immutable_tags),
        dry_run=dry_run,
    )


async def _run(intake: Migration, names: Sequence[str], namespace: str, quietly: bool) -> None:
    """In a thread; whoever is interrupted waits until it has come to a whole step."""
    running = asyncio.create_task(asyncio.to_thread(intake.run, names, lambda name: f"{namespace}/{name}"))
    with closing(Progress(sys.stderr)) as progress:
        try:
            while not (await asyncio.wait({running}, timeout=LOOK))[0]:
                if not quietly:
                    _show(intake, len(names), progress)
        finally:
            intake.stop()
            with suppress(Cancelled):
                await running


def _show(intake: Migration, repositories: int, progress: Progress) -> None:
    taken = intake.taken
    text = (
        f"{intake.repository}: {plural(taken.manifests, 'manifest')}, {plural(taken.blobs, 'blob')},"
        f" {format_size(taken.bytes)}"
    )
    progress.show("repositories", intake.begun, repositories, text)
