"""Who may import whom.  An import goes down the layers, or it is an error; so there are no cycles."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the ground up.  Modules of one layer do not know each other.
LAYERS = (
    ("storage.errors", "storage.waiting", "storage.locking"),
    ("storage.oci",),
    ("storage.registry", "storage.disk", "storage.tar"),
    ("storage.growing",),
    ("storage.files", "storage.records", "storage.archive"),
    ("storage.store", "storage.usage", "storage.tree", "storage.bundle"),
    (
        "storage.pins",
        "storage.scrub",
        "storage.leases",
        "storage.distribution",
        "storage.adopting",
        "storage.layout",
    ),
    ("storage.eviction", "storage.marks", "storage.intake", "storage.gathering", "storage.taking"),
    ("storage.unlinked",),
    ("storage.collect",),
    ("storage.exporting", "storage.importing"),
    ("proxy.values", "proxy.watched", "proxy.wellknown"),
    ("proxy.hosts",),
    (
        "proxy.sections",
        "proxy.web.routes",
        "proxy.flights",
        "proxy.limits",
        "proxy.room",
        "proxy.access.rules",
        "proxy.upstream.credentials",
        "proxy.upstream.health",
        "proxy.upstream.outgoing",
        "proxy.telemetry",
        "proxy.console",
        "proxy.imagefiles",
        "proxy.webhooks.happening",
        "proxy.webhooks.waking",
        "proxy.transferring",
    ),
    (
        "proxy.access.section",
        "proxy.upstream.section",
        "proxy.webhooks.section",
        "proxy.webhooks.formats",
        "proxy.webhooks.queue",
    ),
    ("proxy.config", "proxy.webhooks.teller"),
    (
        "proxy.loading",
        "proxy.upstream.tokens",
        "proxy.recorder",
        "proxy.drill",
        "proxy.copying",
        "proxy.places",
        "proxy.access.addresses",
        "proxy.access.attempts",
        "proxy.access.bearer",
        "proxy.access.htpasswd",
    ),
    ("proxy.upstream.transport", "proxy.upstream.refusals"),
    ("proxy.upstream.channel", "proxy.following"),
    ("proxy.upstream.reading", "proxy.upstream.uploading"),
    ("proxy.upstream.client", "proxy.fills", "proxy.web.send", "proxy.web.responses", "proxy.namespaces"),
    ("proxy.web.telling",),
    ("proxy.upstream.failover", "proxy.cache", "proxy.freshness", "proxy.hosted", "proxy.web.pushing"),
    ("proxy.live", "proxy.web.proofs", "proxy.access.visibility"),
    ("proxy.drills", "proxy.web.access"),
    ("proxy.web.server",),
    ("proxy.web.listener",),
    ("proxy.listening",),
    ("proxy.tls",),
    ("proxy.web.door",),
    ("proxy.composition", "proxy.workers", "proxy.answers", "proxy.webhooks.delivery"),
    ("proxy.inventory", "proxy.receipts"),
    ("proxy.purging", "proxy.asking"),
    ("proxy.reasons", "proxy.readiness"),
    ("proxy.warming",),
    ("proxy.preparations",),
    ("proxy.bundles",),
    ("proxy.operations",),
    ("proxy.web.api",),
    ("proxy.web.carriage",),
    ("proxy.web.admin",),
    ("proxy.keeper", "proxy.admission"),
    ("proxy.app",),
    ("proxy.adminclient", "proxy.tables", "proxy.setup.site"),
    ("proxy.setup.engines", "proxy.setup.builders"),
    ("proxy.setup.clusters",),
    ("proxy.setup.renderers",),
    ("proxy.setup.placing",),
    ("proxy.setup.command", "proxy.doctor.checks"),
    ("proxy.doctor.disk", "proxy.doctor.certificates", "proxy.doctor.host"),
    (
        "proxy.doctor.upstreams",
        "proxy.doctor.running",
        "proxy.doctor.docker",
        "proxy.doctor.containerd",
        "proxy.doctor.podman",
    ),
    ("proxy.doctor.canary",),
    ("proxy.doctor.server", "proxy.doctor.client"),
    ("proxy.doctor.command",),
    ("proxy.calling",),
    ("proxy.errand", "proxy.landing"),
    ("proxy.commands", "proxy.carrying"),
    ("proxy.preparing", "proxy.bundling"),
    ("proxy.cli",),
    ("proxy.__main__",),
)
RANKS = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}
# Libraries that only some may name, by the start of their modules' names.
OWNERS = {"diskcache": "storage.records", "aiohttp": "proxy."}


def modules() -> dict[str, str]:
    """The source of every module by its dotted name; a package's is named `__init__` as its file is."""
    found = {}
    for package in ("storage", "proxy"):
        for path in (ROOT / package).rglob("*.py"):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path.read_text()
    return found


