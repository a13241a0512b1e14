"""Slots for transfers: what another replica asks for waits for none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from proxy.telemetry.exchange import current
from storage.limits import Slots


class ClientSlots(Slots):
    """Slots for what clients ask for.

    What another replica asks for takes none: it has one there.  With slots at both, two replicas could hold
    all of theirs and wait for one of the other.
    """

    @asynccontextmanager
    async def turn(
        self, namespace: str, share: str = "", urged: asyncio.Event | None = None
    ) -> AsyncIterator[None]:
        if current().peer:
            yield
        else:
            async with super().turn(namespace, share, urged):
                yield
