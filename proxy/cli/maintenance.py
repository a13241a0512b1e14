"""The commands that renew and verify what is stored: refresh, scrub."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from contextlib import closing

import click

from proxy.admin import reports
from proxy.admin.api.client import OperationFailed
from proxy.admin.operations import Operations
from proxy.cli.completion import references
from proxy.cli.console import ProgressDisplay
from proxy.cli.context import PAUSE, PLATFORMS, CommandContext, common
from proxy.cli.fills import show_fills
from proxy.cli.help import command
from proxy.cli.replicas import named
from proxy.cli.tables import Column, Table
from proxy.config.quantities import format_past, format_share, format_size, plural
from storage.names import written


@command()
@click.argument("reference", metavar="REF", shell_complete=references)
@PLATFORMS
@common
def refresh(call: CommandContext, reference: str, platforms: tuple[str, ...]) -> None:
    """Update an image from its upstream.

    Resolves REF upstream, whatever its freshness, and fetches what is missing.
    """

    async def work(operations: Operations) -> None:
        refreshing = asyncio.ensure_future(operations.refresh(reference, platforms))
        if not call.json:
            with closing(ProgressDisplay(sys.stderr)) as progress:
                while not (await asyncio.wait({refreshing}, timeout=PAUSE))[0]:
                    show_fills(await operations.fills(), progress)
        call.print(await refreshing, refresh_tables)

    call.run(work)


def refresh_tables(found: reports.Refreshed, now: float) -> Sequence[Table]:
    state = "new" if found.new else "unchanged"
    if found.moved:
        state = f"moved from {found.moved}"
    notes = [
        f"{written(found.repository, found.reference)}: {state}",
        f"{found.digest}: {plural(found.manifests, 'manifest')}, {plural(found.blobs, 'blob')};"
        f" {found.fetched} fetched, {format_size(found.bytes)}",
    ]
    return [Table((), notes=notes)]


@command()
@click.option("--wait", is_flag=True, help="Wait until the scrub ends. Without a server this is always so.")
@common
def scrub(call: CommandContext, wait: bool) -> None:
    """Verify all stored content.

    Reads every blob and manifest, and compares it with its digest. With --wait the exit status is 1 if
    anything was damaged.
    """

    async def work(operations: Operations) -> None:
        found = await operations.scrub()
        if wait or not operations.remote:
            with closing(ProgressDisplay(sys.stderr)) as progress:
                while found.asked.running:
                    if not call.json:
                        _show(found.asked, progress)
                    await asyncio.sleep(PAUSE)
                    found = await operations.scrubbing()
        call.print(found, scrub_tables)
        if found.error is not None:
            raise OperationFailed(found.error)
        if found.asked.damaged and not found.asked.running:
            damaged, healed = found.asked.damaged, found.asked.healed
            raise OperationFailed(
                f"{damaged} damaged and set aside, {healed} of them fetched again", "DAMAGED"
            )

    call.run(work)


def _show(found: reports.ScrubRow, progress: ProgressDisplay) -> None:
    read = f"{format_size(found.bytes)} of about {format_size(found.total_bytes or None)}"
    text = f"{read}, {found.checked} checked, {found.damaged} damaged"
    progress.show("scrub", found.bytes, found.total_bytes or None, text)


def scrub_tables(found: reports.Scrubbing, now: float) -> Sequence[Table]:
    columns = (
        Column("SCRUB", whole=True),
        Column("STARTED", drop=2),
        Column("DONE", right=True),
        Column("CHECKED", right=True, drop=4),
        Column("BYTES READ", right=True, drop=5),
        Column("DAMAGED", right=True),
        Column("REPAIRED", right=True, drop=1),
        Column("UNKNOWN FILES", right=True, drop=3),
    )
    table = Table(columns, empty="no scrub has started yet")
    for name, each in (("requested", found.asked), ("background", found.background)):
        if each.begun or each.running:
            table.add(
                name,
                format_past(each.begun, now),
                format_share(min(1.0, each.bytes / each.total_bytes) if each.total_bytes else None),
                str(each.checked),
                format_size(each.bytes),
                str(each.damaged),
                str(each.healed),
                str(each.foreign),
            )
    if found.error is not None:
        table.notes.append(f"the requested scrub failed: {found.error}")
    return [named(table, found)]


COMMANDS = (refresh, scrub)
