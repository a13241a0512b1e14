"""The command line.  Exit status: 0, 1 for what cannot be done, 2 for what was asked wrongly."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import click
import structlog
from yarl import URL

from proxy.cli import bundles, copy, offline, operations
from proxy.cli.doctor import doctor
from proxy.cli.setup import setup
from proxy.config.errors import ConfigError, StartError
from proxy.config.hosts import Address
from proxy.config.loader import load
from proxy.config.schema import Config
from proxy.config.wellknown import DOCKER_HUB
from proxy.server.supervisor import Assignment, Supervisor
from proxy.setup.renderers import RENDERERS
from proxy.setup.site import client_url, scheme_of, site_of
from proxy.telemetry import logs

log = structlog.get_logger()

BEHIND = 10  # see nice(2)
SHOWN = ("docker", "containerd", "podman")  # in the banner

_CONFIG = click.option(
    "--config", "path", type=click.Path(path_type=Path), metavar="FILE", help="The configuration, in YAML."
)


@click.group()
@click.version_option(version("entrepot"), prog_name="entrepot")
def main() -> None:
    """A pull-through cache for OCI registries, and a small private registry."""


for each in (
    *operations.COMMANDS,
    *offline.COMMANDS,
    *copy.COMMANDS,
    *bundles.COMMANDS,
    setup,
    doctor,
):
    main.add_command(each)


@main.command()
@_CONFIG
def serve(path: Path | None) -> None:
    """Serve; without FILE the well-known public registries, on 127.0.0.1:5000."""
    config = _load(path)
    logs.configure(config.log.format, config.log.level)
    try:
        asyncio.run(_serve(Supervisor(config, lambda: load(path)), config))
    except StartError as error:
        _fail(str(error), 1)


@main.command(hidden=True)
def worker() -> None:
    """Serve as a parent says that called this; not for people."""
    _work()


@main.command(hidden=True)
def keeper() -> None:
    """Keep house as a parent says that called this; not for people."""
    os.nice(BEHIND)  # those that serve clients come first
    _work()


def _work() -> None:
    # Here, since the parent needs none of it: it stays small.
    from proxy.server.process import ServerProcess

    assignment = Assignment.read(sys.stdin.buffer)
    config = assignment.config
    logs.configure(config.log.format, config.log.level)
    # A follower takes three descriptors; the soft limit is made for programs that use select().
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    async def work() -> int:
        app = ServerProcess(config, sockets=assignment.sockets(), run=assignment.run)
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, ended.set)
        loop.add_reader(sys.stdin.fileno(), ended.set)  # its end: the parent is gone
        try:
            await app.start()
        except StartError as error:
            assignment.report(str(error))
            return 1
        assignment.report("ready")
        await ended.wait()
        loop.remove_reader(sys.stdin.fileno())
        await app.stop()
        return 0

    sys.exit(asyncio.run(work()))


@main.command()
@_CONFIG
def check(path: Path | None) -> None:
    """Validate the configuration; nothing is started, nobody asked."""
    config = _load(path)
    names = ", ".join(config.namespaces) or "none"
    click.echo(f"{path or 'the built-in configuration'} is valid; namespaces: {names}")


def _load(path: Path | None) -> Config:
    try:
        return load(path)
    except ConfigError as error:
        _fail(str(error), 2)
        raise


def _fail(message: str, status: int) -> None:
    click.echo(f"entrepot: {message}", err=True)
    sys.exit(status)


async def _serve(parent: Supervisor, config: Config) -> None:
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # until run() sees to them
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    await parent.start()
    click.echo(banner(*parent.addresses(), config))
    if not ended.is_set():
        await parent.run()
    log.info("server.stopping", drain=config.drain)
    await parent.stop()


def banner(listen: tuple[str, int], admin: tuple[str, int] | None, config: Config) -> str:
    """What it listens on, where it stores, and how the usual clients are pointed at it."""
    lines = [
        f"entrepot {version('entrepot')} listening on {_url(config.tls is not None, *listen)}"
        + (f", admin on {_url(config.admin_tls() is not None, *admin)}" if admin else ""),
        f"storing in {config.disk.path}",
    ]
    site = site_of(config, url=str(client_url(scheme_of(config), Address(*listen))))
    if site.namespaces:
        # One registry will do for those that have each named; setup names all.
        name = DOCKER_HUB if DOCKER_HUB in site.namespaces else site.namespaces[0]
        lines.append("point clients at it:")
        for client in SHOWN:
            if client == "docker" and name != DOCKER_HUB:  # it takes mirrors for no other registry
                continue
            piece = RENDERERS[client](replace(site, namespaces=(name,))).pieces[0]
            lines.append(f"  {client}: {piece.path}")
            lines += [f"    {line}".rstrip() for line in piece.content.splitlines()]
    lines.append("all there is to it, and other clients: entrepot setup --help")
    return "\n".join(lines)


def _url(encrypted: bool, host: str, port: int) -> URL:
    return URL.build(scheme="https" if encrypted else "http", host=host, port=port).origin()
