"""Stores whose records are in a database, of which nobody waits long for an answer.

A database that refuses connections is asked again by each request, which costs a moment.  One that is silent
is asked by one task of each process alone, until it answers: so only the first requests have waited for it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from storage.concurrency import shielded
from storage.content import BlobContent
from storage.errors import StorageFailed, StorageUnavailable
from storage.records import Records
from storage.remembered import NotRemembered, RememberedRecords
from storage.store import Store

T = TypeVar("T")

PATIENCE = 3.0  # seconds for an answer of the database
PAUSE = 1.0  # seconds between two looks whether it answers again
RETRY_AFTER = 5.0  # seconds, told to clients


def _silence() -> StorageUnavailable:
    cause = "its database does not answer"
    return StorageUnavailable("the database does not answer", cause=cause, retry_after=RETRY_AFTER)


class PatientStore(Store):
    """A store that asks for its records with limited patience.

    It is cut off when the database could not be used, or after PATIENCE without an answer, until that
    answers again.
    """

    def __init__(
        self,
        files: BlobContent,
        records: Records,
        clock: Callable[[], float] = time.time,
        collected: bool = False,
    ) -> None:
        super().__init__(files, records, clock, collected)
        self._asking: set[asyncio.Future[Any]] = set()
        self._failed = False  # the last time that the database was asked
        self._looking: asyncio.Task[None] | None = None  # while the database is silent

    @property
    def cut_off(self) -> bool:
        return self._failed or self._looking is not None

    async def ask(self, work: Callable[..., T], *arguments: object) -> T:
        """The result of `work`, which asks the database, in a thread.

        Raises StorageFailed: StorageUnavailable at once while the database is silent.  Work that nobody
        waits for any more goes on.
        """
        answer = self._begin(work, *arguments)
        if await self._comes(answer):
            return answer.result()
        raise _silence()

    def _begin(self, work: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
        """Begin to ask the database.  Raises StorageUnavailable while it is silent."""
        if self._looking is not None:
            raise _silence()
        return self._submit(work, *arguments)

    async def _comes(self, answer: asyncio.Future[Any]) -> bool:
        """Whether an answer comes in time; if it does not, the database is silent."""
        if (await asyncio.wait([answer], timeout=PATIENCE))[0]:
            return True
        if self._looking is None:
            self._looking = asyncio.get_running_loop().create_task(self._look())
        return False

    def _submit(self, work: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
        answer = asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)
        self._asking.add(answer)
        answer.add_done_callback(self._ended)
        return answer

    def _ended(self, answer: asyncio.Future[Any]) -> None:
        self._asking.discard(answer)
        if not answer.cancelled():  # the database has logged what failed
            self._failed = isinstance(answer.exception(), StorageUnavailable)

    async def _look(self) -> None:
        """Wait until the database answers, be it that it is a wrong one."""
        with suppress(StorageFailed):
            while True:
                try:
                    await shielded(self._submit(self.records.holds, ""))
                    break
                except StorageUnavailable:
                    await asyncio.sleep(PAUSE)
        self._looking = None

    def troubles(self) -> list[str]:
        """That the database is silent, if nothing else says so."""
        known = self._looking is None or self.records.troubles()
        return [] if known else ["the database of records does not answer"]

    async def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        await super().close()
        await asyncio.gather(*self._asking, return_exceptions=True)


class RememberingStore(PatientStore):
    """A store of which pulls are answered by what is `remembered` of its records, while it is cut off."""

    def __init__(
        self,
        files: BlobContent,
        records: Records,
        remembered: RememberedRecords,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(files, records, clock, collected=True)
        self._remembered = remembered
        self._writing: asyncio.Future[None] | None = None

    @property
    def sure(self) -> bool:
        return not self._remembered.recalls

    async def read(self, work: Callable[..., T], *arguments: object) -> T:
        answer: asyncio.Future[T] | None = None
        try:
            answer = self._begin(self._remembered.noting, work, *arguments)
            if not await self._comes(answer):
                raise _silence()
            found = answer.result()
        except StorageUnavailable as error:
            try:
                return self._remembered.recalling(work, *arguments)
            except NotRemembered:
                if answer is None:
                    raise error from None
            await asyncio.wait([answer])  # there is nothing better; this ends, too
            found = answer.result()
        if self._writing is None:
            self._write()
        return found

    def _write(self) -> None:
        """Begin to write down what waits for it."""
        if self._remembered.memory.waits:
            work = self._remembered.memory.write
            self._writing = asyncio.get_running_loop().run_in_executor(None, work)
            self._writing.add_done_callback(self._written)

    def _written(self, writing: asyncio.Future[None]) -> None:
        self._writing = None
        if not writing.cancelled():
            writing.exception()  # mark it as retrieved: the disk has logged it
            self._write()  # what was noted meanwhile, which nobody may read again

    async def confirm(self) -> None:
        """Compare what is remembered with the database.  Raises StorageFailed."""
        await self.run(self._remembered.confirm)

    async def close(self) -> None:
        while self._writing is not None:
            await asyncio.wait([self._writing])
        await super().close()


@contextmanager
def waits_ended(stores: Iterable[Store], seconds: float) -> Iterator[None]:
    """Inside, nobody waits longer than `seconds` for a database or a bucket, after which they are not used.

    By threads of their own: those that all of the process use may be waiting.
    """
    ends = [each.records.close for each in stores if each.records.remote]
    ends += [each.files.end for each in stores if each.files.remote]
    timers = [threading.Timer(seconds, end) for end in ends]
    for each in timers:
        each.start()
    try:
        yield
    finally:
        for each in timers:
            each.cancel()
            each.join()
