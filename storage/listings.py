"""What origins listed, with the time: the tags of a repository, the referrers of a manifest.

The record of a listing holds the time of validation, a newline, and the listed values as JSON; referrers are
in the order of their digests, each in a line of its own.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Generic, TypeVar

import msgspec

from storage.errors import ManifestInvalid
from storage.keys import LISTING
from storage.oci import Descriptor
from storage.records import Records

T = TypeVar("T")


class ListedReferrers:
    """Referrers that an origin listed, in the order of their digests.

    They are kept as JSON, and decoded one by one: so a page of them costs what it shows.
    """

    def __init__(self, rows: bytes) -> None:
        self._rows = rows

    @classmethod
    def of(cls, found: Iterable[Descriptor]) -> ListedReferrers:
        ordered = sorted(found, key=attrgetter("digest"))
        return cls(_NEXT.join(msgspec.json.encode(each.to_json()) for each in ordered))

    @classmethod
    def parse(cls, record: bytes) -> ListedReferrers:
        """The inverse of encode().  Raises ValueError, RecursionError, ManifestInvalid."""
        if record.startswith(_FIRST):
            return cls(record[len(_FIRST) : -len(_LAST)])
        # None, or written by a former version: all in one line, in the order of the origin.
        return cls.of(map(Descriptor.from_json, msgspec.json.decode(record, type=list[Any])))

    def encode(self) -> bytes:
        """A JSON list with an entry in each line; JSON has no line breaks in strings."""
        return _FIRST + self._rows + _LAST if self._rows else b"[]"

    def after(self, last: str = "") -> Iterator[Descriptor]:
        """Those after the digest `last`; each is decoded when it is asked for."""
        at = self._start(last)
        while at < len(self._rows):
            row, at = self._row(at)
            yield Descriptor.from_json(msgspec.json.decode(row))

    def _row(self, at: int) -> tuple[bytes, int]:
        """The row that begins `at` this byte, and where the next one begins."""
        end = self._rows.find(_NEXT, at)
        end = len(self._rows) if end < 0 else end
        return self._rows[at:end], end + len(_NEXT)

    def _start(self, last: str) -> int:
        """Where the first row after the digest `last` begins."""
        start, stop = 0, len(self._rows)
        while start < stop:
            before = self._rows.rfind(_NEXT, start, (start + stop) // 2)
            middle = start if before < 0 else before + len(_NEXT)
            row, after = self._row(middle)
            if _decode_name(row).digest <= last:
                start = after
            else:
                stop = middle
        return start


class _Named(msgspec.Struct):
    digest: str


_decode_name = msgspec.json.Decoder(_Named).decode
_FIRST, _NEXT, _LAST = b"[\n", b",\n", b"\n]"


@dataclass(frozen=True, slots=True)
class Listing(Generic[T]):
    """What an origin listed, and when, in seconds since the epoch."""

    value: T
    validated_at: float


class OriginListings:
    """The stored listings of all origins.  Every method may raise StorageFailed."""

    def __init__(self, records: Records, clock: Callable[[], float]) -> None:
        self._records = records
        self._clock = clock

    def get(self, repository: str, what: str) -> Listing[Any] | None:
        """The listing as plain JSON values; None if it is not stored, or is damaged."""
        return self._get(repository, what, msgspec.json.decode)

    def referrers(self, repository: str, what: str) -> Listing[ListedReferrers] | None:
        """A listing of referrers; None if it is not stored, or is damaged."""
        return self._get(repository, what, ListedReferrers.parse)

    def _get(self, repository: str, what: str, parse: Callable[[bytes], T]) -> Listing[T] | None:
        time, _, value = (self._records.get(LISTING.key(repository, what)) or b"").partition(b"\n")
        with suppress(ValueError, RecursionError, ManifestInvalid):  # msgspec's DecodeError is a ValueError
            listing = Listing(parse(value), float(time))
            return listing if math.isfinite(listing.validated_at) else None
        return None

    async def put(self, repository: str, what: str, value: Any, age: float = 0.0) -> None:
        """Store what an origin has listed `age` seconds ago: referrers, or plain JSON values."""
        encoded = value.encode() if isinstance(value, ListedReferrers) else msgspec.json.encode(value)
        record = f"{self._clock() - age}\n".encode() + encoded
        await asyncio.to_thread(self._records.put, LISTING.key(repository, what), record)

    async def delete(self, repository: str, what: str) -> None:
        await asyncio.to_thread(self._records.delete, LISTING.key(repository, what))
