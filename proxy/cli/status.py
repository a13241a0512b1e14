"""The commands that show what the server does: stats, why, webhooks."""

from __future__ import annotations

from collections.abc import Sequence

import click

from proxy.admin import models, policy_reports, reports
from proxy.cli.console import freshness
from proxy.cli.context import CommandContext, common, option_type
from proxy.cli.help import command
from proxy.cli.tables import Column, Table
from proxy.config.quantities import (
    format_duration,
    format_share,
    format_size,
    format_time,
    parse_timeout,
    plural,
)
from proxy.config.wellknown import DOCKER_HUB
from storage.names import written

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
    return [caches, *(table for table in (_store_table(found.stores), _trend(found.days)) if table.rows)]


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


@command()
@click.argument("reference", metavar="REF")
@common
def why(call: CommandContext, reference: str) -> None:
    """Explain what a pull would do.

    Prints the rules that apply to REF and the state of its upstream. No upstream is asked.
    """
    call.ask(lambda operations: operations.why(reference), why_tables)


def why_tables(found: reports.Why, now: float) -> Sequence[Table]:
    table = Table(
        (Column("FIELD", whole=True), Column("VALUE")), title=written(found.repository, found.reference)
    )
    fresh_for, keep_for = (
        "without limit" if each is None else format_duration(each)
        for each in (found.fresh_for, found.keep_for)
    )
    table.add("verdict", f"{found.verdict}: {found.because}")
    table.add("namespace", f"{found.namespace}: {found.qualified}")
    if found.fresh_rule is not None:
        table.add("freshness rule", f"{found.fresh_rule}, {fresh_for}")
    table.add("retention rule", f"{found.keep_rule}, {keep_for}")
    table.add("pinned by", found.pin or "no pin")
    table.add("digest", found.digest or "none: nothing is stored")
    if found.digest is not None:
        table.add("stored", ("completely" if found.complete else "partially") if found.stored else "no")
        if found.validated_at is not None:
            table.add("validated", format_time(found.validated_at, now))
        if found.fresh_rule is not None:
            table.add("fresh", freshness(found.fresh_until, now))
        table.add("last used", format_time(found.last_used, now))
    if found.policy is not None:
        table.add("policy rule", _policy(found.policy))
    if found.held is not None:
        table.add("held", f"at {found.held.digest} by {found.held.rule}, moves {moving(found.held, now)}")
    if found.owner is not None:
        table.add("owner", _owner(found.owner, now))
    if found.offline:
        table.add("upstream", "offline: it is never asked")
    for each in found.upstreams:
        table.add("upstream", _upstream(each, now))
    return [table]


def _policy(policy: policy_reports.PolicyRow) -> str:
    rule = policy.rule or "none"
    if policy.verdict == "verify":
        return f"{rule}, which allows content that meets its conditions: see entrepot policy explain"
    refuses = f"refuses it in mode {policy.mode}"
    return f"{rule}, which {'allows it' if policy.verdict == 'allow' else refuses}: {policy.reason}"


def _owner(owner: models.OwnerRow, now: float) -> str:
    if owner.open:
        paused = f"left out, next attempt {format_time(owner.until, now)}"
        return f"{owner.url}, {paused}: {owner.error or 'it failed'}"
    return f"{owner.url}, this replica" if owner.own else f"{owner.url}, which is asked before upstream"


def moving(found: policy_reports.HeldRow, now: float) -> str:
    """When a tag that is held will move."""
    if found.moves_at is not None:
        return format_time(found.moves_at, now) if found.moves_at > now else "at the next pull"
    return "never: rejected" if found.candidate in found.rejected else "when approved"


def _upstream(host: reports.HostRow, now: float) -> str:
    parts = [host.url if host.host in host.url else f"{host.url} through {host.host}"]
    if host.open:
        parts.append(f"paused, next attempt {format_time(host.until, now)}: {host.error or 'it failed'}")
    if host.ratelimit_limit is not None:
        parts.append(f"{host.ratelimit_remaining} of {host.ratelimit_limit} requests left")
    if host.limited_until is not None:
        parts.append(f"rate limited until {format_time(host.limited_until, now)}")
    for each in host.refused:
        when = format_time(each.at, now)
        parts.append(f"{each.host} refused credential {each.credential} with status {each.status} {when}")
    return ", ".join(parts)


@command()
@common
def webhooks(call: CommandContext) -> None:
    """List webhooks and their deliveries."""
    call.ask(lambda operations: operations.webhooks(), webhook_tables)


def webhook_tables(found: Sequence[models.WebhookRow], now: float) -> Sequence[Table]:
    columns = (
        Column("WEBHOOK", whole=True),
        Column("URL", drop=2),
        Column("FORMAT", drop=5),
        Column("ACTIONS", drop=4),
        Column("PENDING", right=True),
        Column("OLDEST PENDING", drop=3),
        Column("LAST DELIVERY", drop=1),
        Column("ERROR", fault=True),
    )
    table = Table(columns, empty="no webhook is configured")
    for each in found:
        failing = (
            ""
            if each.failing_since is None
            else f"since {format_time(each.failing_since, now)}: {each.error}"
        )
        table.add(
            each.name,
            each.url,
            each.format,
            " ".join(each.actions),
            str(each.pending),
            format_time(each.oldest, now, ""),
            format_time(each.delivered_at, now, "never"),
            failing,
        )
    if len(found) > 1:
        counts = f"{plural(sum(each.pending for each in found), 'event')} pending"
        table.notes.append(f"{plural(len(found), 'webhook')}, {counts}")
    return [table]


COMMANDS = (stats, why, webhooks)
