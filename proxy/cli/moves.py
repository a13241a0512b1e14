"""The commands that move the registry between engines: migrate, reload."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING

import click

from proxy.admin import reports
from proxy.admin.api.client import OperationFailed
from proxy.admin.operations import Operations
from proxy.cli.console import ProgressDisplay
from proxy.cli.context import CommandContext, common, quiet
from proxy.cli.damage import damage_table
from proxy.cli.help import command
from proxy.cli.tables import Table
from proxy.cli.target import if_running
from proxy.config.errors import StartError
from proxy.config.loader import load
from proxy.config.quantities import format_duration, format_size, plural
from proxy.config.schema import Config
from proxy.transfer.results import DamageRow, EngineMoved, MovedPart
from storage.errors import RegistryError

if TYPE_CHECKING:  # most commands need none of these
    from proxy.transfer.engine_moves import Job
    from storage.migration.move import MoveReport

REGISTRY = "private registry"


@command()
@click.option(
    "--to",
    "where",
    type=click.Choice(["shared", "local"]),
    required=True,
    help="shared: what `shared` of the configuration names. local: the disk.",
)
@click.option("--dry-run", is_flag=True, help="Show how much would be copied, and how long it takes.")
@click.option("--no-caches", is_flag=True, help="Leave out what caches have stored.")
@common
def migrate(call: CommandContext, where: str, dry_run: bool, no_caches: bool) -> None:
    """Move stored content to other engines.

    Moves the private registry between the disk and the bucket and database of `shared`, while the server
    serves. Also copies what the caches have stored, if they share it. The server then uses the new place. Run
    the command again after an interruption.
    """

    async def work() -> None:
        config = load(call.path, settings=call.settings)
        quiet(config.log.format)
        shared = where == "shared"
        found = await _migrate(config, call, shared, dry_run, caches=not no_caches)
        call.print(found, moved_tables)
        if found.damaged:
            raise OperationFailed(
                f"{len(found.damaged)} damaged: run entrepot scrub, which sets them aside, and this again",
                "DAMAGED",
            )

    call.alone(work)


async def _migrate(
    config: Config, call: CommandContext, shared: bool, dry_run: bool, caches: bool
) -> EngineMoved:
    from proxy.transfer.engine_moves import EngineMoves, NotMovable

    begun, reloaded, pending = time.monotonic(), False, False
    parts: list[MovedPart] = []
    damaged: list[DamageRow] = []
    try:
        async with EngineMoves(config, shared) as moves:
            for name, job in moves.jobs(caches):
                if job is None:
                    parts.append(MovedPart(name=name, blobs=0, bytes=0, records=0))
                    continue
                pending = True
                await moves.check_room(job)
                if dry_run:
                    parts.append(await moves.expected(name, job))
                    continue
                parts.append(await _watched(name, job, call.json))
                damaged += [DamageRow("", str(digest), why) for digest, why in job.report.damaged.items()]
            if pending and not dry_run and not damaged:
                await moves.settle()
    except RegistryError as error:
        kept = "" if dry_run else "; what was copied stays, and the next run continues"
        raise OperationFailed(f"{error}{kept}", error.code) from error
    except (StartError, NotMovable, OSError) as error:
        raise OperationFailed(str(error)) from error
    if config.hosted() and pending and not dry_run and not damaged:
        reloaded = await _reloaded(config, call)
    return EngineMoved(
        to="shared" if shared else "local",
        parts=parts,
        damaged=damaged,
        seconds=time.monotonic() - begun,
        dry_run=dry_run,
        reloaded=reloaded,
    )


async def _reloaded(config: Config, call: CommandContext) -> bool:
    """Have the server read its configuration again; False if none runs.  Raises OperationFailed."""
    try:
        async with if_running(config, call.server, call.token, call.ca_file) as server:
            if server is not None:
                await server.reload()
            return server is not None
    except OperationFailed as error:
        raise OperationFailed(
            f"the private registry is moved; reload the server now, which refuses pushes until then: {error}",
            error.code,
        ) from error


async def _watched(name: str, job: Job, quietly: bool) -> MovedPart:
    """Do it, and show its progress."""
    from proxy.transfer.engine_moves import moved_part

    running = asyncio.ensure_future(job.run())
    with closing(ProgressDisplay(sys.stderr)) as progress:
        try:
            await progress.follow(running, lambda on: None if quietly else _show(name, job.report, on))
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
    return moved_part(name, running.result())


def _show(name: str, report: MoveReport, progress: ProgressDisplay) -> None:
    text = (
        f"{format_size(report.bytes)} of {format_size(report.whole_bytes)}, {report.blobs} of"
        f" {plural(report.whole, 'blob')}, {plural(report.records, 'record')}"
    )
    progress.show(name, report.bytes, report.whole_bytes, text)


def moved_tables(found: EngineMoved, now: float) -> Sequence[Table]:
    return [
        *([damage_table(found.damaged)] if found.damaged else []),
        Table((), notes=[*(_line(each, found) for each in found.parts), *_after(found)]),
    ]


def _place(found: EngineMoved) -> str:
    return "in the engines of `shared`" if found.to == "shared" else "on the disk"


def _is_moved(part: MovedPart) -> bool:
    """Whether it is the private registry, and was where it is to be."""
    return part.name == REGISTRY and not (part.blobs or part.records or part.paused)


def _line(part: MovedPart, found: EngineMoved) -> str:
    if _is_moved(part):
        return f"{part.name}: it is already {_place(found)}"
    what = f"{plural(part.blobs, 'blob')} of {format_size(part.bytes)}, {plural(part.records, 'record')}"
    pause = f"; pushes waited for {part.paused:.1f} s" if part.paused else ""
    expected = "" if part.expected is None else f", in about {format_duration(max(1.0, part.expected))}"
    return f"{part.name}: {what}{expected}{pause}"


def _after(found: EngineMoved) -> list[str]:
    if found.dry_run:
        return ["nothing was copied"]
    if found.damaged:
        return ["the server continues with what it had"]
    if any(each.name == REGISTRY and not _is_moved(each) for each in found.parts):
        server = "is reloading" if found.reloaded else "has to be reloaded now: it refuses pushes until then"
        return [f"the private registry is {_place(found)}; the server {server}", f"{found.seconds:.1f} s"]
    return [f"{found.seconds:.1f} s"]


@command()
@common
def reload(call: CommandContext) -> None:
    """Read the configuration of the server again.

    Like SIGHUP: the server applies a valid configuration without ending a transfer, and logs the result.
    """

    async def work(operations: Operations) -> None:
        call.print(await operations.reload(), reload_tables)

    call.run(work)


def reload_tables(found: reports.Reloading, now: float) -> Sequence[Table]:
    return [Table((), notes=[f"process {found.pid} reads the configuration again; see its log"])]


COMMANDS = (migrate, reload)
