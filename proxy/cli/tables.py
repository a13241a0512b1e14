"""Tables, and how they fit the width of a terminal.

A table that is too wide loses columns that hold nothing, wraps titles and texts, shortens names in the
middle, and leaves out columns by their priority, which a note names.  If that is not enough, each row becomes
a block of lines.  No value is cut without a sign.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

SHORT = 12  # characters of a digest on a terminal
GAP = "  "  # between two columns
LEAST = 20  # characters to which a name is shortened, or a text is wrapped, at least
ELLIPSIS = "…"

_STATES = {
    **dict.fromkeys(("ok", "yes", "complete", "copied", "present"), "green"),
    **dict.fromkeys(("warning", "partial"), "yellow"),
    **dict.fromkeys(("failed", "no", "absent"), "red"),
}


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table.

    `right` aligns numbers.  On a terminal `digests` are shortened, a `whole` cell is never wrapped, a `state`
    is colored by its word, and a `fault` is red.  Where the terminal is narrow, columns are left out in the
    order of `drop`, the highest first; those with 0 stay.
    """

    title: str
    right: bool = False
    digests: bool = False
    whole: bool = False
    state: bool = False
    fault: bool = False
    drop: int = 0

    @property
    def fixed(self) -> bool:
        """Whether no cell may become narrower than it is."""
        return self.right or self.digests or self.state

    def style(self, cell: str) -> str:
        return _STATES.get(cell, "") if self.state else "red" if self.fault else ""


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
        text.append(GAP.join(cells).rstrip() + "\n")
    return "".join(text)


def fitted(table: Table, width: int, *, told: bool = True) -> list[Text]:
    """The lines of a table with rows that fits `width`; the last, if `told`, names what is left out."""
    table = replace(table, rows=[_short_digests(table, row) for row in table.rows])
    widths = _widths(table, width)
    if widths is None:
        return _blocks(table, width)
    lines = _header(table, widths)
    for row in table.rows:
        lines += _row(table, widths, row)
    hidden = [
        column.title
        for number, column in enumerate(table.columns)
        if number not in widths and any(row[number] for row in table.rows)
    ]
    if hidden and told:
        lines += wrapped(f"not shown: {', '.join(hidden)}; --wide shows all columns", width, "dim")
    return lines


def _short_digests(table: Table, row: Sequence[str]) -> list[str]:
    pairs = zip(row, table.columns, strict=True)
    return [shortened_digest(cell) if column.digests else cell for cell, column in pairs]


