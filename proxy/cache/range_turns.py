"""Turns of the ranges of one blob, beside the transfer that brings all of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from proxy.telemetry.metrics import Metrics
from storage.limits import Slots

MOST = 16  # at once


class RangeTurns:
    """The turns of ranges of the blob `share`.

    slots: how many ranges are transferred at once, of all blobs; each has a share
    waiting: how many that clients want wait for a slot
    long: how many are fetched piece by piece
    """

    def __init__(self, slots: Slots, share: str, metrics: Metrics) -> None:
        self.waiting = 0
        self.long = 0
        self._slots = slots
        self._share = share
        self._metrics = metrics
        self._most = asyncio.Semaphore(MOST)

    @property
    def spare(self) -> bool:
        """Whether long ranges are read, and no range waits for a slot."""
        return self.long > 0 and not self.waiting

    @asynccontextmanager
    async def turn(self, namespace: str, long: bool, wanted: bool = True) -> AsyncIterator[None]:
        """Wait for a slot, and hold it.  While a `long` range does, gaps are fetched piece by piece.

        Raises StorageFailed if waiting is impossible.
        """
        async with AsyncExitStack() as held:
            self.waiting += wanted
            try:
                await held.enter_async_context(self._most)
                await held.enter_async_context(self._slots.turn(namespace, self._share))
            finally:
                self.waiting -= wanted
            self.long += long
            try:
                with self._metrics.transfers.track_inprogress():
                    yield
            finally:
                self.long -= long
