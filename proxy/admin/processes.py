"""The state of this process: fills under way, upstreams that are paused, troubles of the disk."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar, runtime_checkable

import msgspec
import structlog

from proxy.cache.cache import Cache
from proxy.cache.drill import Drill
from proxy.cache.fills import Fill, Fills
from proxy.namespaces.composition import Composition
from proxy.upstream.breaker import HostState
from proxy.upstream.ratelimit import LimitState
from storage.disk.health import DiskHealth

log = structlog.get_logger()
T = TypeVar("T")


class FillState(msgspec.Struct, frozen=True, kw_only=True):
    """`bytes` of `size` are here (-1: it is not told yet), for `followers` clients.

    `repository` is the full name of that which began it, `started` is in seconds since the epoch.  With
    `own`, the process transfers it, or is to; without, it follows another process's transfer.
    """

    digest: str
    namespace: str
    repository: str
    bytes: int
    size: int
    started: float
    followers: int
    pid: int
    own: bool


class UpstreamState(msgspec.Struct, frozen=True, kw_only=True):
    """One host by which the upstream at `url` is reached; of its several, the upstream's own comes first.

    While `open` it is let alone, since it failed with `error`; `until` tells when it is tried again.
    `limits` are those of each credential, for the upstream's own host; `ratelimit_` is their sum, None where
    nothing is told.  When all credentials are blocked, `limited_until` tells when the first is not.  Times
    are in seconds since the epoch.
    """

    namespace: str
    url: str
    host: str
    open: bool
    until: float | None
    error: str | None
    ratelimit_limit: int | None
    ratelimit_remaining: int | None
    limited_until: float | None
    limits: list[LimitState]


class ProcessReport(msgspec.Struct, frozen=True, kw_only=True):
    """Of one process.  `troubles` holds a sentence for each."""

    pid: int
    fills: list[FillState]
    upstreams: list[UpstreamState]
    troubles: list[str]


class ForgetRequest(msgspec.Struct, frozen=True):
    repository: str


@runtime_checkable
class _Upstream(Protocol):
    """An origin across the network."""

    def state(self) -> list[HostState]: ...


class ProcessState:
    """Of this process.  `clock` is the one that the fills have; `caches` are by namespace."""

    def __init__(
        self,
        fills: Fills,
        caches: Mapping[str, Cache],
        disks: Sequence[DiskHealth],
        clock: Callable[[], float] = time.time,
        pid: int | None = None,
        drill: Drill | None = None,
    ) -> None:
        self._fills = fills
        self._caches = caches
        self._disks = disks
        self._clock = clock
        self.pid = os.getpid() if pid is None else pid
        self.drill = drill or Drill(clock)

    def state(self) -> ProcessReport:
        """Looks at what is in memory, and asks nobody."""
        now = self._clock()
        return ProcessReport(
            pid=self.pid,
            fills=[_fill(each, self.pid) for each in self._fills.in_flight()],
            upstreams=[
                _upstream(namespace, host, now)
                for namespace, cache in self._caches.items()
                if isinstance(cache.origin, _Upstream)
                for host in cache.origin.state()
            ],
            troubles=[trouble for disk in self._disks for trouble in disk.troubles()],
        )

    async def forget(self, repository: str) -> None:
        """Drop what is remembered of its upstream's having had nothing, or not having answered."""
        namespace, _, name = repository.partition("/")
        if cache := self._caches.get(namespace):
            cache.forget(name)


def state_of(composition: Composition) -> ProcessState:
    """The state of this process, which serves or looks after `composition`."""
    parts = composition
    return ProcessState(parts.fills, parts.caches, parts.disks, parts.clock, None, parts.drill)


def _fill(fill: Fill, pid: int) -> FillState:
    started = fill.started.result() if fill.started.done() else None
    return FillState(
        digest=str(fill.digest),  # a plain one: msgspec refuses a str of another class
        namespace=fill.source.namespace,
        repository=fill.source.repository,
        bytes=fill.upload.offset if fill.upload else 0,
        size=started[1].size if started else fill.size,
        started=fill.begun,
        followers=fill.followers,
        pid=pid,
        own=fill.upload is None or fill.upload.ours,
    )


def _upstream(namespace: str, state: HostState, now: float) -> UpstreamState:
    blocked = [each.blocked_for for each in state.limits]
    return UpstreamState(
        namespace=namespace,
        url=state.url,
        host=state.host,
        open=state.open,
        until=now + state.seconds if state.open else None,
        error=state.error,
        ratelimit_limit=_sum(each.limit for each in state.limits),
        ratelimit_remaining=_sum(each.remaining for each in state.limits),
        limited_until=now + min(blocked) if blocked and all(blocked) else None,
        limits=state.limits,
    )


def _sum(numbers: Iterable[int | None]) -> int | None:
    told = [number for number in numbers if number is not None]
    return sum(told) if told else None


# Between processes
