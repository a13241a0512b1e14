"""A thread with an event loop of its own, in which the code of one extension runs.

Whatever that does, the threads of the server go on: an extension that blocks keeps only its own thread busy,
and SystemExit ends nothing but the call that raises it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, TypeVar

from storage.concurrency import mark_retrieved

T = TypeVar("T")

LONGEST = 300  # characters of a message


class ExtensionFault(Exception):
    """What was raised by code of an extension, in words."""


class ExtensionLate(ExtensionFault):
    """Code of an extension did not return in time."""


class Isolation:
    """The thread of an extension.  The process does not wait for it to end.

    Work is a function that is called there, and whose awaitable is awaited there.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(lambda loop, context: None)  # of tasks that it starts and forgets
        self._closing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._busy_since: float | None = None  # by the loop's time: when work was late that holds the thread
        self._thread = threading.Thread(target=self._run, name=f"extension {name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        while not self._closing:
            # A callback or a task of the extension may raise SystemExit, which ends a loop.
            with suppress(BaseException):
                self._loop.run_forever()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        with suppress(BaseException):
            self._loop.run_until_complete(self._finish(tasks))
        self._loop.close()

    async def _finish(self, tasks: set[asyncio.Task[Any]]) -> None:
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._loop.shutdown_asyncgens()

    async def call(self, work: Callable[[], Awaitable[T]], seconds: float) -> T:
        """The result of work.  Raises ExtensionFault; after so many seconds ExtensionLate.

        While earlier work holds the thread, it raises ExtensionLate at once.
        """
        self._check_free()
        future, cancel = self._submit(work)
        waiting = asyncio.wrap_future(future)
        waiting.add_done_callback(mark_retrieved)
        try:
            done, _ = await asyncio.wait({waiting}, timeout=seconds)
        except asyncio.CancelledError:
            cancel()
            raise
        if not done:
            raise self._late(cancel, seconds)
        return waiting.result()

    def run(self, work: Callable[[], Awaitable[T]], seconds: float) -> T:
        """As call(), for a thread that may block."""
        self._check_free()
        future, cancel = self._submit(work)
        try:
            return future.result(seconds)
        except TimeoutError:
            raise self._late(cancel, seconds) from None

    def begin(self, work: Callable[[], Awaitable[object]]) -> None:
        """Do work whose result nobody waits for."""
        with suppress(ExtensionFault):
            self._submit(work)

    def _submit(self, work: Callable[[], Awaitable[T]]) -> tuple[Future[T], Callable[[], None]]:
        future: Future[T] = Future()
        begun: list[asyncio.Task[None]] = []

        async def run() -> None:
            with suppress(InvalidStateError):  # nobody waits for it any more
                try:
                    result = await work()
                except BaseException as error:
                    future.set_exception(fault_of(error))
                else:
                    future.set_result(result)

        def begin() -> None:
            task = self._loop.create_task(run())
            begun.append(task)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        def cancel() -> None:
            self._soon(lambda: [each.cancel() for each in begun])

        if not self._soon(begin):
            raise ExtensionFault("it is closed")
        return future, cancel

    def _soon(self, callback: Callable[[], Any]) -> bool:
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:  # the loop is closed
            return False
        return True

    # Work that is late

    def _late(self, cancel: Callable[[], None], seconds: float) -> ExtensionLate:
        cancel()
        self._busy_since = self._loop.time() - seconds
        self._soon(self._freed)  # once what holds the thread has returned
        return ExtensionLate(f"did not return within {seconds:g} s")

    def _freed(self) -> None:
        self._busy_since = None

    def _check_free(self) -> None:
        if (since := self._busy_since) is not None:
            raise ExtensionLate(
                f"holds its thread since {self._loop.time() - since:.0f} s, in an earlier call"
            )

    def close(self) -> threading.Thread:
        """End the thread once its code returns.  Returns the thread."""
        self._closing = True
        self._soon(self._loop.stop)
        return self._thread


def fault_of(error: BaseException) -> ExtensionFault:
    """What was raised, in words: the type, and the first line of the message."""
    if isinstance(error, ExtensionFault):
        return error
    try:
        text = " ".join(str(error).partition("\n")[0].split())
    except BaseException:  # it is code of the extension
        text = ""
    name = type(error).__name__
    return ExtensionFault(f"raised {name}: {text[:LONGEST]}" if text else f"raised {name}")
