"""`entrepot setup`: prints a client's configuration, or puts it in place.  Asks nobody, restarts nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from proxy.config.errors import ConfigError
from proxy.config.loader import load
from proxy.setup.install import Change, Plan, place, plan
from proxy.setup.renderers import RENDERERS, text
from proxy.setup.site import Setup, site_of


@click.command()
@click.argument("client", type=click.Choice(list(RENDERERS)))
@click.option(
    "--config", "path", type=click.Path(path_type=Path), metavar="FILE", help="As of serve: which namespaces."
)
@click.option("--url", metavar="URL", help="How clients reach the server; else what listen says.")
@click.option(
    "--namespace", "namespaces", multiple=True, metavar="NAME", help="Only this registry; may be repeated."
)
@click.option(
    "--ca-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The authority of the server's certificate, in PEM, where it is one of your own.",
)
@click.option("--no-bypass", is_flag=True, help="The client is not to ask registries itself.")
@click.option("--write", is_flag=True, help="Put it in place; what is replaced is kept beside it.")
@click.option("--dry-run", is_flag=True, help="Show what --write would change.")
@click.option("--force", is_flag=True, help="With --write: replace what somebody else has written.")
@click.option(
    "--root",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=Path("/"),
    metavar="DIR",
    help="Where --write takes / to be.",
)
def setup(
    client: str,
    path: Path | None,
    url: str | None,
    namespaces: tuple[str, ...],
    ca_file: Path | None,
    no_bypass: bool,
    write: bool,
    dry_run: bool,
    force: bool,
    root: Path,
) -> None:
    """Print what makes CLIENT pull through this server: each file below its path."""
    try:
        site = site_of(load(path), url=url, namespaces=namespaces, ca_file=ca_file, bypass=not no_bypass)
    except (ConfigError, ValueError) as error:
        _fail(str(error), 2)
        raise
    made = RENDERERS[client](site)
    if not (write or dry_run):
        click.echo("\n".join(text(made)))
        return
    if all(each.kind == "flags" for each in made.pieces):
        _fail(f"{client} has no file to write: it takes flags, see entrepot setup {client}", 2)
    planned = plan(made, root, force=force)
    for line in _told(made, planned, dry_run):
        click.echo(line)
    if planned.refused:
        for path, _, cause in planned.refused:
            click.echo(f"entrepot: {path}: {cause}; nothing was written", err=True)
        sys.exit(1)


def _told(setup: Setup, planned: Plan, dry_run: bool) -> Iterator[str]:
    """What is done, while it is done, line by line."""
    for path in planned.right:
        yield f"right already: {path}"
    for path, piece, cause in planned.refused:
        yield f"refused: {path}: {cause}. Put this into it, or say --force where it may be replaced:"
        yield from _indented(piece.content)
    if planned.refused:
        return
    if dry_run:
        for change in planned.changes:
            yield from change.diff()
    else:
        yield from _placed(planned.changes)
    for piece in planned.parts:
        yield f"by hand, in {piece.path}{f' ({piece.about})' if piece.about else ''}:"
        yield from _indented(piece.content)
    if planned.changes or planned.parts:
        yield f"then: {setup.after}"


def _placed(changes: list[Change]) -> Iterator[str]:
    try:
        kept = place(changes)
    except OSError as error:
        _fail(f"{error.filename or ''}: {error.strerror or error}", 1)
        raise
    for change in changes:
        yield f"written: {change.path}"
    for path in kept:
        yield f"kept what was there: {path}"


def _indented(content: str) -> Iterator[str]:
    yield from (f"    {line}".rstrip() for line in content.splitlines())


def _fail(message: str, status: int) -> None:
    click.echo(f"entrepot: {message}", err=True)
    sys.exit(status)
