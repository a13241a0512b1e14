"""Dashboards of Grafana, drawn by plotly.js: their panels on its grid, with what their queries find.

This is not how Grafana looks.  It shows what each panel is about, and what the server's metrics make of it.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from proxy.config.quantities import format_duration, format_size

COLORS = {"green": "#56a64b", "orange": "#e0752d", "red": "#e02f44", "text": "#24292e"}
# By unit: how a value is written, and the format of an axis in the language of d3.
UNITS: Mapping[str, tuple[Callable[[float], str], dict[str, str]]] = {
    "short": (lambda value: f"{value:,.6g}", {}),
    "percentunit": (lambda value: f"{value:.1%}", {"tickformat": ".0%"}),
    "bytes": (format_size, {"tickformat": ".3~s", "ticksuffix": "B"}),
    "Bps": (lambda value: f"{format_size(value)}/s", {"tickformat": ".3~s", "ticksuffix": "B/s"}),
    "s": (format_duration, {"tickformat": ".3~s", "ticksuffix": "s"}),
    "reqps": (lambda value: f"{value:.3g} req/s", {}),
    "cps": (lambda value: f"{value:.3g} c/s", {}),
    "ops": (lambda value: f"{value:.3g} ops/s", {}),
    "dateTimeAsIso": (lambda value: f"{datetime.fromtimestamp(value / 1000, UTC):%Y-%m-%d %H:%M}", {}),
}
STYLE = """
body { margin: 0; font: 13px sans-serif; background: #f4f5f5; color: #24292e }
article { padding: 6px 8px 8px }
h1 { font-size: 18px; margin: 4px }
main { display: grid; grid-template-columns: repeat(24, 1fr); grid-auto-rows: 30px; gap: 6px }
section { background: #fff; border: 1px solid #dadbdc; border-radius: 3px; overflow: hidden }
h2 { font-size: 13px; margin: 5px 8px 0 }
.row { background: none; border: 0 }
.stat p { font-size: 26px; text-align: center; margin: 18px 0 }
p.nothing { text-align: center; color: #6e7175 }
table { width: calc(100% - 16px); margin: 6px 8px; border-collapse: collapse; text-align: left }
td, th { border-bottom: 1px solid #dadbdc; padding: 3px }
"""


@dataclass(frozen=True)
class Series:
    """What Prometheus answers: labels, and values by their times."""

    labels: Mapping[str, str]
    points: Sequence[tuple[float, float]]

    @property
    def last(self) -> float:
        return self.points[-1][1]


Answers = Sequence[Sequence[Series]]  # to each target of a panel


def page(dashboards: Mapping[str, Mapping[str, Any]], answers: Mapping[str, Mapping[str, Answers]]) -> str:
    """A page of HTML with an article for each dashboard.

    `answers` has those of each dashboard, and in it those of each panel by its title.
    """
    articles = "".join(_article(name, each, answers[name]) for name, each in dashboards.items())
    head = f"<meta charset=utf-8><title>Dashboards</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en>{head}<script src='{script()}'></script>{articles}</html>"


def _article(name: str, dashboard: Mapping[str, Any], answers: Mapping[str, Answers]) -> str:
    sections = "".join(_section(name, each, answers.get(each["title"], ())) for each in dashboard["panels"])
    return f"<article id={name}><h1>{html.escape(dashboard['title'])}</h1><main>{sections}</main></article>"


def script() -> str:
    """The address of plotly.js, which draws the charts."""
    return Path(str(files("plotly").joinpath("package_data", "plotly.min.js"))).as_uri()


def is_empty(answers: Answers) -> bool:
    return not any(not math.isnan(value) for one in answers for each in one for _, value in each.points)


def _section(name: str, panel: Mapping[str, Any], answers: Answers) -> str:
    at, kind = panel["gridPos"], panel["type"]
    place = f"grid-area: {at['y'] + 1} / {at['x'] + 1} / span {at['h']} / span {at['w']}"
    title = f"<h2>{html.escape(panel['title'])}</h2>"
    if kind == "row":
        body = ""
    elif is_empty(answers):
        body = "<p class=nothing>No data</p>"
    elif kind in ("stat", "table"):
        body = (_stat if kind == "stat" else _table)(panel, answers)
    else:
        body = _chart(f"{name}-{panel['id']}", panel, answers)
    return f"<section class={kind} style='{place}'>{title}{body}</section>"


def _defaults(panel: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = panel["fieldConfig"]["defaults"]
    return found


def _stat(panel: Mapping[str, Any], answers: Answers) -> str:
    value, defaults = answers[0][0].last, _defaults(panel)
    steps = defaults.get("thresholds", {}).get("steps", [{"color": "text", "value": None}])
    reached = [each for each in steps if each["value"] is None or value >= each["value"]]
    text = f"{value:,.0f}" if defaults.get("decimals") == 0 else UNITS[defaults["unit"]][0](value)
    return f"<p style='color: {COLORS[reached[-1]['color']]}'>{html.escape(text)}</p>"


def _table(panel: Mapping[str, Any], answers: Answers) -> str:
    names = sorted({name for each in answers[0] for name in each.labels})
    write = UNITS[_defaults(panel)["unit"]][0]
    rows = [[*(each.labels.get(name, "") for name in names), write(each.last)] for each in answers[0]]
    lines = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}' for cell in row)}" for row in rows)
    return f"<table><tr>{''.join(f'<th>{name}' for name in [*names, 'Value'])}{lines}</table>"


def _chart(name: str, panel: Mapping[str, Any], answers: Answers) -> str:
    defaults, kind = _defaults(panel), panel["type"]
    axis = {"rangemode": "tozero", "automargin": True, **UNITS[defaults["unit"]][1]}
    if "max" in defaults:
        axis["range"] = [defaults["min"], defaults["max"] * 1.02]
    layout: dict[str, Any] = {
        "margin": {"l": 8, "r": 10, "t": 6, "b": 6},
        "font": {"size": 10},
        "showlegend": kind == "timeseries",
        "legend": {"orientation": "h", "y": -0.18, "font": {"size": 9}},
        "xaxis": {"automargin": True, "tickformat": "%H:%M"},
        "yaxis": {"automargin": True},
    }
    layout |= {"xaxis": axis} if kind == "bargauge" else {"yaxis": axis} if kind == "timeseries" else {}
    traces = {"timeseries": _lines, "bargauge": _bars, "heatmap": _heatmap}[kind](panel, answers)
    drawn = json.dumps([name, traces, layout, {"staticPlot": True}]).replace("<", "\\u003c")
    height = panel["gridPos"]["h"] * 36 - 34
    return f"<div id={name} style='height: {height}px'></div><script>Plotly.newPlot(...{drawn})</script>"


def legend(target: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """The name of a series, as the target has it."""
    made = re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), target["legendFormat"])
    return made or " ".join(labels.values()) or target["expr"]


def _times(series: Series) -> list[str]:
    return [datetime.fromtimestamp(time, UTC).isoformat() for time, _ in series.points]


def _lines(panel: Mapping[str, Any], answers: Answers) -> list[dict[str, Any]]:
    stacked = _defaults(panel)["custom"].get("stacking", {}).get("mode") == "normal"
    return [
        {
            "x": _times(each),
            "y": [None if math.isnan(value) else value for _, value in each.points],
            "name": legend(target, each.labels),
            "mode": "lines",
            "line": {"width": 1.5},
            **({"stackgroup": "all"} if stacked else {}),
        }
        for target, series in zip(panel["targets"], answers, strict=True)
        for each in series
    ]


def _bars(panel: Mapping[str, Any], answers: Answers) -> list[dict[str, Any]]:
    names = [legend(panel["targets"][0], each.labels) for each in answers[0]]
    values = [each.last for each in answers[0]]
    return [{"type": "bar", "y": names, "x": values, "orientation": "h", "width": 0.5}]


def _heatmap(panel: Mapping[str, Any], answers: Answers) -> list[dict[str, Any]]:
    """Each bucket of a histogram without the smaller ones, which it counts too."""
    buckets = sorted(answers[0], key=lambda each: float(each.labels["le"]))
    cells, below = [], [0.0] * len(buckets[0].points)
    for each in buckets:
        values = [value for _, value in each.points]
        cells.append([max(0.0, value - less) for value, less in zip(values, below, strict=True)])
        below = values
    names = [f"{each.labels['le']} s" for each in buckets]
    return [
        {
            "type": "heatmap",
            "x": _times(buckets[0]),
            "y": names,
            "z": cells,
            "colorscale": [[0, "#fff5eb"], [0.2, "#fdae6b"], [1, "#7f2704"]],
            "showscale": False,
        }
    ]
