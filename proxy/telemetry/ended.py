"""Requests that have ended: counts and logs each of them."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable

from prometheus_client import Counter

from proxy.telemetry.exchange import Exchange
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.request_log import RequestLine, RequestLog

REASON, AGENT = 500, 200  # characters of a reason, and of a User-Agent, that are logged


class EndedRequests:
    """Counts and logs requests that have ended; `served` is called with each of them, and its status."""

    def __init__(
        self, metrics: Metrics, served: Callable[[Exchange, int], None] | None, log: RequestLog
    ) -> None:
        self._metrics = metrics
        self._served = served
        self._log = log
        # What ended in this turn of the event loop: to count in memory that processes share takes longer.
        self._requests: defaultdict[tuple[Counter, str, str, str], int] = defaultdict(int)
        self._sent: defaultdict[tuple[Counter, str], int] = defaultdict(int)

    def add(self, method: str, exchange: Exchange, status: int, seconds: float) -> None:
        """`seconds` are those from the request to the end of the response."""
        self._count(exchange)
        if self._served is not None and not exchange.peer:
            self._served(exchange, status)
        line = RequestLine(
            exchange.id,
            exchange.client,
            method,
            exchange.kind,
            exchange.user,
            exchange.namespace,
            exchange.repository,
            exchange.reference,
            status,
            exchange.result,
            exchange.detail,
            exchange.reason[:REASON],
            exchange.upstream_requests,
            exchange.bytes,
            exchange.received,
            round(seconds, 6),
            (exchange.agent or "")[:AGENT],
        )
        self._log.write(line)

    def _count(self, exchange: Exchange) -> None:
        if not self._requests:
            asyncio.get_running_loop().call_soon(self._count_all)
        metrics, peer = self._metrics, bool(exchange.peer)
        requests = metrics.peer_requests if peer else metrics.requests
        self._requests[requests, exchange.namespace, exchange.kind, exchange.result or "none"] += 1
        if exchange.bytes:
            self._sent[metrics.peer_sent if peer else metrics.sent, exchange.namespace] += exchange.bytes

    def _count_all(self) -> None:
        for (requests, namespace, kind, result), number in self._requests.items():
            requests.labels(self._metrics.label(namespace), kind, result).inc(number)
        for (sent, namespace), number in self._sent.items():
            sent.labels(self._metrics.label(namespace)).inc(number)
        self._requests.clear()
        self._sent.clear()
