"""The migration of a Docker registry on this machine's disk: `import --from-registry-dir`."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path

from proxy.admin.api.client import OperationFailed
from proxy.cli.console import ProgressDisplay
from proxy.cli.context import quiet
from proxy.cli.tables import Column, Table
from proxy.config.errors import StartError
from proxy.config.loader import load
from proxy.config.quantities import format_size, plural
from proxy.config.schema import Config
from proxy.config.settings import Setting
from proxy.namespaces.hosted import Hosted
from proxy.namespaces.private import private_store
from proxy.namespaces.upkeep import leases
from proxy.transfer.results import DamageRow, Migrated
from storage.concurrency import Cancelled
from storage.errors import StorageFailed
from storage.migration.distribution import DistributionTree
from storage.migration.migration import Migration, MigrationReport
from storage.store import Store

SHOWN = 100  # rows of damage in a table


async def migrate(
    path: Path | None,
    settings: Sequence[Setting],
    directory: Path,
    namespace: str | None,
    match: str,
    *,
    dry_run: bool,
    quietly: bool,
) -> Migrated:
    """Import the repositories that `match` from a directory of Distribution.  Raises OperationFailed,
    ConfigError.
    """
    config = load(path, settings=settings)
    quiet(config.log.format)
    name = _chosen(config, namespace)
    if config.shared.bucket is not None:
        raise OperationFailed(
            "it writes files, and shared.bucket is set: copy from the running registry by entrepot copy",
            "UNKNOWN",
        )
    begun = time.monotonic()
    try:
        source = DistributionTree(directory)
        names = [each for each in source.repositories() if fnmatchcase(each, match)]
        store = private_store(config)
    except (ValueError, OSError, StorageFailed, StartError) as error:
        raise OperationFailed(str(error), "UNKNOWN") from error
    try:
        migration = _migration(config, name, store, source, dry_run)
        await _run(migration, names, name, quietly)
    except StorageFailed as error:
        raise OperationFailed(
            f"{error}; what was imported stays, and the next run continues", error.code
        ) from error
    finally:
        await store.close()
    return _migrated(migration.report, name, time.monotonic() - begun, dry_run)


def _migrated(report: MigrationReport, namespace: str, seconds: float, dry_run: bool) -> Migrated:
    return Migrated(
        namespace=namespace,
        repositories=report.repositories,
        tags=report.tags,
        manifests=report.manifests,
        blobs=report.blobs,
        bytes=report.bytes,
        linked=report.linked,
        present=report.present,
        kept=[DamageRow(**asdict(each)) for each in report.kept],
        damaged=[DamageRow(**asdict(each)) for each in report.damaged],
        seconds=seconds,
        dry_run=dry_run,
    )


def _chosen(config: Config, namespace: str | None) -> str:
    hosted = list(config.hosted())
    if namespace is None and len(hosted) == 1:
        return hosted[0]
    if namespace in hosted:
        return namespace
    if not hosted:
        raise OperationFailed(
            "no namespace has a store to import into: add one to the configuration, such as"
            " namespaces: {local: {store: {}}}",
            "NAME_UNKNOWN",
            usage=True,
        )
    cause = f"{namespace} has no store" if namespace else "several namespaces have a store: give --namespace"
    raise OperationFailed(f"{cause}; there are {', '.join(hosted)}", "NAME_UNKNOWN", usage=True)


def _migration(
    config: Config, namespace: str, store: Store, source: DistributionTree, dry_run: bool
) -> Migration:
    hosting = config.hosted()[namespace]
    return Migration(
        store,
        source,
        sparse=hosting.sparse,
        immutable=lambda tag: any(each.fullmatch(tag) for each in hosting.immutable_tags),
        retag=Hosted(namespace, store, leases(config, store, time.time)).retag,
        dry_run=dry_run,
    )


async def _run(migration: Migration, names: Sequence[str], namespace: str, quietly: bool) -> None:
    """Run the migration in a thread; when interrupted, wait until its current step is complete."""
    running = asyncio.create_task(asyncio.to_thread(migration.run, names, lambda name: f"{namespace}/{name}"))
    with closing(ProgressDisplay(sys.stderr)) as progress:
        try:
            await progress.follow(running, lambda on: None if quietly else _show(migration, len(names), on))
        finally:
            migration.stop()
            with suppress(Cancelled):
                await running


def _show(migration: Migration, repositories: int, progress: ProgressDisplay) -> None:
    report = migration.report
    text = (
        f"{migration.repository}: {plural(report.manifests, 'manifest')}, {plural(report.blobs, 'blob')},"
        f" {format_size(report.bytes)}"
    )
    progress.show("repositories", migration.begun, repositories, text)


def migration_tables(found: Migrated, now: float) -> Sequence[Table]:
    columns = (Column("REPOSITORY", whole=True), Column("CONTENT", digests=True), Column("REASON"))
    tables = []
    for title, rows in (("damaged or missing:", found.damaged), ("not replaced:", found.kept)):
        if rows:
            table = Table(columns, title=title)
            for each in rows[:SHOWN]:
                table.add(each.repository, each.what, each.why)
            if len(rows) > SHOWN:
                table.notes.append(f"and {len(rows) - SHOWN} more; --json lists all")
            tables.append(table)
    done = "would be imported" if found.dry_run else "imported"
    linked = "" if found.dry_run else f" ({found.linked} of them hard links)"
    tables.append(
        Table(
            (),
            f"{plural(found.repositories, 'repository', 'repositories')}, {plural(found.tags, 'tag')},"
            f" {plural(found.manifests, 'manifest')} and {plural(found.blobs, 'blob')}{linked} of"
            f" {format_size(found.bytes)} {done} into {found.namespace};"
            f" {plural(found.present, 'manifest')} already present; {found.seconds:.1f} s",
        )
    )
    return tables
