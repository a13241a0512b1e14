"""What the documentation shows of a terminal: commands that exist, and tables with these columns."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import click
import pytest

from proxy.cli.main import main
from tests.test_docs import PAGES, ROOT

_BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_PROMPT = re.compile(r"^ *[$#] (.+)$")
_RULE = re.compile(r"^─+$")
_ENDS = {"|", "||", "&&", ";", "&", "<", ">", ">>", "2>"}  # of a command's own words


def blocks(text: str) -> Iterator[list[str]]:
    """The lines of each block that shows a terminal."""
    for indent, language, block in _BLOCK.findall(text):
        lines = [line.removeprefix(indent) for line in block.splitlines()]
        if language in ("", "console") and lines and _PROMPT.match(lines[0]):
            yield lines


def commands(lines: list[str]) -> Iterator[list[str]]:
    """The arguments of every call of entrepot in a block."""
    for line in lines:
        if not (found := _PROMPT.match(line)) or line.startswith("# /"):  # the name of a file
            continue
        reader = shlex.shlex(found[1], posix=True, punctuation_chars=True)
        reader.whitespace_split, reader.commenters = True, "#"
        words: list[str] = []
        for word in [*reader, ";"]:
            if word not in _ENDS:
                words.append(word)
                continue
            if words and words[0].rpartition("/")[2] == "entrepot":
                yield words[1:]
            words = []


CALLS = [
    pytest.param(words, id=f"{page.relative_to(ROOT)}: {' '.join(words)}"[:100])
    for page in PAGES
    for lines in blocks(page.read_text())
    for words in commands(lines)
]


def parse(words: list[str]) -> None:
    """Raises UsageError if entrepot would refuse these arguments before it does anything."""
    context, command = click.Context(main, info_name="entrepot"), main
    while isinstance(command, click.Group) and words:
        found = command.get_command(context, words[0])
        if found is None:
            raise click.UsageError(f"there is no command {words[0]}")
        command, words = found, words[1:]  # type: ignore[assignment]
        context = click.Context(command, parent=context)
    for parameter in command.params:
        if isinstance(parameter.type, click.Path):
            parameter.type.exists = False
    command.make_context(command.name, list(words))


@pytest.mark.parametrize("words", CALLS)
def test_a_command_is_one(words: list[str]) -> None:
    parse(words)


def test_commands_are_found() -> None:
    assert len(CALLS) > 60


@pytest.mark.parametrize(
    "words",
    [
        ["evict", "--too", "1GiB"],
        ["eviction"],
        ["purge"],
        ["collect", "now"],
        ["delete", "a", "--older-than", "x"],
    ],
)
def test_a_command_that_is_none_is_found(words: list[str]) -> None:
    with pytest.raises(click.UsageError):
        parse(words)


def test_calls_are_read_as_a_shell_does() -> None:
    text = (
        "```console\n$ a b && x/entrepot ls --tags   # all\n# entrepot user add a < file\nentrepot 1\n```\n"
    )
    (lines,) = blocks(text)
    assert [*commands(lines)] == [["ls", "--tags"], ["user", "add", "a"]]


# Tables


def titles() -> set[str]:
    """The titles of all columns of the tables that the program prints."""
    found = set()
    for path in (ROOT / "proxy" / "cli").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Name("Column"), args=[title, *_]):
                    found |= {
                        each.value
                        for each in ast.walk(title)
                        if isinstance(each, ast.Constant) and isinstance(each.value, str)
                    }
    return found


def heads(path: Path) -> Iterator[list[str]]:
    lines = path.read_text().splitlines()
    for head, rule in pairwise(lines):
        if _RULE.match(rule.strip()):
            yield re.split(r" {2,}", head.strip())


def test_tables_have_the_columns_that_are_shown() -> None:
    known, seen = titles(), 0
    for page in PAGES:
        for head in heads(page):
            seen += 1
            # Two titles of numbers may have one space between them.
            assert all(title in known for title in head), f"{page.name}: {head}"
    assert seen > 10
