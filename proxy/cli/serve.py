"""The command that runs the server, and what it prints once the server listens."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import click
import structlog
from yarl import URL

from proxy.cli.configured import chosen, config_argument, used
from proxy.cli.console import complain
from proxy.cli.help import command
from proxy.config.advice import advise
from proxy.config.errors import ConfigError, StartError
from proxy.config.hosts import Address, local_url
from proxy.config.loader import load
from proxy.config.schema import Config
from proxy.config.settings import Setting, environment
from proxy.config.wellknown import DOCKER_HUB
from proxy.connections.trust import public_context
from proxy.server import notify
from proxy.server.supervisor import BoundAddresses, Supervisor
from proxy.setup.renderers import RENDERERS, store_lines
from proxy.setup.site import client_url, scheme_of, site_of
from proxy.telemetry import logs
from proxy.web.activation import passed_sockets

log = structlog.get_logger()

SHOWN = ("docker", "containerd", "podman")  # in the banner


@command()
@config_argument
@click.option("--listen", metavar="ADDRESS", help="Where to listen, such as 0.0.0.0:5000.")
@click.option("--disk", metavar="DIRECTORY", help="Where to store.")
@click.option(
    "--store",
    "stores",
    multiple=True,
    metavar="NAME",
    help="Also be a private registry, in the namespace NAME. Can be repeated.",
)
@click.option(
    "--upstream",
    "upstreams",
    multiple=True,
    metavar="[NAME=]URL",
    help="Also cache this registry, in the namespace NAME or that of its host. Can be repeated.",
)
def serve(
    file: Path | None,
    path: Path | None,
    settings: tuple[Setting, ...],
    listen: str | None,
    disk: str | None,
    stores: tuple[str, ...],
    upstreams: tuple[str, ...],
) -> None:
    """Run the server.

    Without a configuration it caches the well-known public registries, and listens on 127.0.0.1:5000. The
    options replace what the configuration says.
    """
    path = chosen(file, path)
    given = [
        *settings,
        *([] if listen is None else [Setting("--listen", ("listen",), listen)]),
        *([] if disk is None else [Setting("--disk", ("disk", "path"), disk)]),
        *(Setting("--store", ("namespaces", name, "store"), {}, default=True) for name in stores),
        *map(_upstream, upstreams),
    ]
    try:
        config = load(path, settings=given)
        gc.disable()  # imports take a tenth longer with it
        from proxy.server.process import run  # here: a mistake in the configuration is said in half the time

        logs.configure(config.log.format, config.log.level, access=config.log.access)
        _with_authorities(config)
        gc.freeze()  # the processes share this memory as long as nothing writes to it
        gc.enable()
        source = used(path, [*environment(os.environ), *given])
        passed = passed_sockets(os.environ)
        parent = Supervisor(config, lambda: _with_authorities(load(path, settings=given)), run, passed)
        asyncio.run(_serve(parent, config, source))
    except (ConfigError, StartError) as error:
        complain(str(error))
        sys.exit(2 if isinstance(error, ConfigError) else 1)


def _with_authorities(config: Config) -> Config:
    """Load the system's authorities, if `config` needs them, for all processes: each would take 20 ms."""
    public_context.cache_clear()
    if config.cached():
        public_context()
    return config


def _upstream(text: str) -> Setting:
    name, sign, url = text.rpartition("=")
    if not sign or "/" in name:  # a sign in the URL
        name, url = URL(text).authority, text
    return Setting("--upstream", ("namespaces", name, "upstream"), url)


async def _serve(parent: Supervisor, config: Config, source: str) -> None:
    alive = asyncio.create_task(notify.keep_alive())  # also while it drains
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # until run() handles them
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    starting = asyncio.ensure_future(parent.start())
    ending = asyncio.ensure_future(ended.wait())
    await asyncio.wait((starting, ending), return_when=asyncio.FIRST_COMPLETED)
    ending.cancel()
    if not starting.done():
        log.info("server.stopping", drain=config.drain)
        starting.cancel()  # it stops what it has started
        await asyncio.wait((starting,))
        return
    starting.result()
    click.echo(banner(parent.addresses(), config, source))
    if not ended.is_set():
        await parent.run()
    log.info("server.stopping", drain=config.drain)
    await parent.stop()
    alive.cancel()


def banner(bound: BoundAddresses, config: Config, source: str) -> str:
    """The addresses, the configuration, the storage directory, warnings, and what common clients need."""
    encrypted, admin = config.tls is not None, bound.admin
    lines = [
        f"entrepot {version('entrepot')} listening on {_url(encrypted, *bound.listen)}"
        + (f", admin on {_url(config.admin_tls() is not None, *admin)}" if admin else ""),
        *_page(bound, config),
        f"configured by {source}",
        f"storing in {config.disk.path}",
        *(f"warning: {each}" for each in advise(config)),
    ]
    site = site_of(config, url=str(client_url(scheme_of(config), Address(*bound.listen))))
    urls = {name: client_url(scheme_of(config), Address(*each)) for name, each in bound.stores.items()}
    stores = {name: each.host_port_subcomponent or "" for name, each in urls.items()}
    lines += store_lines(replace(site, stores=stores))
    if config.trusts_this_machine():
        named = config.hosted().keys() - stores.keys()
        lines += [f"private registry {name}: docker push {site.host}/{name}/team/app:1" for name in named]
    if site.namespaces:
        # One registry is enough for clients that name each; setup prints all.
        name = DOCKER_HUB if DOCKER_HUB in site.namespaces else site.namespaces[0]
        lines.append("point clients at it:")
        for client in SHOWN:
            if client == "docker" and name != DOCKER_HUB:  # docker has mirrors of Docker Hub only
                continue
            piece = RENDERERS[client](replace(site, namespaces=(name,))).pieces[0]
            lines.append(f"  {client}: {piece.path}")
            lines += [f"    {line}".rstrip() for line in piece.content.splitlines()]
    lines.append("complete instructions and other clients: entrepot setup --help")
    return "\n".join(lines)


def _page(bound: BoundAddresses, config: Config) -> list[str]:
    """The address of the web page, as a browser on this machine finds it."""
    if bound.admin is None or config.admin_ui == "off":
        return []
    url = local_url("https" if config.admin_tls() is not None else "http", Address(*bound.admin))
    return [f"see it: {url / 'ui/'}"]


def _url(encrypted: bool, host: str, port: int) -> URL:
    return URL.build(scheme="https" if encrypted else "http", host=host, port=port).origin()


COMMANDS = (serve,)
