"""Waiting for work that must come to its end, whoever is cancelled meanwhile.

A thread cannot be cancelled, and some of what tasks do must not be cut in the middle.  Who waits here for it
learns of his cancellation when the work is done, and not before: whatever it works on is there until then.
The cancellation then counts for more than what came of the work.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


async def finished(function: Callable[..., T], *arguments: object) -> T:
    """Run in a thread; even who is cancelled meanwhile, however often, waits for its end.

    Else its caller would close the file under it, and the thread work on whatever gets its number next.
    """
    return await undisturbed(asyncio.get_running_loop().run_in_executor(None, function, *arguments))


async def undisturbed(work: Awaitable[T]) -> T:
    """The same of what goes on in this thread: it comes to its end before a cancellation counts."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        task.exception()  # seen
        raise cancelled
    return task.result()
