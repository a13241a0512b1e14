"""How commands that copy content show what is damaged."""

from __future__ import annotations

from collections.abc import Sequence

from proxy.cli.tables import Column, Table
from proxy.transfer.results import DamageRow


def damage_table(damaged: Sequence[DamageRow]) -> Table:
    table = Table((Column("DAMAGED", digests=True), Column("REASON")))
    for each in damaged:
        table.add(each.what, each.why)
    return table
