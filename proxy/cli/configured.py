"""The options by which a command finds the configuration, and where it looks without them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from proxy.config.settings import Setting, parse_setting

F = TypeVar("F", bound=Callable[..., Any])

VARIABLE = "ENTREPOT_CONFIG"
SYSTEM = (Path("/etc/entrepot.yml"), Path("/etc/entrepot/config.yml"))
BUILT_IN = "the built-in configuration"


def find_configuration(
    environ: Mapping[str, str] = os.environ, system: Sequence[Path] = SYSTEM
) -> Path | None:
    """The file that is used if none is named: that of the user, then the first of the system, else none.

    The user's is in their configuration directory (XDG Base Directory).
    """
    directory = Path(environ.get("XDG_CONFIG_HOME", ""))
    if not directory.is_absolute():
        directory = Path(environ.get("HOME") or "/") / ".config"
    # os.path.isfile is False for a directory that must not be read, such as another user's.
    return next((each for each in (directory / "entrepot.yml", *system) if os.path.isfile(each)), None)  # noqa: PTH113


def config_options(function: F) -> F:
    """Add -c and --set: the parameters `path`, the file that is used, and `settings`."""
    for option in (SET, CONFIG):
        function = option(function)
    return function


def config_argument(function: F) -> F:
    """Add the argument FILE, and what `config_options` adds; `path` is what either names."""
    return config_options(click.argument("file", required=False, type=click.Path(path_type=Path))(function))


def chosen(file: Path | None, path: Path | None) -> Path | None:
    """The file that the argument or else the option names.  Raises click.UsageError if both do."""
    context = click.get_current_context()
    if file is not None and context.get_parameter_source("path") is click.core.ParameterSource.COMMANDLINE:
        raise click.UsageError("give FILE or --config, not both")
    return file or path


def used(path: Path | None, settings: Iterable[Setting]) -> str:
    """Where a configuration comes from, in words."""
    more = ", ".join(dict.fromkeys(each.source for each in settings))
    return f"{path or BUILT_IN}{f', with {more}' if more else ''}"


def _found(context: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    return value or find_configuration()


def _read(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> tuple[Setting, ...]:
    try:
        return tuple(map(parse_setting, value))
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


CONFIG = click.option(
    "-c",
    "--config",
    "path",
    type=click.Path(path_type=Path),
    envvar=VARIABLE,
    callback=_found,
    metavar="FILE",
    help=f"The configuration, in YAML. By default ${VARIABLE}, else entrepot.yml in the user's configuration"
    f" directory, else {SYSTEM[0]} or {SYSTEM[1]}, else the built-in one.",
)
SET = click.option(
    "--set",
    "settings",
    multiple=True,
    callback=_read,
    metavar="KEY=VALUE",
    help="Set a key of the configuration, such as disk.path=/data. Can be repeated.",
)
