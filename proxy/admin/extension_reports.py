"""What the admin API answers about extensions."""

from __future__ import annotations

from typing import Literal, TypeAlias

from proxy.processes.rows import ReplicaModel

ExtensionUse: TypeAlias = Literal["in use", "failing", "not used"]


class ExtensionRow(ReplicaModel, frozen=True):
    """An extension that the configuration names, or that an installed package offers and none names.

    `name` is its key in the configuration, None if it is not used.  `entry_point` is what the package calls
    it, and `used_by` the keys that name it.  The counts are of all processes since they started; while it
    fails, `error` is its last failure.
    """

    name: str | None
    kind: str
    entry_point: str
    package: str
    version: str
    state: ExtensionUse
    used_by: list[str]
    calls: int
    failures: int
    failing_since: float | None
    error: str | None
