"""The state of this process: fills in flight, paused upstreams, troubles of the disk."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar, runtime_checkable

import msgspec
import structlog

from proxy.cache.cache import Cache
from proxy.cache.drill import Drill
from proxy.cache.fill import EndedFill, Fill
from proxy.cache.fills import Fills
from proxy.extensions.extension import ExtensionState
from proxy.namespaces.composition import Composition
from proxy.processes.rows import EndedFillRow, RefusalRow, SpanRow
from proxy.telemetry.metrics import PEERS, Metrics
from proxy.telemetry.recent_requests import RequestTotals, SlowRequest
from proxy.upstream.breaker import HostState
from proxy.upstream.ratelimit import LimitState
from storage.disk.troubles import Troubled

log = structlog.get_logger()
T = TypeVar("T")

DETAIL = 1000  # steps of a blob, at which its extents are told apart


class FillState(msgspec.Struct, frozen=True, kw_only=True):
    """One fill: `bytes` of `size` have arrived, for `followers` clients; `size` is -1 while unknown.

    `repository` is the full name of the repository that started it, `started` is in seconds since the
    epoch.  With `own`, this process transfers it or waits to; without, it follows the transfer of another
    process, which alone knows what is `coming` and `repeated`: see FillRow.  It is `queued` while it waits
    for a slot.
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
    extents: list[SpanRow]
    coming: list[SpanRow]
    repeated: int
    queued: bool = False


