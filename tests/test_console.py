"""Text for people: on a terminal, and where a program reads it."""

from __future__ import annotations

import io

import pytest

from proxy.cli.console import Column, ProgressDisplay, Table, clean, plain, shortened_digest, write

DIGEST = "sha256:" + "ab" * 32
COLUMNS = (Column("NAME"), Column("SIZE", right=True), Column("DIGEST", digests=True))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def table() -> Table:
    made = Table(COLUMNS, empty="nothing is there", notes=["2 in all"])
    made.add("alpine", "1.0 KiB", DIGEST)
    made.add("a-longer-name", "12 B", DIGEST)
    return made


def test_elsewhere_columns_are_whole() -> None:
    found = io.StringIO()
    write(table(), file=found)
    assert found.getvalue().splitlines() == [
        "NAME              SIZE  DIGEST",
        f"alpine         1.0 KiB  {DIGEST}",
        f"a-longer-name     12 B  {DIGEST}",
        "2 in all",
    ]


def test_on_a_terminal_digests_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    found = Terminal()
    write(table(), file=found)
    assert "sha256:abababababab" in found.getvalue()
    assert DIGEST not in found.getvalue()


def test_without_rows_a_sentence_says_so() -> None:
    found = io.StringIO()
    write(Table(COLUMNS, empty="nothing is there"), file=found)
    assert found.getvalue() == "nothing is there\n"


@pytest.mark.parametrize("file", [io.StringIO, Terminal])
def test_what_steers_a_terminal_is_taken_out(file: type[io.StringIO]) -> None:
    made = Table((Column("TYPE"),), notes=["\x1b[2J"])
    made.add("[red]\x1b]0;title\x07")
    found = file()
    write(made, file=found)
    assert "\x1b]" not in found.getvalue()
    assert "\x1b[2J" not in found.getvalue()
    assert "[red]" in found.getvalue()


def test_small_words() -> None:
    assert shortened_digest(f"└─ {DIGEST}") == "└─ sha256:abababababab"
    assert shortened_digest("alpine:3") == "alpine:3"
    assert clean("a\nb") == "a\N{REPLACEMENT CHARACTER}b"


def test_lines_tell_of_progress_by_tenths() -> None:
    found = io.StringIO()
    progress = ProgressDisplay(found)
    for done in range(0, 1001, 50):
        progress.show("a", done, 1000, f"{done} of 1000")
    progress.show("b", 512, -1, "512 B, 2 followers")
    progress.close()
    lines = found.getvalue().splitlines()
    assert lines[0] == "a: 0 of 1000"
    assert lines[-2:] == ["a: 1000 of 1000", "b: 512 B, 2 followers"]
    assert len(lines) == 12


def test_bars_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    found = Terminal()
    progress = ProgressDisplay(found)
    progress.show("[a]", 1, 2, "[half]")
    progress.show("b", 1, None, "")
    assert progress.parts() == {"[a]", "b"}
    progress.drop("b")
    assert progress.parts() == {"[a]"}
    progress.close()
    assert "[a]" in found.getvalue()
    assert "[half]" in found.getvalue()


def test_notes_stand_above_the_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for found in (Terminal(), io.StringIO()):
        progress = ProgressDisplay(found)
        progress.note("[a]: copied\x1b")
        progress.show("b", 1, 2, "half")
        progress.note("[b]: copied")
        progress.close()
        assert "[a]: copied\N{REPLACEMENT CHARACTER}\n" in found.getvalue()
        assert "[b]: copied" in found.getvalue()


def test_plain_aligns_by_the_widest() -> None:
    made = Table((Column("A"), Column("B")))
    made.add("longer", "x")
    assert plain(made) == "A       B\nlonger  x\n"
