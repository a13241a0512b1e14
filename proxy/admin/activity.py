"""What the server does now, of all its processes together, and what it did before."""

from __future__ import annotations

import os
from collections.abc import Sequence

import msgspec

from proxy.admin.activity_reports import Activity, SlowRow
from proxy.admin.models import Stats
from proxy.admin.rows import day_row, stats_row
from proxy.namespaces.composition import Composition
from proxy.processes.state import ProcessReport
from proxy.telemetry.recent_requests import NUMBER
from storage.maintenance.usage import Counters

TREND = 14  # days


def activity_of(composition: Composition, states: Sequence[ProcessReport]) -> Activity:
    """Blocks: it looks at the disk.  Raises StorageFailed."""
    totals = [each.totals for each in states]
    slowest = sorted((row for each in states for row in each.slowest), key=lambda row: -row.first)
    disk = os.statvfs(composition.config.disk.path)
    return Activity(
        at=composition.clock(),
        processes=len(states),
        requests=sum(each.requests for each in totals),
        served=sum(each.served for each in totals),
        misses=sum(each.misses for each in totals),
        errors=sum(each.errors for each in totals),
        sent_bytes=sum(each.sent for each in totals),
        received_bytes=sum(each.received for each in states),
        slowest=[SlowRow(**msgspec.structs.asdict(each)) for each in slowest[:NUMBER]],
        stored_bytes=composition.maintenance.eviction.stored(),
        limit=composition.config.disk.cache_limit,
        disk_bytes=disk.f_blocks * disk.f_frsize,
        free_bytes=disk.f_bavail * disk.f_frsize,
        troubles=list(dict.fromkeys(trouble for each in states for trouble in each.troubles)),
    )


def stats_of(composition: Composition, seconds: float) -> Stats:
    """What was counted of the last `seconds`.  Blocks: it reads records.  Raises StorageFailed."""
    parts = composition
    since, hosted = parts.clock() - seconds, parts.hosted.keys()
    counted = parts.usage.stats(since)
    caches = {name: counted[name] for name in sorted(counted.keys() - hosted)}
    days = {
        day: sum((found[name] for name in found.keys() - hosted), Counters())
        for day, found in parts.usage.days(TREND).items()
    }
    return Stats(
        period=seconds,
        since=since,
        namespaces=[stats_row(name, each) for name, each in caches.items()],
        stores=[stats_row(name, counted[name], store=True) for name in sorted(counted.keys() & hosted)],
        total=stats_row("", sum(caches.values(), Counters())),
        days=[day_row(day, each) for day, each in days.items()],
        stored_bytes=parts.maintenance.eviction.stored(),
        limit=parts.config.disk.cache_limit,
    )
