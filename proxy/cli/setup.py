"""`entrepot setup`: prints the configuration of a client, or installs it.

It makes no network request, unless it holds the configuration while the server answers, and restarts nothing.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

import click

from proxy.cli.completion import namespaces
from proxy.cli.configured import config_options
from proxy.cli.console import complain
from proxy.cli.help import ExplainedCommand
from proxy.config.errors import ConfigError
from proxy.config.loader import load
from proxy.config.settings import Setting
from proxy.setup.install import BY_HAND, Change, InstallPlan, Refused, install, plan_install
from proxy.setup.removal import former, plan_removal
from proxy.setup.renderers import GROUPS, RENDERERS, lines_of, store_lines
from proxy.setup.site import Setup, Site, site_of
from proxy.setup.trust import trust_warnings


def _known(context: click.Context, parameter: click.Parameter, name: str) -> str:
    if name not in RENDERERS:
        close = get_close_matches(name, RENDERERS)
        advice = f"did you mean {' or '.join(close)}?" if close else "entrepot setup --help lists all"
        raise click.BadParameter(f"{name!r} is no client that setup knows; {advice}")
    return name


def _begun(context: click.Context, parameter: click.Parameter, text: str) -> list[str]:
    """The completions of what was typed."""
    return [each for each in RENDERERS if each.startswith(text)]


class SetupCommand(ExplainedCommand):
    """The command, whose help lists the clients by groups."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Clients"):
            formatter.write_dl([(name, ", ".join(group)) for name, group in GROUPS.items()])
        super().format_options(context, formatter)


@click.command(cls=SetupCommand)
@click.argument("client", metavar="CLIENT", callback=_known, shell_complete=_begun)
@config_options
@click.option("--url", metavar="URL", help="The address of the server for clients. By default from listen.")
@click.option(
    "--namespace",
    "namespaces",
    multiple=True,
    metavar="NAME",
    shell_complete=namespaces,
    help="Only this registry. Can be repeated.",
)
@click.option(
    "--ca-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The private certificate authority of the server, in PEM.",
)
@click.option("--no-bypass", is_flag=True, help="Forbid the client to ask registries directly.")
@click.option(
    "--write", is_flag=True, help="Install the configuration. A backup of each replaced file is kept."
)
@click.option("--remove", is_flag=True, help="Take out what --write has installed.")
@click.option("--dry-run", is_flag=True, help="Show what --write or --remove would change.")
@click.option(
    "--while-serving",
    is_flag=True,
    help="Install it when the server answers, take it out when it does not, and at the end.",
)
@click.option("--force", is_flag=True, help="With --write: replace files that entrepot has not written.")
@click.option(
    "--root",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=Path("/"),
    metavar="DIR",
    help="The root directory of the client, for --write.",
)
def setup(
    client: str,
    path: Path | None,
    settings: tuple[Setting, ...],
    url: str | None,
    namespaces: tuple[str, ...],
    ca_file: Path | None,
    no_bypass: bool,
    write: bool,
    remove: bool,
    dry_run: bool,
    while_serving: bool,
    force: bool,
    root: Path,
) -> None:
    # long: its parameters are the options of the command, its docstring the help.
    """Configure a client to use this server.

    Prints each file that CLIENT needs, below its path. With --write, installs the files.
    """
    if write and remove:
        raise click.UsageError("give --write or --remove, not both")
    if while_serving and (write or remove or dry_run or force or no_bypass):
        raise click.UsageError(
            "--while-serving installs and removes by itself, and without it the registries are asked: give"
            " none of --write, --remove, --dry-run, --force and --no-bypass with it"
        )
    try:
        config = load(path, settings=settings)
        site = site_of(
            config,
            url=url,
            namespaces=namespaces,
            ca_file=ca_file,
            bypass=not no_bypass,
        )
    except (ConfigError, ValueError) as error:
        _fail(str(error), 2)
        raise
    made = RENDERERS[client](site)
    if while_serving:
        _hold(made, site, root)
        return
    warnings = [] if remove else trust_warnings(made, site, config.tls, ca_file)
    if not (write or remove or dry_run):
        click.echo("\n".join([*(f"# {each}" for each in store_lines(site)), *lines_of(made, warnings)]))
        return
    if not remove and all(each.kind in BY_HAND for each in made.pieces):
        cause = "is configured by flags or names, not by a file" if made.pieces else "has nothing to install"
        _fail(f"{client} {cause}: see entrepot setup {client}", 2)
    planned = plan_removal(made, site, root) if remove else plan_install(made, root, force=force)
    for line in _report_removal(made, planned, dry_run) if remove else _report(made, planned, dry_run):
        click.echo(line)
    for each in warnings:
        complain(f"warning: {each}")
    if planned.refused:
        for path, _, cause in planned.refused:
            complain(f"{path}: {cause}; nothing was {'removed' if remove else 'written'}")
        sys.exit(1)


