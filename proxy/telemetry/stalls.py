"""Logs what holds up an event loop: the debug setting `log.slow_callbacks`."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any

import structlog

log = structlog.get_logger()

SHOWN = 4  # functions of a task, of which each called the next
_ROOT = Path(__file__).parents[2]


@contextmanager
def watched_callbacks(
    seconds: float | None, clock: Callable[[], float] = time.perf_counter
) -> Iterator[None]:
    """Meanwhile, log each callback of an event loop that takes more than `seconds`, or none without them.

    asyncio's own debug mode does so too, but slows all callbacks down, which falsifies the result.
    """
    if seconds is None:
        yield
        return
    limit, run = seconds, asyncio.Handle._run

    def timed(handle: Any) -> None:
        callback, begun = handle._callback, clock()
        run(handle)
        if (taken := clock() - begun) > limit:
            log.warning("loop.stalled", seconds=round(taken, 3), place=place(callback))

    asyncio.Handle._run = timed  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        asyncio.Handle._run = run  # type: ignore[method-assign]


def place(callback: Any) -> str:
    """Which function ran; of a task, the innermost of this project, and the line in which it waits now."""
    owner = getattr(callback, "__self__", None)
    if isinstance(owner, asyncio.Task):
        return _place_of_task(owner.get_coro())
    while isinstance(callback, partial):
        callback = callback.func
    name = getattr(callback, "__qualname__", "a callback")
    code = getattr(inspect.unwrap(callback), "__code__", None)
    return f"{name} ({_file(code)})" if isinstance(code, CodeType) else str(name)


def _place_of_task(coroutine: Any) -> str:
    """A task that has ended no longer has the functions that it called."""
    outer, names, where = coroutine, [], ""
    while inspect.iscoroutine(coroutine):
        code, frame = coroutine.cr_code, coroutine.cr_frame
        if frame is not None and Path(code.co_filename).is_relative_to(_ROOT):
            names.append(coroutine.__qualname__)
            where = f"({_file(code)}), before it waits in line {frame.f_lineno}"
        coroutine = coroutine.cr_await
    if names:
        return f"{' > '.join(names[-SHOWN:])} {where}"
    return f"{outer.__qualname__} ({_file(outer.cr_code)}), to its end"


def _file(code: CodeType) -> str:
    path = Path(code.co_filename)
    return str(path.relative_to(_ROOT) if path.is_relative_to(_ROOT) else path.name)
