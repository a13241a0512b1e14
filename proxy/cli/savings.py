"""The command that shows what the cache has saved: stats."""

from __future__ import annotations

from collections.abc import Sequence

import click

from proxy.admin import models
from proxy.cli.context import CommandContext, common, option_type
from proxy.cli.help import command
from proxy.cli.replicas import replica_name
from proxy.cli.tables import Column, Table
from proxy.config.quantities import format_duration, format_share, format_size, parse_timeout
from proxy.config.wellknown import DOCKER_HUB

WEEK = 7 * 86400.0


def _period(text: object) -> object:
    parse_timeout(text)
    return text  # unchanged: the server parses it


@command()
@click.option(
    "--period",
    default="7d",
    metavar="DURATION",
    callback=option_type(_period),
    show_default=True,
    help="How far back to count.",
)
@common
def stats(call: CommandContext, period: str) -> None:
    """Show what the cache has saved.

    Prints what was saved in the period, the caches and private registries, and the last 14 days. AHEAD is
    what was fetched before a client asked: by warming, pins and refreshes.
    """
    call.ask(lambda operations: operations.stats(period), stats_tables)


def stats_tables(found: models.Stats, now: float) -> Sequence[Table]:
    limit = "" if found.limit is None else f" of {format_size(found.limit)}"
    caches = _cache_table(found)
    caches.notes.append(f"{_when(found.period)}; {format_size(found.stored_bytes)}{limit} stored in caches")
    more = _store_table(found.stores), _replica_table(found.replicas), _trend(found.days)
    return [caches, *(table for table in more if table.rows)]


def _cache_table(found: models.Stats) -> Table:
    columns = (
        Column("CACHE", whole=True),
        Column("REQUESTS", right=True, drop=1),
        Column("HIT RATIO", right=True),
        Column("BYTE HIT RATIO", right=True, drop=2),
        Column("SENT", right=True, drop=6),
        Column("RECEIVED", right=True, drop=7),
        Column("AHEAD", right=True, drop=5),
        Column("BYTES SAVED", right=True),
        Column("UPSTREAM REQUESTS", right=True, drop=8),
        Column("REQUESTS SAVED", right=True),
        Column("STALE", right=True, drop=4),
        Column("ERRORS", right=True, drop=3),
    )
    table = Table(columns, title=_saved(found))
    total = [] if len(found.namespaces) <= 1 else [found.total]
    for each in (*found.namespaces, *total):
        table.add(
            each.namespace or "all",
            str(each.requests),
            format_share(each.hit_ratio),
            format_share(each.byte_hit_ratio),
            format_size(each.sent_bytes),
            format_size(each.received_bytes),
            format_size(each.ahead_bytes),
            format_size(each.bytes_saved),
            str(each.upstream_requests),
            str(each.requests_saved),
            str(each.stale),
            str(each.errors),
        )
    return table


def _saved(found: models.Stats) -> str:
    """What the caches were good for, in a sentence."""
    if not found.total.requests:
        return f"nothing was pulled through a cache {_when(found.period)}"
    hub = next((each for each in found.namespaces if each.namespace == DOCKER_HUB), None)
    count, kind = (found.total.requests_saved, "upstream") if hub is None else (hub.requests_saved, "Hub")
    requests = f"{count:,} {kind} request{'' if count == 1 else 's'}"
    return f"saved {format_size(found.total.bytes_saved)} and {requests} {_when(found.period)}"


def _when(period: float) -> str:
    return "this week" if period == WEEK else f"in the last {format_duration(period)}"


def _store_table(rows: Sequence[models.StatsRow]) -> Table:
    columns = (
        Column("PRIVATE REGISTRY", whole=True),
        Column("REQUESTS", right=True),
        Column("SENT", right=True),
        Column("PUSHED", right=True),
        Column("ERRORS", right=True, drop=1),
    )
    table = Table(columns)
    for each in rows:
        sent, pushed = format_size(each.sent_bytes), format_size(each.pushed_bytes)
        table.add(each.namespace, str(each.requests), sent, pushed, str(each.errors))
    return table


def _replica_table(rows: Sequence[models.ReplicaStats]) -> Table:
    columns = (
        Column("REPLICA", whole=True),
        Column("REQUESTS", right=True, drop=1),
        Column("HIT RATIO", right=True),
        Column("SENT", right=True, drop=2),
        Column("RECEIVED", right=True, drop=3),
        Column("BYTES SAVED", right=True),
        Column("STORED", right=True),
        Column("LIMIT", right=True, drop=4),
    )
    table = Table(columns)
    for each in rows:
        total = each.total
        table.add(
            replica_name(each.replica),
            str(total.requests),
            format_share(total.hit_ratio),
            *map(format_size, (total.sent_bytes, total.received_bytes, total.bytes_saved)),
            format_size(each.stored_bytes),
            "none" if each.limit is None else format_size(each.limit),
        )
    return table


def _trend(days: Sequence[models.DayRow]) -> Table:
    columns = (
        Column("DAY", whole=True),
        Column("REQUESTS", right=True, drop=1),
        Column("SENT", right=True, drop=2),
        Column("RECEIVED", right=True, drop=4),
        Column("AHEAD", right=True, drop=3),
        Column("BYTES SAVED", right=True),
        Column("REQUESTS SAVED", right=True),
    )
    table = Table(columns)
    for each in days:
        sizes = (each.sent_bytes, each.received_bytes, each.ahead_bytes, each.bytes_saved)
        table.add(each.day, str(each.requests), *map(format_size, sizes), str(each.requests_saved))
    return table


COMMANDS = (stats,)
