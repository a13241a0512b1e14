"""The rest of a blob of which clients read parts: whether it is due, and how far the parts go."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from proxy.cache.parts import Part
from proxy.cache.policy import Threshold
from storage.errors import RegistryError
from storage.oci import Span

LINGER = 5.0  # seconds without readers after which the file is left to other processes
STALL = 2.0  # seconds that a transfer waits for readers that take nothing
AHEAD = 16 << 20  # bytes by which a transfer may be ahead of its readers
HEARD = 3.0  # seconds for which a reader in another process counts after it has told what it waits for


class Idle(Exception):
    """Nobody reads."""


class Dropped(RegistryError):
    """A transfer ends: nobody waits for what it would bring."""


class Rest:
    """Whether the rest of a blob is due, by `threshold`; without one it is.

    lazy: whether there is one
    demanded: a client wants all of the blob
    confirmed: the origin sends the rest
    error: the one with which the rest could not be got
    """

    def __init__(self, threshold: Threshold | None) -> None:
        self.lazy = threshold is not None
        self.due = self.demanded = not self.lazy
        self.confirmed = False
        self.error: RegistryError | None = None
        self._threshold = threshold or Threshold()
        self._readers: dict[Hashable, list[list[int]]] = {}  # where each is, and where it ends
        self._joining = 0
        self._failure: RegistryError | None = None
        self._changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    # When it is due

    def demand(self) -> None:
        self.due, self.demanded, self.error = True, True, None
        self.tell()

    def weigh(self, share: float, clients: int) -> None:
        """The rest may be due: this share of the blob is here, so many clients asked for missing bytes."""
        if share >= self._threshold.share or clients >= self._threshold.clients:
            self.due = True
            self.tell()

    def postpone(self, error: RegistryError) -> None:
        """It could not be got: wait until more has come, or all is wanted again."""
        self.due, self.demanded, self.confirmed, self.error = False, False, False, error
        self.tell()

    def confirm(self) -> None:
        """The origin sends what it was asked for: the rest, if it is due."""
        self.confirmed = self.confirmed or self.due
        self.tell()

    @property
    def promised(self) -> bool:
        """Whether who follows the fill may rely on the rest."""
        return self.confirmed or not self.lazy

    def fail(self, error: RegistryError) -> None:
        """Nothing can come any more."""
        self._failure = error
        self.tell()

    async def wait(
        self, busy: Callable[[], bool], kept: Callable[[], bool], ended: Awaitable[Any] | None = None
    ) -> None:
        """Wait until it is due, or `ended` is.  Raises the error of fail(), and Idle when nobody reads.

        `busy` returns whether there is anything else to wait for.  It ends at once unless anything is `kept`.
        """
        ending = {asyncio.ensure_future(ended)} if ended is not None else set()
        while not self.due and not any(each.done() for each in ending):
            changed = self._changed
            quiet = not (self._readers or self._joining or busy())
            seconds = (LINGER if kept() else 0.0) if quiet else None
            await asyncio.wait({changed, *ending}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if self._failure is not None:
                raise self._failure
            if quiet and not changed.done() and not any(each.done() for each in ending):
                raise Idle

    def tell(self) -> None:
        """Something has changed: wake those who wait in change()."""
        changed, self._changed = self._changed, asyncio.get_running_loop().create_future()
        changed.set_result(None)

    async def change(self, seconds: float | None = None, ended: asyncio.Future[Any] | None = None) -> bool:
        """Wait for the next change; whether there was one within so many seconds, and before the end."""
        changed = self._changed
        waited = {changed} if ended is None else {changed, ended}
        await asyncio.wait(waited, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        return changed.done()

    # Who reads

    @contextmanager
    def joining(self) -> Iterator[None]:
        """While somebody is about to read."""
        self._joining += 1
        self.tell()
        try:
            yield
        finally:
            self._joining -= 1
            self.tell()

    def reads(self, reader: Hashable, spans: Sequence[Span]) -> None:
        self._readers[reader] = [[each.start, each.stop or 0] for each in spans]
        self.tell()

    def moved(self, reader: Hashable, offset: int, end: int) -> None:
        """The reader takes [offset, end), or has taken it."""
        for span in self._readers.get(reader, []):
            if span[0] <= offset < span[1]:
                span[0] = end
        self.tell()

    def left(self, reader: Hashable) -> None:
        if self._readers.pop(reader, None) is not None:
            self.tell()

    def heard(self, span: Span) -> None:
        """A reader in another process waits for this."""
        reader = object()
        self.reads(reader, [span])
        asyncio.get_running_loop().call_later(HEARD, self.left, reader)

    # How far a part goes

    async def pace(self, part: Part) -> None:
        """Wait until a reader comes near the bytes after those of `part`.

        Raises Dropped if none does.
        """
        until = time.monotonic() + STALL
        while not self.due and part.position < part.stop:
            reach = self._reach(part)
            if part.position < reach:
                return
            if reach < 0 or not await self.change(until - time.monotonic()):
                raise Dropped(f"nobody takes what comes from byte {part.position} on")

    def _reach(self, part: Part) -> int:
        """Up to where `part` may go now; -1 if nobody reads there."""
        spans = (span for spans in self._readers.values() for span in spans)
        reaches = [
            min(stop, max(offset, part.start) + AHEAD)
            for offset, stop in spans
            if offset <= part.stop and stop > part.position
        ]
        return max(reaches, default=part.start + AHEAD if self._joining else -1)
