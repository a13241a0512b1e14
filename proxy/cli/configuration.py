"""The commands about the configuration itself: config schema, show and diff."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from proxy.cli.configured import config_options
from proxy.cli.console import complain, write
from proxy.cli.help import ExplainedGroup, command
from proxy.cli.tables import Column, Table
from proxy.config.errors import ConfigError
from proxy.config.faults import within
from proxy.config.settings import Setting

if TYPE_CHECKING:
    from proxy.config.effective import Difference, EffectiveValue

T = TypeVar("T")

# What a reload (SIGHUP) does not simply apply, by the path of the key.
NOTES = {
    "disk.path": "disk.path: what is stored stays in the old directory; move it while the server is stopped",
    "log": "log: the parent process logs as before until a restart",
}


@click.group(cls=ExplainedGroup)
def config() -> None:
    """Explain the configuration: its schema and its sources."""


@command()
def schema() -> None:
    """Print the JSON Schema of the configuration.

    Editors check a file by it whose first line is: # yaml-language-server: $schema=FILE
    """
    from importlib.resources import files

    click.echo(files("proxy.config").joinpath("config.schema.json").read_text("utf-8"), nl=False)


@command()
@config_options
@click.option("--effective", "everything", is_flag=True, help="Also show what nobody has set.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--wide", is_flag=True, help="Print whole values, however long.")
def show(
    path: Path | None, settings: tuple[Setting, ...], everything: bool, as_json: bool, wide: bool
) -> None:
    """Show the values that are set, and where.

    Prints each key with its value and its source: a file with the line, a variable, or --set. Shows secrets
    as ***.
    """
    from proxy.config.effective import effective

    found = [each for each in _read(lambda: effective(path, settings=settings)) if everything or each.given]
    if as_json:
        click.echo(msgspec.json.encode(found))
        return
    write(_values_table(found), wide=wide)


def _values_table(found: list[EffectiveValue]) -> Table:
    table = Table(
        (Column("KEY"), Column("VALUE"), Column("SOURCE")), empty="nothing is set: all values are defaults"
    )
    for each in found:
        table.add(each.key, _text(each.value), each.source)
    return table


@command()
@click.argument("old", type=click.Path(path_type=Path), metavar="OLD")
@click.argument("new", type=click.Path(path_type=Path), metavar="[NEW]", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--wide", is_flag=True, help="Print whole values, however long.")
def diff(old: Path, new: Path | None, as_json: bool, wide: bool) -> None:
    """Compare two configurations by what they mean.

    Without NEW, OLD is compared with a server without a configuration. The environment is left out, and ${…}
    is not replaced. Secrets are shown as ***. Exits with 1 if there is a difference.
    """
    from proxy.config.effective import differences

    before, after = (None, old) if new is None else (old, new)
    found = _read(lambda: differences(before, after))
    if as_json:
        click.echo(msgspec.json.encode(found))
    else:
        write(_differences_table(found), wide=wide)
    sys.exit(bool(found))


def _differences_table(found: list[Difference]) -> Table:
    table = Table((Column("KEY"), Column("OLD"), Column("NEW")), empty="they mean the same")
    for each in found:
        table.add(each.key, _text(each.old), _text(each.new))
    table.notes = [note for key, note in NOTES.items() if any(within(each.key, key) for each in found)]
    if found:
        table.notes.append(
            "a reload (SIGHUP) applies all that has no note here"
            if table.notes
            else "a reload (SIGHUP) applies it"
        )
    return table


def _read(work: Callable[[], T]) -> T:
    try:
        return work()
    except ConfigError as error:
        complain(str(error))
        sys.exit(2)


def _text(value: Any) -> str:
    """As YAML has it; `-` for no value."""
    if value is None:
        return "-"
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


for each in (schema, show, diff):
    config.add_command(each)
COMMANDS = (config,)
