"""Class names are unique, and modules and functions are short."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain

import pytest

from tests.test_layers import modules

MODULE_LINES = 400
FUNCTION_LINES = 40
REASON = "# long:"  # a comment that says why a function is longer, above it or in its first lines

# Class names that may occur more than once, each with the reason.
SHARED_NAMES: dict[str, str] = {}
# What is still too long.  Remove what has become shorter.
LONG_MODULES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()

Function = ast.FunctionDef | ast.AsyncFunctionDef


def classes() -> dict[str, list[str]]:
    """The modules that define a class of each name."""
    found = defaultdict(list)
    for module, source in modules().items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                found[node.name].append(module)
    return found


def long_functions(source: str) -> Iterator[str]:
    """The functions in `source` that are too long and give no reason for it."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Function) and node.end_lineno is not None:
            start = min(each.lineno for each in chain([node], node.decorator_list))
            too_long = node.end_lineno - start + 1 > FUNCTION_LINES
            around = lines[max(0, start - 2) : node.body[0].lineno + 2]
            if too_long and not any(line.strip().startswith(REASON) for line in around):
                yield node.name


def test_class_names_are_unique() -> None:
    repeated = {name: where for name, where in classes().items() if len(where) > 1}
    assert {name: where for name, where in repeated.items() if name not in SHARED_NAMES} == {}
    assert repeated.keys() >= SHARED_NAMES.keys(), "an exception that is no longer needed"


def test_modules_are_short() -> None:
    found = {name for name, source in modules().items() if source.count("\n") > MODULE_LINES}
    assert found == LONG_MODULES


def test_functions_are_short() -> None:
    found = {f"{module}.{name}" for module, source in modules().items() for name in long_functions(source)}
    assert found == LONG_FUNCTIONS


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f():\n" + "    x\n" * 39, []),
        ("def f():\n" + "    x\n" * 40, ["f"]),
        ("class C:\n    async def f(self):\n" + "        x\n" * 40, ["f"]),
        ("# long: a table\ndef f():\n" + "    x\n" * 40, []),
        ("def f():\n    # long: a table\n" + "    x\n" * 40, []),
        ("@decorated\n" * 2 + "def f():\n" + "    x\n" * 38, ["f"]),
    ],
)
def test_a_long_function_is_found(source: str, expected: list[str]) -> None:
    assert list(long_functions(source)) == expected
