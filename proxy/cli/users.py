"""The commands about users: user add, passwd, rm and ls.  They change the file of access.htpasswd."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import click
import msgspec

from proxy.cli.configured import BUILT_IN, config_options
from proxy.cli.console import complain
from proxy.cli.help import ExplainedCommand, ExplainedGroup
from proxy.cli.removal import is_interactive
from proxy.config.errors import ConfigError
from proxy.config.loader import load
from proxy.config.settings import Setting


@click.group(cls=ExplainedGroup)
def user() -> None:
    """Manage the users of private registries.

    A running server reads the file again when it has changed.
    """


def _with_file(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options of a command on the file of users; it gets that file as `file`."""

    @wraps(function)
    def called(
        path: Path | None, settings: tuple[Setting, ...], file: Path | None, **arguments: object
    ) -> None:
        function(file=file or _configured(path, settings), **arguments)

    option: Callable[..., Any] = click.option(
        "--file",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="The file of users. By default access.htpasswd of the configuration.",
    )
    decorated: Callable[..., None] = config_options(option(called))
    return decorated


def _configured(path: Path | None, settings: tuple[Setting, ...]) -> Path:
    """The file of users that the configuration names."""
    try:
        found = load(path, settings=settings).access.htpasswd
    except ConfigError as error:
        _fail(str(error), 2)
        raise
    if found is None:
        raise click.UsageError(f"{path or BUILT_IN} has no access.htpasswd: add it, or give --file")
    return found


def _checked(context: click.Context, parameter: click.Parameter, name: str) -> str:
    from proxy.access.user_file import check_name

    try:
        check_name(name)
    except ValueError as error:
        raise click.BadParameter(f"a name {error}") from None
    return name


_NAME = click.argument("name", callback=_checked)
_STDIN = click.option(
    "--password-stdin", is_flag=True, help="Read the password from standard input, without asking for it."
)


@user.command(cls=ExplainedCommand)
@_NAME
@_STDIN
@_with_file
def add(name: str, password_stdin: bool, file: Path) -> None:
    """Add a user.

    Asks for the password. Creates the file if there is none.
    """
    from proxy.access.user_file import UserFile

    with _failing(file):
        UserFile(file).add(name, _password(password_stdin))
    click.echo(f"added {name} to {file}")


@user.command(cls=ExplainedCommand)
@_NAME
@_STDIN
@_with_file
def passwd(name: str, password_stdin: bool, file: Path) -> None:
    """Change the password of a user.

    Asks for the new password.
    """
    from proxy.access.user_file import UserFile

    with _failing(file):
        UserFile(file).change(name, _password(password_stdin))
    click.echo(f"changed the password of {name} in {file}")


@user.command(cls=ExplainedCommand)
@_NAME
@_with_file
def rm(name: str, file: Path) -> None:
    """Remove a user.

    The user has no access from the next request on.
    """
    from proxy.access.user_file import UserFile

    with _failing(file):
        UserFile(file).remove(name)
    click.echo(f"removed {name} from {file}")


@user.command(cls=ExplainedCommand)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_with_file
def ls(as_json: bool, file: Path) -> None:
    """List the users.

    Prints a warning for each line of the file that the server refuses.
    """
    from proxy.access.user_file import UserFile

    with _failing(file):
        users = UserFile(file).users()
    for each in users.bad:
        complain(f"{file}: {each}")
    if as_json:
        click.echo(msgspec.json.encode(sorted(users.hashes)))
    elif users.hashes:
        click.echo("\n".join(sorted(users.hashes)))


def _password(from_stdin: bool) -> str:
    """Raises ValueError."""
    from proxy.access.user_file import check_password

    if from_stdin:
        text = sys.stdin.read()
        password = text.removesuffix("\n").removesuffix("\r")
    elif is_interactive():
        password = click.prompt("Password", hide_input=True, confirmation_prompt=True)
    else:
        raise click.UsageError("standard input is no terminal: give --password-stdin")
    try:
        check_password(password)
    except ValueError as error:
        raise ValueError(f"the password {error}") from None
    return password


@contextmanager
def _failing(file: Path) -> Iterator[None]:
    """End the program if the work fails."""
    try:
        yield
    except OSError as error:
        _fail(f"{file}: {error.strerror}", 1)
    except ValueError as error:
        _fail(str(error), 1)


def _fail(message: str, status: int) -> None:
    complain(message)
    sys.exit(status)


COMMANDS = (user,)
