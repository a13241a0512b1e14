"""The health of a server, as /readyz tells it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from proxy.extensions.extension import worst
from proxy.namespaces.composition import Composition
from proxy.processes.server_processes import ServerProcesses
from proxy.processes.state import ProcessReport, refusal_notes
from storage.errors import StorageFailed
from storage.store import Store

MOMENT = 1.0  # seconds that a health check waits for a database: it must not take longer if that hangs


class Health:
    """Finds out how a server is.  `draining` says whether it stops.  Must be closed."""

    def __init__(
        self, composition: Composition, processes: ServerProcesses, draining: Callable[[], bool]
    ) -> None:
        self._composition = composition
        self._processes = processes
        self._draining = draining
        self._asking: asyncio.Task[bool] | None = None

    async def report(self) -> Mapping[str, str]:
        """`status`, which is ready, degraded or draining, and the reasons."""
        if self._draining():
            return {"status": "draining"}
        left = self._composition.drill.left
        drill = {"drill": f"upstreams are cut off for {left:.0f} s more"} if left else {}
        states = await self.states()
        notes = refusal_notes([each for state in states for each in state.upstreams])
        refused = {"credentials": "; ".join(notes)} if notes else {}
        disks, extensions = troubles(states), failing(states)
        degraded = {
            **({"store": "; ".join(disks)} if disks else {}),
            **({"extensions": "; ".join(extensions)} if extensions else {}),
        }
        return {"status": "degraded" if degraded else "ready", **degraded, **drill, **refused}

    async def states(self) -> list[ProcessReport]:
        """The states of all processes, after a look at the disks and the database."""
        for store in self._composition.all_stores:
            with suppress(StorageFailed):  # a failure is among the troubles then
                store.files.check()
            if store.records.remote:
                await self._ask_database(store)
        return await self._processes.states()

    async def _ask_database(self, store: Store) -> None:
        """Ask the database of the records something, and wait for a moment; later calls wait for that too."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(store.run(store.records.holds, ""))
        await asyncio.wait({self._asking}, timeout=MOMENT)
        if self._asking.done():
            self._asking.exception()  # which is among the troubles

    async def close(self) -> None:
        if self._asking is not None:
            await asyncio.gather(self._asking, return_exceptions=True)


def failing(states: Sequence[ProcessReport]) -> list[str]:
    """A sentence for each extension that fails, without what that says itself: anybody may read it."""
    found = worst(each for state in states for each in state.extensions)
    return [f"{name} {(each.error or '').partition(': ')[0]}" for name, each in found.items() if each.error]


def troubles(states: Sequence[ProcessReport]) -> list[str]:
    """A sentence for each trouble, once."""
    return list(dict.fromkeys(trouble for each in states for trouble in each.troubles))