def _hold(setup: Setup, site: Site, root: Path) -> None:
    """Keep the configuration in place while the server answers, until a signal asks for the end."""
    from proxy.doctor import containerd
    from proxy.doctor.machine import Machine
    from proxy.setup.hold import CLIENTS, HeldSetup, hold

    if setup.client not in CLIENTS:
        raise click.UsageError(
            f"--while-serving is for clients that read their files at each pull: {', '.join(CLIENTS)}"
        )
    if setup.client == containerd.CLIENT and (fault := containerd.unread(Machine(site, root))):
        complain(f"warning: {fault}")

    async def until_ended() -> None:
        ended = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, ended.set)
        await hold(HeldSetup(setup, root, click.echo), site, ended)

    try:
        asyncio.run(until_ended())
    except Refused as error:
        _fail(f"{error}; nothing was written", 1)
    except OSError as error:
        _fail(f"{error.filename or ''}: {error.strerror or error}", 1)


def _report(setup: Setup, planned: InstallPlan, dry_run: bool) -> Iterator[str]:
    """Install the plan, and yield a line for each step."""
    for path in planned.right:
        yield f"already up to date: {path}"
    for path, piece, cause in planned.refused:
        yield f"refused: {path}: {cause}. Add this to it, or give --force to replace it:"
        yield from _indented(piece.content)
    if planned.refused:
        return
    yield from _placed(planned.changes, dry_run)
    for piece in planned.parts:
        what = "give these flags" if piece.kind == "flags" else f"add by hand to {piece.path}"
        yield f"{what}{f' ({piece.about})' if piece.about else ''}:"
        yield from _indented(piece.content)
    if planned.changes or planned.parts:
        yield f"then: {setup.after}"


def _report_removal(setup: Setup, planned: InstallPlan, dry_run: bool) -> Iterator[str]:
    """Remove what is planned, and yield a line for each step."""
    if planned.refused:
        return
    for path in planned.right:
        yield f"left as it is: {path}, which has nothing of entrepot setup"
    yield from _placed(planned.changes, dry_run)
    for path in (each.path for each in planned.changes if each.after is None):
        if before := former(path):
            yield f"the file that it replaced is {before}: rename it to have it again"
    for piece in planned.parts:
        what = {"flags": "give these flags no more", "example": f"undo by hand, {piece.path}"}
        yield f"{what.get(piece.kind, f'take out of {piece.path} by hand')}:"
        yield from _indented(piece.content)
    if planned.changes or planned.parts:
        yield f"then: {setup.undo or setup.after}"
    else:
        yield f"nothing to remove for {setup.client}"


def _placed(changes: list[Change], dry_run: bool) -> Iterator[str]:
    """Write and delete the files, unless it is a dry run."""
    if dry_run:
        for change in changes:
            yield from change.diff()
        return
    try:
        kept = install(changes)
    except OSError as error:
        _fail(f"{error.filename or ''}: {error.strerror or error}", 1)
        raise
    for change in changes:
        yield f"{'removed' if change.after is None else 'written'}: {change.path}"
    for path in kept:
        yield f"backup: {path}"


def _indented(content: str) -> Iterator[str]:
    yield from (f"    {line}".rstrip() for line in content.splitlines())


def _fail(message: str, status: int) -> None:
    complain(message)
    sys.exit(status)


COMMANDS = (setup,)
