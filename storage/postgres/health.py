"""The state of a database: its failures, each logged once for all processes of a server."""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

from storage.disk.troubles import Trouble, Troubles

log = structlog.get_logger()

KIND = "database"


class DatabaseHealth:
    """The state of the database `name`.  Thread-safe.

    `clock` returns seconds.  Processes may share `troubles`.
    """

    def __init__(
        self, name: str, clock: Callable[[], float] = time.time, troubles: Troubles | None = None
    ) -> None:
        self._name = name
        self._clock = clock
        self._troubles = Troubles() if troubles is None else troubles

    def failed(self, cause: str) -> None:
        """Report that the database could not be used."""
        trouble = Trouble(KIND, 0, self._name, self._name, cause, 0, self._clock())
        if self._troubles.add(trouble):
            log.error("records.failed", database=self._name, cause=cause, action="pushes are answered 503")

    def worked(self) -> None:
        """Report that the database was used."""
        if self._troubles:
            for each in self._troubles.remove(self._has):
                log.info("records.recovered", database=self._name, cause=each.cause)

    def _has(self, trouble: Trouble) -> bool:
        return trouble.kind == KIND and trouble.root == self._name

    def troubles(self) -> list[str]:
        """A sentence for each cause that is not over."""
        return [f"{each.path}: {each.cause}" for each in self._troubles if self._has(each)]
