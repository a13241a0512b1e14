"""Which package may import which.  Within a package only circles are forbidden.

docs/architecture.md draws the two tables and says what each package is.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Modules and packages of storage, from the ground up.  Those of one line do not know each other.
STORAGE = (
    "errors concurrency names shared exports tls",
    "oci limits",
    "conditions validation",
    "registry keys values records",
    "disk",
    "content listings bucket postgres totals writers remembered",
    "store",
    "patient graph held migration",
    "maintenance archives",
)

# Packages of proxy, from the ground up, and the packages of proxy that each may import.
# All may import storage; the commands may import everything.
PROXY = {
    "config": "",
    "connections": "",
    "telemetry": "config",
    "extensions": "config telemetry",
    "upstream": "config connections telemetry extensions",
    "cache": "telemetry",
    "webhooks": "config connections telemetry extensions",
    "setup": "config connections",
    "access": "config connections telemetry upstream",
    "signatures": "",
    "policy": "config telemetry extensions cache signatures",
    "namespaces": "config telemetry extensions upstream cache webhooks policy",
    "web": "config connections telemetry extensions webhooks access",
    "transfer": "config telemetry upstream namespaces",
    "processes": "connections telemetry extensions upstream cache namespaces web",
    "admin": "config connections telemetry extensions upstream cache webhooks access policy namespaces web"
    " transfer processes",
    "doctor": "config connections extensions upstream setup access web",
    "ui": "config namespaces admin",
    "server": "telemetry config extensions webhooks access namespaces web processes admin ui",
    "testing": "config telemetry upstream namespaces web transfer",
}
PROXY["cli"] = " ".join(PROXY)
PROXY["__main__"] = "cli"

FACES = ("storage.__init__", "proxy.__init__")  # name what is public of all modules below them

# Libraries that only some may name, by the start of their modules' names.
OWNERS = {
    "diskcache": "storage.disk.database",
    "psycopg": "storage.postgres.",
    "obstore": "storage.bucket.",
    "sigstore": "proxy.signatures.",
    "cbor2": "proxy.signatures.",
    "aiohttp": "proxy.",
    "opentelemetry": "proxy.telemetry.otel",
}

ALLOWED = {
    **{
        f"storage.{name}": {f"storage.{below}" for line in STORAGE[:level] for below in line.split()}
        for level, line in enumerate(STORAGE)
        for name in line.split()
    },
    **{f"proxy.{name}": {f"proxy.{each}" for each in below.split()} for name, below in PROXY.items()},
}


@cache
def modules() -> dict[str, str]:
    """The source of every module by its dotted name; a package's is named `__init__` as its file is."""
    found = {}
    for package in ("storage", "proxy"):
        for path in (ROOT / package).rglob("*.py"):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path.read_text()
    return found


def statements(source: str) -> Iterator[ast.stmt]:
    """All statements in `source`, also those within others: a tenth of the nodes of ast.walk()."""
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.stmt):
            yield node
        for block in ("body", "orelse", "finalbody", "handlers", "cases"):
            pending += getattr(node, block, ())


@cache
def imports(module: str, source: str) -> list[str]:
    """The full names that it imports, wherever in the source; `from a import b` is `a.b`."""
    found = []
    for node in statements(source):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            found += [f"{base}.{alias.name}" for alias in node.names]
    return found


def part(name: str) -> str:
    """The row of the tables that a module belongs to."""
    return ".".join(name.split(".")[:2])


def violations(sources: Mapping[str, str]) -> list[str]:
    found = []
    for module, source in sources.items():
        for name in imports(module, source) if module not in FACES else ():
            library = name.partition(".")[0]
            if library in OWNERS and not module.startswith(OWNERS[library]):
                found.append(f"{module} imports {library}, which only {OWNERS[library]} may")
            if library not in ("storage", "proxy") or part(name) == part(module):
                continue
            if part(name) not in ALLOWED:
                found.append(f"{module} imports {name}, which has no row")
            elif library == "storage" and module.startswith("proxy."):
                continue
            elif part(name) not in ALLOWED.get(part(module), set()):
                found.append(f"{module} imports {part(name)}, which it may not")
    return found


def circle(sources: Mapping[str, str]) -> list[str]:
    """Modules that import each other in a circle; nothing where there is none."""
    graph = {}
    for module, source in sources.items():
        names = [name if name in sources else name.rpartition(".")[0] for name in imports(module, source)]
        graph[module] = {name for name in names if name in sources}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_imports_follow_the_tables() -> None:
    assert violations(modules()) == []


def test_there_are_no_circles() -> None:
    assert circle(modules()) == []


def test_every_module_has_a_row() -> None:
    named = {part(module) for module in modules() if module.count(".") > 1 or "__init__" not in module}
    assert named == set(ALLOWED)


def test_the_tables_have_no_circle() -> None:
    rows = list(ALLOWED)
    for row, below in ALLOWED.items():
        assert all(rows.index(each) < rows.index(row) for each in below), row


