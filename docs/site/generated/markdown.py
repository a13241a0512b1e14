"""Text of the code as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_CODE = re.compile(r"(`[^`]+`)")
_MARK = re.compile(r"([\\*_\[\]<>#])")


def prose(text: str) -> str:
    """A text whose only marks are those of code; what else Markdown would take for one is escaped."""
    parts = _CODE.split(text)
    return "".join(part if number % 2 else _MARK.sub(r"\\\1", part) for number, part in enumerate(parts))


def paragraphs(text: str) -> str:
    """A docstring: its paragraphs and lists, and as code what is indented."""
    return "\n\n".join(_paragraph(part) for part in text.strip("\n").split("\n\n"))


def _paragraph(part: str) -> str:
    if part.startswith("- "):
        lines = part.splitlines()
        return "\n".join(f"- {prose(line[2:])}" if line[:2] == "- " else prose(line) for line in lines)
    if any(line.startswith("    ") for line in part.splitlines()):
        return f"```text\n{part}\n```"
    return prose(" ".join(part.split()))


def code(text: str) -> str:
    return f"`{text}`" if text else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(each) for each in line)} |" for line in lines)


def _cell(text: str) -> str:
    parts = _CODE.split(" ".join(text.split()))
    return "".join(part if number % 2 else part.replace("|", r"\|") for number, part in enumerate(parts))
