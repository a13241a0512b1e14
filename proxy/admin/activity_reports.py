"""What the admin API answers about what happens: fills as they come and end, acts, and what is evicted next.

Units and names are those of models.py.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from proxy.admin.models import FillRow, Model, ReplicaModel

FillResult: TypeAlias = Literal["committed", "followed", "linked", "kept", "suspended", "failed", "uncached"]


class EndedFillRow(ReplicaModel, frozen=True):
    """A fill that has ended.

    `result` says how: committed (fetched), followed (another process fetched it), linked (stored already, for
    another repository), kept (parts of it), suspended (the server stopped), uncached (it could not be stored)
    or failed.  `error` is None if it succeeded.
    """

    digest: str
    namespace: str
    repository: str
    bytes: int
    started: float
    ended: float
    result: FillResult
    error: str | None


class FillsNow(Model, frozen=True):
    """The fills in flight in all processes, the oldest first, and those that ended last, the latest first."""

    at: float
    fills: list[FillRow]
    ended: list[EndedFillRow]


class EvictableRow(Model, frozen=True):
    """A blob that may be evicted.

    `bytes` is what it occupies, `repositories` are those that show it.  `left` is what the cache holds once
    it and all before it are evicted: a limit below `left` + `bytes` evicts it.  `expires` is when its age
    alone evicts it, None if it never does.
    """

    digest: str
    bytes: int
    last_used: float
    repositories: list[str]
    left: int
    expires: float | None


class LimitRow(Model, frozen=True):
    """The limit of the caches of a key of `namespaces`."""

    namespace: str
    limit: int


class Evictable(Model, frozen=True):
    """What is evicted next: `rows`, in this order.  `more` is whether there are further ones.

    `stored` is what the cache holds; `limit` is disk.cache_limit, None without limit.  `over` is how much too
    much it is.
    """

    stored: int
    limit: int | None
    over: int
    limits: list[LimitRow]
    rows: list[EvictableRow]
    more: bool


class AuditRow(ReplicaModel, frozen=True):
    """A line of the audit log; docs/operations.md describes its keys.  What a line does not have is empty."""

    at: float
    kind: str
    result: str
    status: int
    user: str
    address: str
    agent: str
    method: str
    object: str
    repository: str
    reference: str
    digest: str
    code: str
    rule: str
    mode: str
    reason: str
    operation: str
    arguments: dict[str, Any]
    id: str
