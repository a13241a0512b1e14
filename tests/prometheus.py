"""Prometheus, and what its format says: for tests of metrics, rules and dashboards."""

from __future__ import annotations

import subprocess

from prometheus_client.parser import text_string_to_metric_families

from tests.clients.processes import require

Samples = dict[str, float]


def samples(text: str) -> Samples:
    """Each sample of an exposition, by its name and its labels as PromQL writes them, in order."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def promtool(*arguments: str, standard_input: str = "") -> str:
    """What promtool says; empty if it finds nothing wrong."""
    require("promtool", root=False)
    done = subprocess.run(
        ["promtool", *arguments], input=standard_input, capture_output=True, text=True, timeout=60
    )
    return "" if done.returncode == 0 and not done.stderr else done.stdout + done.stderr
