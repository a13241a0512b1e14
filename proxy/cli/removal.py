"""The commands that delete what is stored: purge, evict, collect."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import click

from proxy.admin import activity_reports, reports
from proxy.admin.api.client import OperationFailed
from proxy.admin.operations import LARGEST_PAGE, Operations
from proxy.cli.completion import references
from proxy.cli.console import write
from proxy.cli.context import CommandContext, common, option_type
from proxy.cli.help import command
from proxy.cli.replicas import by_replica
from proxy.cli.tables import Column, Table
from proxy.config.quantities import format_duration, format_past, format_size, parse_size, plural
from storage.names import is_glob

_DRY_RUN = click.option("--dry-run", is_flag=True, help="Show what would be deleted, and delete nothing.")


@command()
@click.argument("pattern", metavar="REF|GLOB", shell_complete=references)
@_DRY_RUN
@click.option("--yes", is_flag=True, help="Do not ask for confirmation of a glob.")
@click.option("--force", is_flag=True, help="Delete pinned images too, without confirmation.")
@common
def purge(call: CommandContext, pattern: str, dry_run: bool, yes: bool, force: bool) -> None:
    """Delete images now.

    Deletes REF, or all that matches GLOB, and the content that no other image needs. A name without tag and
    digest is the whole repository. The next pull fetches the image again.
    """

    async def work(operations: Operations) -> None:
        if is_glob(pattern) and not (dry_run or yes or force):
            await _confirm(operations, pattern)
        found = await operations.purge(pattern, dry_run=dry_run, force=force)
        call.print(found, purge_tables)
        if not found.references and not found.absences:
            raise OperationFailed(f"nothing that is stored matches {pattern}", "NAME_UNKNOWN")

    call.run(work)


def is_interactive() -> bool:
    return sys.stdin.isatty()


async def _confirm(operations: Operations, pattern: str) -> None:
    if not is_interactive():
        raise OperationFailed(
            "purging by a glob needs a confirmation: give --yes", "NOT_CONFIRMED", usage=True
        )
    found = await operations.purge(pattern, dry_run=True)
    if found.references:
        write(*purge_tables(found, time.time()), file=sys.stderr)
        if not click.confirm("Purge?", err=True):
            raise OperationFailed("nothing was purged", "NOT_CONFIRMED")


def purge_tables(found: reports.Purged, now: float) -> Sequence[Table]:
    table = Table((Column("WOULD BE PURGED" if found.dry_run else "PURGED", whole=True),))
    for each in found.references:
        table.add(each)
    table.notes += [f"kept because it is pinned: {each}" for each in found.kept]
    if found.absences:
        done = "would be forgotten" if found.dry_run else "forgotten"
        answers = plural(found.absences, "answer")
        table.notes.append(
            f"{done}: {answers} of upstream that it does not have something; it is asked again"
        )
    if found.references:
        parts = (
            plural(found.manifests, "manifest"),
            plural(found.links, "link"),
            plural(found.blobs, "blob"),
        )
        table.notes.append(f"{', '.join(parts)}, {format_size(found.bytes)}{_dry_run(found.dry_run)}")
    return [table]


def _dry_run(dry_run: bool) -> str:
    return "; nothing was deleted" if dry_run else ""


@command()
@click.option(
    "--to",
    callback=option_type(parse_size),
    metavar="SIZE",
    help="Evict until this much is left. By default the configured limits apply.",
)
@_DRY_RUN
@click.option(
    "--list",
    "listed",
    type=click.IntRange(1, LARGEST_PAGE),
    metavar="NUMBER",
    help="List the blobs that are evicted next, and evict nothing.",
)
@common
def evict(call: CommandContext, to: int | None, dry_run: bool, listed: int | None) -> None:
    """Evict content from the cache.

    Evicts what has not been used for its keep_for, then the least recently used content.
    """
    if listed is not None:
        if to is not None or dry_run:
            raise click.UsageError("--list evicts nothing: leave out --to and --dry-run")
        call.ask(lambda operations: operations.evictable(listed), evictable_tables)
        return
    call.ask(lambda operations: operations.evict(to, dry_run=dry_run), evict_tables)


def evictable_tables(found: activity_reports.Evictable, now: float) -> Sequence[Table]:
    columns = (
        Column("BLOB", digests=True),
        Column("SIZE", right=True),
        Column("LAST USED"),
        Column("EXPIRES", drop=2),
        Column("EVICTED BELOW", right=True),
        Column("REPOSITORIES", drop=1),
    )
    table = Table(columns, empty="nothing may be evicted")
    for each in found.rows:
        left = None if each.expires is None else each.expires - now
        table.add(
            each.digest,
            format_size(each.bytes),
            format_past(each.last_used, now),
            "never" if left is None else f"in {format_duration(left)}" if left > 0 else "now",
            format_size(each.left + each.bytes),
            " ".join(each.repositories),
        )
    limit = "without limit" if found.limit is None else f"of at most {format_size(found.limit)}"
    table.notes.append(f"{format_size(found.stored)} stored, {limit}")
    if found.over:
        table.notes.append(f"{format_size(found.over)} over the limits")
    return [table]


def evict_tables(found: reports.Evicted, now: float) -> Sequence[Table]:
    done = "would be evicted" if found.dry_run else "evicted"
    notes = [f"{done}: {_counts(found)}{_dry_run(found.dry_run)}"]
    if found.short:
        notes.append(
            f"still {format_size(found.short)} over the limit: the rest is pinned, offline or being read"
        )
    return [Table((), notes=notes)]


def _counts(found: reports.Evicted | reports.Collected) -> str:
    return (
        f"{plural(found.tags, 'tag')}, {plural(found.manifests, 'manifest')}, {plural(found.links, 'link')},"
        f" {plural(found.blobs, 'blob')}, {format_size(found.bytes)}"
    )


@command()
@_DRY_RUN
@click.option("--last", is_flag=True, help="Show the result of the last collection, and start none.")
@common
def collect(call: CommandContext, dry_run: bool, last: bool) -> None:
    """Collect garbage in private repositories.

    Deletes pushed content that no tag reaches, and what the retention rules of its namespace allow. Clients
    may push meanwhile. The exit status is 1 if damaged records kept a repository from being collected.
    """

    async def work(operations: Operations) -> None:
        found = await (operations.collected() if last else operations.collect(dry_run=dry_run))
        call.print(found, collection_tables)
        if found.refused or any(each.refused for each in found.rows):
            raise OperationFailed(found.refused or "not all repositories could be collected", "DAMAGED")

    call.run(work)


def collection_tables(found: reports.Collected, now: float) -> Sequence[Table]:
    columns = (
        Column("REPOSITORY", whole=True),
        Column("TAGS", right=True),
        Column("MANIFESTS", right=True),
        Column("LINKS", right=True, drop=2),
        Column("TOO RECENT", right=True, drop=1),
    )
    table = Table(columns)
    for each in found.rows:
        table.add(each.repository, str(each.tags), str(each.manifests), str(each.links), str(each.young))
        if each.refused:
            table.notes.append(f"not collected: {each.repository}: {each.refused}")
    by_replica(table, found.rows)
    if not found.begun:
        table.notes.append("no collection has run yet")
        return [table]
    done = "would be collected" if found.dry_run else f"collected {format_past(found.begun, now)}"
    table.notes.append(f"{done}: {_counts(found)}{_dry_run(found.dry_run)}")
    table.notes.append(
        f"examined {plural(found.repositories, 'repository', 'repositories')};"
        f" {found.young} too recent to be collected"
    )
    return [*_expired_tags(found, now), table] if found.dry_run else [table]


def _expired_tags(found: reports.Collected, now: float) -> Sequence[Table]:
    table = Table(
        (
            Column("TAG", whole=True),
            Column("PUSHED", drop=1),
            Column("PULLED"),
            Column("WHY"),
        )
    )
    for row in found.rows:
        for each in row.expired:
            pushed, pulled = format_past(each.pushed_at, now), format_past(each.pulled_at or None, now)
            table.add(f"{row.repository}:{each.tag}", pushed, pulled, each.reason)
    shown = sum(len(row.expired) for row in found.rows)
    if shown < found.tags:
        table.notes.append(f"and {found.tags - shown} more tags")
    return [table] if shown else []


COMMANDS = (purge, evict, collect)
