"""What origins listed, with the time: the tags of a repository, the referrers of a manifest.

The record of a listing holds the time of validation, a newline, and the listed values as JSON.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec

from storage.disk.records import Records
from storage.keys import LISTING


@dataclass(frozen=True, slots=True)
class Listing:
    """What an origin listed, as plain JSON values, and when, in seconds since the epoch."""

    value: Any
    validated_at: float


class OriginListings:
    """The stored listings of all origins.  Every method may raise StorageFailed."""

    def __init__(self, records: Records, clock: Callable[[], float]) -> None:
        self._records = records
        self._clock = clock

    def get(self, repository: str, what: str) -> Listing | None:
        """The listing; None if it is not stored, or is damaged."""
        time, _, value = (self._records.get(LISTING.key(repository, what)) or b"").partition(b"\n")
        with suppress(ValueError, RecursionError):  # msgspec's DecodeError is a ValueError
            listing = Listing(msgspec.json.decode(value), float(time))
            return listing if math.isfinite(listing.validated_at) else None
        return None

    async def put(self, repository: str, what: str, value: Any) -> None:
        """Store what an origin has just listed."""
        record = f"{self._clock()}\n".encode() + msgspec.json.encode(value)
        await asyncio.to_thread(self._records.put, LISTING.key(repository, what), record)

    async def delete(self, repository: str, what: str) -> None:
        await asyncio.to_thread(self._records.delete, LISTING.key(repository, what))
