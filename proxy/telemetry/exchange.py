"""What is recorded of one exchange: one request of a client, from its head to the last byte of its answer."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

from storage.oci import Descriptor
from storage.registry import everything

UNKNOWN = "-"  # the namespace of a request that named none of ours


@dataclass(slots=True)
class Exchange:
    """One client request as it goes: filled in by whoever knows, written down when it ends.

    `id` tells it from all others, to the client too (X-Request-Id).
    `result` is hit, miss, revalidated, stale, negative or error, after RFC 9111; "" where no content is
    concerned.  `age` is seconds since the origin last vouched for the content, `ttl` how many more it
    counts as fresh (None: for ever).  `digest` is that of the content, once it is known; `content` describes
    what is pulled.  `ns` is the query's, where the client gave one.  `bytes` are those of the answer's body,
    `received` of the request's.  `client` is its address.

    `user` is who the client has proved to be, `visible` tells of a full name whether it may pull from there.
    What is not `shared` is for this client alone.
    """

    id: str = ""
    namespace: str = UNKNOWN
    repository: str = ""
    reference: str = ""
    kind: str = "other"
    result: str = ""
    upstream_requests: int = 0
    bytes: int = 0
    received: int = 0
    ns: str | None = None
    user: str = ""
    visible: Callable[[str], bool] = everything
    shared: bool = True
    age: float | None = None
    ttl: float | None = None
    detail: str = ""
    digest: str = ""
    content: Descriptor | None = None
    client: str = ""


# The exchange that runs in this context.  A task that it starts (a fill) counts into it as well: those
# are the upstream requests that it caused.
exchange: ContextVar[Exchange] = ContextVar("exchange")


_NOBODY = Exchange()


def current() -> Exchange:
    """The exchange that is going on here; a scratch one where none is (at start, in tests)."""
    return exchange.get(_NOBODY)
