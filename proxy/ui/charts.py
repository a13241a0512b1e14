"""The geometry of charts, which templates draw as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 700, 190  # of a chart with columns, with room for its labels
_LEFT, _TOP, _BOTTOM = 78, 10, 24  # on the left is room for 1023.9 MiB
_STEPS = (1, 2, 4, 5, 8, 10)  # of a scale, times a power of 10 or 1024
LINES = 4


@dataclass(frozen=True, slots=True)
class ChartColumn:
    """A bar of two parts, `lower` and `upper`, each its y and height; `text` says what it stands for."""

    x: float
    width: float
    lower: tuple[float, float]
    upper: tuple[float, float]
    label: str
    text: str


@dataclass(frozen=True, slots=True)
class ColumnChart:
    """Columns, and the lines of their scale: the y and the value of each."""

    columns: Sequence[ChartColumn]
    lines: Sequence[tuple[float, float]]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT

    @property
    def base(self) -> int:
        return self.height - _BOTTOM


def column_chart(bars: Sequence[tuple[str, float, float, str]], unit: int = 1024) -> ColumnChart:
    """A chart of bars: the label of each, the values of its lower and upper part, and a text.

    `unit` is 1024 for bytes, 10 for numbers.
    """
    sums = (lower + upper for _, lower, upper, _ in bars)
    top = scale(max(LINES, *sums), unit)  # no two lines have the same whole number
    base, room = HEIGHT - _BOTTOM, HEIGHT - _BOTTOM - _TOP
    step = (WIDTH - _LEFT) / max(1, len(bars))
    columns = []
    for number, (label, lower, upper, text) in enumerate(bars):
        low, high = room * lower / top, room * upper / top
        x = _LEFT + number * step + step * 0.15
        parts = (base - low, low), (base - low - high, high)
        columns.append(ChartColumn(x, step * 0.7, *parts, label, text))
    lines = [(base - room * part / LINES, top * part / LINES) for part in range(LINES + 1)]
    return ColumnChart(columns, lines)


def scale(largest: float, unit: int) -> float:
    """A round number that is not less than `largest`."""
    power = 1.0
    while power * unit <= largest:
        power *= unit
    if unit == 10:
        return next(power * step for step in _STEPS if power * step >= largest)
    tens = 1
    while True:
        for step in _STEPS:
            if power * step * tens >= largest:
                return power * step * tens
        tens *= 10
