"""The commands that show what the server does: why, webhooks."""

from __future__ import annotations

from collections.abc import Sequence

import click

from proxy.admin import models, policy_reports, reports
from proxy.cli.completion import references
from proxy.cli.console import freshness
from proxy.cli.context import CommandContext, common
from proxy.cli.help import command
from proxy.cli.replicas import by_replica, replica_name
from proxy.cli.tables import Column, Table
from proxy.config.quantities import (
    format_duration,
    format_past,
    format_time,
    plural,
)
from storage.names import written


@command()
@click.argument("reference", metavar="REF", shell_complete=references)
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
            table.add("validated", format_past(found.validated_at, now))
        if found.fresh_rule is not None:
            table.add("fresh", freshness(found.fresh_until, now))
        table.add("last used", format_past(found.last_used, now))
    if found.absent is not None:
        table.add("absent", _absence(found.absent, now))
    if found.access is not None:
        table.add("may be pulled by", found.access)
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
    for other in found.elsewhere:
        at = f", at {other.digest}" if other.digest and other.digest != found.digest else ""
        table.add(f"verdict of {replica_name(other.replica)}", f"{other.verdict}: {other.because}{at}")
    return [table]


def _absence(absent: reports.AbsenceRow, now: float) -> str:
    until = "" if absent.until is None else f", for {format_duration(max(0.0, absent.until - now))}"
    answered = f"which is answered while upstream cannot be asked{until}"
    return f"{absent.code} {format_past(absent.since, now)}, {answered}"


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
    name = host.url if host.host in host.url else f"{host.url} through {host.host}"
    return ", ".join(filter(None, (name, host_state(host, now))))


def host_state(host: reports.HostRow, now: float) -> str:
    """Whether a host of an upstream is asked, and what is left of its limits; empty if nothing is known."""
    parts = []
    if host.open:
        parts.append(f"paused, next attempt {format_time(host.until, now)}: {host.error or 'it failed'}")
    if host.ratelimit_limit is not None:
        parts.append(f"{host.ratelimit_remaining} of {host.ratelimit_limit} requests left")
    if host.limited_until is not None:
        parts.append(f"rate limited until {format_time(host.limited_until, now)}")
    for each in host.refused:
        when = format_past(each.at, now)
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
            else f"since {format_past(each.failing_since, now)}: {each.error}"
        )
        table.add(
            each.name,
            each.url,
            each.format,
            " ".join(each.actions),
            str(each.pending),
            format_past(each.oldest, now, ""),
            format_past(each.delivered_at, now, "never"),
            failing,
        )
    by_replica(table, found)
    if len(found) > 1:
        counts = f"{plural(sum(each.pending for each in found), 'event')} pending"
        table.notes.append(f"{plural(len({each.name for each in found}), 'webhook')}, {counts}")
    return [table]


COMMANDS = (why, webhooks)
