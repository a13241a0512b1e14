"""The dashboards of deploy/grafana: Grafana imports them, and every panel shows something real."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

ROOT = Path(__file__).parent.parent
DASHBOARDS = ("overview", "upstreams", "storage", "fills")
KINDS = {"row", "stat", "timeseries", "table", "bargauge", "heatmap"}
UNITS = {"short", "percentunit", "bytes", "Bps", "s", "reqps", "cps", "ops", "dateTimeAsIso"}
WIDTH = 24  # of Grafana's grid


def dashboard(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "deploy" / "grafana" / f"{name}.json").read_text())
    return found


def panels(name: str) -> list[dict[str, Any]]:
    return [each for each in dashboard(name)["panels"] if each["type"] != "row"]


def expressions(name: str) -> Iterator[tuple[str, str]]:
    """Of each target, the title of its panel and what it asks."""
    for panel in panels(name):
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_is_one_that_grafana_imports(name: str) -> None:
    found = dashboard(name)
    assert found["uid"] == f"entrepot-{name}" and found["schemaVersion"] >= 36 and found["title"]
    ids = [each["id"] for each in found["panels"]]
    assert len(set(ids)) == len(ids)
    variables = {each["name"] for each in found["templating"]["list"]}
    taken: set[tuple[int, int]] = set()
    for panel in found["panels"]:
        assert panel["type"] in KINDS
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= WIDTH
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, f"{panel['title']} covers another panel"
        taken |= cells
    for panel in panels(name):
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
        assert [each["refId"] for each in panel["targets"]] == list("ABCDE")[: len(panel["targets"])]
    for title, asked in expressions(name):
        used = set(re.findall(r"\$(\w+)", asked)) - {"__rate_interval", "__range"}
        assert used <= variables, title
        assert "$instance" in asked, f"{title}: shows servers that were not chosen"


def missing(ours: Any, theirs: Any, path: str = "") -> Iterator[str]:
    """The places at which `ours` has what `theirs` has not."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key, value in ours.items():
            yield from missing(value, theirs.get(key), f"{path}.{key}")
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for each, other in zip(ours, theirs, strict=True):
            yield from missing(each, other, f"{path}[]")
    elif ours != theirs:
        yield path


@pytest.mark.parametrize("name", DASHBOARDS)
def test_grafanas_own_types_know_every_field(name: str) -> None:
    """What they do not know is lost when they read a dashboard and write it again."""
    register_default_plugins()
    found = dashboard(name)
    written = json.loads(json.dumps(Dashboard.from_json(found), cls=JSONEncoder))
    # Grafana writes the definition of a variable, and reads only its query.
    assert set(missing(found, written)) <= {".templating.list[].definition"}
    found["panels"][0]["gridPosition"] = found["panels"][0].pop("gridPos")
    assert ".panels[].gridPosition" in set(
        missing(found, json.loads(json.dumps(Dashboard.from_json(found), cls=JSONEncoder)))
    )


def test_titles_are_not_used_twice_in_a_dashboard() -> None:
    for name in DASHBOARDS:
        titles = [each["title"] for each in dashboard(name)["panels"]]
        assert len(set(titles)) == len(titles)


def test_dashboards_show_every_metric() -> None:
    made = set(re.findall(r"entrepot_[a-z_]+", (ROOT / "proxy/telemetry/metrics.py").read_text()))
    asked = " ".join(text for name in DASHBOARDS for _, text in expressions(name))
    used = {re.sub("_(bucket|sum|count)$", "", each) for each in re.findall(r"entrepot_[a-z_]+", asked)}
    assert used <= made
    assert made - used <= UNSEEN.keys()


# Metrics that no panel shows, and why.
UNSEEN = {
    "entrepot_peer_sent_bytes_total": "the requests of replicas are shown",
    "entrepot_peers": "the alert for a replica is about one that is known",
    "entrepot_collection_duration_seconds": "collections are rare",
    "entrepot_scrub_checked_total": "their bytes are shown",
    "entrepot_extension_calls_total": "most servers have no extensions",
    "entrepot_issued_tokens_total": "the requests for them are among all requests",
}
