"""`entrepot health`: for what watches the server, such as the health check of a container."""

from __future__ import annotations

import asyncio

import click
import msgspec

from proxy.admin.api.client import HealthReport, OperationFailed
from proxy.cli.context import CommandContext, common
from proxy.cli.help import command
from proxy.cli.target import admin_url, if_running
from proxy.config.loader import load

PATIENCE = 8.0  # seconds for an answer; the image gives the command ten
DRAINING = "draining"


@command()
@common
def health(call: CommandContext) -> None:
    """Ask the server whether it serves.

    Prints ready, degraded or draining, and why; needs no token. The exit status is 1 if the server is
    draining, or does not answer.
    """
    call.alone(lambda: _health(call))


async def _health(call: CommandContext) -> None:
    state = await _state(call)
    if call.json:
        click.echo(msgspec.json.encode(state))
    else:
        reasons = "; ".join(filter(None, (state.store, state.drill, state.credentials)))
        click.echo(f"{state.status}: {reasons}" if reasons else state.status)
    if state.status == DRAINING:
        raise SystemExit(1)


async def _state(call: CommandContext) -> HealthReport:
    config = load(call.path, settings=call.settings)
    url = admin_url(config)
    if url is None and call.server is None:
        raise OperationFailed("admin is off: set it in the configuration, or give --server", "NOT_RUNNING")
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
