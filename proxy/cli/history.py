"""The commands that tell how images have changed: history, diff."""

from __future__ import annotations

from collections.abc import Sequence

import click

from proxy.admin import tag_reports
from proxy.cli.completion import references
from proxy.cli.context import CommandContext, common
from proxy.cli.help import command
from proxy.cli.replicas import by_replica
from proxy.cli.tables import Column, Table
from proxy.config.quantities import format_past, format_size
from storage.names import written


@command()
@click.argument("reference", metavar="REF", shell_complete=references)
@common
def history(call: CommandContext, reference: str) -> None:
    """Show what a tag stood for.

    Prints the digests that the tag REF had when clients asked for it, the latest first.
    """
    call.ask(lambda operations: operations.history(reference), history_tables)


def history_tables(found: tag_reports.TagHistory, now: float) -> Sequence[Table]:
    columns = (
        Column("SINCE"),
        Column("UNTIL", drop=2),
        Column("DIGEST", digests=True),
        Column("SIZE", right=True, drop=3),
        Column("STORED"),
        Column("PLATFORMS", drop=1),
    )
    table = Table(columns, title=written(found.repository, found.tag))
    for each in found.rows:
        table.add(
            format_past(each.since, now),
            format_past(each.until, now, "still"),
            each.digest,
            format_size(each.bytes_whole),
            ("completely" if each.complete else "partially") if each.stored else "no",
            " ".join(each.platforms),
        )
    return [by_replica(table, found.rows)]


@command()
@click.argument("reference", metavar="REF", shell_complete=references)
@click.argument("other", metavar="[OTHER]", default="")
@common
def diff(call: CommandContext, reference: str, other: str) -> None:
    """Compare two stored images.

    Prints which platforms, layers and values of the configuration differ. OTHER is a reference, or the digest
    of another image in the repository of REF. Without it, what the tag REF stood for before its last move is
    compared with what it stands for since.
    """
    call.ask(lambda operations: operations.diff(reference, other), diff_tables)


def diff_tables(found: tag_reports.ImageDiff, now: float) -> Sequence[Table]:
    columns = (
        Column("PLATFORM", whole=True),
        Column("CHANGE"),
        Column("FROM", digests=True, drop=2),
        Column("TO", digests=True, drop=3),
        Column("ADDED", right=True),
        Column("REMOVED", right=True),
        Column("SAME", right=True, drop=1),
    )
    table = Table(columns, title=f"{found.old} and {found.new}")
    for each in found.platforms:
        table.add(
            each.platform or "?",
            each.change,
            each.old or "",
            each.new or "",
            format_size(each.bytes_added),
            format_size(each.bytes_removed),
            format_size(each.bytes_same),
        )
        name = each.platform or "the image"
        table.notes += [f"{name}: {reason}" for reason in each.unknown]
    if found.same:
        table.notes.append("they are the same image")
    changed = [each for each in found.platforms if each.change != "same"]
    parts = [part for each in changed for part in (_layers(each), _values(each))]
    return [table, *(part for part in parts if part.rows)]


def _layers(found: tag_reports.PlatformDiff) -> Table:
    columns = (
        Column("LAYER", digests=True),
        Column("CHANGE"),
        Column("SIZE", right=True),
        Column("STORED", drop=1),
        Column("MADE BY", drop=2),
    )
    table = Table(columns, title=f"Layers of {found.platform or 'the image'}")
    for each in found.layers:
        stored = "yes" if each.stored else "no"
        table.add(each.digest, each.change, format_size(each.size), stored, each.created_by)
    return table


def _values(found: tag_reports.PlatformDiff) -> Table:
    columns = (Column("KIND", drop=1), Column("NAME"), Column("BEFORE"), Column("NOW"))
    table = Table(columns, title=f"Configuration of {found.platform or 'the image'}")
    for each in found.values:
        table.add(each.kind, each.name, each.old or "", each.new or "")
    return table


COMMANDS = (history, diff)