def imports(module: str, source: str) -> Iterator[str]:
    """The full names that it imports, wherever in the source; `from a import b` is `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(sources: Mapping[str, str]) -> list[str]:
    found = []
    for module, source in sources.items():
        for name in imports(module, source):
            library = name.partition(".")[0]
            if library in OWNERS and not module.startswith(OWNERS[library]):
                found.append(f"{module} imports {library}, which only {OWNERS[library]} may")
            if library not in ("storage", "proxy"):
                continue
            # Of a module, or of a name in one.
            imported = name if name in RANKS else name.rpartition(".")[0]
            if imported not in RANKS:
                found.append(f"{module} imports {name}, which has no layer")
            elif RANKS[imported] >= RANKS.get(module, -1):
                found.append(f"{module} imports {imported}, which is not below it")
    return found


def test_imports_go_down() -> None:
    assert violations(modules()) == []


def test_every_module_has_a_layer() -> None:
    named = {module for module in modules() if not module.endswith("__init__")}
    assert named == set(RANKS)


def test_packages_hold_nothing_themselves() -> None:
    packages = {module: source for module, source in modules().items() if module.endswith("__init__")}
    assert len(packages) >= 4
    assert set(packages.values()) == {""}


@pytest.mark.parametrize(
    ("module", "source", "says"),
    [
        ("storage.errors", "from storage.oci import Digest", "storage.oci, which is not below it"),
        ("storage.store", "import proxy.cache", "proxy.cache, which is not below it"),
        ("storage.store", "from proxy import cache", "proxy.cache, which is not below it"),
        ("storage.files", "from storage import records", "storage.records, which is not below it"),
        ("storage.files", "from . import records", "storage.records, which is not below it"),
        ("storage.files", "from .records import Records", "storage.records, which is not below it"),
        ("proxy.web.server", "from ..app import App", "proxy.app, which is not below it"),
        ("proxy.cache", "def f():\n    from proxy.app import App", "proxy.app, which is not below it"),
        ("proxy.cache", "class C:\n    import proxy.cli", "proxy.cli, which is not below it"),
        ("proxy.cache", "if TYPE_CHECKING:\n    import proxy.cli", "proxy.cli, which is not below it"),
        ("proxy.cache", "import asyncio, proxy.cli as c", "proxy.cli, which is not below it"),
        ("proxy.cache", "import proxy.cache", "proxy.cache, which is not below it"),
        ("proxy.app", "import proxy", "which has no layer"),
        ("proxy.app", "from proxy.web import *", "which has no layer"),
        ("proxy.app", "from proxy.elsewhere import x", "which has no layer"),
        ("proxy.stray", "from storage.oci import Digest", "storage.oci, which is not below it"),
        ("storage.store", "import diskcache", "diskcache, which only storage.records may"),
        ("proxy.cache", "from diskcache.core import Disk", "diskcache, which only storage.records may"),
        ("storage.files", "import aiohttp.web", "aiohttp, which only proxy. may"),
    ],
)
def test_what_goes_up_is_found(module: str, source: str, says: str) -> None:
    (found,) = violations({module: source})
    assert found.startswith(f"{module} imports ")
    assert found.endswith(says)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("storage.records", "import diskcache\nfrom storage.errors import StorageFailed"),
        ("proxy.upstream.tokens", "from proxy.upstream.credentials import Credentials"),
        ("proxy.upstream.tokens", "from ..flights import Flights"),
        ("proxy.cli", "from proxy import telemetry\nimport proxy.app"),
        ("proxy.web.send", "import aiohttp"),
    ],
)
def test_what_goes_down_is_not(module: str, source: str) -> None:
    assert violations({module: source}) == []
