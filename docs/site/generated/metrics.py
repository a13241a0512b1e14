"""Every metric, of the table that declares them."""

from __future__ import annotations

from collections.abc import Iterator

from generated.markdown import code, prose, table
from proxy.telemetry.metrics import Metrics, _Row

KINDS = {"TalliedHistogram": "histogram"}
_HEAD = """\
# Metrics

What `/metrics` of the admin listener shows. A histogram has `_bucket`, `_sum` and `_count`.
[Operations](../operations.md#metrics) says what to watch, and [Monitoring](../operations.md#monitoring) has
alerts and dashboards.
"""


def page() -> str:
    return f"{_HEAD}\n" + table(("Metric", "Type", "Labels", "Meaning"), declared()) + "\n"


def declared() -> Iterator[tuple[str, str, str, str]]:
    """The name, type, labels and meaning of each."""
    for row in vars(Metrics).values():
        if isinstance(row, _Row):
            kind, (name, meaning, labels) = row.make.func, row.make.args  # type: ignore[attr-defined]
            shown = KINDS.get(kind.__name__, kind.__name__.lower())
            yield code(name), shown, " ".join(map(code, labels)), prose(meaning)
