"""Requests that have ended: counts and logs each of them, and ends its span."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import UNSET

from proxy.telemetry import request_span
from proxy.telemetry.exchange import Exchange
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.request_counts import RequestCounts
from proxy.telemetry.request_log import RequestLine, RequestLog
from proxy.telemetry.tracing import NO_SPAN

REASON, AGENT = 500, 200  # characters of a reason, and of a User-Agent, that are logged


class EndedRequests:
    """Counts and logs requests that have ended; `served` is called with each of them, and its status."""

    def __init__(
        self, metrics: Metrics, served: Callable[[Exchange, int], None] | None, log: RequestLog
    ) -> None:
        self._counts = RequestCounts(metrics)
        self._recent = metrics.recent
        self._served = served
        self._log = log

    def add(
        self,
        method: str,
        exchange: Exchange,
        status: int,
        seconds: float,
        first: float | None = None,
    ) -> None:
        """`seconds` are those from the request to the end of the response, `first` to its beginning.

        Without `first`, the response came all at once.
        """
        self._counts.add(exchange, status, seconds, first, request_span.exemplar(exchange.span))
        if not exchange.peer:
            self._recent.add(method, exchange, status, seconds if first is None else first, seconds)
            if self._served is not None:
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
            UNSET if exchange.span is NO_SPAN else exchange.span.trace_id,
        )
        self._log.write(line)
        request_span.end(method, exchange, status)
