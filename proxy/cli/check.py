"""The command that validates a configuration."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from proxy.cli.configured import BUILT_IN, chosen, config_argument
from proxy.cli.console import complain
from proxy.cli.context import quiet
from proxy.cli.help import command
from proxy.config.advice import advise
from proxy.config.errors import ConfigError
from proxy.config.loader import load
from proxy.config.settings import Setting


@command()
@config_argument
@click.option(
    "--no-files",
    is_flag=True,
    help="Look at the configuration alone: not at files, ports and the disk of this machine.",
)
def check(file: Path | None, path: Path | None, settings: tuple[Setting, ...], no_files: bool) -> None:
    """Validate the configuration.

    Finds what serve would refuse on this machine, and warns of what is unwise. Run it as the user of the
    server. Starts nothing and makes no network request.
    """
    from proxy.cli.preflight import Preflight, inspect

    quiet(level="critical")  # what it finds is all that it prints
    path = chosen(file, path)
    try:
        config = load(path, settings=settings)
    except ConfigError as error:
        complain(str(error))
        sys.exit(2)
    found = Preflight() if no_files else inspect(config)
    if not found.errors:
        names = ", ".join(config.namespaces) or "none"
        click.echo(f"{path or BUILT_IN} is valid; namespaces: {names}")
    for each in (*map(str, advise(config)), *found.warnings):
        click.echo(f"warning: {each}", err=bool(found.errors))
    if found.errors:
        complain("\n".join(found.errors))
        sys.exit(1)


COMMANDS = (check,)
