"""A drill over all processes of a server: begun, looked at and ended as one.

The order lies in a file of the server's directory, since processes may be replaced while a drill lasts: who
comes new opens its socket, then reads the file; who orders writes the file, then tells the sockets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import structlog

from proxy.admin.peers import ServerProcesses
from proxy.cache.drill import Drill, DrillOrder, DrillState, merged
from proxy.telemetry.metrics import Metrics
from storage.errors import Denied

log = structlog.get_logger()

NEVER = DrillState(order=None, left=0.0, missed=[], untold=0)
_FILE = "drill"


def resume(drill: Drill, directory: Path) -> None:
    """Take part in what goes on in the server whose directory it is."""
    with suppress(OSError, msgspec.DecodeError):
        drill.begin(msgspec.json.decode((directory / _FILE).read_bytes(), type=DrillOrder))


class DrillControl:
    """Of the process that administers the server; `drill` is its own.  To be closed."""

    def __init__(
        self,
        everyone: ServerProcesses,
        drill: Drill,
        metrics: Metrics,
        clock: Callable[[], float],
        directory: Path | None,
    ) -> None:
        self._everyone = everyone
        self._drill = drill
        self._gauge = metrics.drill
        self._clock = clock
        self._directory = directory
        self._timer: asyncio.TimerHandle | None = None
        if directory is not None:
            resume(drill, directory)
            self._go_on()

    async def begin(self, seconds: float, namespaces: Sequence[str]) -> DrillState:
        """Raises Denied while there is another."""
        if left := self._drill.left:
            raise Denied(f"a drill goes on for {left:.0f} s more: end it first")
        order = DrillOrder(begun=self._clock(), seconds=seconds, namespaces=tuple(namespaces))
        self._drill.begin(order)
        if self._directory is not None:
            new = self._directory / f"{_FILE}.new"
            new.write_bytes(msgspec.json.encode(order))
            new.replace(self._directory / _FILE)
        await self._everyone.begin_drill(order)
        self._go_on()
        log.warning("drill.begun", seconds=seconds, namespaces=list(namespaces))
        return await self.state()

    async def end(self) -> DrillState:
        """Where none goes on, that is all right."""
        self._drill.end()
        if self._directory is not None:
            (self._directory / _FILE).unlink(missing_ok=True)
        await self._everyone.end_drill()
        self._over()
        return await self.state()

    async def state(self) -> DrillState:
        """Of the one that goes on, or was the last."""
        return merged(await self._everyone.drills()) or NEVER

    def _go_on(self) -> None:
        if left := self._drill.left:
            self._gauge.set(1)
            self._timer = asyncio.get_running_loop().call_later(left, self._over)

    def _over(self) -> None:
        """Each process knows by itself when its time is up: this only tells of it."""
        if self._timer is not None:
            self.close()
            self._gauge.set(0)
            log.info("drill.ended")

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