class UpstreamState(msgspec.Struct, frozen=True, kw_only=True):
    """One host of the upstream at `url`; the host of the upstream itself comes first.

    While `open`, requests to it are paused because it failed with `error`, `until` the next attempt.
    `limits` are those of each credential at the first host; the `ratelimit_` fields are their sums, None if
    the host sends none.  If all credentials are blocked, `limited_until` is when the first is free again.
    `refused` are the credentials that it or its token server refuses, at the first host.  Times are in
    seconds since the epoch.
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
    refused: list[RefusalRow]


class ProcessReport(msgspec.Struct, frozen=True, kw_only=True):
    """The report of one process.

    `troubles` holds a sentence for each trouble of its disks and databases; `ended` are the fills that ended
    last, the latest last.  `totals` and `slowest` are of clients' requests, `received` counts the bytes from
    upstreams.
    """

    pid: int
    fills: list[FillState]
    upstreams: list[UpstreamState]
    troubles: list[str]
    ended: list[EndedFillRow] = []
    totals: RequestTotals = msgspec.field(default_factory=RequestTotals)
    received: int = 0
    slowest: list[SlowRequest] = []
    extensions: list[ExtensionState] = []


class ForgetRequest(msgspec.Struct, frozen=True):
    """The body of a request to forget negatives; `repository` is a full name."""

    repository: str


@runtime_checkable
class _Upstream(Protocol):
    """An origin that is reached over the network."""

    def state(self) -> list[HostState]: ...


class ProcessState:
    """The state of this process.  `caches` are by namespace; `record` records what requests were counted.

    `metrics` are those of this process, as are the `extensions`.  `peers` gives the state of the other
    replicas of a fleet, among that of the upstreams.
    """

    def __init__(
        self,
        fills: Fills,
        caches: Mapping[str, Cache],
        disks: Sequence[Troubled],
        clock: Callable[[], float] = time.time,
        pid: int | None = None,
        drill: Drill | None = None,
        record: Callable[[], Awaitable[None]] | None = None,
        peers: Callable[[], Sequence[HostState]] = list,
        metrics: Metrics | None = None,
        extensions: Callable[[], list[ExtensionState]] = list,
    ) -> None:
        self._metrics = metrics
        self._fills = fills
        self._caches = caches
        self._disks = disks
        self._clock = clock
        self.pid = os.getpid() if pid is None else pid
        self.drill = drill or Drill(clock)
        self._record = record
        self._peers = peers
        self._extensions = extensions

    def state(self) -> ProcessReport:
        """The state as known in memory, without any request; the metrics are up to date then."""
        metrics, now = self._metrics, self._clock()
        if metrics is not None:
            metrics.flush()
        return ProcessReport(
            pid=self.pid,
            fills=[_fill(each, self.pid) for each in self._fills.in_flight()],
            upstreams=[
                _upstream(namespace, host, now)
                for namespace, cache in self._caches.items()
                if isinstance(cache.origin, _Upstream)
                for host in cache.origin.state()
            ]
            + [_upstream(PEERS, host, now) for host in self._peers()],
            troubles=list(dict.fromkeys(each for disk in self._disks for each in disk.troubles())),
            ended=[_ended(each) for each in self._fills.last],
            totals=metrics.recent.totals if metrics is not None else RequestTotals(),
            received=sum(each.received for each in metrics.upstreams.values()) if metrics is not None else 0,
            slowest=metrics.recent.slowest() if metrics is not None else [],
            extensions=self._extensions(),
        )

    async def record(self) -> None:
        """Record what was counted of requests, which otherwise happens some seconds later."""
        if self._record is not None:
            await self._record()

    async def forget(self, repository: str) -> None:
        """Forget that the upstream did not have content of the repository, or did not answer."""
        namespace, _, name = repository.partition("/")
        if cache := self._caches.get(namespace):
            cache.forget(name)


def state_of(composition: Composition) -> ProcessState:
    """The state of this process, which serves a composition or does its housekeeping."""
    parts = composition
    return ProcessState(
        parts.fills,
        parts.caches,
        parts.disks,
        parts.clock,
        drill=parts.drill,
        record=parts.recorder.flush,
        peers=list if parts.peers is None else parts.peers.state,
        metrics=parts.metrics,
        extensions=parts.extensions.states,
    )


def _fill(fill: Fill, pid: int) -> FillState:
    started = fill.started.result() if fill.started.done() else None
    upload, fetcher = fill.upload, fill.fetcher
    size = started[1].size if started else max(fill.size, upload.listed_size if upload else -1)
    return FillState(
        digest=str(fill.digest),  # msgspec refuses a subclass of str
        namespace=fill.source.namespace,
        repository=fill.source.full_name,
        bytes=upload.offset if upload else 0,
        size=size,
        started=fill.begun,
        followers=fill.followers,
        pid=pid,
        own=upload is None or upload.ours,
        extents=_spans(upload.extents.joined(size // DETAIL) if upload else []),
        coming=_spans(fetcher.coming if fetcher else []),
        repeated=fetcher.repeated if fetcher else 0,
        queued=fill.queued,
    )


def _ended(fill: EndedFill) -> EndedFillRow:
    return EndedFillRow(
        digest=str(fill.digest),
        namespace=fill.namespace,
        repository=fill.repository,
        bytes=fill.bytes,
        started=fill.begun,
        ended=fill.ended,
        result=fill.result,  # type: ignore[arg-type]
        error=fill.error,
    )


def _spans(spans: Iterable[tuple[int, int]]) -> list[SpanRow]:
    return [SpanRow(start=start, stop=stop) for start, stop in spans]


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
        refused=[
            RefusalRow(credential=each.credential, host=each.host, status=each.status, at=now - each.age)
            for each in state.refused
        ],
    )


def _sum(numbers: Iterable[int | None]) -> int | None:
    known = [number for number in numbers if number is not None]
    return sum(known) if known else None


def refusals(states: Iterable[UpstreamState]) -> list[RefusalRow]:
    """The latest refusal of each credential by each host."""
    rows = sorted((row for each in states for row in each.refused), key=lambda row: row.at)
    return list({(row.credential, row.host): row for row in rows}.values())


def refusal_notes(states: Sequence[UpstreamState]) -> list[str]:
    """A sentence for each credential that is refused."""
    names = dict.fromkeys(each.namespace for each in states)
    return [
        f"{name}: {row.host} refused credential {row.credential} with status {row.status}"
        for name in names
        for row in refusals(each for each in states if each.namespace == name)
    ]
