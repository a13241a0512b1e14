"""Processes that die at a step of their own."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterable
from typing import Any


def die_before(number: int, methods: Iterable[tuple[Any, str]]) -> None:
    """Have this process die before its call of that number, counted from 1, of any of these methods.

    methods: classes, each with the name of a method
    """
    calls = itertools.count(1)

    def replace(place: Any, name: str) -> None:
        real = getattr(place, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        setattr(place, name, counted)

    for place, name in methods:
        replace(place, name)
