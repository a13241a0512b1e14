"""Builds the newest release of each client, tries it against a server, and prints a table.

Progress goes to standard error, and the table to standard output, as Markdown.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import click
import pytest

from tests.clients.newest.sources import Failed, Source
from tests.clients.newest.table import CLIENTS, Client
from tests.clients.newest.trial import COLUMNS, Trial

WIDTH = 100  # characters of an error in the table


@click.command()
@click.option("--only", multiple=True, metavar="NAME", help="Try clients whose name contains it; repeatable.")
@click.option(
    "--directory",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep here what is built, and a log of each client.  [default: a temporary directory]",
)
def main(only: tuple[str, ...], directory: Path | None) -> None:
    """Try the newest clients against a server.

    Exits with status 1 if a step fails.
    """
    chosen = [each for each in CLIENTS if not only or any(name in each.name for name in only)]
    if not chosen:
        raise click.BadParameter(f"no client has such a name: {', '.join(only)}", param_hint="--only")
    with _kept(directory) as tools:
        rows = [_row(client, tools) for client in chosen]
    print(f"Tried on {datetime.now(UTC):%Y-%m-%d}:\n")
    heads = ["client", "version", *COLUMNS]
    for row in [heads, ["---"] * len(heads), *rows]:
        print(f"| {' | '.join(row)} |")
    sys.exit(any(cell not in ("ok", "-") for row in rows for cell in row[2:]))


@contextmanager
def _kept(directory: Path | None) -> Iterator[Path]:
    with ExitStack() as stack:
        found = directory or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="entrepot-")))
        (found / "bin").mkdir(parents=True, exist_ok=True)
        yield found.absolute()


@cache
def _install(source: Source, tools: Path) -> str:
    return source.install(tools)


def _row(client: Client, tools: Path) -> list[str]:
    print(f"{client.name} …", file=sys.stderr, flush=True)
    version, cells = "?", dict.fromkeys(COLUMNS, "-")
    with (
        open(tools / f"{client.name.split()[0].replace('/', '-')}.log", "w") as log,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        try:
            version, *_ = [_install(source, tools) for source in client.sources]
        except Failed as error:
            cells["cold"] = f"not built: {error}"
        else:
            cells = _try(client, tools)
    row = [client.name, version, *(cell[:WIDTH].replace("|", "\\|") for cell in cells.values())]
    print(*row, sep="\t", file=sys.stderr, flush=True)
    return row


def _try(client: Client, tools: Path) -> dict[str, str]:
    cells: dict[str, str] = {}
    temporary = tempfile.TemporaryDirectory(prefix="entrepot-", ignore_cleanup_errors=True)
    try:
        with temporary as directory, ExitStack() as stack:
            cells = Trial(client, tools, Path(directory), stack).cells()
    except (AssertionError, pytest.fail.Exception) as error:  # of the server, which has logged an error
        first, *_ = str(error).splitlines()
        cells = {**dict.fromkeys(COLUMNS, "-"), **cells, "cold": first}
    return cells


if __name__ == "__main__":
    main()
