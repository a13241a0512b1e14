"""The command line.  Exit status: 0, 1 for what cannot be done, 2 for what was asked wrongly."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from importlib.metadata import version
from pathlib import Path

import click
from yarl import URL

from proxy import telemetry
from proxy.app import App, StartError
from proxy.config import Config, ConfigError, load

_CONFIG = click.option(
    "--config", "path", type=click.Path(path_type=Path), metavar="FILE", help="The configuration, in YAML."
)


@click.group()
@click.version_option(version("entrepot"), prog_name="entrepot")
def main() -> None:
    """A pull-through cache for OCI registries."""


@main.command()
@_CONFIG
def serve(path: Path | None) -> None:
    """Serve.  Without FILE: the well-known public registries, on 127.0.0.1:5000."""
    config = _load(path)
    telemetry.configure(config.log.format, config.log.level)
    try:
        asyncio.run(_serve(config))
    except StartError as error:
        _fail(str(error), 1)


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


async def _serve(config: Config) -> None:
    app = App(config)
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    await app.start()
    click.echo(banner(app.url, app.admin_url, config.disk.path))
    await ended.wait()
    await app.stop()


def banner(url: URL, admin: URL | None, path: Path) -> str:
    """What it listens on, where it stores, and how the usual clients are pointed at it."""
    host = url.host or ""
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    reach = URL.build(scheme=url.scheme, host=host, port=url.port)
    where = f"{reach.host_subcomponent}:{reach.port}"
    return "\n".join(
        (
            f"entrepot {version('entrepot')} listening on {url.origin()}"
            + (f", admin on {admin.origin()}" if admin else ""),
            f"storing in {path}",
            "point clients at it:",
            f'  dockerd     /etc/docker/daemon.json: {{"registry-mirrors": ["{reach.origin()}"]}}',
            f'  containerd  /etc/containerd/certs.d/_default/hosts.toml: [host."{reach.origin()}"]',
            "  podman      /etc/containers/registries.conf.d/entrepot.conf: "
            'registry = [{prefix = "docker.io", location = "docker.io", '
            f'mirror = [{{location = "{where}/docker.io", insecure = true}}]}}]',
        )
    )
