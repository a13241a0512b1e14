"""`entrepot doctor`: on a server, or with --client on a machine that pulls from one."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import click
import msgspec
import structlog
from yarl import URL

from proxy.cli.console import Column, Table, write
from proxy.config.errors import ConfigError
from proxy.config.hosts import parse_server
from proxy.config.image_names import parse
from proxy.config.loader import load
from proxy.doctor.checks import Check, Diagnosis
from proxy.setup.site import site_of
from proxy.telemetry import logs


@click.command()
@click.option("--config", "path", type=click.Path(path_type=Path), metavar="FILE", help="As of serve.")
@click.option(
    "--server", metavar="URL", help="The admin address of the server; else that of the configuration."
)
@click.option(
    "--client",
    "url",
    is_flag=False,
    flag_value="",
    metavar="[URL]",
    help="Look at this machine as one that pulls from the server at URL; without, from where listen says.",
)
@click.option(
    "--namespace",
    "namespaces",
    multiple=True,
    metavar="NAME",
    help="With --client: these, not all configured.",
)
@click.option(
    "--ca-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="With --client: the authority of the server's certificate.",
)
@click.option("--no-bypass", is_flag=True, help="With --client: what may go past the server is a failure.")
@click.option("--canary", metavar="REF", help="With --client: what is pulled for a trial; else hello-world.")
@click.option("--pull", metavar="REF", help="With --client: have each client here pull it, too.")
@click.option(
    "--root",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=Path("/"),
    metavar="DIR",
    help="With --client: where / of the clients is.",
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def doctor(
    path: Path | None,
    server: str | None,
    url: str | None,
    namespaces: tuple[str, ...],
    ca_file: Path | None,
    no_bypass: bool,
    canary: str | None,
    pull: str | None,
    root: Path,
    as_json: bool,
) -> None:
    """Look whether all is well here, and say what to do where it is not.

    Upstreams are asked for it, as pulls ask them, nothing that counts.  Exit status 1: something failed.
    """
    admin = _admin(server)
    if url is None:
        given = {
            "--namespace": namespaces,
            "--ca-file": ca_file,
            "--no-bypass": no_bypass,
            "--canary": canary,
        }
        for option, value in {**given, "--pull": pull}.items():
            if value:
                raise click.UsageError(f"{option} goes with --client")
        # Here, since the server's own start needs none of it.
        from proxy.doctor import server as examination

        _run(lambda: examination.examine(path, admin), as_json)
        return
    from proxy.doctor import client as looks

    try:
        config = load(path)
        site = site_of(config, url=url or None, namespaces=namespaces, ca_file=ca_file, bypass=not no_bypass)
        wish = looks.ClientOptions(
            parse(canary or pull or looks.CANARY), parse(pull) if pull else None, admin
        )
    except (ConfigError, ValueError) as error:
        raise click.UsageError(str(error)) from None
    _run(lambda: looks.examine(site, root, wish), as_json)


def _admin(server: str | None) -> URL | None:
    try:
        return None if server is None else parse_server(server).origin()
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _run(examine: Callable[[], Awaitable[list[Check]]], as_json: bool) -> None:
    if not structlog.is_configured():
        logs.configure("auto", "critical")  # what fails is told by a check

    async def run() -> list[Check]:
        return await examine()

    found = Diagnosis.of(asyncio.run(run()))
    if as_json:
        click.echo(msgspec.json.encode(found))
    else:
        write(*shown(found, time.time()))
    sys.exit(1 if found.failed else 0)


def shown(found: Diagnosis, now: float) -> Sequence[Table]:
    table = Table((Column("CHECK", whole=True), Column("OF"), Column("STATE", whole=True), Column("FOUND")))
    for each in found.checks:
        table.add(each.name, each.subject, each.state, "; ".join(filter(None, (each.message, each.advice))))
    table.notes.append(f"{found.ok} ok, {found.warnings} to be looked at, {found.failed} failed")
    return [table]
