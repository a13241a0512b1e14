"""What the server does now, of all its processes together."""

from __future__ import annotations

import os
from collections.abc import Sequence

import msgspec

from proxy.admin.activity_reports import Activity, SlowRow
from proxy.admin.processes import ProcessReport
from proxy.namespaces.composition import Composition
from proxy.telemetry.recent_requests import NUMBER


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
