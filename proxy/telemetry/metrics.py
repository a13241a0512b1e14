"""Prometheus metrics.

An object holds them, so that several servers in one process do not mix theirs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Generic, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    Summary,
    disable_created_metrics,
    mmap_dict,
    values,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from proxy.telemetry.durations import BUCKETS, TalliedHistogram
from proxy.telemetry.exemplars import Exemplars
from proxy.telemetry.recent_requests import RecentRequests
from proxy.telemetry.traffic import Traffic
from storage.shared import SharedTable

M = TypeVar("M", Counter, Gauge, Histogram, Summary, TalliedHistogram)
NAMESPACES = 1000  # that have metrics of their own
OTHERS = "*"
PEERS = "peers"  # the label of other replicas, in place of a namespace
_SECONDS = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 60)


def share_metrics(directory: Path) -> None:
    """Count together with all processes that share `directory`.  Call it before the first Metrics()."""
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(directory)
    # prometheus_client decides this by the environment when it is imported, and that was before the fork.
    values.ValueClass = values.MultiProcessValue()  # type: ignore[no-untyped-call]
    mmap_dict._INITIAL_MMAP_SIZE = 8192  # bytes of each of seven files, which double when they are full


class _Row(Generic[M]):
    """A metric, made when it is first used: type, name, help text, labels with spaces between, options."""

    def __init__(self, kind: type[M], name: str, help: str, labels: str = "", **options: Any) -> None:
        self.make: Callable[[], M] = partial(kind, name, help, labels.split(), registry=None, **options)

    def __set_name__(self, owner: type, attribute: str) -> None:
        self._attribute = attribute

    def __get__(self, metrics: Metrics | None, owner: type) -> M:
        if metrics is None:
            raise AttributeError(self._attribute)
        # Python finds the attribute first from now on.  Two threads may come here at once.
        return vars(metrics).setdefault(self._attribute, self.make())  # type: ignore[no-any-return]


def _gauge(name: str, help: str, mode: str, labels: str = "") -> _Row[Gauge]:
    """A gauge; `mode` says how the values of several processes are combined."""
    return _Row(Gauge, name, help, labels, multiprocess_mode=mode)


class Metrics(Collector):
    """The metrics of one server: of all its processes if they share a directory, else of this object."""

    # Requests of clients, and of other replicas
    requests = _Row(Counter, "entrepot_requests_total", "Client requests.", "namespace kind result")
    responses = _Row(
        Counter,
        "entrepot_responses_total",
        "Responses to clients by status; 499 if the client left before it.",
        "kind status",
    )
    seconds = _Row(
        TalliedHistogram,
        "entrepot_request_duration_seconds",
        "Time from a client's request to the end of the response.",
        "kind result",
        buckets=BUCKETS,
    )
    first_byte = _Row(
        TalliedHistogram,
        "entrepot_time_to_first_byte_seconds",
        "Time from a client's request to the beginning of the response.",
        "kind result",
        buckets=BUCKETS,
    )
    saved = _Row(
        Counter,
        "entrepot_saved_bytes_total",
        "Body bytes sent to clients from the cache: of hits, revalidated and stale content.",
        "namespace",
    )
    saved_requests = _Row(
        Counter,
        "entrepot_saved_requests_total",
        "Client requests that the cache answered without a request to an upstream.",
        "namespace",
    )
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
    upstream_seconds = _Row(
        Histogram,
        "entrepot_upstream_request_duration_seconds",
        "Time until the headers of an upstream's response, or until the request failed.",
        "namespace host",
        buckets=_SECONDS,
    )
    upstream_requests = _Row(
        Counter,
        "entrepot_upstream_requests_total",
        "Requests to upstreams by result: ok, unknown, denied, limited, refused, failed, unreachable.",
        "namespace host result",
    )
    upstream_expiry = _gauge(
        "entrepot_upstream_certificate_expiry_timestamp_seconds",
        "When the certificate expires that an upstream showed last.",
        "livemostrecent",
        "namespace host",
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
    # Fills
    fills = _Row(Counter, "entrepot_fills_total", "Fills that ended, by result.", "namespace result")
    filling = _gauge("entrepot_fills_in_flight", "Fills in flight.", "livesum")
    waiting = _gauge("entrepot_fills_waiting", "Fills that wait for a slot.", "livemostrecent")
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
    # What is stored, and what keeps it small
    stored = _gauge(
        "entrepot_stored_bytes", "Bytes of committed blobs in caches, updated periodically.", "livemostrecent"
    )
    stored_private = _gauge(
        "entrepot_private_stored_bytes",
        "Bytes of blobs in the private registry, updated periodically.",
        "livemostrecent",
    )
    stored_by = _gauge(
        "entrepot_namespace_stored_bytes",
        "Bytes of the blobs of a namespace, once for each repository, updated periodically.",
        "livemostrecent",
        "namespace",
    )
    cache_limit = _gauge(
        "entrepot_cache_limit_bytes", "disk.cache_limit, 0 without a limit.", "livemostrecent"
    )
    disk_size = _gauge("entrepot_disk_size_bytes", "Size of the disk of disk.path.", "livemostrecent")
    disk_free = _gauge("entrepot_disk_free_bytes", "Free space of that disk.", "livemostrecent")
    disk_min_free = _gauge(
        "entrepot_disk_min_free_bytes", "disk.min_free: what must be free of that disk.", "livemostrecent"
    )
    evicted_blobs = _Row(Counter, "entrepot_evicted_blobs_total", "Blobs that were evicted.", "reason")
    evicted = _Row(Counter, "entrepot_evicted_bytes_total", "Bytes of blobs that were evicted.", "reason")
    eviction_seconds = _Row(
        Summary, "entrepot_eviction_duration_seconds", "Evictions, and how long they took.", "reason"
    )
    eviction_short = _gauge(
        "entrepot_eviction_short_bytes",
        "Bytes that exceed a limit and could not be evicted, at the last eviction by limits.",
        "mostrecent",
    )
    housekeeping = _Row(
        Counter,
        "entrepot_housekeeping_runs_total",
        "Runs of each task of the housekeeping by result: done, failed.",
        "task result",
    )
    housekeeping_seconds = _Row(
        Summary, "entrepot_housekeeping_duration_seconds", "How long runs took that were done.", "task"
    )
    housekeeping_done_at = _gauge(
        "entrepot_housekeeping_last_success_timestamp_seconds",
        "When a run of the task was last done.",
        "mostrecent",
        "task",
    )
    scrub_checked = _Row(Counter, "entrepot_scrub_checked_total", "Blobs and manifests checked.", "store")
    scrub_bytes = _Row(Counter, "entrepot_scrub_checked_bytes_total", "Bytes that were checked.", "store")
    scrub_damaged = _Row(
        Counter, "entrepot_scrub_damaged_total", "Content that was found damaged, or missing.", "store"
    )
    scrub_healed = _Row(
        Counter, "entrepot_scrub_healed_total", "Damaged blobs that were fetched again.", "store"
    )
    scrub_foreign = _Row(
        Counter, "entrepot_scrub_foreign_total", "Files found that do not belong there.", "store"
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
    extension_calls = _Row(
        Counter,
        "entrepot_extension_calls_total",
        "Calls of an extension by result: done, failed, late, wrong (returned what it must not).",
        "extension result",
    )
    collected_tags = _Row(Counter, "entrepot_collected_tags_total", "Tags that retention rules deleted.")
    collected_blobs = _Row(Counter, "entrepot_collected_blobs_total", "Pushed blobs that were collected.")
    collected = _Row(Counter, "entrepot_collected_bytes_total", "Bytes of pushed blobs that were collected.")
    collected_at = _gauge(
        "entrepot_collected_timestamp_seconds",
        "Start of the last completed collection.",
        "mostrecent",
    )
    collections = _Row(
        Counter, "entrepot_collections_total", "Collections by result: done, refused.", "result"
    )
    collection_seconds = _Row(
        Summary, "entrepot_collection_duration_seconds", "Collections, and how long they took."
    )
    policy = _Row(
        Counter,
        "entrepot_policy_refused_total",
        "Answers that a rule of the policy refuses; they are given all the same in modes warn and audit.",
        "namespace rule mode",
    )
    policy_verdicts = _Row(
        Counter,
        "entrepot_policy_verdicts_total",
        "Verdicts of the policy by result: allowed, audited, warned, refused, overridden.",
        "namespace result",
    )
    policy_held = _Row(
        Counter,
        "entrepot_policy_held_total",
        "Moves of tags that a rule of the policy holds, each once.",
        "namespace rule",
    )
    # The server
    drill = _gauge("entrepot_drill", "1 while a drill cuts off upstreams.", "livemax")
    degraded = _gauge("entrepot_degraded", "1 while /readyz says degraded.", "livemostrecent")
    troubles = _gauge(
        "entrepot_troubles",
        "Failures that are not over, by what fails: disk, blobs, records, bucket, database.",
        "livemostrecent",
        "kind",
    )
    credentials_refused = _gauge(
        "entrepot_credentials_refused", "Configured credentials that upstreams refuse now.", "livemostrecent"
    )
    workers = _gauge("entrepot_workers", "Processes that serve clients and answer.", "livemostrecent")
    peers = _gauge("entrepot_peers", "Replicas of the fleet that are known, with this one.", "livemostrecent")
    expiry = _gauge(
        "entrepot_certificate_expiry_timestamp_seconds",
        "When the certificate expires that a listener shows.",
        "livemostrecent",
        "listener",
    )
    unrecorded = _gauge(
        "entrepot_usage_pending", "Uses, moves and counts that could not be recorded yet.", "livesum"
    )
    deposits = _gauge(
        "entrepot_deposits_pending",
        "Blobs to be handed over to the store that servers share.",
        "livemostrecent",
    )
    build = _gauge("entrepot_build_info", "1, with the versions as labels.", "livemax", "version python")

    def __init__(self, exemplars: SharedTable | None = None) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the size of the exposition
        self._registry = CollectorRegistry()
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            self._registry.register(self)  # for all: each of them would take half as long as to make it
        else:  # where collect() would only cover this process
            self._all()
            MultiProcessCollector(self._registry)  # type: ignore[no-untyped-call]
            # Each type has a file, which its first value opens; the others have values without labels.
            # Later, while a crowd of clients is connected, there may be no descriptor.
            self.seconds.labels("base", "none")
        self.exemplars = Exemplars(exemplars)
        self.recent = RecentRequests()
        self.upstreams: dict[str, Traffic] = {}
        self._labels: set[str] = set()
        self._uncounted: list[Callable[[], None]] = []

    def count_later(self, count: Callable[[], None]) -> None:
        """Call `count`, which counts what is not counted yet, before the metrics are shown."""
        self._uncounted.append(count)

    def flush(self) -> None:
        """Count what this process has not counted yet."""
        for count in self._uncounted:
            count()

    def scrubbed(self, name: str) -> Counter:
        """The counter of what a scrub counts by this name."""
        made: Counter = getattr(self, f"scrub_{name}")
        return made

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

    def collect(self) -> Iterator[Metric]:
        return chain.from_iterable(each.collect() for each in self._all())

    def _all(self) -> list[Collector]:
        return [getattr(self, name) for name, row in vars(Metrics).items() if isinstance(row, _Row)]

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """All metrics and their media type: OpenMetrics if `accept` names it, else the text format 0.0.4."""
        self.flush()
        encode, media_type = choose_encoder(accept)
        return encode(self.exemplars.around(self._registry)), media_type
