"""A class name is used once in the project."""

from __future__ import annotations

import ast
from collections import defaultdict

from tests.test_layers import modules, statements


def test_class_names_are_unique() -> None:
    found = defaultdict(list)
    for module, source in modules().items():
        for node in statements(source):
            if isinstance(node, ast.ClassDef):
                found[node.name].append(module)
    assert {name: places for name, places in found.items() if len(places) > 1} == {}
