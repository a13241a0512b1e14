"""The rows of answers, made of counters, reports and states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from yarl import URL

from proxy.admin.models import DayRow, StatsRow, WebhookRow
from proxy.admin.reports import (
    Collected,
    CollectedRow,
    Drilling,
    Evicted,
    ExpiredRow,
    MissedRow,
    Refreshed,
    ScrubRow,
)
from proxy.cache.drill import DrillState
from proxy.cache.refresh import RefreshResult
from proxy.config.webhooks import WebhookConfig
from proxy.webhooks.queue import Queue
from storage.maintenance import collection
from storage.maintenance.eviction import EvictionReport
from storage.maintenance.scrub import Scrub
from storage.maintenance.usage import Counters


def stats_row(namespace: str, counted: Counters, *, store: bool = False) -> StatsRow:
    counters: dict[str, Any] = {name: getattr(counted, name) for name in counted.__struct_fields__}
    served = counted.hits + counted.revalidated + counted.stale + counted.misses
    return StatsRow(
        namespace=namespace,
        **counters,
        hit_ratio=counted.hit_ratio if served else None,
        byte_hit_ratio=counted.byte_hit_ratio if counted.sent_bytes else None,
        bytes_saved=0 if store else counted.bytes_saved,
        requests_saved=0 if store else counted.requests_saved,
    )


def day_row(day: str, counted: Counters) -> DayRow:
    return DayRow(
        day=f"{day[:4]}-{day[4:6]}-{day[6:]}",
        requests=counted.requests,
        sent_bytes=counted.sent_bytes,
        received_bytes=counted.received_bytes,
        upstream_requests=counted.upstream_requests,
        ahead_bytes=counted.ahead_bytes,
        bytes_saved=counted.bytes_saved,
        requests_saved=counted.requests_saved,
    )


def webhook_row(webhook: WebhookConfig, queue: Queue) -> WebhookRow:
    state = queue.state(webhook.name)
    return WebhookRow(
        name=webhook.name,
        url=f"extension {webhook.extension}" if webhook.url is None else str(URL(webhook.url).origin()),
        format=webhook.format if webhook.extension is None else "cloudevents",
        actions=list(webhook.actions),
        pending=queue.pending(webhook.name),
        oldest=queue.oldest(webhook.name),
        delivered_at=state.delivered_at,
        failing_since=state.failing_since,
        failed_at=state.failed_at,
        error=state.error,
    )


def evicted(reports: Sequence[EvictionReport], dry_run: bool) -> Evicted:
    return Evicted(
        blobs=sum(each.blobs for each in reports),
        bytes=sum(each.bytes for each in reports),
        manifests=sum(each.manifests for each in reports),
        tags=sum(each.tags for each in reports),
        links=sum(each.links for each in reports),
        seconds=sum(each.seconds for each in reports),
        short=reports[-1].short,
        dry_run=dry_run,
    )


def refreshed(done: RefreshResult) -> Refreshed:
    return Refreshed(
        repository=done.repository,
        reference=str(done.reference),
        digest=str(done.digest),
        new=done.new,
        moved=None if done.moved is None else str(done.moved),
        manifests=done.manifests,
        blobs=done.blobs,
        fetched=done.fetched,
        bytes=done.bytes,
    )


def scrub_row(scrubs: Sequence[Scrub]) -> ScrubRow:
    """The progress of scrubs that run one after the other, as one."""
    known = [each.progress for each in scrubs if each.progress is not None]
    return ScrubRow(
        begun=min((each.started_at for each in known), default=0.0),
        running=any(each.running for each in known),
        checked=sum(each.checked for each in known),
        bytes=sum(each.bytes for each in known),
        total_bytes=sum(each.total_bytes for each in known),
        damaged=sum(each.damaged for each in known),
        healed=sum(each.healed for each in known),
        foreign=sum(each.foreign for each in known),
        digest=next((str(each.current) for each in known if each.current), ""),
    )


def collected(report: collection.CollectionReport) -> Collected:
    rows = [
        CollectedRow(
            **{
                **msgspec.structs.asdict(each),
                "expired": [ExpiredRow(**msgspec.structs.asdict(tag)) for tag in each.expired],
            }
        )
        for each in report.rows
    ]
    return Collected(**{**msgspec.structs.asdict(report), "rows": rows})


def drilling(state: DrillState) -> Drilling:
    order = state.order
    return Drilling(
        running=state.left > 0,
        begun=order.begun if order else 0.0,
        seconds=order.seconds if order else 0.0,
        left=state.left,
        namespaces=list(order.namespaces) if order else [],
        missed=[
            MissedRow(
                client=each.client,
                kind=each.kind,
                repository=f"{each.namespace}/{each.repository}",
                reference=each.reference,
                count=each.count,
                first=each.first,
                last=each.last,
            )
            for each in state.missed
        ],
        untold=state.untold,
    )
