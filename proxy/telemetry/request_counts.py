"""Counts of requests that have ended.

To count in memory that processes share takes as long as to serve a hit that is remembered.  So requests are
counted in memory of this process first, and go to the metrics together: a moment later, or before the metrics
are shown.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from proxy.telemetry.durations import Durations, TalliedHistogram
from proxy.telemetry.exchange import STORED, Exchange
from proxy.telemetry.metrics import Metrics

MOMENT = 0.1  # seconds; a process that is killed has not counted the requests of such a time
_ANSWERED = ("hit", "stale", "negative")


class _Tally:
    """The requests with the same namespace, kind, result and status.

    saved: how many caused no request to an upstream
    """

    __slots__ = ("bytes", "first", "number", "saved", "seconds")

    def __init__(self) -> None:
        self.number = self.bytes = self.saved = 0
        self.seconds, self.first = Durations(), Durations()


class RequestCounts:
    """Counts requests in `metrics`.  add() is called in an event loop."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._tallies: dict[tuple[bool, str, str, str, int], _Tally] = {}
        self._timer: asyncio.TimerHandle | None = None
        metrics.count_later(self.flush)

    def add(
        self,
        exchange: Exchange,
        status: int,
        seconds: float,
        first: float | None = None,
        exemplar: Mapping[str, str] | None = None,
    ) -> None:
        """Count a request; the parameters are those of EndedRequests.add()."""
        key = bool(exchange.peer), exchange.namespace, exchange.kind, exchange.result, status
        if (tally := self._tallies.get(key)) is None:
            tally = self._tallies[key] = _Tally()
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(MOMENT, self.flush)
        tally.number += 1
        tally.bytes += exchange.bytes
        tally.saved += not exchange.upstream_requests
        tally.seconds.add(seconds, exemplar)
        tally.first.add(seconds if first is None else first, exemplar)

    def flush(self) -> None:
        """Count in the metrics what was added."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        tallies, self._tallies = self._tallies, {}
        for (peer, namespace, kind, result, status), tally in tallies.items():
            label, metrics = self._metrics.label(namespace), self._metrics
            requests = metrics.peer_requests if peer else metrics.requests
            requests.labels(label, kind, result or "none").inc(tally.number)
            if tally.bytes:
                (metrics.peer_sent if peer else metrics.sent).labels(label).inc(tally.bytes)
            if not peer:
                metrics.recent.totals.add(result, tally.number, tally.bytes)
                self._count_client(label, kind, result or "none", status, tally)

    def _count_client(self, label: str, kind: str, result: str, status: int, tally: _Tally) -> None:
        metrics = self._metrics
        metrics.responses.labels(kind, str(status)).inc(tally.number)
        if result in STORED:
            metrics.saved.labels(label).inc(tally.bytes)
        if result in _ANSWERED:
            metrics.saved_requests.labels(label).inc(tally.saved)
        self._observe(metrics.seconds, kind, result, tally.seconds)
        self._observe(metrics.first_byte, kind, result, tally.first)

    def _observe(self, histogram: TalliedHistogram, kind: str, result: str, durations: Durations) -> None:
        histogram.labels(kind, result).take(durations)
        labels = {"kind": kind, "result": result}
        self._metrics.exemplars.keep(histogram.name, labels, durations)
