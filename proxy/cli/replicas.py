"""How tables say which replica of a fleet a line is about."""

from __future__ import annotations

from collections.abc import Sequence

from proxy.cli.tables import Column, Table
from proxy.processes.rows import ReplicaModel

ALL = "all"


def replica_name(url: str) -> str:
    """The host and the port of a replica."""
    return url.partition("//")[2] or url


def by_replica(table: Table, rows: Sequence[ReplicaModel]) -> Table:
    """The table with a column REPLICA, if any of the rows that its lines show is that of one replica."""
    if any(each.replica for each in rows):
        table.columns = [*table.columns, Column("REPLICA", whole=True)]
        lines = zip(table.rows, rows, strict=True)
        table.rows = [[*line, replica_name(each.replica) if each.replica else ALL] for line, each in lines]
    return table


def named(table: Table, found: ReplicaModel) -> Table:
    """The table with a note of which replica it is, if others may have another one."""
    if found.replica is not None:
        table.notes.append(f"this is what {replica_name(found.replica)} knows; other replicas were not asked")
    return table
