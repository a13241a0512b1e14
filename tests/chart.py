"""The chart in deploy/helm, and what is made of it and of the schema of the configuration.

That is the part of its schema for `config`, the table of its values in the manual, and deploy/kustomize.
`python -m tests.chart` writes them; a test checks that this has been done.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests import config_schema
from tests.clients.processes import GO

ROOT = Path(__file__).parent.parent
CHART = ROOT / "deploy" / "helm" / "entrepot"
SCHEMA = CHART / "values.schema.json"
VALUES = CHART / "values.yaml"
KUSTOMIZE = ROOT / "deploy" / "kustomize"
PAGE = ROOT / "docs" / "install" / "kubernetes.md"
TABLE = "| Value | Default | Meaning |\n|---|---|---|\n"
RELEASE = "entrepot"  # with this name, the name of the chart is not added to it
OWN = ("listen", "admin", "admin_token")  # keys of the configuration that the chart sets
BY_HELM = ("helm.sh/chart", "app.kubernetes.io/managed-by")

FAST = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Manifest = dict[str, Any]


def tool(name: str) -> str | None:
    """A program that the wheels of the tests bring, or another one of that name."""
    own = Path(sys.executable).with_name(name)
    return str(own) if own.exists() else shutil.which(name)


def run_tool(name: str, *words: str | Path, ok: bool = True, given: str | None = None) -> str:
    """What a program prints, or what it says against it if it is not `ok`."""
    command = [tool(name) or name, *map(str, words)]
    done = subprocess.run(
        command, input=given, env={**os.environ, **GO}, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout if ok else done.stderr


def helm(*words: str | Path, ok: bool = True, given: str | None = None) -> str:
    return run_tool("helm", *words, ok=ok, given=given)


def render(values: Mapping[str, Any] | None = None, *words: str) -> list[Manifest]:
    """The manifests that the chart makes of values."""
    return [each for each in yaml.load_all(_rendered(json.dumps(values or {}), words), FAST) if each]


@cache
def _rendered(values: str, words: tuple[str, ...]) -> str:
    return helm("template", RELEASE, CHART, "--namespace=registry", "--values=-", *words, given=values)


def refusal(values: Mapping[str, Any]) -> str:
    """Why helm refuses values."""
    return helm("template", RELEASE, CHART, "--values=-", ok=False, given=json.dumps(values))


def schema() -> str:
    """The schema of the values, with the one of the configuration in it as it is now.

    Keys that the chart sets are not in it, and none that is then complete is required.
    """
    made = json.loads(SCHEMA.read_text(encoding="utf-8"))
    config = _for_go(json.loads(config_schema.FILE.read_text(encoding="utf-8")))
    for name in OWN:
        del config["properties"][name]
    del config["definitions"]["DiskConfig"]["properties"]["path"]
    for name in ("TLS", "PeersConfig"):
        config["definitions"][name].pop("required", None)
    made["definitions"] = config.pop("definitions")
    del config["$schema"]
    made["properties"]["config"] = config
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


def _for_go(tree: Any) -> Any:
    """Without look-aheads in patterns, which regular expressions of Go do not have."""
    if isinstance(tree, dict):
        return {key: _for_go(each) for key, each in tree.items()}
    if isinstance(tree, list):
        return [_for_go(each) for each in tree]
    return tree.replace("(?=.)", "") if isinstance(tree, str) else tree


def table() -> str:
    """A row for each value that values.yaml explains, of what it says."""
    rows = []
    for path, default, meaning in _explained(VALUES.read_text(encoding="utf-8").splitlines()):
        shown = json.dumps(default) if isinstance(default, (dict, list)) else yaml.safe_dump(default)
        shown = shown.removesuffix("\n...\n").strip()
        known = "" if shown in ("null", "''") else f"`{shown}`"
        rows.append(f"| `{path}` | {known} | {meaning} |\n")
    return TABLE + "".join(rows)


def _explained(lines: list[str]) -> Iterator[tuple[str, Any, str]]:
    tree = yaml.safe_load("\n".join(lines))
    path: list[str] = []
    meaning: list[str] = []
    for line in lines:
        if found := re.match(r"( *)# (.*)", line):
            meaning.append(found[2])
        elif found := re.match(r"( *)(\w+):", line):
            path = [*path[: len(found[1]) // 2], found[2]]
            if meaning:
                default = tree
                for name in path:
                    default = default[name]
                yield ".".join(path), default, " ".join(meaning).replace("|", "\\|")
            meaning = []
        else:
            meaning = []


def page() -> str:
    """The page, with the table as it is now."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(TABLE)
    after = rest.partition("\n\n")[2]
    return f"{before}{table()}\n{after}"


def kustomized(manifests: list[Manifest]) -> tuple[str, list[Manifest]]:
    """The configuration, and the manifests as deploy/kustomize has them.

    Without what is helm's: its labels, the checksum in place of which kustomize has a name, the test, and
    the secret, whose content is for nobody else to know.
    """
    [config] = [each["data"]["entrepot.yml"] for each in manifests if each["kind"] == "ConfigMap"]
    left = []
    for each in manifests:
        if each["kind"] in ("ConfigMap", "Secret") or "helm.sh/hook" in each["metadata"].get(
            "annotations", {}
        ):
            continue
        for name in BY_HELM:
            each["metadata"]["labels"].pop(name)
        if template := each.get("spec", {}).get("template"):
            template["metadata"]["annotations"].pop("checksum/config")
        left.append(each)
    return config, left


BASES: Mapping[str, Mapping[str, Any]] = {"base": {}, "nodes": {"mode": "DaemonSet"}}


def bases() -> dict[Path, str]:
    """The files of deploy/kustomize that are made of the chart."""
    found = {}
    for name, values in BASES.items():
        config, manifests = kustomized(render(values))
        found[KUSTOMIZE / name / "entrepot.yml"] = config
        for each in manifests:
            path = KUSTOMIZE / name / f"{each['kind'].lower()}.yaml"
            text = yaml.safe_dump(each, sort_keys=False)
            found[path] = f"{found[path]}---\n{text}" if path in found else text
    return found


def written() -> dict[Path, str]:
    """All that is made, by the file that has it."""
    return {SCHEMA: schema(), PAGE: page(), **bases()}


if __name__ == "__main__":
    for path, text in written().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
