"""The repositories, as they were some seconds ago: to read all of them takes long, and screens sort them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from proxy.admin.models import Listed, RepositoryRow
from proxy.admin.operations import Operations
from proxy.ui.listing import ROWS, ListView
from storage.concurrency import SingleFlight, run_in_thread

KEPT = 10.0  # seconds, as the API keeps its summaries
REST = 20  # times as long as it takes to read them
UNUSED = 300.0  # seconds after which they take no memory any more

ORDERS: dict[str, Callable[[RepositoryRow], float]] = {
    "tags": lambda row: row.tags or 0,
    "images": lambda row: row.manifests or 0,
    "size": lambda row: row.bytes or 0,
    "used": lambda row: row.last_used or 0.0,
}


class RepositorySnapshot:
    """The repositories of all namespaces.  Must be closed."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations
        self._flight = SingleFlight()
        self._known: Listed | None = None
        self._until = 0.0
        self._dropping: asyncio.TimerHandle | None = None

    async def get(self) -> Listed:
        """Raises StorageFailed."""
        if self._dropping is not None:
            self._dropping.cancel()
        self._dropping = asyncio.get_running_loop().call_later(UNUSED, self._drop)
        if self._known is not None and time.monotonic() < self._until:
            return self._known
        return await self._flight.join("", self._read)

    async def _read(self) -> Listed:
        begun = time.monotonic()
        self._known = await self._operations.repositories()
        ended = time.monotonic()
        self._until = ended + max(KEPT, REST * (ended - begun))
        return self._known

    def _drop(self) -> None:
        self._known = None

    def forget(self) -> None:
        """Called after an act that may have changed them."""
        self._until = 0.0

    async def page(self, view: ListView) -> tuple[Sequence[RepositoryRow], int]:
        """The rows of a page, and the number of all that match."""
        return await run_in_thread(_page, (await self.get()).repositories, view)

    async def close(self) -> None:
        if self._dropping is not None:
            self._dropping.cancel()
        await self._flight.close()


def _page(rows: Sequence[RepositoryRow], view: ListView) -> tuple[Sequence[RepositoryRow], int]:
    words = view.search.lower().split()
    found = [row for row in rows if all(word in row.repository.lower() for word in words)] if words else rows
    if view.sort in ORDERS:
        found = sorted(found, key=ORDERS[view.sort], reverse=view.reverse)
    elif view.reverse:
        found = found[::-1]
    return found[view.offset : view.offset + ROWS], len(found)
