"""What is awaited of a bucket, whose client cannot be interrupted.

A server that stops waits for it no longer than its operator has said.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, TypeVar

from storage.errors import Unavailable

T = TypeVar("T")


class Pending:
    """Requests under way.  After end() each raises Unavailable or CancelledError.  Thread-safe."""

    def __init__(self) -> None:
        self._asked: set[asyncio.Future[Any]] = set()
        self._blocked: set[Future[Any]] = set()
        self._ended = False

    def _check(self) -> None:
        if self._ended:
            raise Unavailable("the server stops", retry_after=1.0)

    async def answer(self, ask: Callable[[], Awaitable[T]]) -> T:
        """What `ask` gives."""
        self._check()
        asked = asyncio.ensure_future(ask())
        self._asked.add(asked)
        try:
            return await asked
        finally:
            self._asked.discard(asked)

    def result(self, ask: Callable[[], T]) -> T:
        """What `ask` returns, which blocks: in a thread of its own, which may last until the process ends."""
        found: Future[T] = Future()

        def work() -> None:
            with suppress(InvalidStateError):  # nobody waits for it any more
                try:
                    found.set_result(ask())
                except InvalidStateError:
                    raise
                except BaseException as error:
                    found.set_exception(error)

        self._blocked.add(found)
        try:
            self._check()
            threading.Thread(target=work, daemon=True).start()
            return found.result()
        finally:
            self._blocked.discard(found)

    def end(self) -> None:
        self._ended = True
        for each in list(self._asked):
            each.get_loop().call_soon_threadsafe(each.cancel)
        for one in list(self._blocked):
            with suppress(InvalidStateError):
                one.set_exception(Unavailable("the server stops", retry_after=1.0))
