"""The documentation: what it names exists, all events and metrics are described, its English is plain."""

from __future__ import annotations

import ast
import re
from itertools import chain
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DEVELOPERS = (
    "CONTRIBUTING.md",
    "SECURITY.md",
    "docs/architecture.md",
    "docs/library.md",
    "docs/releasing.md",
)
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *ROOT.glob("docs/**/*.md"),
]
SOURCES = [*ROOT.glob("storage/**/*.py"), *ROOT.glob("proxy/**/*.py")]

FORBIDDEN = ("let alone", "for ever", "of late", "is told", "as nobody", "gone on with")
_PHRASE = re.compile(rf"\b(?:{'|'.join(FORBIDDEN)})\b".replace(" ", r"[\s#]+"), re.IGNORECASE)
_FILE = re.compile(r"\b(?:proxy|storage|tests|docs|deploy)/[\w/.-]*\w")
_NAMED = re.compile(r"`([A-Za-z_.]+)`[^`|]{0,2}\(([\w/]+\.py)\)")  # `Class.method` (path/of/it.py)
_MODULE = re.compile(r"`((?:proxy|storage)\.[\w.]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_BLOCK = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    assert not broken(page)


@pytest.mark.parametrize("link", ["nowhere.md", "#nothing", "clients.md#nothing"])
def test_a_link_that_leads_nowhere_is_found(tmp_path: Path, link: str) -> None:
    (tmp_path / "clients.md").write_text("# Clients\n\n## k3s, RKE2\n")
    page = tmp_path / "page.md"
    page.write_text(f"# A page\n\n[1](#a-page) [2](clients.md) [3](clients.md#k3s-rke2) [4]({link})\n")
    assert broken(page) == [link]


def broken(page: Path) -> list[str]:
    """The relative links of a page that lead to no file, or to no heading of it."""
    found = []
    for link in _LINK.findall(_prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            found.append(link)
    return found


def _anchors(page: Path) -> set[str]:
    """The anchors of the headings, as GitHub makes them."""
    return {
        re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        for heading in _HEADING.findall(_prose(page))
    }


def _prose(page: Path) -> str:
    return _BLOCK.sub("", page.read_text())


@pytest.mark.parametrize("page", DEVELOPERS)
def test_files_are_there(page: str) -> None:
    text = (ROOT / page).read_text()
    files = _FILE.findall(text)
    absent = [each for each in files if not (ROOT / each).exists()]
    assert not absent
    modules = _MODULE.findall(text)
    assert files or modules
    absent = [each for each in modules if not _is_module(each) and not _is_module(each.rpartition(".")[0])]
    assert not absent


def _is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


@pytest.mark.parametrize("page", ["SECURITY.md", "docs/architecture.md"])
def test_names_are_in_their_files(page: str) -> None:
    named = _NAMED.findall(" ".join((ROOT / page).read_text().split()))
    assert len(named) > 30
    absent = [
        f"{name} in {path}"
        for name, path in named
        for part in name.split(".")
        if not re.search(rf"^ *(?:class|def|async def) {part}\b", (ROOT / path).read_text(), re.MULTILINE)
    ]
    assert not absent


def test_every_promise_names_what_holds_it() -> None:
    _, *sections = re.split(r"^##+ ", (ROOT / "SECURITY.md").read_text(), flags=re.MULTILINE)
    promises = [each for section in sections for each in section.split("\n- ")[1:]]
    assert len(promises) > 30
    assert [each for each in promises if not _NAMED.search(" ".join(each.split()))] == []


def test_examples_of_style_are_from_the_code() -> None:
    code = "".join(path.read_text() for path in (*SOURCES, *ROOT.glob("tests/test_*.py")))
    examples = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert len(examples) > 2
    assert [each for each in examples if each not in code] == []


def test_issue_forms_ask_for_what_there_is() -> None:
    """The commands that they name are in the manual, and each field has a name of its own."""
    forms = [path for path in ROOT.glob(".github/ISSUE_TEMPLATE/*.yml") if path.name != "config.yml"]
    assert len(forms) > 2
    manual = (ROOT / "docs/commands.md").read_text()
    for path in forms:
        form = yaml.safe_load(path.read_text())
        assert {"name", "description", "labels", "body"} == form.keys()
        fields = [each for each in form["body"] if each["type"] != "markdown"]
        assert {each["type"] for each in fields} == {"textarea"}
        assert (
            len({each["id"] for each in fields})
            == len({each["attributes"]["label"] for each in fields})
            == len(fields)
        )
        for command in re.findall(r"`entrepot (\w+)", path.read_text()):
            assert f"entrepot {command}" in manual


def test_hooks_before_a_commit_are_those_of_the_manual() -> None:
    [local] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    programs = {each["entry"].split()[0] for each in local["hooks"]}
    assert programs == set(
        re.findall(r"\.venv/bin/(?:ruff|mypy|pytest)\b", (ROOT / "CONTRIBUTING.md").read_text())
    )
    tests = re.findall(r"tests/\w+\.py", " ".join(each["entry"] for each in local["hooks"]))
    assert "tests/test_layers.py" in tests
    assert [each for each in tests if not (ROOT / each).is_file()] == []


def test_no_page_and_no_source_holds_a_forbidden_phrase() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {' '.join(phrase.split())}"
        for path in chain(PAGES, SOURCES)
        for phrase in _PHRASE.findall(path.read_text())
    ]
    assert not found


def _logged() -> set[str]:
    """The names of the events that the program logs, where they are written as they are."""
    found = set()
    for source in (path.read_text() for path in SOURCES):
        for node in ast.walk(ast.parse(source)) if "log." in source else ():
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name("log")), args=[ast.Constant(str(name)), *_]):
                    found.add(name)
    return found


@pytest.mark.clients
def test_every_event_is_described() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    logged = _logged()
    assert len(logged) > 40
    assert {each for each in logged if f"`{each}`" not in text} == set()


def test_every_metric_is_described() -> None:
    named = r"entrepot_[a-z_]+"
    made = set(re.findall(named, (ROOT / "proxy/telemetry/metrics.py").read_text()))
    described = set(re.findall(named, (ROOT / "docs/operations.md").read_text()))
    assert made == described
