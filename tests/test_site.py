"""The documentation as a site: it is whole, and asks no other server for anything."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import pytest
from mkdocs.exceptions import Abort

from tests.documentation import ROOT, SECRET, build_site, site
from tests.test_docs import PAGES

__all__ = ["site"]  # a fixture

pytestmark = pytest.mark.clients  # it takes seconds to build

LOADED = {
    "img": "src",
    "script": "src",
    "link": "href",
    "form": "action",
    "iframe": "src",
    "source": "srcset",
}
SHAPES = {"svg", "title", "desc", "style", "defs", "marker", "path", "rect", "text"}
CARRIED = "files"  # the folder for files of the repository
IGNORED = ROOT / "deploy/image/Dockerfile.dockerignore"
LARGEST = 5 << 20  # bytes of the whole site: it is in the wheel


class SitePage(HTMLParser):
    """Its links, what is `loaded`, its `ids` and prose; a strict policy refuses what is `inline`."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.inline: list[str] = []
        self.blocks = 0
        self.prose = ""
        self._open: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self._open.append(tag)
        self.blocks += tag == "pre"
        self.ids |= {given["id"] or ""} if "id" in given else set()
        self.inline += [name for name in given if name == "style" or name.startswith("on")]
        if tag == "style" or (tag == "script" and "src" not in given):
            self.inline.append(tag)
        if tag == "a":
            self.links.append(given["href"] or "")
        elif tag in LOADED and LOADED[tag] in given:
            self.loaded.append(given[LOADED[tag]] or "")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not {"code", "pre", "script"} & {*self._open}:
            self.prose += data


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, SitePage]:
    """By their paths in the site."""
    return {path.name: SitePage(path) for path in site.glob("*.html")} | {
        str(path.relative_to(site)): SitePage(path) for path in site.glob("*/*.html")
    }


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs/site/hooks.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as path:
        path.syspath_prepend(ROOT / "docs/site")  # as MkDocs does, for what it imports
        spec.loader.exec_module(module)
    return module


def test_every_page_of_the_repository_is_in_the_site_and_leads_to_all(pages: dict[str, SitePage]) -> None:
    docs = {path.relative_to(ROOT / "docs") for path in PAGES if path.is_relative_to(ROOT / "docs")}
    assert {str(path.with_suffix(".html")) for path in docs} < pages.keys()
    for name, page in pages.items():
        led = {_resolved(name, link)[0] for link in page.links if not urlsplit(link).scheme}
        assert pages.keys() - led <= {"search.html"}, name


def test_links_lead_to_files_and_places(site: Path, pages: dict[str, SitePage]) -> None:
    broken = []
    for name, page in pages.items():
        for link in (*page.links, *page.loaded):
            if urlsplit(link).scheme in ("http", "https") and link in page.links:
                continue
            target, fragment = _resolved(name, link)
            there = pages[target].ids if target in pages else {""}
            if not (site / target).is_file() or (fragment and fragment not in there):
                broken.append(f"{name}: {link}")
    assert broken == []


def _resolved(page: str, link: str) -> tuple[str, str]:
    path, _, fragment = link.partition("#")
    place = (Path("/") / page).parent / unquote(path) if path else Path("/") / page
    return str(place.resolve().relative_to("/")), fragment


def test_nothing_is_asked_of_another_server(site: Path, pages: dict[str, SitePage]) -> None:
    assert [link for page in pages.values() for link in page.loaded if "//" in link] == []
    outside = re.compile(r"""(?:url\(|@import|fetch\(|src=|import )\s*["'(]*(?:https?:)?//""")
    for path in (*site.rglob("*.css"), *site.rglob("*.js"), *site.rglob("*.svg")):
        assert not outside.search(path.read_text()), path


def test_a_strict_policy_of_content_allows_every_page(pages: dict[str, SitePage]) -> None:
    assert {name: page.inline for name, page in pages.items() if page.inline} == {}


def test_all_markdown_has_become_html(pages: dict[str, SitePage]) -> None:
    """Each block is one, and no page shows a mark of Markdown outside of code."""
    for path in PAGES:
        blocks = len(re.findall(r"^ *```", path.read_text(), re.MULTILINE)) // 2
        name = path.name if path.parent != ROOT else f"{path.name.lower()}".replace("readme", "index")
        place = path.relative_to(ROOT / "docs").as_posix() if path.is_relative_to(ROOT / "docs") else name
        page = pages[place.removesuffix(".md") + ".html"]
        assert page.blocks >= blocks, path
        assert not re.search(r"```|\]\(|^\s*\|.*\|$|^#+ |\*\*", page.prose, re.MULTILINE), path


