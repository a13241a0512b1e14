"""The order of the tests."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import pytest


def spread(items: Sequence[pytest.Item], processes: int) -> list[pytest.Item]:
    """Let half of the processes begin with the modules in which a test has a time-out of its own: minutes.

    With --dist=worksteal each process gets a piece of the list, all of the same length, and takes from the
    end of those of others when it is through.  So nobody waits at the end for a long one that began late.
    These wait for the most part, also for each other: the other half keeps the cores busy meanwhile.
    """
    some = (processes + 1) // 2
    slow = list(dict.fromkeys(item.path for item in items if item.get_closest_marker("timeout")))
    left_out = {*slow}
    others = iter([item for item in items if item.path not in left_out])
    found: list[pytest.Item] = []
    for number in range(processes):
        paths = {*slow[number::some]} if number < some else set()
        first = [item for item in items if item.path in paths]
        length = (len(items) - len(found)) // (processes - number)
        found += [*first, *islice(others, max(0, length - len(first)))]
    return found
