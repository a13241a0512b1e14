"""Prometheus metrics.

An object holds them, so that several servers in one process do not mix theirs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
    values,
)
from prometheus_client.multiprocess import MultiProcessCollector

from proxy.telemetry.exchange import current, in_exchange

M = TypeVar("M", Counter, Gauge, Histogram)
NAMESPACES = 1000  # that have metrics of their own
OTHERS = "*"
PEERS = "peers"  # the label of other replicas, in place of a namespace
_SECONDS = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 60)


def share_metrics(directory: Path) -> None:
    """Count together with all processes that share `directory`.  Call it before the first Metrics()."""
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(directory)
    # prometheus_client decides this by the environment when it is imported, and that was before the fork.
    values.ValueClass = values.MultiProcessValue()  # type: ignore[no-untyped-call]


class Traffic:
    """Requests to, and bytes from, the upstreams of a namespace since this process started.

    `ahead` of them is what no client's request caused: warming, pins, refreshes.
    """

    def __init__(self, received: Counter) -> None:
        self.requests = 0
        self.received = 0  # bytes
        self.ahead_requests = 0
        self.ahead_received = 0
        self._received = received

    def count_request(self) -> None:
        self.requests += 1
        self.ahead_requests += not in_exchange()
        current().upstream_requests += 1

    def count_received(self, number: int) -> None:
        """Count `number` bytes of a body."""
        self.received += number
        self.ahead_received += 0 if in_exchange() else number
        self._received.inc(number)


class _Row(Generic[M]):
    """A metric of the table below: its type, name, help text and labels, separated by spaces.

    `options` are passed on to `kind`.
    """

    def __init__(self, kind: type[M], name: str, help: str, labels: str = "", **options: Any) -> None:
        self._make: Callable[..., M] = partial(kind, name, help, labels.split(), **options)

    def __set_name__(self, owner: type, attribute: str) -> None:
        self._attribute = attribute

    def __get__(self, metrics: Metrics, owner: type) -> M:
        # Only for the type: each Metrics has an attribute of this name, which Python finds first.
        raise AttributeError(self._attribute)

    def make(self, registry: CollectorRegistry | None) -> M:
        return self._make(registry=registry)


def _gauge(name: str, help: str, mode: str, labels: str = "") -> _Row[Gauge]:
    """A gauge; `mode` says how the values of several processes are combined."""
    return _Row(Gauge, name, help, labels, multiprocess_mode=mode)


class Metrics:
    """The metrics of one server: of all its processes if they share a directory, else of this object."""

    requests = _Row(Counter, "entrepot_requests_total", "Client requests.", "namespace kind result")
    sent = _Row(Counter, "entrepot_sent_bytes_total", "Body bytes sent to clients.", "namespace")
    peer_requests = _Row(
        Counter, "entrepot_peer_requests_total", "Requests of other replicas.", "namespace kind result"
    )
    peer_sent = _Row(
        Counter, "entrepot_peer_sent_bytes_total", "Body bytes sent to other replicas.", "namespace"
    )
    pushed = _Row(Counter, "entrepot_pushed_bytes_total", "Body bytes received from clients.", "namespace")
    received = _Row(
        Counter, "entrepot_received_bytes_total", "Body bytes received from upstreams.", "namespace"
    )
    upstream = _Row(
        Histogram,
        "entrepot_upstream_seconds",
        "Time until an upstream's response headers; status 0 if there was no response.",
        "namespace kind status",
        buckets=_SECONDS,
    )
    tokens = _Row(Counter, "entrepot_token_fetches_total", "Token requests.", "namespace result")
    issued_tokens = _Row(
        Counter,
        "entrepot_issued_tokens_total",
        "Tokens that the token endpoint issued, by how the client was identified.",
        "scheme",
    )
    refused = _Row(
        Counter,
        "entrepot_upstream_refused_total",
        "Answers 401 and 403 to configured credentials.",
        "namespace host credential",
    )
    retries = _Row(
        Counter,
        "entrepot_upstream_retries_total",
        "Requests to upstreams that were repeated after a failure.",
        "namespace",
    )
    open = _gauge(
        "entrepot_upstream_open",
        "1 while requests to the host are paused after failures.",
        "livemostrecent",  # another process may close what one has opened
        "namespace host",
    )
    ratelimit_limit = _gauge(
        "entrepot_ratelimit_limit",
        "Requests that an upstream allows in a window.",
        "livemostrecent",
        "namespace host credential",
    )
    ratelimit_remaining = _gauge(
        "entrepot_ratelimit_remaining",
        "Requests that remain in the window, as last reported by the upstream.",
        "livemostrecent",
        "namespace host credential",
    )
    fills = _Row(Counter, "entrepot_fills_total", "Fills that ended, by result.", "namespace result")
    filling = _gauge("entrepot_fills_in_flight", "Fills in flight.", "livesum")
    transfers = _gauge(
        "entrepot_fill_transfers_in_flight", "Transfers from upstreams, of all fills in flight.", "livesum"
    )
    extents = _gauge(
        "entrepot_fill_extents", "Extents of all fills in flight: one for each without gaps.", "livesum"
    )
    repeated = _Row(
        Counter,
        "entrepot_fill_repeated_bytes_total",
        "Body bytes from upstreams that were dropped: they were there, or another transfer brings them.",
        "namespace",
    )
    followers = _gauge("entrepot_followers", "Clients that read a blob while it is filled.", "livesum")
    stored = _gauge(
        "entrepot_stored_bytes", "Bytes of committed blobs in caches, updated periodically.", "livemostrecent"
    )
    webhook_events = _Row(
        Counter,
        "entrepot_webhook_events_total",
        "Events of a webhook by result: queued, delivered, failed (and retried), dropped, lost.",
        "webhook result",
    )
    webhook_pending = _gauge(
        "entrepot_webhook_pending",
        "Events that are not delivered to a webhook yet.",
        "livemostrecent",
        "webhook",
    )
    collected_tags = _Row(Counter, "entrepot_collected_tags_total", "Tags that retention rules deleted.")
    collected_blobs = _Row(Counter, "entrepot_collected_blobs_total", "Pushed blobs that were collected.")
    collected = _Row(Counter, "entrepot_collected_bytes_total", "Bytes of pushed blobs that were collected.")
    collected_at = _gauge(
        "entrepot_collected_timestamp_seconds",
        "Start of the last completed collection.",
        "mostrecent",
    )
    policy = _Row(
        Counter,
        "entrepot_policy_refused_total",
        "Answers that a rule of the policy refuses; they are given all the same in modes warn and audit.",
        "namespace rule mode",
    )
    policy_held = _Row(
        Counter,
        "entrepot_policy_held_total",
        "Moves of tags that a rule of the policy holds, each once.",
        "namespace rule",
    )
    drill = _gauge("entrepot_drill", "1 while a drill cuts off upstreams.", "livemax")

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the size of the exposition
        self._registry = CollectorRegistry()
        common = "PROMETHEUS_MULTIPROC_DIR" in os.environ
        if common:
            MultiProcessCollector(self._registry)  # type: ignore[no-untyped-call]
        # Metrics in a registry would only cover this process.
        registry = None if common else self._registry
        rows = {name: row for name, row in vars(Metrics).items() if isinstance(row, _Row)}
        vars(self).update((name, row.make(registry)) for name, row in rows.items())
        self.upstreams: dict[str, Traffic] = {}
        self._labels: set[str] = set()

    def label(self, namespace: str) -> str:
        """The namespace as a label; `*` beyond the first ones, since clients may have made them up."""
        if namespace in self._labels:
            return namespace
        if len(self._labels) >= NAMESPACES:
            return OTHERS
        self._labels.add(namespace)
        return namespace

    def traffic(self, namespace: str) -> Traffic:
        """Of a namespace by its label()."""
        found = self.upstreams.get(namespace)
        if found is None:
            found = self.upstreams[namespace] = Traffic(self.received.labels(namespace))
        return found

    def exposition(self) -> bytes:
        """All metrics in the text format of Prometheus."""
        return generate_latest(self._registry)