def _widths(table: Table, width: int) -> Mapping[int, int] | None:
    """The width of each column to show, by its number; None if not even those that must stay fit."""
    natural = {
        number: max(map(_cells, (column.title, *(row[number] for row in table.rows))))
        for number, column in enumerate(table.columns)
    }
    if _total(natural) <= width:
        return natural
    filled = {number: natural[number] for number in natural if any(row[number] for row in table.rows)}
    names = [number for number in filled if table.columns[number].whole]
    for level in sorted({column.drop for column in table.columns}, reverse=True):
        shown = {number: filled[number] for number in filled if table.columns[number].drop <= level}
        # A name is shortened further only when no other column can be left out.
        limit = max(LEAST, width // 2 // max(1, len(names))) if level else LEAST
        least = {number: _least(table, number, limit) for number in shown}
        if _total(least) <= width:
            widths = _grown(table, least, shown, width)
            shortened = [number for number in names if number in widths]
            return widths if all(_distinct(table, each, widths[each]) for each in shortened) else None
    return None


def _total(widths: Mapping[int, int]) -> int:
    return sum(widths.values()) + len(GAP) * (len(widths) - 1)


def _least(table: Table, number: int, limit: int) -> int:
    """The least width of a column, in which no word of its title is broken."""
    column = table.columns[number]
    content = max(_cells(row[number]) for row in table.rows)
    if not column.fixed:
        content = min(content, limit if column.whole else LEAST)
    return max(content, *map(_cells, column.title.split()))


def _grown(
    table: Table, least: Mapping[int, int], natural: Mapping[int, int], width: int
) -> Mapping[int, int]:
    """The widths with what is left of `width`: first for names, then for texts, the narrowest first."""
    widths = dict(least)
    spare = width - _total(widths)
    for names in (True, False):
        while growing := [
            number
            for number in widths
            if table.columns[number].whole == names and widths[number] < natural[number]
        ]:
            if not spare:
                return widths
            widths[min(growing, key=lambda number: widths[number])] += 1
            spare -= 1
    return widths


def _distinct(table: Table, number: int, width: int) -> bool:
    """Whether names that differ still do when they are shortened."""
    names = {row[number] for row in table.rows}
    return len({shortened(name, width) for name in names}) == len(names)


def _header(table: Table, widths: Mapping[int, int]) -> list[Text]:
    from rich.text import Text

    titles = [column.title for column in table.columns]
    lines = _row(table, widths, titles, "bold")
    return [*lines, Text("─" * _total(widths))]


def _row(table: Table, widths: Mapping[int, int], row: Sequence[str], style: str | None = None) -> list[Text]:
    from rich.text import Text

    cells = []
    for number, width in widths.items():
        column, cell = table.columns[number], row[number]
        chosen = column.style(cell) if style is None else style
        text = shortened(cell, width) if column.whole and style is None else cell
        cells.append(wrapped(text, width, chosen) or [Text("")])
    height = max(map(len, cells))
    lines = []
    for level in range(height):
        line = Text()
        for (number, width), parts in zip(widths.items(), cells, strict=True):
            # Titles of several lines end above their column, cells begin beside their row.
            at = level - (height - len(parts) if style else 0)
            part = parts[at] if 0 <= at < len(parts) else Text("")
            space = " " * (width - part.cell_len)
            line.append_text(
                Text.assemble(space, part) if table.columns[number].right else part + Text(space)
            )
            line.append(GAP)
        line.rstrip()
        lines.append(line)
    return lines


def _blocks(table: Table, width: int) -> list[Text]:
    """A block of lines for each row, one line or more for each cell that holds something."""
    from rich.text import Text

    titles = max(_cells(column.title) for column in table.columns)
    room = max(1, width - titles - len(GAP))
    lines: list[Text] = []
    for row in table.rows:
        if lines:
            lines.append(Text(""))
        for column, cell in zip(table.columns, row, strict=True):
            title = column.title
            for part in wrapped(cell, room, column.style(cell)):
                lines.append(Text.assemble((title.ljust(titles), "bold"), GAP, part))
                title = ""
    return lines


def wrapped(text: str, width: int, style: str = "") -> list[Text]:
    """The text as lines of `width`, broken at spaces; longer words are broken anywhere."""
    from rich.text import Text

    if _cells(text) <= width:
        return [Text(text, style)] if text else []
    lines = Text(text, style).wrap(_console(), max(1, width), overflow="fold")
    for line in lines:
        line.rstrip()
    return list(lines)


@cache
def _console() -> Console:
    from rich.console import Console

    return Console()


def _cells(text: str) -> int:
    """How many columns of a terminal the text takes."""
    from rich.cells import cell_len

    return cell_len(text)


def shortened(text: str, width: int) -> str:
    """The text, if it is wider than `width` with an ellipsis for what its middle loses."""
    if _cells(text) <= width:
        return text
    for kept in range(min(len(text), width) - 1, 0, -1):
        short = f"{text[: kept // 2]}{ELLIPSIS}{text[len(text) - (kept - kept // 2) :]}"
        if _cells(short) <= width:
            return short
    return ELLIPSIS


def shortened_digest(text: str) -> str:
    """The text with a digest at its end cut to its beginning."""
    before, colon, encoded = text.rpartition(":")
    return f"{before}:{encoded[:SHORT]}" if colon and len(encoded) >= 32 else text


def clean(text: str) -> str:
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)


def no_image(reference: str, platforms: Sequence[str]) -> str:
    """A note on an image that some of the wanted platforms have none of."""
    return f"{reference} has no image for {', '.join(platforms)}"
