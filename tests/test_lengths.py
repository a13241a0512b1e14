"""Modules and functions are short."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.test_layers import modules, statements

MODULE_LINES = 400
FUNCTION_LINES = 40
REASON = "# long:"  # a comment that says why a function is longer, above it or in its first lines

Function = ast.FunctionDef | ast.AsyncFunctionDef


def long_functions(source: str) -> Iterator[str]:
    """The functions in `source` that are too long, without their decorators, and give no reason for it."""
    lines = source.splitlines()
    for node in statements(source):
        if isinstance(node, Function) and node.end_lineno is not None:
            too_long = node.end_lineno - node.lineno + 1 > FUNCTION_LINES
            first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            around = lines[max(0, first - 2) : node.body[0].lineno + 2]
            if too_long and not any(line.strip().startswith(REASON) for line in around):
                yield node.name


def test_modules_are_short() -> None:
    lengths = {module: source.count("\n") for module, source in modules().items()}
    assert {module: lines for module, lines in lengths.items() if lines > MODULE_LINES} == {}


def test_functions_are_short() -> None:
    found = {f"{module}.{name}" for module, source in modules().items() for name in long_functions(source)}
    assert found == set()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f():\n" + "    x\n" * 39, []),
        ("def f():\n" + "    x\n" * 40, ["f"]),
        ("class C:\n    async def f(self):\n" + "        x\n" * 40, ["f"]),
        ("# long: a table\ndef f():\n" + "    x\n" * 40, []),
        ("def f():\n    # long: a table\n" + "    x\n" * 40, []),
        ("@decorated\n" * 2 + "def f():\n" + "    x\n" * 39, []),
    ],
)
def test_a_long_function_is_found(source: str, expected: list[str]) -> None:
    assert list(long_functions(source)) == expected
