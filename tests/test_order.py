from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.order import spread


@dataclass(frozen=True)
class Some:
    """A test, as far as its order depends on it."""

    name: str
    path: Path
    slow: bool = False

    def get_closest_marker(self, name: str) -> bool | None:
        return (name == "timeout" and self.slow) or None


def module(name: str, count: int, slow: bool = False) -> list[Any]:
    """Of which only the last test is slow."""
    return [Some(f"{name}{number}", Path(name), slow and number == count - 1) for number in range(count)]


ALL = [*module("a", 5), *module("b", 2, slow=True), *module("c", 1, slow=True), *module("d", 4)]


def names(items: list[Any]) -> str:
    return " ".join(each.name for each in items)


def test_one_process_begins_with_what_takes_longest() -> None:
    assert names(spread(ALL, 1)) == "b0 b1 c0 a0 a1 a2 a3 a4 d0 d1 d2 d3"


def test_half_of_the_processes_begin_with_some_of_it() -> None:
    found = spread(ALL, 3)
    assert names(found[:4]) == "b0 b1 a0 a1"
    assert names(found[4:8]) == "c0 a2 a3 a4"
    assert names(found[8:]) == "d0 d1 d2 d3"


@pytest.mark.parametrize("processes", range(1, 20))
@pytest.mark.parametrize("items", [ALL, ALL[5:8], ALL[:5], []], ids=len)
def test_each_test_is_run_once(items: list[Any], processes: int) -> None:
    assert Counter(spread(items, processes)) == Counter(items)
