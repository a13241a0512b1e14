"""The command audit: who did what."""

from __future__ import annotations

from collections.abc import Sequence

import click
import msgspec

from proxy.admin import activity_reports
from proxy.admin.operations import LARGEST_PAGE
from proxy.cli.context import CommandContext, common
from proxy.cli.help import command
from proxy.cli.replicas import by_replica
from proxy.cli.tables import Column, Table
from proxy.config.quantities import format_past
from storage.names import written


@command()
@click.argument("words", metavar="[WORD…]", nargs=-1)
@click.option(
    "--last",
    "limit",
    type=click.IntRange(1, LARGEST_PAGE),
    default=50,
    show_default=True,
    metavar="NUMBER",
    help="How many acts to list.",
)
@common
def audit(call: CommandContext, words: tuple[str, ...], limit: int) -> None:
    """List the last recorded acts.

    Prints the last lines of the audit log (audit.file), the latest first. With WORDs, prints only lines whose
    values contain all of them, such as: refused ann.
    """
    call.ask(lambda operations: operations.audit(" ".join(words), limit), audit_tables)


def audit_tables(found: Sequence[activity_reports.AuditRow], now: float) -> Sequence[Table]:
    columns = (
        Column("TIME"),
        Column("KIND"),
        Column("RESULT"),
        Column("WHO"),
        Column("WHAT"),
        Column("WHY", drop=1),
    )
    table = Table(columns, empty="nothing is recorded")
    for each in found:
        table.add(
            format_past(each.at, now),
            each.kind,
            f"{each.result} ({each.status})",
            f"{each.user} at {each.address}" if each.user else each.address,
            act_of(each),
            each.reason or each.code,
        )
    return [by_replica(table, found)]


def act_of(row: activity_reports.AuditRow) -> str:
    """What was done, in a line: the operation of an operator, or the request of a client."""
    if row.operation:
        given = {name: each for name, each in row.arguments.items() if each not in (None, "", [], False)}
        arguments = " ".join(f"{name}={_text(each)}" for name, each in given.items())
        return f"{row.operation} {arguments}".strip()
    name = written(row.repository, row.reference) if row.reference else row.repository
    return " ".join(filter(None, (row.method, row.object, name)))


def _text(value: object) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


COMMANDS = (audit,)
