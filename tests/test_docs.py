"""The pages for developers name files, and names in them, that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("CONTRIBUTING.md", "docs/architecture.md", "docs/library.md")
_FILE = re.compile(r"\b(?:proxy|storage|tests|docs|deploy)/[\w/.-]*\w")
_NAMED = re.compile(r"`([A-Za-z_.]+)`[^`|]{0,2}\(([\w/]+\.py)\)")  # `Class.method` (path/of/it.py)
_MODULE = re.compile(r"`((?:proxy|storage)\.[\w.]+)`")
_LINK = re.compile(r"\]\(([\w./-]+)\)")


@pytest.mark.parametrize("page", PAGES)
def test_files_are_there(page: str) -> None:
    text = (ROOT / page).read_text()
    files = _FILE.findall(text)
    absent = [each for each in files if not (ROOT / each).exists()]
    assert not absent
    absent = [each for each in _LINK.findall(text) if not (ROOT / page).parent.joinpath(each).exists()]
    assert not absent
    modules = _MODULE.findall(text)
    assert files or modules
    absent = [each for each in modules if not _is_module(each) and not _is_module(each.rpartition(".")[0])]
    assert not absent


def _is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def test_names_are_in_their_files() -> None:
    named = _NAMED.findall((ROOT / "docs/architecture.md").read_text())
    assert len(named) > 30
    absent = [
        f"{name} in {path}"
        for name, path in named
        for part in name.split(".")
        if not re.search(rf"^ *(?:class|def|async def) {part}\b", (ROOT / path).read_text(), re.MULTILINE)
    ]
    assert not absent
