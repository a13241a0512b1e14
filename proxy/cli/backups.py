"""The commands that back up what cannot be fetched again, and restore it: backup, restore."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from proxy.admin.api.client import OperationFailed
from proxy.cli.console import ProgressDisplay
from proxy.cli.context import CommandContext, on_directory, quiet
from proxy.cli.damage import damage_table
from proxy.cli.help import command
from proxy.cli.tables import Column, Table
from proxy.config.errors import StartError
from proxy.config.loader import load
from proxy.config.quantities import format_past, format_size, plural
from proxy.config.schema import Config
from proxy.transfer.results import BackedUp, BackupRow, DamageRow, Restored
from storage.errors import RegistryError

if TYPE_CHECKING:  # most commands need none of these
    from storage.migration.backup import BackupHead, BackupRun
    from storage.migration.restore import RestoreRun

T = TypeVar("T")
_DIRECTORY = click.argument("directory", metavar="DIRECTORY", type=click.Path(path_type=Path))


@command()
@_DIRECTORY
@click.option("--cache", is_flag=True, help="Also back up what is cached.")
@on_directory
def backup(call: CommandContext, directory: Path, cache: bool) -> None:
    """Back up the private registry.

    Writes its content and records, API keys, keys that sign tokens, and pins to DIRECTORY, while the server
    serves. The next backup into the same DIRECTORY copies only what is new. Blobs are hard links where
    possible.
    """

    async def work() -> None:
        config = load(call.path, settings=call.settings)
        quiet(config.log.format)
        found = await _back_up(call, config, directory, cache)
        call.print(found, backup_tables)
        if found.damaged:
            raise OperationFailed(
                f"{len(found.damaged)} damaged or missing; all else is backed up. Push these images again",
                "DAMAGED",
            )

    call.alone(work)


async def _back_up(call: CommandContext, config: Config, directory: Path, cache: bool) -> BackedUp:
    from proxy.transfer.backups import check_apart, left_out, sources
    from storage.disk.format import check
    from storage.migration.backup import BackupRun

    begun, run = time.monotonic(), BackupRun(directory)

    def make() -> BackupHead:
        check_apart(directory, config.disk.path)
        format = check(config.disk.path)
        return run.run(sources(config, cache), format, version("entrepot"), time.time())

    head = await _watched(call, run, make)
    return BackedUp(
        directory=str(directory),
        made=head.made,
        stores=_rows(head),
        new=run.report.new,
        new_bytes=run.report.new_bytes,
        linked=run.report.linked,
        damaged=_damaged(run),
        left_out=left_out(config, cache),
        seconds=time.monotonic() - begun,
    )


@command()
@_DIRECTORY
@click.option("--without-damaged", is_flag=True, help="Restore what is whole, if some blobs are damaged.")
@on_directory
def restore(call: CommandContext, directory: Path, without_damaged: bool) -> None:
    """Restore a backup into an empty directory.

    Restores DIRECTORY, which entrepot backup made, into disk.path of the configuration, and verifies every
    blob. Start the server afterwards. Run the command again after an interruption.
    """

    async def work() -> None:
        from proxy.transfer.backups import check_apart
        from storage.migration.restore import RestoreRun

        config = load(call.path, settings=call.settings)
        quiet(config.log.format)
        begun = time.monotonic()
        run = RestoreRun(directory, config.disk.path)

        def make() -> BackupHead:
            check_apart(directory, config.disk.path)
            return run.run(without_damaged)

        head = await _watched(call, run, make)
        found = Restored(
            path=str(config.disk.path),
            restored=without_damaged or not run.report.damaged,
            made=head.made,
            version=head.entrepot,
            stores=_rows(head),
            linked=run.report.linked,
            damaged=_damaged(run),
            seconds=time.monotonic() - begun,
        )
        call.print(found, restore_tables)
        if not found.restored:
            raise OperationFailed(
                f"{len(found.damaged)} damaged in {directory}, and nothing is restored: use another backup,"
                " or --without-damaged, and push these images again",
                "DAMAGED",
            )

    call.alone(work)


async def _watched(call: CommandContext, run: BackupRun | RestoreRun, work: Callable[[], T]) -> T:
    """Do it in a thread, and show its progress.  Raises OperationFailed."""
    from storage.migration.backup import BackupRefused

    running = asyncio.create_task(asyncio.to_thread(work))
    try:
        with closing(ProgressDisplay(sys.stderr)) as progress:
            try:
                await progress.follow(running, lambda on: None if call.json else _show(run, on))
            finally:
                run.stop()
                await asyncio.gather(running, return_exceptions=True)
        return running.result()
    except RegistryError as error:
        raise OperationFailed(str(error), error.code) from error
    except (BackupRefused, StartError) as error:
        raise OperationFailed(str(error)) from error
    except OSError as error:
        raise OperationFailed(f"{error.filename or run.report.store}: {error.strerror}") from error


def _show(run: BackupRun | RestoreRun, progress: ProgressDisplay) -> None:
    report = run.report
    text = f"{plural(report.blobs, 'blob')}, {report.new} of them new, {format_size(report.new_bytes)}"
    progress.show(report.store or "records", report.blobs, None, text)


def _rows(head: BackupHead) -> list[BackupRow]:
    return [BackupRow(store=name, blobs=each.blobs, bytes=each.bytes) for name, each in head.parts.items()]


def _damaged(run: BackupRun | RestoreRun) -> list[DamageRow]:
    return [DamageRow(repository="", what=digest, why=why) for digest, why in run.report.damaged.items()]


def _shown(stores: Sequence[BackupRow], damaged: Sequence[DamageRow], notes: list[str]) -> list[Table]:
    table = Table((Column("STORE"), Column("BLOBS", right=True), Column("BYTES", right=True)), notes=notes)
    for row in stores:
        table.add(row.store, str(row.blobs), format_size(row.bytes))
    return [damage_table(damaged), table] if damaged else [table]


def backup_tables(found: BackedUp, now: float) -> Sequence[Table]:
    new = f"{plural(found.new, 'new blob')} of {format_size(found.new_bytes)}, {found.linked} as hard links"
    notes = [f"{new}; {found.seconds:.1f} s", *(f"not in it: {each}" for each in found.left_out)]
    return _shown(found.stores, found.damaged, notes)


def restore_tables(found: Restored, now: float) -> Sequence[Table]:
    made = f"made {format_past(found.made, now)} by version {found.version}"
    done = f"restored into {found.path}" if found.restored else "not restored"
    linked = f"{plural(found.linked, 'blob')} as hard links"
    return _shown(found.stores, found.damaged, [f"{done}: a backup {made}; {linked}; {found.seconds:.1f} s"])


COMMANDS = (backup, restore)
