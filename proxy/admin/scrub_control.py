"""The scrub that an operator requests, beside the background scrub of the server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import structlog

from proxy.admin.reports import Scrubbing
from proxy.admin.rows import scrub_row
from proxy.connections.failures import reason
from storage.errors import RegistryError
from storage.maintenance.scrub import Heal, Scrub

log = structlog.get_logger()


class ScrubControl:
    """Starts scrubs at full speed, one at a time.  Must be closed.

    The `background` scrubs are slow and take days; both kinds share what they find.  `heal` fetches damaged
    content of the cache again.
    """

    def __init__(self, background: Sequence[Scrub], heal: Heal | None, clock: Callable[[], float]) -> None:
        self._background = background
        self._scrubs = [
            Scrub(each.store, None, clock, kept=each.kept, counted=each.counted) for each in background
        ]
        self._heal = heal
        self._task: asyncio.Task[None] | None = None
        self._error: str | None = None

    def start(self) -> None:
        """Start a scrub, unless one is running."""
        if self._task is None or self._task.done():
            for each in self._scrubs:
                each.begin()
            self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        self._error = None
        cache, *private = self._scrubs
        try:
            await cache.run(self._heal)
            for each in private:
                await each.run()
        except RegistryError as error:
            self._error = str(error)
        except Exception as error:
            log.exception("scrub.failed", error=str(error))
            self._error = f"an unexpected fault ({reason(error)}); the log of the server has more"
        finally:
            for each in self._scrubs:
                each.end()

    def state(self) -> Scrubbing:
        return Scrubbing(
            background=scrub_row(self._background), asked=scrub_row(self._scrubs), error=self._error
        )

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
