"""The fills in flight as rows, each with its speed."""

from __future__ import annotations

from collections.abc import Sequence

from proxy.admin.models import FillRow
from proxy.admin.processes import FillState

INTERVAL = 1.0  # seconds between two measurements of a speed, at least


class FillSpeeds:
    """Measures the speed of each fill from one call to the next."""

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
