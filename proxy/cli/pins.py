"""The commands about pins: pin, unpin, pins."""

from __future__ import annotations

from collections.abc import Sequence

import click

from proxy.admin import models, reports
from proxy.cli.context import PLATFORMS, CommandContext, common, option_type
from proxy.cli.help import command
from proxy.cli.replicas import by_replica
from proxy.cli.tables import Column, Table
from proxy.config.quantities import format_duration, format_past, format_size, parse_timeout


@command()
@click.argument("pattern")
@click.option(
    "--keep-fresh",
    callback=option_type(parse_timeout),
    metavar="DURATION",
    help="Have the server refresh what matches at this interval.",
)
@PLATFORMS
@common
def pin(call: CommandContext, pattern: str, keep_fresh: float | None, platforms: tuple[str, ...]) -> None:
    """Protect images from eviction.

    PATTERN is a glob over namespace/repository:tag. A pin of the same pattern is replaced.
    """
    call.ask(lambda operations: operations.pin(pattern, keep_fresh, platforms), pin_tables)


@command()
@click.argument("pattern")
@common
def unpin(call: CommandContext, pattern: str) -> None:
    """Remove a pin.

    PATTERN is written as `pins` lists it. A pin of the configuration can only be removed there.
    """
    call.ask(lambda operations: operations.unpin(pattern), unpinned_tables)


@command()
@common
def pins(call: CommandContext) -> None:
    """List pins.

    Pins of the configuration come first. The sizes are those of what each pin matches now.
    """
    call.ask(lambda operations: operations.pins(), pin_tables)


def pin_tables(found: Sequence[models.PinRow], now: float) -> Sequence[Table]:
    columns = (
        Column("PATTERN", whole=True),
        Column("REFRESHED", drop=2),
        Column("PLATFORMS", drop=4),
        Column("ADDED", drop=3),
        Column("REFERENCES", right=True, drop=1),
        Column("MANIFESTS", right=True, drop=5),
        Column("BLOBS", right=True, drop=6),
        Column("STORED", right=True),
    )
    table = Table(columns, empty="nothing is pinned")
    for each in found:
        table.add(
            each.pattern,
            "no" if each.keep_fresh is None else f"every {format_duration(each.keep_fresh)}",
            " ".join(each.platforms) or "all",
            format_past(each.since, now, "configuration"),
            str(each.references),
            str(each.manifests),
            str(each.blobs),
            format_size(each.bytes),
        )
    return [by_replica(table, found)]


def unpinned_tables(found: reports.Unpinned, now: float) -> Sequence[Table]:
    return [Table((), notes=[f"{found.pattern} is no longer pinned"])]


COMMANDS = (pin, unpin, pins)
