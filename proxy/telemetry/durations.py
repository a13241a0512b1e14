"""How long requests took, counted in memory until a histogram takes it all at once."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

from prometheus_client import Histogram

# From a hit, which takes less than a millisecond, to a large blob over a slow line; in seconds.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Durations:
    """How many durations are in each bucket, and their sum in seconds.

    exemplars: of a bucket, by its number, the labels and the value of the last one that had any
    """

    __slots__ = ("counts", "exemplars", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.total = 0.0
        self.exemplars: dict[int, tuple[Mapping[str, str], float]] = {}

    def add(self, seconds: float, exemplar: Mapping[str, str] | None = None) -> None:
        bucket = bisect_left(BUCKETS, seconds)
        self.counts[bucket] += 1
        self.total += seconds
        if exemplar:
            self.exemplars[bucket] = exemplar, seconds


class TalliedHistogram(Histogram):
    """A histogram with `BUCKETS` that also takes many observations at once."""

    @property
    def name(self) -> str:
        return str(self._name)

    def take(self, durations: Durations) -> None:
        """Observe all of them, in the time that one takes."""
        self._raise_if_not_observable()  # type: ignore[no-untyped-call]
        self._sum.inc(durations.total)
        for bucket, number in zip(self._buckets, durations.counts, strict=True):
            if number:
                bucket.inc(number)
