"""What was asked for on the page, and continues without it: some fetch an image for minutes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

import structlog

from proxy.namespaces.references import FieldInvalid
from storage.concurrency import Cancelled
from storage.errors import RegistryError

log = structlog.get_logger()

REMEMBERED = 20
AT_ONCE = 20  # that are under way


@dataclass(frozen=True, slots=True)
class Job:
    """An act that was begun, at `begun`, in seconds since the epoch; `subject` is what it was done to."""

    title: str
    subject: str
    begun: float
    task: asyncio.Task[Any]

    @property
    def running(self) -> bool:
        return not self.task.done()

    @property
    def error(self) -> str | None:
        """Why it failed; None if it did not, or goes on."""
        if self.running:
            return None
        if self.task.cancelled():
            return "the server was stopped"
        error = self.task.exception()
        if error is None:
            return getattr(self.task.result(), "error", None)
        expected = isinstance(error, RegistryError | FieldInvalid)
        return (str(error) or type(error).__name__) if expected else "internal error: see the log"


class Jobs:
    """The jobs of the page.  Must be closed, which ends them."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._jobs: deque[Job] = deque(maxlen=REMEMBERED)
        self._running: set[asyncio.Task[Any]] = set()
        self._news = asyncio.Event()

    def __iter__(self) -> Iterator[Job]:
        """The last ones, the latest first."""
        return reversed(self._jobs)

    @property
    def full(self) -> bool:
        return len(self._running) >= AT_ONCE

    def begin(self, title: str, subject: str, work: Coroutine[Any, Any, Any]) -> Job:
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._ended)
        job = Job(title, subject, self._clock(), task)
        self._jobs.append(job)
        self._tell()
        return job

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, RegistryError | FieldInvalid | Cancelled):
            log.error("ui.failed", error=str(error), exc_info=error)
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def change(self) -> None:
        """Wait until a job begins or ends."""
        await self._news.wait()

    async def close(self) -> None:
        for each in self._running:
            each.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
