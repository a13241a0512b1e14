"""Every event of the log: where the code logs it says its level and keys, the manual says when."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from generated.markdown import code, table

ROOT = Path(__file__).parents[3]
MANUAL = ROOT / "docs" / "operations.md"
LEVELS = ("debug", "info", "warning", "error", "exception", "critical")
_NAME = re.compile(r"[a-z]+\.[a-z_]+")
_ROW = re.compile(r"^\| ((?:`[a-z]+\.[a-z_]+` ?)+) \| [^|]+ \| (.+) \|$", re.MULTILINE)
_LINK = re.compile(r"\]\(([^):#]*)(#[^)]*)?\)")
_HEAD = """\
# Events of the log

Every event that the server logs, with its levels and keys as the code has them; keys that depend on the
case are not listed. [Operations](../operations.md#events) describes how the log is written, and
`request.served`.
"""


@dataclass
class LoggedEvent:
    """An event, as the code logs it."""

    levels: set[str] = field(default_factory=set)
    keys: set[str] = field(default_factory=set)


def page() -> str:
    meanings = described()
    rows = [
        (
            code(name),
            ", ".join(sorted(event.levels)),
            " ".join(map(code, sorted(event.keys))),
            meanings.get(name, ""),
        )
        for name, event in sorted(logged().items())
    ]
    return f"{_HEAD}\n" + table(("Event", "Level", "Keys", "When"), rows) + "\n"


def logged() -> dict[str, LoggedEvent]:
    """By name, where the name is written as it is."""
    found: dict[str, LoggedEvent] = {}
    for path in (*ROOT.glob("proxy/**/*.py"), *ROOT.glob("storage/**/*.py")):
        source = path.read_text()
        for name, level, keys in _calls(source) if "log." in source else ():
            event = found.setdefault(name, LoggedEvent())
            event.levels.add("error" if level == "exception" else level)
            event.keys |= keys
    return found


def _calls(source: str) -> Iterator[tuple[str, str, set[str]]]:
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Name("log"), attr=level),
                args=[ast.Constant(str(name)), *_],
                keywords=keywords,
            ) if level in LEVELS and _NAME.fullmatch(name):
                yield name, level, {each.arg for each in keywords if each.arg}


def described() -> dict[str, str]:
    """What the manual says of each event; several that are in one row have its text."""
    return {
        name: _LINK.sub(lambda link: f"](../{link[1] or MANUAL.name}{link[2] or ''})", meaning)
        for names, meaning in _ROW.findall(MANUAL.read_text())
        for name in _NAME.findall(names)
    }
