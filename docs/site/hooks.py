"""What the documentation needs to be a site of MkDocs: its pages are written for the repository.

Pages of the root and generated ones become pages of the site, links are made to lead within it, and
files of the repository that pages link to are carried along.
"""

from __future__ import annotations

import json
import posixpath
import re
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

from generated import PAGES
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
# Pages in the root of the repository, and in the site.
OF_ROOT = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
CARRIED = "files/"  # the folder of the site for files of the repository
ICON = "proxy/ui/static/icon.svg"
_LINK = re.compile(  # but not in blocks of code
    r"(?P<code>^(?P<indent> *)(?P<fence>```+).*?^(?P=indent)(?P=fence)$)"
    r"|(?P<picture>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<link>[^)\s]+)\)",
    re.MULTILINE | re.DOTALL,
)
_FENCE = re.compile(r" *(```+)")
_ITEM = re.compile(r"(?:[-*] +|\d+\. +)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.mdx_configs["toc"] = {"slugify": anchor}
    config.nav = _expanded(config.nav or [], Path(config.docs_dir))
    return config


def anchor(heading: str, separator: str) -> str:
    """The anchor of a heading, as GitHub makes it: the pages are read there, too."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", separator)


def _expanded(nav: list[Any], docs: Path) -> list[Any]:
    """The navigation with the pages of a folder in its place; without folders that have none."""
    found = []
    for entry in nav:
        [(title, value)] = entry.items()
        if isinstance(value, list):
            value = _expanded(value, docs)
        elif value.endswith("/"):
            value = [path.relative_to(docs).as_posix() for path in sorted(docs.glob(f"{value}*.md"))]
        if value:
            found.append({title: value})
    return found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, page in OF_ROOT.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    files.append(File.generated(config, "icon.svg", abs_src_path=str(ROOT / ICON)))
    for name, make in PAGES.items():
        files.append(File.generated(config, name, content=make()))
    for page in [each for each in files if each.is_documentation_page()]:
        source = _source(page)
        for match in _LINK.finditer(page.content_string):
            link = match["link"] or ""
            target = _target(source, link)
            if target and target.startswith(CARRIED) and files.get_file_from_path(target) is None:
                path = ROOT / posixpath.dirname(source) / link.partition("#")[0]
                files.append(File.generated(config, target, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    source, here = _source(page.file), posixpath.dirname(page.file.src_uri)

    def led(match: re.Match[str]) -> str:
        if match["code"]:
            return match[0]
        target = _target(source, match["link"])
        if target is None:
            return match[0]
        if not target:
            return match["text"]  # a folder of the repository
        _, mark, fragment = match["link"].partition("#")
        place = posixpath.relpath(target, here or ".")
        return f"{match['picture']}[{match['text']}]({place}{mark}{fragment})"

    return _LINK.sub(led, with_deep_lists(markdown))


def with_deep_lists(markdown: str) -> str:
    """What belongs to an item of a list is indented by four: Python-Markdown wants it, GitHub does not."""
    lines: list[str] = []
    width, added, fence = 0, 0, ""  # of the marker of the item; to the lines of a block; the end of the block
    for line in markdown.splitlines():
        indent = len(line) - len(line.lstrip())
        if not fence:
            if line and not indent:
                item = _ITEM.match(line)
                if item and not width and lines and lines[-1]:
                    lines.append("")
                width = len(item[0]) if item else 0
            added = indent // width * (4 - width) if width else 0
            begun = _FENCE.match(line)
            fence = begun[1] if begun else ""
        elif line.strip() == fence:
            fence = ""
        lines.append(" " * added + line if line else line)
    return "\n".join(lines) + "\n"


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """What is wider than the page scrolls by keys, too; a heading of a table that says nothing is none."""
    for old, new in (
        ("<table>", '<div class="table" tabindex="0"><table>'),
        ("</table>", "</table></div>"),
        ("<pre>", '<pre tabindex="0">'),
        ("<th></th>", "<td></td>"),
    ):
        html = html.replace(old, new)
    return html


def on_post_build(config: MkDocsConfig) -> None:
    """Bring the library of the search, and leave out of its index the pages: their sections are there."""
    plugin, place = import_module("mkdocs.contrib.search"), Path(config.site_dir) / "search"
    shutil.copyfile(Path(str(plugin.__file__)).parent / "templates/search/lunr.js", place / "lunr.js")
    index = json.loads((place / "search_index.json").read_text())
    index["docs"] = [each for each in index["docs"] if "#" in each["location"]]
    (place / "search_index.json").write_text(json.dumps(index, ensure_ascii=False))
    (Path(config.site_dir) / "sitemap.xml").unlink()  # it has no addresses: the site is at many
    (Path(config.site_dir) / "sitemap.xml.gz").unlink(missing_ok=True)


def _source(file: File) -> str:
    """Where a page is in the repository."""
    of_root = {page: name for name, page in OF_ROOT.items()}
    return of_root.get(file.src_uri, f"docs/{file.src_uri}")


def _target(source: str, link: str) -> str | None:
    """What a link of a page leads to in the site; empty if that is a folder, None if it leads elsewhere."""
    path = link.partition("#")[0]
    if not path or re.match(r"[a-z]+:", link):
        return None
    found = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if found in OF_ROOT:
        return OF_ROOT[found]
    if found.startswith("docs/"):
        return found.removeprefix("docs/")
    if (ROOT / found).is_dir():
        return ""
    if not (ROOT / found).is_file():
        return None
    # MkDocs leaves out what begins with a dot, and a module would be one of the package that has the site.
    return CARRIED + found.lstrip(".") + (".txt" if found.endswith(".py") else "")
