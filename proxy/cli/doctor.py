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

from proxy.cli.configured import config_options
from proxy.cli.console import write
from proxy.cli.help import command
from proxy.cli.tables import Column, Table
from proxy.config.errors import ConfigError
from proxy.config.hosts import parse_server
from proxy.config.image_names import parse
from proxy.config.loader import load
from proxy.config.settings import Setting
from proxy.doctor.checks import Check, Diagnosis, guarded
from proxy.setup.site import site_of
from proxy.telemetry import logs


@command()
@config_options
@click.option(
    "--server", metavar="URL", help="The admin address of the server. By default that of the configuration."
)
@click.option(
    "--client",
    "url",
    is_flag=False,
    flag_value="",
    metavar="[URL]",
    help="Check this machine as a client of the server at URL. By default the URL is from listen.",
)
@click.option(
    "--namespace",
    "namespaces",
    multiple=True,
    metavar="NAME",
    help="With --client: only this registry. Can be repeated.",
)
@click.option(
    "--ca-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="With --client: the private certificate authority of the server, in PEM.",
)
@click.option("--no-bypass", is_flag=True, help="With --client: fail if the client can bypass the server.")
@click.option(
    "--canary", metavar="REF", help="With --client: the image to test with. By default hello-world."
)
@click.option("--pull", metavar="REF", help="With --client: have each installed client pull this image.")
@click.option(
    "--root",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=Path("/"),
    metavar="DIR",
    help="With --client: the root directory of the clients.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--wide", is_flag=True, help="Print whole values, however wide the terminal is.")
def doctor(
    path: Path | None,
    settings: tuple[Setting, ...],
    server: str | None,
    url: str | None,
    namespaces: tuple[str, ...],
    ca_file: Path | None,
    no_bypass: bool,
    canary: str | None,
    pull: str | None,
    root: Path,
    as_json: bool,
    wide: bool,
) -> None:
    """Check an installation.

    Prints what to do about each problem. Asks the upstreams, with requests that no rate limit counts. The
    exit status is 1 if a check failed.
    """
    admin = _admin(server)
    if url is None:
        _check_unused(namespace=namespaces, ca_file=ca_file, no_bypass=no_bypass, canary=canary, pull=pull)
        # Here, since the start of the server needs none of it.
        from proxy.doctor import server as server_checks

        _run(lambda: server_checks.examine(path, admin, settings), as_json, wide)
        return
    from proxy.doctor import client as client_checks

    try:
        config = load(path, settings=settings)
        site = site_of(config, url=url or None, namespaces=namespaces, ca_file=ca_file, bypass=not no_bypass)
        options = client_checks.ClientOptions(
            parse(canary or pull or client_checks.CANARY), parse(pull) if pull else None, admin
        )
    except (ConfigError, ValueError) as error:
        raise click.UsageError(str(error)) from None
    _run(lambda: client_checks.examine(site, root, options), as_json, wide)


def _check_unused(**options: object) -> None:
    for name, value in options.items():
        if value:
            raise click.UsageError(f"--{name.replace('_', '-')} needs --client")


def _admin(server: str | None) -> URL | None:
    try:
        return None if server is None else parse_server(server).origin()
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _run(examine: Callable[[], Awaitable[list[Check]]], as_json: bool, wide: bool) -> None:
    if not structlog.is_configured():
        logs.configure("auto", "critical")  # the checks report all errors

    async def run() -> Sequence[Check]:
        return await guarded("doctor", "-", examine())

    found = Diagnosis.of(asyncio.run(run()))
    if as_json:
        click.echo(msgspec.json.encode(found))
    else:
        write(*check_tables(found, time.time()), wide=wide)
    sys.exit(1 if found.failed else 0)


def check_tables(found: Diagnosis, now: float) -> Sequence[Table]:
    table = Table(
        (
            Column("CHECK", whole=True),
            Column("SUBJECT", whole=True),
            Column("STATE", state=True),
            Column("FINDING"),
        )
    )
    for each in found.checks:
        table.add(each.name, each.subject, each.state, "; ".join(filter(None, (each.message, each.advice))))
    table.notes.append(f"{found.ok} ok, {found.warnings} warnings, {found.failed} failed")
    return [table]


COMMANDS = (doctor,)
