"""The command fills, and how transfers are shown while other commands wait for them."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from contextlib import closing, suppress

import click
import msgspec

from proxy.admin import models
from proxy.admin.api.client import OperationFailed
from proxy.admin.operations import Operations
from proxy.cli.bars import LEGEND, extents_bar, has_gaps
from proxy.cli.console import ProgressDisplay
from proxy.cli.context import PAUSE, CommandContext, common
from proxy.cli.help import command
from proxy.cli.replicas import by_replica, replica_name
from proxy.cli.tables import Column, Table
from proxy.config.quantities import format_duration, format_share, format_size, plural
from storage.names import written


@command()
@click.option("--watch", is_flag=True, help="Update the list until Ctrl-C.")
@common
def fills(call: CommandContext, watch: bool) -> None:
    """List transfers in flight, and kept parts.

    EXTENTS shows which bytes of each blob are stored, in transfer, and missing. CONNECTIONS is the number of
    connections that transfer it. REPEATED is the number of bytes that were dropped because another connection
    transfers them.
    """

    async def work(operations: Operations) -> None:
        if not operations.remote:
            raise OperationFailed("no server is running: nothing is being transferred", "NOT_RUNNING")
        if not watch:
            call.print(await operations.fills(), fill_tables)
            return
        while True:  # a server that is configured anew ends the stream
            await follow(operations, call.json)
            await asyncio.sleep(PAUSE)

    with suppress(KeyboardInterrupt):
        call.run(work)


async def follow(operations: Operations, as_json: bool) -> None:
    """Show the fills at each change: as bars, as lines, or as one line of JSON each time."""
    with closing(ProgressDisplay(sys.stdout)) as progress:
        async for now in operations.watch():
            if as_json:
                click.echo(msgspec.json.encode(now.fills))
            else:
                show_fills(now.fills, progress)


def show_fills(found: Sequence[models.FillRow], progress: ProgressDisplay, other: str = "") -> None:
    """Show the fills, and drop those that have ended; the part named `other` is none of them, and stays."""
    found = [each for each in found if not each.idle]
    for each in found:
        done = f"{format_size(each.bytes)} of {format_size(each.size)}, {format_size(each.speed)}/s"
        text = f"{done}, {plural(each.followers, 'client')}"
        progress.show(_part(each), each.bytes, each.size, text, extents_bar(each))
    for part in progress.parts() - {_part(each) for each in found} - {other}:
        progress.drop(part)


def _part(fill: models.FillRow) -> str:
    part = written(fill.repository, fill.digest)
    return part if fill.replica is None else f"{replica_name(fill.replica)} {part}"


def fill_tables(found: Sequence[models.FillRow], now: float) -> Sequence[Table]:
    idle = [each for each in found if each.idle]
    tables = [_running_table([each for each in found if not each.idle])]
    return [*tables, _idle_table(idle, now)] if idle else tables


def _idle_table(found: Sequence[models.FillRow], now: float) -> Table:
    columns = (
        Column("REPOSITORY", whole=True),
        Column("DIGEST", digests=True, drop=4),
        Column("STORED", right=True, drop=3),
        Column("SIZE", right=True, drop=2),
        Column("DONE", right=True),
        Column("LAST USED", drop=1),
        Column("EXPIRES"),
        Column("EXTENTS", whole=True),
    )
    table = Table(columns, title="Blobs of which parts are kept")
    for each in found:
        left = None if each.expires is None else each.expires - now
        table.add(
            each.repository,
            each.digest,
            format_size(each.bytes),
            format_size(each.size),
            format_share(each.bytes / each.size if each.size > 0 else None),
            f"{format_duration(max(0.0, now - each.started))} ago",
            "never" if left is None else f"in {format_duration(left)}" if left > 0 else "now",
            extents_bar(each),
        )
    return by_replica(table, found)


def _running_table(found: Sequence[models.FillRow]) -> Table:
    columns = (
        Column("REPOSITORY", whole=True),
        Column("DIGEST", digests=True, drop=6),
        Column("RECEIVED", right=True, drop=4),
        Column("SIZE", right=True, drop=2),
        Column("DONE", right=True),
        Column("SPEED", right=True, drop=1),
        Column("TIME LEFT", right=True, drop=3),
        Column("CLIENTS", right=True, drop=5),
        Column("CONNECTIONS", right=True, drop=7),
        Column("REPEATED", right=True, drop=8),
        Column("EXTENTS", whole=True),
    )
    table = Table(columns, empty="nothing is being transferred")
    for each in found:
        table.add(
            each.repository,
            each.digest,
            format_size(each.bytes),
            format_size(each.size),
            format_share(each.bytes / each.size if each.size > 0 else None),
            f"{format_size(each.speed)}/s",
            "?" if each.eta is None else format_duration(each.eta),
            str(each.followers),
            str(len(each.coming)),
            format_size(each.repeated),
            extents_bar(each),
        )
    return by_replica(_summed_up(table, found), found)


def _summed_up(table: Table, found: Sequence[models.FillRow]) -> Table:
    if any(map(has_gaps, found)):
        table.notes.append(LEGEND)
    if repeated := sum(each.repeated for each in found):
        table.notes.append(f"{format_size(repeated)} came twice")
    if len(found) > 1:
        received, speed = (
            format_size(sum(numbers))
            for numbers in zip(*((each.bytes, each.speed) for each in found), strict=True)
        )
        table.notes.append(f"{plural(len(found), 'transfer')}, {received} received, {speed}/s")
    return table


COMMANDS = (fills,)
