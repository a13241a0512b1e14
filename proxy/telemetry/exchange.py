"""The record of one exchange: a client's request and its response."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

from proxy.telemetry.tracing import NO_SPAN, TraceSpan
from storage.oci import Descriptor
from storage.registry import everything

UNKNOWN = "-"  # the namespace of a request that names no configured one
STORED = ("hit", "revalidated", "stale")  # results whose content comes from the cache


@dataclass(frozen=True, slots=True)
class PolicyVerdict:
    """What the policy said of content: by which rule, and why.  The mode of an exception is `override`."""

    rule: str
    mode: str
    reason: str


@dataclass(frozen=True, slots=True)
class KeyLock:
    """The lines of a lock file, and the name of the API key that may pull nothing else."""

    key: str
    lines: tuple[str, ...]


@dataclass(slots=True)
class Exchange:
    """A client's request and its response.  Filled in while it is served, logged when it ends.

    id: unique; clients see it as X-Request-Id
    result: hit, miss, revalidated, stale, negative or error, after RFC 9111; "" if no content is concerned
    bytes, received: the size of the response's and of the request's body so far
    as_of: the time, in seconds since the epoch, at which tags are wanted as they were; None for now
    ns: the parameter `ns` of the query; None without one
    user: the authenticated user; "" for an anonymous client
    visible: whether this client may pull from the repository of a full name
    shared: whether the response may be stored in caches that others use
    age: seconds since the origin last confirmed the content
    ttl: seconds for which the content stays fresh; None for content that never expires
    reason: the message of the error that the client was given
    warning: a message for the client besides the content; "" for none
    digest: the digest of the content, once it is known
    content: describes the content that is pulled
    client: the address of the connection
    agent: the User-Agent; None where no client is served
    peer: the URL of the replica that asks, empty for a client
    tell: makes headers of the response to another replica
    added: headers of the response that extensions add
    stored_only: that replica wants what is stored, and nothing to be asked for
    passed: the ids of the servers that the request has passed: see loops.py
    method: that of the request
    refused: the credentials of the client were refused
    verdicts: what the policy said of the content, unless it allows it
    lock: the images that are all that this client may pull; None without a lock
    begun_at: when the response began, by time.perf_counter(), if it did before its end
    span: its part of a trace
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
    reason: str = ""
    warning: str = ""
    digest: str = ""
    content: Descriptor | None = None
    client: str = ""
    agent: str | None = None
    as_of: float | None = None
    peer: str = ""
    tell: Callable[[], Mapping[str, str]] = dict
    added: tuple[tuple[str, str], ...] = ()
    stored_only: bool = False
    passed: tuple[str, ...] = ()
    method: str = ""
    refused: bool = False
    verdicts: tuple[PolicyVerdict, ...] = ()
    lock: KeyLock | None = None
    begun_at: float | None = None
    span: TraceSpan = NO_SPAN


# The exchange of this context.  Tasks that it starts, such as a fill, inherit it: it counts the upstream
# requests that it caused.
current_exchange: ContextVar[Exchange] = ContextVar("exchange")
_SCRATCH = Exchange()
# Whether the upstream itself is asked, and not another replica, which answers with what it was told before.
past_owners: ContextVar[bool] = ContextVar("past_owners", default=False)
# Whether nothing could be served instead of the answer of an origin: then one that restarts is waited for.
needed: ContextVar[bool] = ContextVar("needed", default=False)
# How many seconds ago what an origin has just said was true: another replica may have been told it before.
origin_age: ContextVar[float] = ContextVar("origin_age", default=0.0)


def in_exchange() -> bool:
    """Whether a client's request caused what happens here, and not the server itself or a command."""
    return current_exchange.get(None) is not None


def current() -> Exchange:
    """The exchange of this context; outside of one (at start, in tests) a scratch value."""
    return current_exchange.get(_SCRATCH)


def note_verdict(verdict: PolicyVerdict) -> None:
    """Note in the exchange of this context, if there is one, what the policy said."""
    now = current_exchange.get(None)
    if now is not None and verdict not in now.verdicts:
        now.verdicts += (verdict,)


@contextmanager
def aside() -> Iterator[None]:
    """Let what happens inside change nothing of the exchange but its number of upstream requests.

    Its client is served nothing of that: so `agent` is None inside.
    """
    if (now := current_exchange.get(None)) is None:
        yield
        return
    inside = replace(now, agent=None)
    token = current_exchange.set(inside)
    try:
        yield
    finally:
        current_exchange.reset(token)
        now.upstream_requests = inside.upstream_requests
