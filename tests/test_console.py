"""What the documentation shows of a terminal: commands that exist, and tables with these columns."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import click
import pytest
from click.testing import CliRunner

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
    with ExitStack() as stack:
        for parameter in command.params:
            if isinstance(parameter.type, click.Path):
                stack.enter_context(patch.object(parameter.type, "exists", False))
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
    for source in (path.read_text() for path in (ROOT / "proxy" / "cli").glob("*.py")):
        for node in ast.walk(ast.parse(source)) if "Column(" in source else ():
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


# Output

# These need no server and no network, so their output is compared with what the page shows of it.
ALONE = {"check", "setup", "user"}
CONFIGURATIONS = {
    "check": "namespaces: {docker.io: {upstream: https://registry-1.docker.io,"
    " tags: [{match: 'a:1', fresh_for: 1h}]}, local: {store: {}}}",
    "setup": "{listen: '0.0.0.0:5000', namespaces: {docker.io: {upstream: https://registry-1.docker.io},"
    " local: {store: {}, listen: '0.0.0.0:5001'}}}",
    "user": "{access: {htpasswd: /etc/entrepot/htpasswd}, namespaces: {local: {store: {}}}}",
}
CHANGES = {"--write", "--remove", "--while-serving"}
SECRET = "correct horse battery"


def calls(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """The commands of a block, each with the lines that follow it."""
    numbers = [number for number, line in enumerate(lines) if re.match(r"[$#] entrepot ", line)]
    for number, end in pairwise([*numbers, len(lines)]):
        yield lines[number][2:], lines[number + 1 : end]


def is_alone(lines: list[str]) -> bool:
    """Whether all commands of a block can be run anywhere, and change nothing of the machine."""
    told = [line for line in lines if line.startswith("$ ")]
    words = [text.split() for text, _ in calls(lines)]
    return (
        all(line.startswith("$ entrepot ") for line in told)
        and bool(words)
        and all(each[1] in ALONE and not CHANGES & {*each} for each in words)
    )


SHOWN = [
    pytest.param(lines, id=f"{page.relative_to(ROOT)}: {lines[0]}"[:100])
    for page in PAGES
    for lines in blocks(page.read_text())
    if is_alone(lines) and any(output for _, output in calls(lines))
]


@pytest.mark.parametrize("lines", SHOWN)
def test_output_is_as_shown(lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "etc"
    (place / "entrepot").mkdir(parents=True)

    def here(text: str) -> str:
        return text.replace("/etc/entrepot", f"{place}/entrepot")

    configuration = here(CONFIGURATIONS[lines[0].split()[2]])
    for path in (tmp_path / "entrepot.yml", place / "entrepot.yml"):
        path.write_text(configuration)
    if lines[0].split()[2] != "setup":
        monkeypatch.setenv("ENTREPOT_CONFIG", str(place / "entrepot.yml"))
    monkeypatch.setattr("proxy.cli.users.is_interactive", lambda: True)
    (tmp_path / "password").write_text(f"{SECRET}\n")
    for text, shown in calls(lines):
        words, _, source = text.partition(" < ")
        given = (tmp_path / source).read_text() if source else f"{SECRET}\n{SECRET}\n"
        result = CliRunner().invoke(main, shlex.split(here(words))[1:], input=given)
        assert result.exit_code == 0, result.output
        found = [line.rstrip().replace(str(place), "/etc") for line in result.output.splitlines()]
        assert matches([line for line in found if line], [line.rstrip() for line in shown if line.strip()])


def matches(found: list[str], shown: list[str]) -> bool:
    """Whether these are the lines that are shown, of which the last may be an ellipsis."""
    if shown and shown[-1] == "…":
        return found[: len(shown) - 1] == shown[:-1] and len(found) >= len(shown)
    return found == shown


def test_blocks_with_output_are_found() -> None:
    assert len(SHOWN) >= 5


@pytest.mark.parametrize(
    ("found", "shown", "same"),
    [
        (["a", "b"], ["a", "b"], True),
        (["a", "b"], ["a"], False),
        (["a", "b"], ["a", "…"], True),
        (["a"], ["a", "…"], False),
        (["b", "b"], ["a", "…"], False),
    ],
)
def test_an_ellipsis_stands_for_further_lines(found: list[str], shown: list[str], same: bool) -> None:
    assert matches(found, shown) == same
