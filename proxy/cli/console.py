"""Output for people: tables, progress bars, and phrases that several commands use.

On a terminal rich draws the tables and fits them to its width.  Elsewhere, as in a pipe or a file, they are
plain columns at full width and without colors.  Text from elsewhere (media types, errors of upstreams) may
hold anything, so control characters are replaced.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING

from proxy.config.quantities import format_duration

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

SHORT = 12  # characters of a digest on a terminal


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table.

    `right` aligns numbers.  On a terminal `digests` are shortened, and a `whole` cell is never wrapped.
    """

    title: str
    right: bool = False
    digests: bool = False
    whole: bool = False


@dataclass(slots=True)
class Table:
    """A table, with lines below it, `notes`.  Without rows the sentence `empty` is printed instead."""

    columns: Sequence[Column]
    empty: str = ""
    title: str = ""
    rows: list[Sequence[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        self.rows.append([clean(each) for each in cells])


def write(*tables: Table, file: IO[str] | None = None) -> None:
    """Write tables to `file`, by default standard output."""
    file = file or sys.stdout
    console = terminal(file)
    for number, table in enumerate(tables):
        if number:
            file.write("\n")
        if table.title:
            file.write(f"{table.title}\n")
        if not table.rows:
            file.write(f"{table.empty}\n" if table.empty else "")
        elif console:
            _draw(console, table)
        else:
            file.write(plain(table))
        for note in table.notes:
            file.write(f"{clean(note)}\n")


def terminal(file: IO[str]) -> Console | None:
    """A console that draws on `file`, or None if that is not a terminal."""
    if not file.isatty():
        return None
    # Not at the top: the server writes no table, and stays smaller without rich.
    from rich.console import Console

    return Console(file=file, highlight=False, markup=False, emoji=False)


def plain(table: Table) -> str:
    """The table as columns with two spaces between, and no space at the end of a line."""
    lines = [[column.title for column in table.columns], *table.rows]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    text = []
    for line in lines:
        cells = [
            cell.rjust(width) if column.right else cell.ljust(width)
            for cell, width, column in zip(line, widths, table.columns, strict=True)
        ]
        text.append("  ".join(cells).rstrip() + "\n")
    return "".join(text)


def _draw(console: Console, table: Table) -> None:
    from rich import box
    from rich import table as rich
    from rich.text import Text

    drawn = rich.Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for column in table.columns:
        drawn.add_column(
            Text(column.title),
            justify="right" if column.right else "left",
            no_wrap=column.right or column.digests or column.whole,
            overflow="fold",
        )
    for row in table.rows:
        cells = zip(row, table.columns, strict=True)
        # As Text, since rich parses markup in a str.
        drawn.add_row(*(Text(shortened_digest(cell) if column.digests else cell) for cell, column in cells))
    console.print(drawn)


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


def clean(text: str) -> str:
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)


def shortened_digest(text: str) -> str:
    """The text with a digest at its end cut to its beginning."""
    before, colon, encoded = text.rpartition(":")
    return f"{before}:{encoded[:SHORT]}" if colon and len(encoded) >= 32 else text


def freshness(until: float | None, now: float) -> str:
    """How long a tag stays fresh: `always`, `for 9 min`, or `no`."""
    if until is None:
        return "always"
    return f"for {format_duration(until - now)}" if until > now else "no"