@pytest.mark.parametrize(
    ("text", "page"),
    [
        ("cache_limit", "configuration.html"),
        ("PostgreSQL", "fleet.html"),
        ("imagePullSecrets", "access.html"),
        ("containerd", "clients.html"),
        ("entrepot why", "commands.html"),
    ],
)
def test_the_search_index_has_what_the_pages_say(site: Path, text: str, page: str) -> None:
    documents = json.loads((site / "search/search_index.json").read_text())["docs"]
    assert page in {each["location"].partition("#")[0] for each in documents if text in each["text"]}
    assert all(len(each["title"]) > 1 for each in documents)


DRAWINGS = sorted((ROOT / "docs" / "images").glob("*.svg"))


@pytest.mark.parametrize("path", DRAWINGS, ids=lambda path: path.name)
def test_a_drawing_says_what_it_shows_and_is_dark_where_the_page_is(path: Path) -> None:
    text = path.read_text()
    assert len(text) < 8000
    drawing = ElementTree.fromstring(text)
    assert drawing.get("role") == "img"
    for name in (drawing.get("aria-labelledby") or "").split():
        [said] = [each.text for each in drawing if each.get("id") == name]
        assert said and len(said) > 8
    assert "prefers-color-scheme: dark" in text
    assert {each.tag.partition("}")[2] for each in drawing.iter()} <= SHAPES
    colored = re.findall(r"\.([a-z]+) \{", text.partition("@media")[0])
    assert {*re.findall(r"\.([a-z]+) \{", text.partition("@media")[2]), "dash"} == {*colored}
    used = {name for each in drawing.iter() for name in each.get("class", "").split()}
    assert used <= {*colored}


def test_pictures_have_words_in_their_place(pages: dict[str, SitePage]) -> None:
    shown = [each for page in PAGES for each in re.findall(r"!\[([^\]]*)\]\([^)]*\)", page.read_text())]
    assert len(shown) > 15
    assert [each for each in shown if not each.strip()] == []
    assert {path.name for path in DRAWINGS} < {
        Path(each).name for page in pages.values() for each in page.loaded
    }


def test_it_has_no_modules(site: Path) -> None:
    """It is within a package, and would be a part of its code."""
    assert [*site.rglob("*.py")] == []
    assert "def main" in (site / "files/examples/in_process_registry.py.txt").read_text()


def test_it_says_nothing_of_whoever_builds_it(site: Path) -> None:
    """Neither variables of the environment nor paths."""
    for path in site.rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path


def test_files_that_it_carries_along_are_there_where_the_image_is_built(site: Path) -> None:
    allowed = {line[1:] for line in IGNORED.read_text().splitlines() if line.startswith("!")}
    for path in (site / CARRIED).iterdir():
        assert {path.name, f".{path.name}"} & allowed, f"{IGNORED} does not let {path.name} in"


def test_it_is_small(site: Path) -> None:
    assert sum(path.stat().st_size for path in site.rglob("*") if path.is_file()) < LARGEST


@pytest.mark.parametrize(
    ("text", "nav", "fault"),
    [
        ("# A\n\n[b](b.md)", [{"A": "a.md"}], "b.md"),
        ("# A\n\n[b](#b)", [{"A": "a.md"}], "#b"),
        ("# A\n\n[b](../nothing.txt)", [{"A": "a.md"}], "nothing.txt"),
        ("# A", [{"A": "index.md"}], "a.md"),
        ("# A", [{"A": "a.md"}, {"B": "b.md"}], "b.md"),
    ],
)
def test_what_is_not_whole_is_not_built(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, nav: list[dict[str, str]], fault: str
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text(text)
    with caplog.at_level(logging.WARNING), pytest.raises(Abort):
        build_site(tmp_path / "site", docs_dir=str(tmp_path / "docs"), nav=nav, hooks=[], plugins=[])
    assert fault in caplog.text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1. a\n   b\n", "1. a\n    b\n"),
        ("- a\n  b\n\n  c\n", "- a\n    b\n\n    c\n"),
        ("text\n- a\n- b\n", "text\n\n- a\n- b\n"),
        (
            "1. a\n\n   ```sh\n   if b; then\n     c\n   fi\n   ```\n",
            "1. a\n\n    ```sh\n    if b; then\n      c\n    fi\n    ```\n",
        ),
        ("1. a\n   - b\n", "1. a\n    - b\n"),
        ("- a\n\ntext\n\n  b\n", "- a\n\ntext\n\n  b\n"),
        ("```\n- a\n  b\n```\n", "```\n- a\n  b\n```\n"),
    ],
)
def test_lists_are_indented_as_the_renderer_wants_it(hooks: ModuleType, text: str, expected: str) -> None:
    assert hooks.with_deep_lists(text) == expected


@pytest.mark.parametrize(
    ("heading", "expected"),
    [("Claims, in detail", "claims-in-detail"), ("a & `b_c`", "a--b_c"), ("TLS: why?", "tls-why")],
)
def test_anchors_are_those_of_the_repository(hooks: ModuleType, heading: str, expected: str) -> None:
    assert hooks.anchor(heading, "-") == expected
