"""Output for people: tables, progress bars, and phrases that several commands use.

On a terminal tables fit its width, and are colored unless NO_COLOR is set.  Elsewhere, as in a pipe or a
file, they are plain columns at full width and without colors.  Text from elsewhere (media types, errors of
upstreams) may hold anything, so control characters are replaced, and what the encoding of the terminal or
file has not.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any

import click

from proxy.cli.bars import share_bar
from proxy.cli.tables import Table, clean, fitted, plain, shortened, shortened_digest, wrapped
from proxy.config.quantities import format_duration

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID


PAUSE = 0.5  # seconds between two updates of the progress of work in this process
_GLYPHS = "█▒░·─│├└…"
_ASCII = str.maketrans(_GLYPHS, "#+-.-||`~")


def legible(text: str, file: IO[str]) -> str:
    """The text, with ASCII characters for those that the encoding of `file` has not."""
    encoding = getattr(file, "encoding", None) or "utf-8"  # that of a StringIO is None
    try:
        f"{_GLYPHS}{text}".encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_ASCII).encode(encoding, "replace").decode(encoding)
    return text


def write(*tables: Table, file: IO[str] | None = None, wide: bool = False) -> None:
    """Write tables to `file`, by default standard output; `wide` ones as if that were no terminal."""
    file = file or sys.stdout
    console = None if wide else terminal(file)
    for number, table in enumerate(tables):
        if number:
            file.write("\n")
        if table.title:
            file.write(f"{legible(table.title, file)}\n")
        if console is None:
            if table.rows:
                file.write(legible(plain(table), file))
            for note in _below(table):
                file.write(f"{legible(note, file)}\n")
            continue
        lines = fitted(table, console.width) if table.rows else []
        for note in _below(table):
            lines += wrapped(note, console.width)
        for line in lines:
            line.plain = legible(line.plain, file)
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


def warn(message: str) -> None:
    """Say on standard error what is missing in the answer of a command."""
    colored = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    start = click.style("warning:", fg="yellow") if colored else "warning:"
    click.echo(f"{start} {legible(clean(message), sys.stderr)}", err=True)


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

    def show(self, part: str, done: int, whole: int | None, text: str, bar: str = "") -> None:
        """Show that `done` of `whole` is done of a part, which is unknown if below 0; `text` says so in
        words, and `bar` is drawn in place of a bar of one piece.
        """
        text, bar = self._legible(text), self._legible(bar)
        known = whole if whole is not None and whole >= 0 else None
        if self._console:
            if self._bars is None:
                self._bars = _bars(self._console, self._file)
                self._bars.start()
            if part not in self._tasks:
                name = self._legible(shortened_digest(part))
                self._tasks[part] = self._bars.add_task(name, total=known, text="", bar="")
            self._bars.update(self._tasks[part], completed=done, total=known, text=text, bar=bar)
            return
        # A line for each tenth, or for each doubling where the total is unknown.
        step = 10 * done // known if known else done.bit_length()
        if self._steps.get(part) != step:
            self._steps[part] = step
            self._file.write(f"{self._legible(part)}: {text}\n")
            self._file.flush()

    async def follow(self, work: asyncio.Future[Any], show: Callable[[ProgressDisplay], None]) -> None:
        """Wait until `work` has ended, and call `show` now and then."""
        while not (await asyncio.wait({work}, timeout=PAUSE))[0]:
            show(self)

    def note(self, text: str) -> None:
        """Write a line of its own, above the bars."""
        text = self._legible(text)
        if self._bars:
            self._bars.console.print(text, highlight=False, markup=False)
        else:
            self._file.write(f"{text}\n")
            self._file.flush()

    def _legible(self, text: str) -> str:
        return legible(clean(text), self._file)

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


def _bars(console: Console, file: IO[str]) -> Bars:
    """Bars that fit the console: the name of a part is above its bar if there is no room beside it."""
    from rich import progress as rich
    from rich.text import Text

    remaining = rich.TimeRemainingColumn()

    class PartColumn(rich.ProgressColumn):
        def render(self, task: rich.Task) -> Text:
            names = max(len(each.description) for each in bars.tasks)
            bar = task.fields["bar"] or share_bar(task.completed, task.total)
            done = f"{bar}  {remaining.render(task).plain}  {task.fields['text']}"
            if names + len(done) + 2 <= console.width:
                drawn = f"{task.description:{names}}  {done}"
            else:
                drawn = f"{shortened(task.description, console.width)}\n  {done}"
            return Text(legible(drawn, file), overflow="fold")

    bars = rich.Progress(PartColumn(), console=console, transient=True)
    return bars


def freshness(until: float | None, now: float) -> str:
    """How long a tag stays fresh: `always`, `for 9 min`, or `no`."""
    if until is None:
        return "always"
    return f"for {format_duration(until - now)}" if until > now else "no"
