"""Samples become a Markdown table: medians, the spread, and ratios of samples of the same round."""

from __future__ import annotations

from statistics import median

from tests.bench.peers import Entrepot
from tests.bench.scenarios import Measure, Scenario
from tests.bench.upstream import MIB

Results = dict[str, list[list[float]]]  # peer -> round -> one figure a measure


def ratio(measure: Measure, ours: list[float], theirs: list[float]) -> float:
    """How many times as good ours is: the median over rounds, since noise hits neighbours alike."""
    pairs = [(a, b) if measure.more_is_better else (b, a) for a, b in zip(ours, theirs, strict=True)]
    return median(good / bad if bad else float("inf") for good, bad in pairs)


def verdict(measure: Measure, figures: dict[str, list[float]]) -> str:
    if not measure.aim or Entrepot.name not in figures:
        return ""
    ours = figures[Entrepot.name]
    if not measure.aim.peer:
        met = median(ours) <= measure.aim.value * 1.005
    elif measure.aim.peer in figures:
        # As precise as it is printed.
        met = round(ratio(measure, ours, figures[measure.aim.peer]), 1) >= measure.aim.value
    else:
        return str(measure.aim)
    return f"{measure.aim}: {'met' if met else '**missed**'}"


def rows(scenario: Scenario, results: Results, peers: list[str]) -> list[str]:
    """A column for each of `peers`, and for each but Entrepôt one of how much better Entrepôt is."""
    lines = []
    for index, measure in enumerate(scenario.measures):
        figures = {peer: [sample[index] for sample in samples] for peer, samples in results.items()}
        size = f" ({scenario.size // MIB} MiB)" if (scenario.size or 0) >= MIB else ""
        cells = [f"– {measure.title}" if index else f"{measure.title}{size}", measure.unit]
        cells += [_spread(figures.get(peer, [])) for peer in peers]
        for peer in _others(peers):
            known = Entrepot.name in figures and peer in figures
            cells.append(f"{ratio(measure, figures[Entrepot.name], figures[peer]):.2f}×" if known else "")
        lines.append(f"| {' | '.join([*cells, verdict(measure, figures)])} |")
    return lines


def header(peers: list[str]) -> list[str]:
    titles = ["work", "unit", *peers, *(f"ratio to {peer}" for peer in _others(peers)), "goal"]
    return [f"| {' | '.join(titles)} |", f"|{'---|' * 2}{'--:|' * (len(titles) - 3)}---|"]


def _others(peers: list[str]) -> list[str]:
    return [peer for peer in peers if peer != Entrepot.name]


def _spread(figures: list[float]) -> str:
    if not figures:
        return ""
    low, middle, high = (_number(each) for each in (min(figures), median(figures), max(figures)))
    return middle if low == high else f"{middle} ({low}–{high})"


def _number(figure: float) -> str:
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}"
