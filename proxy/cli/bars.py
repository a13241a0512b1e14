"""Bars of characters: of a blob, which of its bytes are there; of other work, how much is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a server imports this module, too
    from proxy.admin.models import FillRow
    from proxy.processes.rows import SpanRow

WIDTH = 20  # characters
THERE, PARTLY, COMING, MISSING = "█▒░·"
LEGEND = f"{THERE} there  {PARTLY} partly there  {COMING} coming now  {MISSING} missing"


def has_gaps(fill: FillRow) -> bool:
    """Whether it has bytes behind a gap."""
    return len(fill.extents) > 1 or any(each.start for each in fill.extents)


def extents_bar(fill: FillRow, width: int = WIDTH) -> str:
    """A character for each part of the blob; empty while its size is unknown."""
    if fill.size <= 0:
        return ""
    return "".join(
        _cell(fill, at * fill.size // width, -(-(at + 1) * fill.size // width)) for at in range(width)
    )


def share_bar(done: float, whole: float | None, width: int = WIDTH) -> str:
    """The part of something that is done; of spaces while the whole is unknown."""
    if not whole:
        return " " * width
    there = min(width, int(width * done / whole))
    return THERE * there + MISSING * (width - there)


def _cell(fill: FillRow, start: int, stop: int) -> str:
    there = _within(fill.extents, start, stop)
    if there:
        return THERE if there >= stop - start else PARTLY
    return COMING if _within(fill.coming, start, stop) else MISSING


def _within(spans: Sequence[SpanRow], start: int, stop: int) -> int:
    """How many bytes of [start, stop) are in the spans."""
    return sum(max(0, min(stop, each.stop) - max(start, each.start)) for each in spans)
