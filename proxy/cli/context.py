"""What all commands share: their options, how they print a result, and how they end the program.

Exit status: 0 for success, 1 for a failure or something that does not exist, 2 for wrong usage.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeAlias

import click
import msgspec
import structlog

from proxy.admin.api.client import AdminClient, OperationFailed
from proxy.admin.operations import Operations
from proxy.cli.configured import CONFIG, SET
from proxy.cli.console import complain, write
from proxy.cli.tables import Table
from proxy.cli.target import composed, connected, reach
from proxy.config.errors import ConfigError
from proxy.config.loader import load
from proxy.config.schema import Config
from proxy.config.settings import Setting
from proxy.config.values import parse_platform
from proxy.telemetry import logs

if TYPE_CHECKING:
    from proxy.namespaces.composition import Composition

P = ParamSpec("P")

# The parameters of the API whose names differ from those of the commands' parameters.
_PARAMETERS = {"ref": "reference", "match": "pattern", "seconds": "time"}

PAUSE = 1.0  # seconds between two requests for the progress
View: TypeAlias = "Callable[[Any, float], Sequence[Table]]"


@dataclass(frozen=True, slots=True)
class CommandContext:
    """The common options of a command, and what it does with them."""

    path: Path | None = None
    settings: Sequence[Setting] = ()
    server: str | None = None
    token: str | None = None
    ca_file: Path | None = None
    json: bool = False
    wide: bool = False

    def run(self, work: Callable[[Operations], Awaitable[None]], *, make: bool = False) -> None:
        """Do the work on a server or directory; end the program if it fails.  `make` a missing directory."""
        self.alone(lambda: self._run(work, make))

    def alone(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do work that needs neither server nor directory."""

        async def run() -> None:
            await work()

        try:
            asyncio.run(run())
        except (OperationFailed, ConfigError) as error:
            failed = (
                error
                if isinstance(error, OperationFailed)
                else OperationFailed(str(error), "CONFIG_INVALID", usage=True)
            )
            self._fail(failed)

    async def _run(self, work: Callable[[Operations], Awaitable[None]], make: bool) -> None:
        config = self._configured()
        async with reach(config, self.server, self.token, self.ca_file, make=make) as operations:
            await work(operations)

    def run_there(self, server: str, work: Callable[[AdminClient], Awaitable[None]]) -> None:
        """Do work that only a client of the admin API can do."""

        async def run() -> None:
            async with connected(self._configured(), server, self.token, self.ca_file) as client:
                await work(client)

        self.alone(run)

    def run_here(self, work: Callable[[Composition], Awaitable[None]], *, make: bool = False) -> None:
        """Do work on the directory, whether a server runs on it or not."""

        async def run() -> None:
            config = self._configured()
            async with composed(config, make) as composition:
                await work(composition)

        self.alone(run)

    def _configured(self) -> Config:
        config = load(self.path, settings=self.settings)
        quiet(config.log.format)
        return config

    def ask(self, question: Callable[[Operations], Awaitable[Any]], view: View) -> None:
        """Print the answer to a question."""

        async def work(operations: Operations) -> None:
            self.print(await question(operations), view)

        self.run(work)

    def print(self, found: Any, view: View) -> None:
        if self.json:
            click.echo(msgspec.json.encode(found))
        else:
            write(*view(found, time.time()), wide=self.wide)

    def _fail(self, failed: OperationFailed) -> None:
        message = _as_typed(str(failed)) if failed.code == "FIELD_INVALID" else str(failed)
        if self.json:
            click.echo(msgspec.json.encode({"error": message, "code": failed.code}), err=True)
        else:
            complain(message)
        sys.exit(failed.status)


def _as_typed(message: str) -> str:
    """A message about a parameter of the API, with the option or argument of the command for its name."""
    field, _, cause = message.partition(": ")
    for each in click.get_current_context().command.params:
        if each.name == _PARAMETERS.get(field, field):
            metavar = re.sub(r"[^A-Z|]", "", each.metavar or each.human_readable_name.upper())
            return f"{max(each.opts, key=len) if isinstance(each, click.Option) else metavar}: {cause}"
    return message


def option_type(parse: Callable[[object], Any]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """A callback that parses an option as the configuration does."""

    def callback(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
        try:
            if isinstance(value, tuple):
                return tuple(map(parse, value))
            return None if value is None else parse(value)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None

    return callback


_OPTIONS = {
    "path": CONFIG,
    "settings": SET,
    "server": click.option(
        "--server",
        metavar="URL",
        help="The admin address of the server. By default that of the configuration.",
    ),
    "token": click.option(
        "--token",
        metavar="TOKEN",
        envvar="ENTREPOT_ADMIN_TOKEN",
        help="The token of the admin API. By default admin_token of the configuration.",
    ),
    "ca_file": click.option(
        "--ca-file",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Certificate authorities to trust for an https:// server, in PEM.",
    ),
    "as_json": click.option(
        "--json", "as_json", is_flag=True, help="Print JSON, as the admin API answers it."
    ),
    "wide": click.option(
        "--wide", is_flag=True, help="Print all columns and whole values, however wide the terminal is."
    ),
}


# Options that several commands have.
PLATFORMS = click.option(
    "--platform",
    "platforms",
    callback=option_type(parse_platform),
    multiple=True,
    metavar="OS/ARCH",
    help="Only this platform of an index. Can be repeated.",
)


def quiet(format: str = "auto", level: str = "warning") -> None:
    """Log only problems, beside the output of the command."""
    if not structlog.is_configured():
        logs.configure(format, level)


def common(function: Callable[Concatenate[CommandContext, P], None]) -> Callable[..., None]:
    """Add the options of a command that asks a server; it gets them as its first argument."""
    return _with_options(function, *_OPTIONS)


def without_server(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options of a command that needs neither a server nor its directory."""
    return _with_options(function, "as_json", "wide")


def on_directory(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options of a command that works on the directory, whether a server uses it or not."""
    return _with_options(function, "path", "settings", "as_json", "wide")


def _with_options(function: Callable[..., None], *names: str) -> Callable[..., None]:
    def called(*rest: Any, **arguments: Any) -> None:
        options = {name: arguments.pop(name) for name in names}
        function(CommandContext(json=options.pop("as_json"), **options), *rest, **arguments)

    called.__doc__ = function.__doc__
    called.__name__ = function.__name__
    decorated: Callable[..., None] = called
    for name in reversed(names):
        decorated = _OPTIONS[name](decorated)
    return decorated
