"""What the server says of itself: events, one access line a request, metrics.

An event is `noun.verb` with keys from the glossary; never a token, a password or a signed URL.  Metrics
are held by an object of their own, so that several servers in one process do not mix.
"""

from __future__ import annotations

import os

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


class Metrics:
    """Of all workers, where they have a directory for them in common; else of this object."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # they double what is exported
        self._common = "PROMETHEUS_MULTIPROC_DIR" in os.environ
        self._registry = CollectorRegistry()
        # A registry of their own would only tell of this process.
        registry = None if self._common else self._registry
        if self._common:
            MultiProcessCollector(self._registry)  # type: ignore[no-untyped-call]
        self.requests = Counter(
            "entrepot_requests_total", "Client requests.", ["namespace", "kind", "result"], registry=registry
        )
        self.sent = Counter(
            "entrepot_sent_bytes_total", "Body bytes sent to clients.", ["namespace"], registry=registry
        )
        self.pushed = Counter(
            "entrepot_pushed_bytes_total", "Body bytes taken from clients.", ["namespace"], registry=registry
        )
        self.received = Counter(
            "entrepot_received_bytes_total",
            "Body bytes received from upstreams.",
            ["namespace"],
            registry=registry,
        )
        self.upstream = Histogram(
            "entrepot_upstream_seconds",
            "Time until an upstream's response headers; status 0 where none came.",
            ["namespace", "kind", "status"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.tokens = Counter(
            "entrepot_token_fetches_total", "Token requests.", ["namespace", "result"], registry=registry
        )
        self.retries = Counter(
            "entrepot_upstream_retries_total",
            "Requests to upstreams repeated after a failure.",
            ["namespace"],
            registry=registry,
        )
        self.open = Gauge(
            "entrepot_upstream_open",
            "1: the host has failed, and is let alone.",
            ["namespace", "host"],
            multiprocess_mode="livemax",
            registry=registry,
        )
        self.ratelimit_limit = Gauge(
            "entrepot_ratelimit_limit",
            "Requests that an upstream grants in a window.",
            ["namespace", "host", "credential"],
            multiprocess_mode="livemostrecent",
            registry=registry,
        )
        self.ratelimit_remaining = Gauge(
            "entrepot_ratelimit_remaining",
            "What remained of them when it told last.",
            ["namespace", "host", "credential"],
            multiprocess_mode="livemostrecent",
            registry=registry,
        )
        self.fills = Counter(
            "entrepot_fills_total", "Fills that ended.", ["namespace", "result"], registry=registry
        )
        self.filling = Gauge(
            "entrepot_fills_in_flight", "Fills going on.", multiprocess_mode="livesum", registry=registry
        )
        self.followers = Gauge(
            "entrepot_followers",
            "Clients that read a growing blob.",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.stored = Gauge(
            "entrepot_stored_bytes",
            "Bytes of committed blobs, counted now and then.",
            multiprocess_mode="livemostrecent",
            registry=registry,
        )
        self.webhook_events = Counter(
            "entrepot_webhook_events_total",
            "Events for a webhook: queued, delivered, failed (to be tried again), dropped, lost.",
            ["webhook", "result"],
            registry=registry,
        )
        self.webhook_pending = Gauge(
            "entrepot_webhook_pending",
            "Events that a webhook has not been told of yet.",
            ["webhook"],
            multiprocess_mode="livemostrecent",
            registry=registry,
        )
        self.collected_blobs = Counter(
            "entrepot_collected_blobs_total", "Blobs that were pushed and collected.", registry=registry
        )
        self.collected = Counter(
            "entrepot_collected_bytes_total", "Bytes of blobs that were collected.", registry=registry
        )
        self.collected_at = Gauge(
            "entrepot_collected_timestamp_seconds",
            "When the last collection began that came to its end.",
            multiprocess_mode="mostrecent",
            registry=registry,
        )

        self.drill = Gauge(
            "entrepot_drill",
            "1: a drill cuts upstreams off.",
            multiprocess_mode="livemax",
            registry=registry,
        )

        self.upstreams: dict[str, Traffic] = {}

    def traffic(self, namespace: str) -> Traffic:
        found = self.upstreams.get(namespace)
        if found is None:
            found = self.upstreams[namespace] = Traffic(self.received.labels(namespace))
        return found

    def exposition(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
