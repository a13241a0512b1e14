"""The command line: the group of all commands."""

from __future__ import annotations

import sys
from importlib import import_module

import click
from click.shell_completion import add_completion_class

from proxy.cli.completion import ColonBashComplete
from proxy.cli.help import GroupedCommands, LazyCommands

add_completion_class(ColonBashComplete)


def _import_structlog() -> None:
    """Import it without rich, which it uses for tracebacks that our log never has.

    That is 3 MB and 70 modules less for a server.  A command that prints tables imports rich afterwards.
    """
    if sys.modules.keys().isdisjoint({"structlog", "rich"}):
        sys.modules["rich"] = None  # type: ignore[assignment]  # an import fails, as if it were not installed
        import_module("structlog")
        del sys.modules["rich"]


_import_structlog()


@click.group(cls=GroupedCommands, commands=LazyCommands())
@click.version_option(package_name="entrepot", prog_name="entrepot")
def main() -> None:
    """A pull-through cache for OCI registries, and a private registry."""
