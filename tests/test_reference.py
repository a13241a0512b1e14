"""The reference of the site, which is made of the code: nothing that the code declares is left out."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import storage.errors
from proxy.cli.main import main
from proxy.config.schema import Config
from proxy.telemetry.metrics import Metrics
from proxy.web.routes import Endpoint
from tests.config_schema import _Maker
from tests.documentation import ROOT
from tests.test_admin import DOCUMENT
from tests.test_docs import _logged

SITE = ROOT / "docs" / "site"


@pytest.fixture(scope="module")
def generated() -> ModuleType:
    """The generators, as the hooks of the site import them."""
    sys.path.insert(0, str(SITE))
    try:
        return importlib.import_module("generated")
    finally:
        sys.path.remove(str(SITE))


@pytest.fixture(scope="module")
def pages(generated: ModuleType) -> dict[str, str]:
    """By the names of their files."""
    return {Path(path).name: make() for path, make in generated.PAGES.items()}


def rows(page: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]


@pytest.mark.clients
def test_every_key_of_the_configuration_is_there(pages: dict[str, str]) -> None:
    maker = _Maker()
    sections = {"": maker.section(Config), **maker.definitions}
    page = pages["configuration.md"]
    assert page.count("\n## ") == len(sections)
    for section in sections.values():
        [text] = [
            part
            for part in page.split("\n## ")
            if all(f"\n| `{key}` |" in part for key in section["properties"])
            and part.count("\n| `") == len(section["properties"])
        ][:1]
        for key, value in section["properties"].items():
            if isinstance(value.get("default"), str):
                assert re.search(rf"^\| `{key}` \|.*`{re.escape(value['default'])}`", text, re.MULTILINE)
    assert "## `namespaces.NAME.upstream`" in page
    assert "## `namespaces.NAME.tags[]`" in page


def options(command: click.Command) -> set[str]:
    return {flag for each in command.params if isinstance(each, click.Option) for flag in each.opts}


def test_every_command_and_option_is_there(pages: dict[str, str]) -> None:
    page, seen = pages["commands.md"], 0
    pending: list[tuple[str, click.Command]] = [("entrepot", main)]
    while pending:
        name, command = pending.pop()
        if isinstance(command, click.Group):
            pending += [(f"{name} {each}", below) for each, below in command.commands.items()]
        if command is main or command.hidden:
            continue
        seen += 1
        section = page.partition(f"\n## `{name}`\n")[2].partition("\n## ")[0]
        assert f"Usage: {name}" in section
        shown = options(command) - {
            flag for each in command.params if getattr(each, "hidden", False) for flag in each.opts
        }
        assert {each for each in shown if each not in section} == set(), name
    assert seen > 40


@pytest.mark.clients
def test_every_event_is_there_with_its_meaning(pages: dict[str, str]) -> None:
    found = {row[0].strip("`"): row for row in rows(pages["events.md"])}
    assert found.keys() == _logged()
    unsaid = {name for name, row in found.items() if len(row) < 4 or not row[3].strip()}
    assert {name for name in unsaid if found[name][1] != "debug"} == set()
    assert found["upstream.limited"][1:3] == ["warning", "`credential` `host` `namespace` `seconds`"]
    assert "](../fleet.md#one-view)" in found["act.learned"][3]
    assert "](../operations.md#the-audit-log)" in found["audit.failed"][3]


def test_every_metric_is_there_with_its_labels(pages: dict[str, str]) -> None:
    metrics = Metrics()
    metrics.exposition()  # each is made when it is used
    declared = {each for each in vars(metrics).values() if hasattr(each, "_labelnames")}
    assert len(declared) > 40
    found = {row[0].strip("`"): row for row in rows(pages["metrics.md"])}
    named = set(re.findall(r'"(entrepot_[a-z_]+)"', (ROOT / "proxy/telemetry/metrics.py").read_text()))
    assert found.keys() == named
    for each in declared:
        [row] = [row for name, row in found.items() if name.removesuffix("_total") == each._name]
        assert row[2].replace("`", "").split() == [*each._labelnames]


def faults(document: dict[str, Any]) -> list[Exception]:
    """What is wrong with a document of OpenAPI."""
    from openapi_spec_validator import OpenAPIV31SpecValidator  # a third of a second: for two tests

    return [*OpenAPIV31SpecValidator(document).iter_errors()]


@pytest.mark.clients
def test_the_document_of_the_admin_api_is_openapi() -> None:
    assert faults(DOCUMENT) == []


@pytest.mark.parametrize(
    "change",
    [
        {"paths": {"/a": {"get": {"responses": {"200": {}}}}}},
        {"info": {"title": "x"}},
        {"paths": {"/a/{b}": {"get": {"responses": {"200": {"description": ""}}}}}},
    ],
)
def test_a_document_that_is_none_is_found(change: dict[str, Any]) -> None:
    small = {"openapi": "3.1.0", "info": {"title": "x", "version": "1"}, "paths": {}}
    assert faults(small) == []
    assert faults({**small, **change})


def test_every_operation_and_schema_of_the_admin_api_is_there(pages: dict[str, str]) -> None:
    page = pages["admin-api.md"]
    for path, item in DOCUMENT["paths"].items():
        for method, operation in item.items():
            section = page.partition(f"\n### `{method.upper()} {path}`\n")[2].partition("\n### ")[0]
            for each in operation.get("parameters", ()):
                assert f"| `{each.get('name') or each['$ref'].rpartition('/')[2]}` |" in section
            assert all(f"| {status} |" in section for status in operation["responses"] if status != "default")
    for name, schema in DOCUMENT["components"]["schemas"].items():
        section = page.partition(f"\n### {name}\n")[2].partition("\n### ")[0]
        assert all(f"| `{key}` |" in section for key in schema.get("properties", ())), name


def test_every_endpoint_and_error_is_there(pages: dict[str, str], generated: ModuleType) -> None:
    page = pages["distribution-api.md"]
    assert generated.distribution_api.handled().keys() == {*Endpoint}
    assert "| `/v2/<name>/manifests/<reference>` | `GET` `HEAD` `PUT` `DELETE` |" in page
    kinds = [each for each in vars(storage.errors).values() if isinstance(each, type)]
    for kind in kinds:
        if issubclass(kind, storage.errors.RegistryError) and kind.__module__ == "storage.errors":
            assert f"| `{kind.code}` | {kind.status} |" in page, kind


def test_the_python_api_is_what_packages_declare(
    generated: ModuleType, pages: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "### `Store`" in pages["python-api.md"]
    assert "async def push_manifest(" in pages["python-api.md"]
    assert "<built-in" not in pages["python-api.md"]
    module = ModuleType("declares")
    exec("class Kept:\n  'It is kept.'\n  def f(self) -> int: 'F.'\nclass Hidden: pass", module.__dict__)
    module.__all__ = ["Kept"]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "declares", module)
    monkeypatch.setattr(generated.python_api, "PACKAGES", ("declares",))
    page = generated.python_api.page()
    assert "## `declares`" in page and "### `Kept`" in page and "It is kept." in page
    assert "#### `Kept.f`" in page and "def f(self) -> int" in page
    assert "Hidden" not in page


# Without the libraries that only other extras bring: as pip install '.[docs]' leaves it.
ALONE = """
import sys
sys.path.insert(0, {site!r})
sys.modules.update(dict.fromkeys({absent!r}))
from generated import PAGES
print(sum(len(make()) for make in PAGES.values()))
"""


@pytest.mark.clients
def test_the_site_needs_no_other_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    needed = {canonicalize_name(Requirement(each).name) for name in extras for each in extras[name]}
    kept = {canonicalize_name(Requirement(each).name) for each in extras["docs"]}
    modules = metadata.packages_distributions().items()
    absent = [name for name, by in modules if {*map(canonicalize_name, by)} & (needed - kept)]
    assert {"pytest", "sigstore", "playwright"} <= {*absent}
    code = ALONE.format(site=str(SITE), absent=absent)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100_000


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a <b> and `<c>`", r"a \<b\> and `<c>`"),
        ("__all__ and *", r"\_\_all\_\_ and \*"),
        ("[x](y)", r"\[x\](y)"),
    ],
)
def test_text_of_the_code_is_no_markup(generated: ModuleType, text: str, shown: str) -> None:
    assert generated.configuration.prose(text) == shown


def test_docstrings_keep_their_paragraphs_lists_and_tables(generated: ModuleType) -> None:
    text = "A thing.\n\nIt is\nlong.\n\n    a  b\n    c  d\n\n- one\n  more\n- two\n"
    shown = generated.python_api.paragraphs(text)
    assert shown == "A thing.\n\nIt is long.\n\n```text\n    a  b\n    c  d\n```\n\n- one\n  more\n- two"
