"""Completion of what is typed in a shell: the command that installs it, and what it offers.

Each Tab runs the program, which must be quick and say nothing: a server that takes longer than a moment, or a
configuration that is wrong, offers nothing.
"""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import BashComplete, get_completion_class, split_arg_string

from proxy.cli.configured import find_configuration
from proxy.cli.console import complain
from proxy.cli.help import command
from storage.names import is_glob

if TYPE_CHECKING:
    from proxy.admin.operations import Operations
    from proxy.config.schema import Config

QUICK = 1.0  # seconds that a server may take
MOST = 100  # references that are offered
PROGRAM, VARIABLE = "entrepot", "_ENTREPOT_COMPLETE"
SHELLS = ("bash", "zsh", "fish")
# Where each shell looks for it, below $XDG_DATA_HOME or $XDG_CONFIG_HOME, or what these are by default.
_PLACES = {
    "bash": ("XDG_DATA_HOME", ".local/share", f"bash-completion/completions/{PROGRAM}"),
    "zsh": ("XDG_DATA_HOME", ".local/share", f"zsh/site-functions/_{PROGRAM}"),
    "fish": ("XDG_CONFIG_HOME", ".config", f"fish/completions/{PROGRAM}.fish"),
}
_THEN = {
    "bash": "open a new shell; it needs the package bash-completion",
    "zsh": "add this to ~/.zshrc, before compinit: fpath=({directory} $fpath)",
    "fish": "open a new shell",
}


class ColonBashComplete(BashComplete):
    """Completion for bash of words with colons, as references have them.

    Readline ends words at colons: so the line itself is read, and only what follows the last colon of the
    word is offered.
    """

    source_template = """\
%(complete_func)s() {
    local IFS=$'\\n' line="${COMP_LINE:0:COMP_POINT}" prefix="" completion response type value
    local word="${line##* }"
    [[ $COMP_WORDBREAKS == *:* && $word == *:* ]] && prefix="${word%%:*}:"
    response=$(env COMP_LINE="$line" %(complete_var)s=bash_complete "$1")
    COMPREPLY=()
    for completion in $response; do
        IFS=',' read -r type value <<< "$completion"
        case $type in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain) COMPREPLY+=("${value#"$prefix"}") ;;
        esac
    done
    return 0
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ["COMP_LINE"]
        words = split_arg_string(line)[1:]
        return (words, "") if not words or line[-1].isspace() else (words[:-1], words[-1])


@command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.option("--install", is_flag=True, help="Write it where the shell looks for it, for this user.")
@click.pass_context
def completion(context: click.Context, shell: str, install: bool) -> None:
    """Complete commands, options and references by Tab.

    Prints the completion for SHELL. References are those that the server stores, if it answers at once.
    """
    kind = get_completion_class(shell)
    assert kind is not None
    text = kind(context.find_root().command, {}, PROGRAM, VARIABLE).source()
    if not install:
        click.echo(text)
        return
    path = place(shell)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    except OSError as error:
        complain(
            f"cannot write {error.filename or path}: {error.strerror}."
            f" Print the completion instead: {PROGRAM} completion {shell} > FILE"
        )
        sys.exit(1)
    click.echo(f"{path}\nthen: {_THEN[shell].format(directory=path.parent)}")


def place(shell: str) -> Path:
    """The file in which the shell looks for the completion."""
    variable, default, name = _PLACES[shell]
    base = Path(os.environ.get(variable, ""))
    return (base if base.is_absolute() else Path.home() / default) / name


# What is offered


def namespaces(context: click.Context, parameter: click.Parameter, text: str) -> list[str]:
    """The namespaces of the configuration that begin so."""
    with suppress(Exception):  # a shell has no place for errors
        return [each for each in _configuration(context).namespaces if each.startswith(text)]
    return []


def references(context: click.Context, parameter: click.Parameter, text: str) -> list[str]:
    """The references that the server stores, as the user began to write them."""
    if is_glob(text) or "@" in text:
        return []
    with suppress(Exception):
        return asyncio.run(asyncio.wait_for(_ask(context, text), QUICK))
    return []


async def _ask(context: click.Context, text: str) -> list[str]:
    from proxy.cli.target import admin_url, connected

    config, given = _configuration(context), context.params
    url = given.get("server") or str(admin_url(config) or "")
    token = given.get("token") or os.environ.get("ENTREPOT_ADMIN_TOKEN")
    async with connected(config, url, token, given.get("ca_file")) as client:
        return await _found(client, config, text)


async def _found(operations: Operations, config: Config, text: str) -> list[str]:
    name, colon, tag = text.rpartition(":")
    if colon and "/" not in tag:
        return await _tags(operations, name, tag)
    names = [row.repository for row in (await operations.repositories(f"{text}*")).repositories]
    if (start := _default(config)) is not None and "/" not in text:
        rows = (await operations.repositories(f"{start}{text}*")).repositories
        names = [*(row.repository.removeprefix(start) for row in rows), *names]
    return await _tags(operations, names[0], "") if len(names) == 1 else names[:MOST]


async def _tags(operations: Operations, name: str, tag: str) -> list[str]:
    listed = await operations.images(f"{name}:{tag}*", limit=MOST)
    return [f"{name}:{row.tag}" for row in listed.images if row.tag is not None]


def _default(config: Config) -> str | None:
    """What precedes the name of an image that is written without a namespace."""
    name = config.default_namespace
    found = None if name is None else config.namespaces.get(name)
    return None if found is None else f"{name}/library/" if found.library else f"{name}/"


def _configuration(context: click.Context) -> Config:
    from proxy.cli.context import quiet
    from proxy.config.loader import load

    given: dict[str, Any] = context.params
    quiet(level="critical")
    return load(given.get("path") or find_configuration(), settings=given.get("settings") or ())


COMMANDS = (completion,)
