"""Exemplars: for each bucket of a histogram, one request that is in it, such as by its trace.

The library keeps none where several processes count together; so they are in memory that these share.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

from proxy.telemetry.durations import BUCKETS, Durations
from storage.shared import SharedTable

LONGEST = 128  # characters of the labels of an exemplar, as OpenMetrics limits them
_BOUNDS = [floatToGoString(each) for each in (*BUCKETS, float("inf"))]  # type: ignore[no-untyped-call]


class Exemplars:
    """The exemplars of all histograms with `BUCKETS`; a `table` may be one that processes share."""

    def __init__(self, table: SharedTable | None = None) -> None:
        self._table = table
        self._named: set[str] = set()

    def keep(self, histogram: str, labels: Mapping[str, str], durations: Durations) -> None:
        """Keep those of the durations that the histogram took, of the child with `labels`."""
        if not durations.exemplars:
            return
        if self._table is None:
            self._table = SharedTable(records=1024, size=512)
        for bucket, (exemplar, seconds) in durations.exemplars.items():
            if sum(len(name) + len(value) for name, value in exemplar.items()) <= LONGEST:
                key = self._key(histogram, {**labels, "le": _BOUNDS[bucket]})
                self._table.put(key, (dict(exemplar), seconds, time.time()))

    def around(self, registry: CollectorRegistry) -> Collector:
        """What `registry` collects, with the exemplars."""
        return registry if self._table is None else _Exemplified(registry, self)

    def of(self, metric: Metric) -> Metric:
        """The metric with its exemplars."""
        if metric.type == "histogram":
            metric.samples = [
                each._replace(exemplar=self._find(metric.name, each.labels)) if "le" in each.labels else each
                for each in metric.samples
            ]
        return metric

    def _find(self, histogram: str, labels: Mapping[str, str]) -> Exemplar | None:
        assert self._table is not None
        found = self._table.get(self._key(histogram, labels), tuple[dict[str, str], float, float])
        return None if found is None else Exemplar(*found)

    def _key(self, histogram: str, labels: Mapping[str, str]) -> int:
        assert self._table is not None
        return self._table.key(histogram, sorted(labels.items()))


@dataclass(frozen=True, slots=True)
class _Exemplified(Collector):
    registry: CollectorRegistry
    exemplars: Exemplars

    def collect(self) -> Iterator[Metric]:
        return map(self.exemplars.of, self.registry.collect())
