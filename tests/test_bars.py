"""Bars of characters, and how a terminal of any encoding shows them."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

import proxy.cli
from proxy.admin.models import FillRow
from proxy.cli import bars, console, fills
from proxy.cli.bars import MISSING, THERE, extents_bar, has_gaps, share_bar
from proxy.processes.rows import SpanRow
from storage.disk.extents import Extents

MIB = 1 << 20
Spans = list[tuple[int, int]]


def row(
    size: int, extents: Spans, coming: Spans, repeated: int = 0, repository: str = "docker.io/library/nginx"
) -> FillRow:
    there, under_way = ([SpanRow(start=a, stop=b) for a, b in each] for each in (extents, coming))
    return FillRow(
        digest=f"sha256:{'5e' * 32}",
        namespace="docker.io",
        repository=repository,
        bytes=sum(stop - start for start, stop in extents),
        size=size,
        started=0.0,
        followers=3,
        pid=7,
        own=True,
        extents=there,
        coming=under_way,
        repeated=repeated,
        speed=3.5 * MIB,
        eta=75.0,
    )


@pytest.mark.parametrize(
    ("size", "extents", "coming", "drawn"),
    [
        (1000, [], [], "··········"),
        (1000, [(0, 1000)], [], "██████████"),
        (1000, [(0, 999)], [], "█████████▒"),
        (1000, [(100, 350)], [(350, 600)], "·██▒░░····"),
        (1000, [(0, 1), (999, 1000)], [(1, 2), (500, 501)], "▒····░···▒"),
        (1000, [], [(0, 1000)], "░░░░░░░░░░"),
        (3, [(0, 1)], [(2, 3)], "███▒··░░░░"),
        (1, [(0, 1)], [], "██████████"),
        (0, [], [], ""),
        (-1, [(0, 500)], [], ""),
    ],
)
def test_bars_of_extents(size: int, extents: Spans, coming: Spans, drawn: str) -> None:
    assert extents_bar(row(size, extents, coming), 10) == drawn


@given(
    size=st.integers(1, 50_000),
    spans=st.lists(st.tuples(st.integers(0, 50_000), st.integers(1, 9_000))),
    width=st.integers(1, 60),
)
def test_a_bar_is_full_and_empty_where_the_blob_is(
    size: int, spans: list[tuple[int, int]], width: int
) -> None:
    extents = Extents((min(size, start), min(size, start + length)) for start, length in spans)
    drawn = extents_bar(row(size, list(extents), []), width)
    assert len(drawn) == width
    assert (set(drawn) == {THERE}) == (extents.total == size)
    assert (set(drawn) == {MISSING}) == (extents.total == 0)
    for start, stop in extents:
        assert drawn[start * width // size] != MISSING
        assert drawn[(stop - 1) * width // size] != MISSING


@pytest.mark.parametrize(
    ("extents", "gaps"), [([], False), ([(0, 5)], False), ([(1, 5)], True), ([(0, 1), (3, 4)], True)]
)
def test_gaps(extents: Spans, gaps: bool) -> None:
    assert has_gaps(row(10, extents, [])) == gaps


@pytest.mark.parametrize(
    ("done", "whole", "drawn"),
    [
        (0, 10, "····"),
        (5, 10, "██··"),
        (9.9, 10, "███·"),
        (10, 10, "████"),
        (12, 10, "████"),
        (5, None, "    "),
    ],
)
def test_bars_of_other_work(done: float, whole: float | None, drawn: str) -> None:
    assert share_bar(done, whole, 4) == drawn


class Screen(io.TextIOWrapper):
    """A terminal that knows one encoding."""

    def __init__(self, encoding: str, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
        self.written = io.BytesIO()
        super().__init__(self.written, encoding, write_through=True)
        drawn = Console(file=self, width=width, force_terminal=True, color_system=None)
        monkeypatch.setattr(console, "terminal", lambda file: drawn)

    def lines(self) -> list[str]:
        return self.written.getvalue().decode(self.encoding).splitlines()


FILLS = [
    row(20 * MIB, [(0, 3 * MIB), (6 * MIB, 7 * MIB)], [(3 * MIB, 6 * MIB), (13 * MIB, 20 * MIB)], 5 * MIB),
    row(40 << 30, [(0, 1 << 30)], [(1 << 30, 40 << 30)], 0, "registry.ollama.ai/library/a-model-of-a-name"),
]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "iso-8859-1"])
def test_fills_on_80_columns(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(encoding, monkeypatch, 80)
    console.write(*fills.fill_tables(FILLS, 0.0), file=screen)
    lines = screen.lines()
    assert max(map(cell_len, lines)) <= 80
    shown = "\n".join(lines)
    first, second, legend = "███░░░█······░░░░░░░", "▒░░░░░░░░░░░░░░░░░░░", bars.LEGEND
    if encoding != "utf-8":
        first, second = "###---#......-------", "+-------------------"
        legend = "# there  + partly there  - coming now  . missing"
    assert f"{first}\n" in shown
    assert f"{second}\n" in shown
    assert f"{legend}\n5.0 MiB came twice\n" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("width", [50, 80, 200])
def test_fills_that_are_watched(encoding: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(encoding, monkeypatch, width)
    progress = console.ProgressDisplay(screen)
    fills.show_fills(FILLS, progress)
    progress.show("other work", 1, 4, "1 of 4")
    progress.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", "\n".join(screen.lines()))
    assert max(cell_len(line) for line in text.splitlines()) <= width
    assert ("███░░░█······░░░░░░░" if encoding == "utf-8" else "###---#......-------") in text
    assert ("█████···············" if encoding == "utf-8" else "#####...............") in text
    assert "docker.io/library/nginx@" in text


def test_a_file_of_another_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    file = io.TextIOWrapper(written, "ascii", write_through=True)
    table = fills.fill_tables([row(10, [(2, 4)], [], repository="ünïcode")], 0.0)
    console.write(*table, file=file)
    assert b"?n?code" in written.getvalue()
    assert b"....####............" in written.getvalue()


def test_every_character_has_one_of_ascii() -> None:
    ascii = io.TextIOWrapper(io.BytesIO(), "ascii")
    for path in Path(proxy.cli.__path__[0]).glob("*.py"):
        letters = set(path.read_text()) - {"?"}
        assert {each for each in letters if console.legible(each, ascii) == "?"} == set()
