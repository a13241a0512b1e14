"""The extensions of a server, and what else installed packages offer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from proxy.admin.extension_reports import ExtensionRow
from proxy.config.extension_rules import uses
from proxy.config.schema import Config
from proxy.extensions.extension import ExtensionState, worst
from proxy.extensions.loader import InstalledExtension, installed
from proxy.processes.state import ProcessReport


def extension_rows(config: Config, reports: Iterable[ProcessReport]) -> list[ExtensionRow]:
    """Those of the configuration in its order, then the others.  Reads the metadata of all packages."""
    states = worst(each for report in reports for each in report.extensions)
    offered = {(each.kind, each.entry.name): each for each in installed()}
    rows = [
        _row(config, name, offered.get((each.kind, each.use or name)), states)
        for name, each in config.extensions.items()
    ]
    used = {(each.kind, each.use or name) for name, each in config.extensions.items()}
    return rows + [_unused(each) for key, each in offered.items() if key not in used]


def _row(
    config: Config, name: str, found: InstalledExtension | None, states: Mapping[str, ExtensionState]
) -> ExtensionRow:
    configured, state = config.extensions[name], states.get(name) or ExtensionState(name=name)
    named = [path for path, _, wanted in uses(config) if wanted == name]
    return ExtensionRow(
        name=name,
        kind=configured.kind,
        entry_point=configured.use or name,
        package=found.package if found else "not installed",
        version=found.version if found else "",
        state="in use" if state.failing_since is None else "failing",
        used_by=named or [f"extensions.{name}"],
        calls=state.calls,
        failures=state.failures,
        failing_since=state.failing_since,
        error=state.error,
    )


def _unused(found: InstalledExtension) -> ExtensionRow:
    return ExtensionRow(
        name=None,
        kind=found.kind,
        entry_point=found.entry.name,
        package=found.package,
        version=found.version,
        state="not used",
        used_by=[],
        calls=0,
        failures=0,
        failing_since=None,
        error=None,
    )
