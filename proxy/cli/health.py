"""`entrepot health`: for what watches the server, such as the health check of a container."""

from __future__ import annotations

import asyncio
import time

import click
import msgspec
from yarl import URL

from proxy.admin.api.client import HealthReport, OperationFailed
from proxy.cli.context import CommandContext, common, option_type
from proxy.cli.help import command
from proxy.cli.target import admin_url, if_running
from proxy.config.loader import load
from proxy.config.quantities import parse_timeout
from proxy.config.schema import Config

PATIENCE = 8.0  # seconds for an answer; the image gives the command ten
AGAIN = 0.2  # seconds: nothing says when a port is opened
DRAINING = "draining"


@command()
@click.option(
    "--wait",
    callback=option_type(parse_timeout),
    metavar="DURATION",
    help="How long to wait for a server that is starting.",
)
@common
def health(call: CommandContext, wait: float | None) -> None:
    """Ask the server whether it serves.

    Prints ready, degraded or draining, and why; needs no token. The exit status is 1 if the server is
    draining, or does not answer.
    """
    call.alone(lambda: _health(call, wait or 0))


async def _health(call: CommandContext, wait: float) -> None:
    state = await _awaited(call, time.monotonic() + wait)
    if call.json:
        click.echo(msgspec.json.encode(state))
    else:
        reasons = "; ".join(filter(None, (state.store, state.drill, state.credentials)))
        click.echo(f"{state.status}: {reasons}" if reasons else state.status)
    if state.status == DRAINING:
        raise SystemExit(1)


async def _awaited(call: CommandContext, last: float) -> HealthReport:
    """The first answer; a server that is not there is asked again until the time `last`."""
    config = load(call.path, settings=call.settings)
    url = admin_url(config)
    if url is None and call.server is None:
        raise OperationFailed("admin is off: set it in the configuration, or give --server", "NOT_RUNNING")
    while True:
        try:
            return await _state(call, config, url)
        except OperationFailed as error:
            if error.code not in ("NOT_RUNNING", "UNREACHABLE") or time.monotonic() >= last:
                raise
        await asyncio.sleep(AGAIN)


async def _state(call: CommandContext, config: Config, url: URL | None) -> HealthReport:
    try:
        async with (
            asyncio.timeout(PATIENCE),
            if_running(config, call.server, call.token, call.ca_file) as server,
        ):
            if server is None:
                raise OperationFailed(
                    f"nothing listens at {url}: start a server (entrepot serve)", "NOT_RUNNING"
                )
            return await server.health()
    except TimeoutError:
        raise OperationFailed(
            f"no answer from {call.server or url} in {PATIENCE:.0f} s", "UNREACHABLE"
        ) from None


COMMANDS = (health,)