def test_packages_hold_only_a_docstring() -> None:
    # The supervisor starts light only because a package imports nothing itself.
    for module, source in modules().items():
        if module.endswith("__init__") and module not in FACES:
            body = ast.parse(source).body
            assert len(body) == 1 and ast.get_docstring(ast.parse(source)), module


@pytest.mark.parametrize(
    ("module", "source", "says"),
    [
        ("storage.errors", "from storage.oci import Digest", "storage.oci, which it may not"),
        ("storage.store", "import proxy.cache.cache", "proxy.cache, which it may not"),
        ("storage.store", "from proxy import cache", "proxy.cache, which it may not"),
        ("storage.disk.blobs", "from storage import store", "storage.store, which it may not"),
        ("storage.disk.blobs", "from .. import store", "storage.store, which it may not"),
        ("storage.disk.blobs", "from ..store import Store", "storage.store, which it may not"),
        ("proxy.web.server", "from ..server.process import x", "proxy.server, which it may not"),
        ("proxy.cache.cache", "def f():\n    from proxy.web.send import x", "proxy.web, which it may not"),
        ("proxy.cache.cache", "class C:\n    import proxy.cli.main", "proxy.cli, which it may not"),
        ("proxy.cache.cache", "if TYPE_CHECKING:\n    import proxy.cli.main", "proxy.cli, which it may not"),
        ("proxy.cache.cache", "import asyncio, proxy.cli.main as c", "proxy.cli, which it may not"),
        ("proxy.cache.cache", "import proxy.config.schema", "proxy.config, which it may not"),
        ("proxy.server.process", "import proxy", "which has no row"),
        ("proxy.server.process", "from proxy.elsewhere import x", "which has no row"),
        ("proxy.stray", "from proxy.config import schema", "proxy.config, which it may not"),
        ("storage.store", "import diskcache", "diskcache, which only storage.disk.database may"),
        ("proxy.cache.cache", "from diskcache.core import Disk", "which only storage.disk.database may"),
        ("storage.disk.blobs", "import aiohttp.web", "aiohttp, which only proxy. may"),
        *(
            (
                "storage.store",
                f"{before}\n    from storage import graph{after}",
                "storage.graph, which it may not",
            )
            for before, after in (
                ("for x in y:\n    pass\nelse:", ""),
                ("while x:", ""),
                ("async def f():\n  async with x:", ""),
                ("try:", "\nfinally:\n    pass"),
                ("try:\n    pass\nexcept* OSError:", ""),
                ("try:\n    pass\nfinally:", ""),
                ("match x:\n  case 1:", ""),
            )
        ),
    ],
)
def test_what_may_not_be_imported_is_found(module: str, source: str, says: str) -> None:
    (found,) = violations({module: source})
    assert found.startswith(f"{module} imports ")
    assert found.endswith(says)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("storage.disk.database", "import diskcache\nfrom storage.errors import StorageFailed"),
        ("proxy.upstream.tokens", "from proxy.upstream.credentials import Credentials"),
        ("proxy.upstream.tokens", "from ...storage import concurrency\nfrom storage.oci import Digest"),
        ("proxy.cli.main", "from proxy.telemetry import logs\nimport proxy.server.process"),
        ("proxy.web.send", "import aiohttp"),
    ],
)
def test_what_may_be_imported_is_not(module: str, source: str) -> None:
    assert violations({module: source}) == []


def test_a_circle_is_found() -> None:
    found = circle({"proxy.web.a": "from proxy.web import b", "proxy.web.b": "from proxy.web.a import x"})
    assert set(found) == {"proxy.web.a", "proxy.web.b"}


def rows(start: str) -> dict[str, list[str]]:
    """The rows of a table of docs/architecture.md whose first column has names with `start`, by these."""
    lines = (ROOT / "docs" / "architecture.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {
        name.strip("`"): [cell for cell in row if cell != name]
        for row in table
        for name in row
        if name.startswith(f"`{start}.")
    }


def purpose(package: Path) -> str:
    """The first paragraph of its docstring."""
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    return " ".join(docstring.partition("\n\n")[0].split())


def test_the_page_shows_the_packages_of_proxy() -> None:
    found = rows("proxy")
    assert list(found) == [f"proxy.{name}" for name in PROXY]
    for name, below in PROXY.items():
        said, imported = found[f"proxy.{name}"]
        package = ROOT / "proxy" / name
        if package.is_dir():
            assert said == purpose(package), f"docs/architecture.md about proxy.{name}"
        everything = "all of the above" if name == "cli" else "nothing"
        told = " ".join(f"`{each}`" for each in below.split())
        assert imported == (told if told and name != "cli" else everything), f"imports of proxy.{name}"


def test_the_page_shows_the_parts_of_storage() -> None:
    found = rows("storage")
    assert list(found) == [f"storage.{name}" for line in STORAGE for name in line.split()]
    for level, line in enumerate(STORAGE):
        for name in line.split():
            shown, said = found[f"storage.{name}"]
            package = ROOT / "storage" / name
            assert shown == str(level), f"the level of storage.{name}"
            if package.is_dir():
                assert said == purpose(package), f"docs/architecture.md about storage.{name}"
