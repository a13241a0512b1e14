"""Limits that hold for all processes of a server together: work in progress, and bytes per second."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from weakref import WeakValueDictionary

from storage.errors import StorageFailed
from storage.shared import SharedState, SharedTable

BURST = 0.1  # seconds that a transfer may be ahead of its rate, so that it does not sleep after each chunk
STEP = 0.4  # seconds after which a transfer knows of another rate


class _Queue(asyncio.Lock):
    """Who waits for one slot after the other: `length` of them."""

    length = 0


class Slots:
    """A limit of work in progress, in total and for each namespace.

    `each` is the limit of each namespace; that of a namespace that is not in it is `total`.  Namespaces with
    the same `key_of` have one limit together.  Limits of different `kind` are independent.

    Those who name a `share` are bounded further, so that no share keeps out another: it gets a slot only
    while it holds fewer than are free.  Alone it holds half of them, and a new one finds a slot.  Within a
    process, of those with the same share or none, who comes first is served first.
    """

    def __init__(
        self,
        total: int,
        each: dict[str, int] | None = None,
        shared: SharedState | None = None,
        key_of: Callable[[str], str] = str,
        kind: str = "",
    ) -> None:
        shared = shared or SharedState()
        self._total = total
        self._each = each or {}
        self._key_of = key_of
        self._kind = (kind,) if kind else ()
        self._held = shared.slots
        self._bell = shared.bell
        self._queues: WeakValueDictionary[tuple[int, int | None], _Queue] = WeakValueDictionary()

    @asynccontextmanager
    async def turn(
        self, namespace: str, share: str = "", urged: asyncio.Event | None = None
    ) -> AsyncIterator[None]:
        """Wait for a slot, and hold it; once `urged` is set, go on without one.

        Raises StorageFailed if waiting is impossible.
        """
        async with AsyncExitStack() as slots:
            # The slot of the namespace first: waiting for a busy upstream must not block other namespaces.
            if (limited := self._key_of(namespace)) in self._each:
                most = self._each[limited]
                await slots.enter_async_context(self._slot(most, share, urged, "namespace", limited))
            await slots.enter_async_context(self._slot(self._total, share, urged, "all"))
            yield

    @asynccontextmanager
    async def _slot(
        self, most: int, share: str, urged: asyncio.Event | None, *limit: str
    ) -> AsyncIterator[None]:
        key = self._held.key(*self._kind, *limit)
        part = self._held.key(*self._kind, *limit, "share", share) if share else None
        queue = self._queues.setdefault((key, part), _Queue())
        held = not queue.length and self._held.take(key, most, part)
        if not held:
            held = await self._take_unless(urged, queue, key, most, part)
        try:
            yield
        finally:
            if held:
                self._release(key, part)

    async def _take_unless(
        self, urged: asyncio.Event | None, queue: _Queue, key: int, most: int, part: int | None
    ) -> bool:
        """Whether a slot was taken before `urged` was set."""
        if urged is None:
            await self._take(queue, key, most, part)
            return True
        taking = asyncio.ensure_future(self._take(queue, key, most, part))
        waiting = asyncio.ensure_future(urged.wait())
        try:
            await asyncio.wait((taking, waiting), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            if not taking.cancel() and taking.exception() is None:
                self._release(key, part)
            raise
        finally:
            waiting.cancel()
        if taking.done():
            taking.result()
            return True
        taking.cancel()
        await asyncio.wait((taking,))
        return False

    async def _take(self, queue: _Queue, key: int, most: int, part: int | None) -> None:
        queue.length += 1
        try:
            async with queue:
                if not self._held.take(key, most, part):
                    await self._wait(key, most, part)
        finally:
            queue.length -= 1

    def _release(self, key: int, part: int | None) -> None:
        self._held.release(key)
        if part is not None:
            self._held.release(part)
        self._bell.ring()

    async def _wait(self, key: int, most: int, part: int | None) -> None:
        try:
            with self._bell.listen() as rung:
                while not self._held.take(key, most, part):
                    await rung.wait()
                    rung.clear()
        except OSError as error:  # no descriptors are left
            raise StorageFailed(f"cannot wait for other transfers: {error.strerror}") from error


class RateLimit:
    """A limit in bytes per second for all transfers together; None is no limit.

    Limits of the same `name` in `table` are one, and a change of one is a change of all.
    """

    def __init__(self, rate: float | None = None, table: SharedTable | None = None, name: str = "") -> None:
        self._rate = rate
        self._table = table or SharedTable()
        self._key = self._table.key("bandwidth", name)
        self._changed = self._table.key("changed bandwidth", name)
        self._read_again = 0.0

    async def take(self, number: int) -> None:
        """Wait until `number` more bytes are within the rate."""
        now = asyncio.get_running_loop().time()  # it is the same in all processes: CLOCK_MONOTONIC
        if (rate := self._current(now)) is None:
            return
        with self._table.lock:
            # When the bytes so far are within the rate.
            paid_until = max(now, self._paid_until()) + number / rate
            self._table.put(self._key, paid_until)
        while (ahead := paid_until - now) > BURST:
            await asyncio.sleep(min(ahead, STEP))
            now = asyncio.get_running_loop().time()
            if (new := self._current(now)) is None:
                return
            if new != rate:
                paid_until, rate = now + (paid_until - now) * rate / new, new

    def change(self, rate: float | None) -> None:
        """Have another rate, also for the transfers that wait now."""
        now = asyncio.get_running_loop().time()
        with self._table.lock:
            before = self._current(now)
            self._table.put(self._changed, rate or 0.0)
            if rate is None or before is None:
                self._table.discard(self._key)
            elif (ahead := self._paid_until() - now) > 0:
                self._table.put(self._key, now + ahead * before / rate)

    def _paid_until(self) -> float:
        return self._table.get(self._key, float) or 0.0

    def _current(self, now: float) -> float | None:
        if now >= self._read_again:  # not for each chunk: another process may hold the lock of the table
            self._read_again = now + STEP
            changed = self._table.get(self._changed, float)
            if changed is not None:
                self._rate = changed or None
        return self._rate
