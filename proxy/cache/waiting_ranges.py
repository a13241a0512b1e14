"""Ranges of a blob that clients wait for while its origin refuses further transfers."""

from __future__ import annotations

from collections.abc import Callable

from proxy.cache.readers import LOOK, BlobSource


class WaitingRanges:
    """Who waits for which bytes, in the order in which they came; each says so again every `LOOK` seconds.

    When a transfer ends that the origin had accepted, it accepts another one in its place.

    ticks: seconds of a clock that nobody sets
    places: how many of them have ended, and nobody waited
    """

    def __init__(self, ticks: Callable[[], float]) -> None:
        self.places = 0
        self._ticks = ticks
        self._found: dict[tuple[int, int], tuple[BlobSource, float]] = {}

    def add(self, source: BlobSource, start: int, stop: int) -> None:
        """Somebody waits for [start, stop)."""
        self._found[start, stop] = source, self._ticks()

    def refused(self, source: BlobSource, start: int, stop: int) -> None:
        """The origin has refused these bytes: it accepts no more than those that are under way."""
        self.places = 0
        self.add(source, start, stop)

    def next(self, late: Callable[[int, int], int]) -> tuple[BlobSource, int, int] | None:
        """Remove and return what comes next, as far as it is late: `late` returns where that ends."""
        while self._found:
            start, stop = next(iter(self._found))
            source, since = self._found.pop((start, stop))
            if self._ticks() - since < 2 * LOOK and (stop := late(start, stop)) > start:
                return source, start, stop
        return None
