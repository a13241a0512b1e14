"""Output for people: tables, progress bars, and phrases that several commands use.

On a terminal tables fit its width, and are colored unless NO_COLOR is set.  Elsewhere, as in a pipe or a
file, they are plain columns at full width and without colors.  Text from elsewhere (media types, errors of
upstreams) may hold anything, so control characters are replaced.
"""

from __future__ import annotations

import os
import sys
from typing import IO, TYPE_CHECKING

import click

from proxy.cli.tables import Table, clean, fitted, plain, shortened_digest, wrapped
from proxy.config.quantities import format_duration

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID


def write(*tables: Table, file: IO[str] | None = None, wide: bool = False) -> None:
    """Write tables to `file`, by default standard output; `wide` ones as if that were no terminal."""
    file = file or sys.stdout
    console = None if wide else terminal(file)
    for number, table in enumerate(tables):
        if number:
            file.write("\n")
        if table.title:
            file.write(f"{table.title}\n")
        if console is None:
            if table.rows:
                file.write(plain(table))
            for note in _below(table):
                file.write(f"{note}\n")
            continue
        lines = fitted(table, console.width) if table.rows else []
        for note in _below(table):
            lines += wrapped(note, console.width)
        for line in lines:
            # Each line fits: rich must not wrap it again.
            console.print(line, soft_wrap=True)


def _below(table: Table) -> list[str]:
    """The lines below the rows of a table, or in their place."""
    return [*([table.empty] if table.empty and not table.rows else []), *map(clean, table.notes)]


def complain(message: str) -> None:
    """Say on standard error why a command fails."""
    # A start that fails may have several reasons, one in each line.
    colored = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    start = click.style("entrepot:", fg="red") if colored else "entrepot:"
    for line in message.splitlines():
        click.echo(f"{start} {line}", err=True)


def terminal(file: IO[str]) -> Console | None:
    """A console that draws on `file`, or None if that is not a terminal."""
    if not file.isatty():
        return None
    # Not at the top: the server writes no table, and stays smaller without rich.
    from rich.console import Console

    return Console(file=file, highlight=False, markup=False, emoji=False)


class ProgressDisplay:
    """Shows the progress of long work: a bar for each part of it on a terminal, elsewhere lines.

    Must be closed before anything else is written.
    """

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._console = terminal(file)
        self._bars: Bars | None = None  # made with the first part
        self._tasks: dict[str, TaskID] = {}
        self._steps: dict[str, int] = {}  # without a terminal: how far each part was at its last line

    def show(self, part: str, done: int, whole: int | None, text: str) -> None:
        """Show that `done` of `whole` is done of a part, which is unknown if below 0; `text` says so in
        words.
        """
        known = whole if whole is not None and whole >= 0 else None
        if self._console:
            if self._bars is None:
                self._bars = _bars(self._console)
                self._bars.start()
            if part not in self._tasks:
                self._tasks[part] = self._bars.add_task(clean(shortened_digest(part)), total=known, text="")
            self._bars.update(self._tasks[part], completed=done, total=known, text=clean(text))
            return
        # A line for each tenth, or for each doubling where the total is unknown.
        step = 10 * done // known if known else done.bit_length()
        if self._steps.get(part) != step:
            self._steps[part] = step
            self._file.write(f"{clean(part)}: {clean(text)}\n")
            self._file.flush()

    def note(self, text: str) -> None:
        """Write a line of its own, above the bars."""
        if self._bars:
            self._bars.console.print(clean(text), highlight=False, markup=False)
        else:
            self._file.write(f"{clean(text)}\n")
            self._file.flush()

    def drop(self, part: str) -> None:
        """Remove a part that has ended."""
        self._steps.pop(part, None)
        if self._bars and part in self._tasks:
            self._bars.remove_task(self._tasks.pop(part))

    def parts(self) -> set[str]:
        return {*self._tasks, *self._steps}

    def close(self) -> None:
        if self._bars:
            self._bars.stop()


def _bars(console: Console) -> Bars:
    from rich import progress as rich

    return rich.Progress(
        rich.TextColumn("{task.description}", markup=False),
        rich.BarColumn(),
        rich.TimeRemainingColumn(),
        rich.TextColumn("{task.fields[text]}", markup=False),
        console=console,
        transient=True,
    )


def freshness(until: float | None, now: float) -> str:
    """How long a tag stays fresh: `always`, `for 9 min`, or `no`."""
    if until is None:
        return "always"
    return f"for {format_duration(until - now)}" if until > now else "no"
