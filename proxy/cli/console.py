"""Text for people: tables, bars, sizes, ages.

On a terminal tables are drawn by rich and fit its width.  Elsewhere they are plain columns, whole, without
colors: what reads them is a program, or a file.  What was not written here (media types, errors of upstreams)
may hold anything, so whatever could steer a terminal is taken out of it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

SHORT = 12  # characters of a digest on a terminal: enough to tell two apart


@dataclass(frozen=True, slots=True)
class Column:
    """`right` aligns numbers; `digests` may be cut short on a terminal; `whole` is never broken there."""

    title: str
    right: bool = False
    digests: bool = False
    whole: bool = False


@dataclass(slots=True)
class Table:
    """`notes` are lines below it.  Without rows it is `empty`, a sentence."""

    columns: Sequence[Column]
    empty: str = ""
    title: str = ""
    rows: list[Sequence[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        self.rows.append([clean(each) for each in cells])


def write(*tables: Table, file: IO[str] | None = None) -> None:
    """Write them to `file`, standard output if none is given."""
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
    """To draw on it, or None if it is no terminal."""
    if not file.isatty():
        return None
    # Not above: who writes no table, such as the server, does without rich.
    from rich.console import Console

    return Console(file=file, highlight=False, markup=False, emoji=False)


def plain(table: Table) -> str:
    """Columns with two spaces between, and no space at the end of a line."""
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
        # As Text, since in a str rich would look for markup.
        drawn.add_row(*(Text(shortened_digest(cell) if column.digests else cell) for cell, column in cells))
    console.print(drawn)


class Progress:
    """What long work has done so far: a bar for each part of it on a terminal, elsewhere lines.

    To be closed; what there is to say after it is written then.
    """

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._console = terminal(file)
        self._bars: Bars | None = None  # from the first part on
        self._tasks: dict[str, TaskID] = {}
        self._steps: dict[str, int] = {}  # elsewhere: how far a part was when its last line was written

    def show(self, part: str, done: int, whole: int | None, text: str) -> None:
        """`part` is its name, `text` says what the numbers do, and more; `whole` below 0 is unknown."""
        known = whole if whole is not None and whole >= 0 else None
        if self._console:
            if self._bars is None:
                self._bars = _bars(self._console)
                self._bars.start()
            if part not in self._tasks:
                self._tasks[part] = self._bars.add_task(clean(shortened_digest(part)), total=known, text="")
            self._bars.update(self._tasks[part], completed=done, total=known, text=clean(text))
            return
        # A line for each tenth, or each doubling: neither silence nor a flood.
        step = 10 * done // known if known else done.bit_length()
        if self._steps.get(part) != step:
            self._steps[part] = step
            self._file.write(f"{clean(part)}: {clean(text)}\n")
            self._file.flush()

    def note(self, text: str) -> None:
        """A line of its own, above the bars."""
        if self._bars:
            self._bars.console.print(clean(text), highlight=False, markup=False)
        else:
            self._file.write(f"{clean(text)}\n")
            self._file.flush()

    def drop(self, part: str) -> None:
        """It is done, or given up."""
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
    """Of a digest the beginning, after what may stand before it in its cell; other text as it is."""
    before, colon, encoded = text.rpartition(":")
    return f"{before}:{encoded[:SHORT]}" if colon and len(encoded) >= 32 else text
