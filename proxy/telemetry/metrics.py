"""What the server says of itself: events, one access line a request, metrics.

An event is `noun.verb` with keys from the glossary; never a token, a password or a signed URL.  Metrics
are held by an object of their own, so that several servers in one process do not mix.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar, cast

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

from proxy.telemetry.exchange import current

M = TypeVar("M", Counter, Gauge, Histogram)
_SECONDS = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 60)


class Traffic:
    """Of this process with the upstreams of a namespace, since it started."""

    def __init__(self, received: Counter) -> None:
        self.requests = 0
        self.received = 0  # bytes
        self._received = received

    def asked(self) -> None:
        self.requests += 1
        current().upstream_requests += 1

    def took(self, number: int) -> None:
        """So many bytes of a body."""
        self.received += number
        self._received.inc(number)


class _Row(Generic[M]):
    """A row of the table of metrics: the type of one, its name, help text and labels, separated by spaces.

    `options` are passed on to `kind`.  A gauge's `multiprocess_mode` says how the values of several processes
    are combined.
    """

    def __init__(self, kind: type[M], name: str, help: str, labels: str = "", **options: Any) -> None:
        self._make: Callable[..., M] = partial(kind, name, help, labels.split(), **options)

    def __set_name__(self, owner: type, attribute: str) -> None:
        self._attribute = attribute

    def __get__(self, metrics: Metrics, owner: type) -> M:
        return cast(M, metrics.made[self._attribute])

    def make(self, registry: CollectorRegistry | None) -> M:
        return self._make(registry=registry)


def _gauge(name: str, help: str, mode: str, labels: str = "") -> _Row[Gauge]:
    return _Row(Gauge, name, help, labels, multiprocess_mode=mode)


class Metrics:
    """The metrics of one server: of all its processes where they share a directory, else of this object."""

    requests = _Row(Counter, "entrepot_requests_total", "Client requests.", "namespace kind result")
    sent = _Row(Counter, "entrepot_sent_bytes_total", "Body bytes sent to clients.", "namespace")
    pushed = _Row(Counter, "entrepot_pushed_bytes_total", "Body bytes taken from clients.", "namespace")
    received = _Row(
        Counter, "entrepot_received_bytes_total", "Body bytes received from upstreams.", "namespace"
    )
    upstream = _Row(
        Histogram,
        "entrepot_upstream_seconds",
        "Time until an upstream's response headers; status 0 where none came.",
        "namespace kind status",
        buckets=_SECONDS,
    )
    tokens = _Row(Counter, "entrepot_token_fetches_total", "Token requests.", "namespace result")
    retries = _Row(
        Counter,
        "entrepot_upstream_retries_total",
        "Requests to upstreams repeated after a failure.",
        "namespace",
    )
    open = _gauge(
        "entrepot_upstream_open", "1: the host has failed, and is let alone.", "livemax", "namespace host"
    )
    ratelimit_limit = _gauge(
        "entrepot_ratelimit_limit",
        "Requests that an upstream grants in a window.",
        "livemostrecent",
        "namespace host credential",
    )
    ratelimit_remaining = _gauge(
        "entrepot_ratelimit_remaining",
        "What remained of them when it told last.",
        "livemostrecent",
        "namespace host credential",
    )
    fills = _Row(Counter, "entrepot_fills_total", "Fills that ended.", "namespace result")
    filling = _gauge("entrepot_fills_in_flight", "Fills going on.", "livesum")
    followers = _gauge("entrepot_followers", "Clients that read a growing blob.", "livesum")
    stored = _gauge(
        "entrepot_stored_bytes", "Bytes of committed blobs, counted now and then.", "livemostrecent"
    )
    webhook_events = _Row(
        Counter,
        "entrepot_webhook_events_total",
        "Events for a webhook: queued, delivered, failed (to be tried again), dropped, lost.",
        "webhook result",
    )
    webhook_pending = _gauge(
        "entrepot_webhook_pending",
        "Events that a webhook has not been told of yet.",
        "livemostrecent",
        "webhook",
    )
    collected_blobs = _Row(Counter, "entrepot_collected_blobs_total", "Blobs that were pushed and collected.")
    collected = _Row(Counter, "entrepot_collected_bytes_total", "Bytes of blobs that were collected.")
    collected_at = _gauge(
        "entrepot_collected_timestamp_seconds",
        "When the last collection began that came to its end.",
        "mostrecent",
    )
    drill = _gauge("entrepot_drill", "1: a drill cuts upstreams off.", "livemax")

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # they double what is exported
        self._registry = CollectorRegistry()
        common = "PROMETHEUS_MULTIPROC_DIR" in os.environ
        if common:
            MultiProcessCollector(self._registry)  # type: ignore[no-untyped-call]
        # A registry of its own would only show this process.
        registry = None if common else self._registry
        rows = {name: row for name, row in vars(Metrics).items() if isinstance(row, _Row)}
        self.made = {name: row.make(registry) for name, row in rows.items()}
        self.upstreams: dict[str, Traffic] = {}

    def traffic(self, namespace: str) -> Traffic:
        found = self.upstreams.get(namespace)
        if found is None:
            found = self.upstreams[namespace] = Traffic(self.received.labels(namespace))
        return found

    def exposition(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
