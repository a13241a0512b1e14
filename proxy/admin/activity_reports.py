"""What the admin API answers about what happens: fills as they come and end, acts, and what is evicted next.

Units and names are those of models.py.
"""

from __future__ import annotations

from typing import Any

from proxy.admin.models import FillRow
from proxy.processes.rows import EndedFillRow, Model, ReplicaModel


class FillsNow(Model, frozen=True):
    """The fills in flight in all processes, the oldest first, and those that ended last, the latest first."""

    at: float
    fills: list[FillRow]
    ended: list[EndedFillRow]


class SlowRow(ReplicaModel, frozen=True):
    """A client's request that ended in the last ten minutes.

    `first` is the number of seconds to the beginning of its response, `seconds` that to its end.  `id` is its
    X-Request-Id; `trace` is empty if it is not traced.  `name` is the full name of the repository, and
    `result` that of the access log.
    """

    at: float
    first: float
    seconds: float
    id: str
    trace: str
    client: str
    method: str
    kind: str
    name: str
    reference: str
    status: int
    result: str
    bytes: int


class Activity(Model, frozen=True):
    """What the server does now.

    The counts are of clients' requests to the processes that run, since these started: the difference of two
    answers is what happened between them.  Content came from the cache for those `served`, and from an
    upstream for the `misses`.  `slowest` are the twenty whose responses took longest to begin.
    `stored_bytes` is what the caches hold, and `limit` disk.cache_limit, None without limit; `disk_bytes` and
    `free_bytes` are of the file system.  `troubles` are those of disks and databases.  In a fleet the numbers
    are sums over all replicas.
    """

    at: float
    processes: int
    requests: int
    served: int
    misses: int
    errors: int
    sent_bytes: int
    received_bytes: int
    slowest: list[SlowRow]
    stored_bytes: int
    limit: int | None
    disk_bytes: int
    free_bytes: int
    troubles: list[str]


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
