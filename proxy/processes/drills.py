"""A drill in all processes of a server: started, observed and ended together.

The order is in a file of the server's directory, since a process may be replaced during a drill.  No
process misses it: a new process opens its socket, then reads the file; the process that starts a drill
writes the file, then sends the order to the sockets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import structlog

from proxy.cache.drill import Drill, DrillOrder, DrillState, merged
from proxy.processes.server_processes import ServerProcesses
from proxy.telemetry.metrics import Metrics
from storage.errors import Denied

log = structlog.get_logger()

NEVER = DrillState(order=None, left=0.0, missed=[], untold=0)
_FILE = "drill"


def resume(drill: Drill, directory: Path) -> None:
    """Join the drill that is running in the server of a directory, if there is one."""
    with suppress(OSError, msgspec.DecodeError):
        drill.begin(msgspec.json.decode((directory / _FILE).read_bytes(), type=DrillOrder))


class DrillControl:
    """Controls drills, in the housekeeping process; `drill` is that of this process.  Must be closed."""

    def __init__(
        self,
        processes: ServerProcesses,
        drill: Drill,
        metrics: Metrics,
        clock: Callable[[], float],
        directory: Path | None,
    ) -> None:
        self._processes = processes
        self._drill = drill
        self._gauge = metrics.drill
        self._clock = clock
        self._directory = directory
        self._timer: asyncio.TimerHandle | None = None
        if directory is not None:
            resume(drill, directory)
            self._set_timer()

    async def begin(self, seconds: float, namespaces: Sequence[str]) -> DrillState:
        """Start a drill.  Raises Denied while another is running."""
        if left := self._drill.left:
            raise Denied(f"a drill is running for {left:.0f} s more: end it first")
        order = DrillOrder(begun=self._clock(), seconds=seconds, namespaces=tuple(namespaces))
        self._drill.begin(order)
        if self._directory is not None:
            new = self._directory / f"{_FILE}.new"
            new.write_bytes(msgspec.json.encode(order))
            new.replace(self._directory / _FILE)
        await self._processes.begin_drill(order)
        self._set_timer()
        log.warning("drill.begun", seconds=seconds, namespaces=list(namespaces))
        return await self.state()

    async def end(self) -> DrillState:
        """End the drill, if one is running."""
        self._drill.end()
        if self._directory is not None:
            (self._directory / _FILE).unlink(missing_ok=True)
        await self._processes.end_drill()
        self._log_end()
        return await self.state()

    async def state(self) -> DrillState:
        """The state of the drill that is running, or of the last one."""
        return merged(await self._processes.drills()) or NEVER

    def _set_timer(self) -> None:
        if left := self._drill.left:
            self._gauge.set(1)
            self._timer = asyncio.get_running_loop().call_later(left, self._log_end)

    def _log_end(self) -> None:
        """Log the end; each process ends the drill by its own clock."""
        if self._timer is not None:
            self.close()
            self._gauge.set(0)
            log.info("drill.ended")

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
