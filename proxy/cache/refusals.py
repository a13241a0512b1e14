"""Which ranges of a blob its origin has refused, and until when it is not asked again."""

from __future__ import annotations

import math
from collections.abc import Callable

from storage.errors import RegistryError

RECENT = 5.0  # seconds for which the origin is not asked again for bytes that it has refused
REST = 10.0  # seconds without further ranges after the origin has refused one beside all of the blob


class RangeRefusals:
    """The refusals of the ranges of one blob.  `ticks` are the seconds of a clock that nobody sets."""

    def __init__(self, ticks: Callable[[], float]) -> None:
        self._ticks = ticks
        self._paused_until = -math.inf
        self._spans: dict[tuple[int, int], tuple[RegistryError, float]] = {}

    @property
    def paused(self) -> bool:
        """Whether the origin is asked for no range at all."""
        return self._ticks() < self._paused_until

    def pause(self, seconds: float = REST) -> None:
        self._paused_until = self._ticks() + seconds

    def resume(self) -> None:
        self._paused_until = -math.inf

    def add(self, start: int, stop: int, error: RegistryError) -> None:
        """The origin has refused [start, stop)."""
        self._spans[start, stop] = error, self._ticks()

    def check(self, offset: int) -> None:
        """Raises the error with which the origin has just refused the byte."""
        for (start, stop), (error, at) in self._spans.items():
            if start <= offset < stop and self._ticks() - at < RECENT:
                raise error

    def errors(self) -> list[RegistryError]:
        return [error for error, _ in self._spans.values()]

    def forgive(self, start: int, stop: int) -> None:
        """Ask again for what was refused."""
        kept = {span: each for span, each in self._spans.items() if not (span[0] < stop and start < span[1])}
        self._spans = kept
