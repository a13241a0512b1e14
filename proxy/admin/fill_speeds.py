"""The fills in flight as rows, each with its speed; and the blobs of which parts are kept."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path

from proxy.admin.models import FillRow
from proxy.processes.rows import SpanRow
from proxy.processes.state import DETAIL, FillState
from storage.disk.kept import KeptParts, extents_of
from storage.maintenance.eviction import Eviction

INTERVAL = 1.0  # seconds between two measurements of a speed, at least


class FillSpeeds:
    """Measures the speed of each fill from one call to the next; at first, from its beginning."""

    def __init__(self) -> None:
        self._measured: dict[str, tuple[float, int, float]] = {}  # digest: time, bytes then, and speed

    def rows(self, fills: Sequence[FillState], now: float) -> list[FillRow]:
        running = {each.digest for each in fills}
        self._measured = {digest: each for digest, each in self._measured.items() if digest in running}
        return [self._row(each, now) for each in fills]

    def _row(self, fill: FillState, now: float) -> FillRow:
        at, before, speed = self._measured.get(fill.digest, (fill.started, 0, 0.0))
        if now - at >= INTERVAL:
            speed = max(0.0, (fill.bytes - before) / (now - at))
            self._measured[fill.digest] = now, fill.bytes, speed
        elif fill.digest not in self._measured and now > fill.started:  # better than nothing
            speed = fill.bytes / (now - fill.started)
        return FillRow(
            digest=fill.digest,
            namespace=fill.namespace,
            repository=fill.repository,
            bytes=fill.bytes,
            size=fill.size,
            started=fill.started,
            followers=fill.followers,
            pid=fill.pid,
            own=fill.own,
            extents=fill.extents,
            coming=fill.coming,
            repeated=fill.repeated,
            speed=speed,
            eta=(fill.size - fill.bytes) / speed if speed and fill.size >= 0 else None,
        )


def idle_rows(eviction: Eviction, root: Path, running: Collection[str]) -> list[FillRow]:
    """The blobs of which parts are kept in the directory `root`, and no fill is `running`.  Blocks."""
    found = eviction.expiring()
    return [_idle(root, parts, expires) for parts, expires in found if parts.blob.digest not in running]


def _idle(root: Path, parts: KeptParts, expires: float) -> FillRow:
    extents, repository = extents_of(root, parts.blob.digest), min(parts.repositories)
    return FillRow(
        digest=str(parts.blob.digest),
        namespace=repository.partition("/")[0],
        repository=repository,
        bytes=extents.total,
        size=parts.size,
        started=parts.blob.used_at,
        followers=0,
        pid=0,
        own=False,
        extents=[SpanRow(start=start, stop=stop) for start, stop in extents.joined(parts.size // DETAIL)],
        coming=[],
        repeated=0,
        speed=0.0,
        eta=None,
        idle=True,
        expires=None if math.isinf(expires) else expires,
    )
