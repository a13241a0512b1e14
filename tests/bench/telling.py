"""What webhooks have to tell of random writes, and what they may: see http_writes.py."""

from __future__ import annotations

import asyncio
import time
from typing import Any, NamedTuple

from tests.receiver import Receiver

LATE = 180.0  # seconds after which an event is lost: that of a process that died comes in two minutes
ACTIONS = ["push", "mount", "delete", "move"]


class Told(NamedTuple):
    """An event: `what` is as in `manifest.pushed`."""

    what: str
    repository: str
    digest: str = ""
    tag: str = ""

    @classmethod
    def of(cls, event: dict[str, Any]) -> Told:
        data = event["data"]
        what = event["type"].removeprefix("entrepot.")
        return cls(what, data["repository"], data.get("digest", ""), data.get("tag", ""))


class Telling:
    """What was begun may be told, and what was acknowledged or seen to be done must be."""

    def __init__(self) -> None:
        self._may: set[Told] = set()
        self.must: set[Told] = set()

    def may(self, what: str, repository: str, digest: str = "", tag: str = "") -> Told:
        told = Told(what, f"local/{repository}", digest, tag)
        self._may.add(told)
        return told

    async def compare(self, receiver: Receiver) -> list[str]:
        """Wait for all events that must come.  Returns those that are missing, or had no cause."""
        deadline = time.monotonic() + LATE
        while True:
            told = {Told.of(each.event) for each in receiver.notices}
            missing = self.must - told
            if not missing or time.monotonic() > deadline:
                wrong = [f"told, but not begun: {each}" for each in told - self._may]
                return wrong + [f"not told: {each}" for each in missing]
            await asyncio.sleep(0.1)
