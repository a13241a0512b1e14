"""The commands that change private registries: delete, tag."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import click

from proxy.admin import reports
from proxy.admin.api.client import OperationFailed
from proxy.admin.operations import Operations
from proxy.cli.completion import references
from proxy.cli.console import write
from proxy.cli.context import CommandContext, common, option_type
from proxy.cli.help import command
from proxy.cli.removal import is_interactive
from proxy.cli.tables import Column, Table
from proxy.config.quantities import format_size, parse_timeout, plural
from storage.names import is_glob, written


@command()
@click.argument("pattern", metavar="REF|GLOB", shell_complete=references)
@click.option(
    "--older-than",
    callback=option_type(parse_timeout),
    metavar="DURATION",
    help="Only tags that were pushed longer ago.",
)
@click.option(
    "--keep",
    type=click.IntRange(min=0),
    metavar="N",
    help="Keep the last N pushed of the matching tags in each repository.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be deleted, and delete nothing.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation of a glob.")
@common
def delete(
    call: CommandContext, pattern: str, older_than: float | None, keep: int | None, dry_run: bool, yes: bool
) -> None:
    """Delete images from a private registry.

    Deletes REF, or all that matches GLOB, with the manifests that nothing else needs. A name without tag and
    digest is the whole repository, or with --older-than or --keep its tags. The blobs follow with the next
    collection. Immutable tags stay.
    """

    async def work(operations: Operations) -> None:
        if is_glob(pattern) and not (dry_run or yes):
            await _confirm(operations, pattern, older_than, keep)
        found = await operations.delete(pattern, older_than=older_than, keep=keep, dry_run=dry_run)
        call.print(found, deleted_tables)
        if not found.references:
            cause = f"nothing that is stored, and may be deleted, matches {pattern}"
            raise OperationFailed(f"nothing was deleted: {cause}", "NAME_UNKNOWN")

    call.run(work)


async def _confirm(operations: Operations, pattern: str, older_than: float | None, keep: int | None) -> None:
    if not is_interactive():
        raise OperationFailed(
            "deleting by a glob needs a confirmation: give --yes", "NOT_CONFIRMED", usage=True
        )
    found = await operations.delete(pattern, older_than=older_than, keep=keep, dry_run=True)
    if found.references:
        write(*deleted_tables(found, time.time()), file=sys.stderr)
        if not click.confirm("Delete?", err=True):
            raise OperationFailed("nothing was deleted", "NOT_CONFIRMED")


def deleted_tables(found: reports.Deleted, now: float) -> Sequence[Table]:
    table = Table((Column("WOULD BE DELETED" if found.dry_run else "DELETED", whole=True),))
    for each in found.references:
        table.add(each)
    table.notes += [f"kept: {each.reference}: {each.reason}" for each in found.kept]
    if found.references:
        freed = f"{plural(found.blobs, 'blob')}, {format_size(found.bytes)}"
        end = "; nothing was deleted" if found.dry_run else ""
        table.notes.append(
            f"{plural(found.manifests, 'manifest')}; the next collection can free {freed}{end}"
        )
    return [table]


@command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@common
def tag(call: CommandContext, source: str, target: str) -> None:
    """Tag an image in a private registry.

    Points DST to the image SRC, as a push would. Between repositories it copies what the image consists of,
    without its signatures. SRC may be in a cache.
    """
    call.ask(lambda operations: operations.tag(source, target), tagged_tables)


def tagged_tables(found: reports.Tagged, now: float) -> Sequence[Table]:
    notes = [f"{written(found.repository, found.tag)}: {found.digest}"]
    if found.former is not None:
        notes.append(f"before: {found.former}")
    if found.copied:
        notes.append(f"{plural(found.copied, 'manifest and blob', 'manifests and blobs')} copied")
    return [Table((), notes=notes)]


COMMANDS = (tag, delete)
