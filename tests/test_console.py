"""Text for people: on a terminal, and where a program reads it."""

from __future__ import annotations

import io

import pytest

from proxy.cli.console import ProgressDisplay


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


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
