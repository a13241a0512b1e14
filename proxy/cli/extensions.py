"""The command extensions: what packages of others the server uses."""

from __future__ import annotations

from collections.abc import Sequence

from proxy.admin import extension_reports
from proxy.cli.context import CommandContext, common
from proxy.cli.help import command
from proxy.cli.replicas import by_replica
from proxy.cli.tables import Column, Table
from proxy.config.quantities import format_past


@command()
@common
def extensions(call: CommandContext) -> None:
    """List extensions and how they do.

    Prints those of the configuration, then what other installed packages offer.
    """
    call.ask(lambda operations: operations.extensions(), extension_tables)


def extension_tables(found: Sequence[extension_reports.ExtensionRow], now: float) -> Sequence[Table]:
    columns = (
        Column("EXTENSION", whole=True),
        Column("KIND", drop=2),
        Column("PACKAGE"),
        Column("USED BY", drop=3),
        Column("CALLS", right=True, drop=4),
        Column("FAILED", right=True, drop=1),
        Column("STATE"),
        Column("ERROR", fault=True),
    )
    table = Table(columns, empty="no extension is used, and no installed package offers one")
    for each in found:
        failing = each.failing_since is not None
        table.add(
            each.name or each.entry_point,
            each.kind,
            f"{each.package} {each.version}".rstrip(),
            " ".join(each.used_by),
            str(each.calls),
            str(each.failures),
            each.state,
            f"since {format_past(each.failing_since, now)}: {each.error}" if failing else "",
        )
    return [by_replica(table, found)]


COMMANDS = (extensions,)
