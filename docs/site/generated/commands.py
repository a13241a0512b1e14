"""What each command prints for --help."""

from __future__ import annotations

from collections.abc import Iterator

import click

from generated.markdown import code, prose, table
from proxy.cli.main import main

_HEAD = """\
# Options of all commands

What `entrepot COMMAND --help` prints. [Commands](../commands.md) shows what the commands print, with
examples.
"""


def page() -> str:
    known = [*listed(main, click.Context(main, info_name="entrepot"))]
    rows = [
        (f"[{code(context.command_path)}](#{_anchor(context)})", prose(command.get_short_help_str(limit=200)))
        for command, context in known
    ]
    parts = [_HEAD, table(("Command", ""), rows)]
    parts += [
        f"## {code(context.command_path)}\n\n```text\n{command.get_help(context)}\n```"
        for command, context in known
    ]
    return "\n\n".join(parts) + "\n"


def listed(group: click.Group, context: click.Context) -> Iterator[tuple[click.Command, click.Context]]:
    """All commands that are not hidden, and those of groups."""
    for name in sorted(group.list_commands(context)):
        command = group.get_command(context, name)
        if command is None or command.hidden:
            continue
        below = click.Context(
            command, info_name=name, parent=context, max_content_width=100, terminal_width=100
        )
        yield command, below
        if isinstance(command, click.Group):
            yield from listed(command, below)


def _anchor(context: click.Context) -> str:
    return context.command_path.replace(" ", "-")
