"""Waiting for what the server says of itself, instead of looking again and again."""

from __future__ import annotations

import asyncio
from typing import Any

import structlog

PATIENCE = 20.0  # seconds; only an event that never comes takes them


class Ear:
    """Hears every event from its making on, in tests that capture events."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._came = asyncio.Event()
        structlog.get_config()["processors"].insert(0, self._hear)

    def _hear(self, logger: object, method: str, event: Any) -> Any:
        self._events.append(dict(event))
        self._came.set()
        return event

    async def heard(self, name: str, **keys: Any) -> dict[str, Any]:
        """The next event of that name and with those keys, those included that came since the last one."""
        async with asyncio.timeout(PATIENCE):
            while True:
                while self._events:
                    event = self._events.pop(0)
                    if event["event"] == name and keys.items() <= event.items():
                        return event
                self._came.clear()
                await self._came.wait()
