"""What a store holds, as numbers that change in the transactions that change what they count.

    total <repository>        of the records of a repository
    stored <algorithm>/<ab>   of the blobs in a fan-out directory
    counted                   that everything without a total is empty

Each is a Total as JSON.  So a listing reads one record for each repository, whatever it holds.

A total is counted once, in a directory that a former version wrote, and again by each scrub.  That takes
many transactions, between which others write: `reached` is the last key that was counted, and a change of a
key up to it changes the unfinished count as well.  So a count is right when it ends, whatever happened
meanwhile, and whoever goes on with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple, TypeVar

import msgspec

from storage.errors import StorageFailed
from storage.keys import (
    BLOB,
    COUNTED,
    EVERY,
    LINK,
    LISTING,
    MANIFEST,
    STORED,
    TAG,
    TOTAL,
    USE,
    RecordKind,
    countable,
    total_key,
)
from storage.records import Batch, Records

T = TypeVar("T")

_KEEPERS = {TAG.name, MANIFEST.name}
_AGING = (TAG, MANIFEST, LINK, LISTING)  # begin with, or end their first line with, a time


class RecordChange(NamedTuple):
    """A record that was written or deleted: its size before and after, None if there was none.

    `at` is the time that it states, `used` when it says that something was used.  `moved` tells of a tag
    that points elsewhere.
    """

    kind: str
    key: str
    before: int | None
    after: int | None
    at: float | None = None
    used: float = 0.0
    moved: bool = False

    @classmethod
    def of(cls, key: str, former: bytes | None, value: bytes | None) -> RecordChange | None:
        """None if records of this kind are not counted, or if nothing changes."""
        kind = countable(key)
        if kind is None or former == value:
            return None
        at = _time(value) if value is not None and kind in _AGING else None
        used = last_use(value) if value is not None and kind is USE else 0.0
        moved = kind is TAG and None not in (former, value) and _target(former) != _target(value)
        return cls(kind.name, key, _size(kind, former), _size(kind, value), at, used, moved)


class Counts(msgspec.Struct, omit_defaults=True, gc=False):
    """How many records there are by kind, and the bytes of manifests, or of blobs that are linked or stored.

    used: when anything was last used
    oldest: nothing that may expire was stored, confirmed or used earlier, see Expiry; None if there is none
    """

    numbers: dict[str, int] = {}
    bytes: dict[str, int] = {}
    used: float = 0.0
    oldest: float | None = None

    def apply(self, change: RecordChange) -> bool:
        """Whether it changes anything."""
        known = self.used, self.oldest
        self.used = max(self.used, change.used)
        if change.kind in _KEEPERS and (change.moved or change.after is None):
            self.oldest = 0.0  # what it kept may go at once
        elif change.at is not None:
            self.oldest = change.at if self.oldest is None else min(self.oldest, change.at)
        if change.before == change.after and known == (self.used, self.oldest):
            return change.moved
        number = (change.after is not None) - (change.before is not None)
        _add(self.numbers, change.kind, number)
        _add(self.bytes, change.kind, (change.after or 0) - (change.before or 0))
        return True

    def same(self, other: Counts) -> bool:
        return (self.numbers, self.bytes) == (other.numbers, other.bytes)

    def number(self, kind: RecordKind) -> int:
        return self.numbers.get(kind.name, 0)

    @property
    def size(self) -> int:
        """All bytes."""
        return sum(self.bytes.values())


class Total(msgspec.Struct, omit_defaults=True, gc=False):
    """What is `counted`, None if the first count has not ended; and the count in progress, up to `reached`.

    `changes` is another number after every change.  `settled` was that number when a collection found that
    nothing in the repository can become removable but by a change.
    """

    counted: Counts | None = None
    recount: Counts | None = None
    reached: str = ""
    changes: int = 0
    settled: int = -1

    def encode(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def parse(cls, record: bytes | None) -> Total | None:
        """None if the record is absent or damaged."""
        try:
            return _decode(record or b"")
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None

    def apply(self, change: RecordChange) -> bool:
        """Whether it changes anything."""
        # Also if nothing is counted yet: whoever has just read the record for a count must notice.
        changed = change.moved or change.before != change.after
        if self.recount is not None and change.key <= self.reached:
            changed |= self.recount.apply(change)
        if self.counted is not None:
            changed |= self.counted.apply(change)
        self.changes += changed
        return changed


_decode = msgspec.json.Decoder(Total).decode  # of 100,000 records, one after the other


class CountedBatch:
    """A batch that changes the totals with the records; all records were made by one if they are `fresh`."""

    def __init__(self, batch: Batch, fresh: bool) -> None:
        self._batch = batch
        self.get, self.count, self.tags_at = batch.get, batch.count, batch.tags_at
        self._fresh = fresh
        self.known = False  # whether it has seen, or made, the record that says what is empty
        self._changes: dict[str, list[RecordChange]] = {}  # by the key of the total

    def put(self, key: str, value: bytes) -> None:
        self._note(key, value)
        self._batch.put(key, value)

    def delete(self, key: str) -> bool:
        """Whether it was there."""
        self._note(key, None)
        return self._batch.delete(key)

    def _note(self, key: str, value: bytes | None) -> None:
        if countable(key) is not None:
            change = RecordChange.of(key, self._batch.get(key), value)
            if change is not None:
                self._changes.setdefault(total_key(key), []).append(change)

    def finish(self) -> None:
        """Write the totals, at the end of the transaction."""
        for key, changes in self._changes.items():
            total = Total.parse(self._batch.get(key))
            new = total is None
            if total is None:
                total = Total(counted=Counts() if self._known() else None)
            changed = [total.apply(change) for change in changes]
            if total.counted is not None and not total.counted.numbers and total.recount is None:
                self._batch.delete(key)
            elif new or any(changed):
                self._batch.put(key, total.encode())

    def _known(self) -> bool:
        """Whether what has no total is known to be empty."""
        self.known = self._batch.get(COUNTED.key()) is not None
        if self._fresh and not self.known:
            self._batch.put(COUNTED.key(), b"")
            self.known = True
        return self.known


class CountedRecords:
    """Records that change the totals with what they count."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self.remote, self.version, self.turn = records.remote, records.version, records.turn
        self.get, self.scan, self.keys, self.holds = records.get, records.scan, records.keys, records.holds
        self.first, self.groups, self.linking = records.first, records.groups, records.linking
        self.oldest, self.troubles, self.close = records.oldest, records.troubles, records.close
        self._fresh = False  # whether there were no records yet
        with suppress(StorageFailed):  # they are counted later
            self._fresh = records.first(EVERY) is None

    def put(self, key: str, value: bytes) -> None:
        if countable(key) is not None:
            self.transaction(lambda batch: batch.put(key, value), shared=True)
        else:
            self._records.put(key, value)

    def delete(self, key: str) -> bool:
        """Whether it was there."""
        if countable(key) is not None:
            return self.transaction(lambda batch: batch.delete(key), shared=True)
        return self._records.delete(key)

    def transaction(self, work: Callable[[Batch], T], shared: bool = False) -> T:
        def counted(batch: Batch) -> tuple[T, bool]:
            counting = CountedBatch(batch, self._fresh)
            result = work(counting)
            counting.finish()
            return result, counting.known

        result, known = self._records.transaction(counted, shared)
        # Only once: a database that is damaged later loses its totals, and is counted again.
        self._fresh = self._fresh and not known
        return result


class Totals:
    """Reads the totals of a store.  Methods may raise StorageFailed."""

    def __init__(self, records: Records) -> None:
        self._records = records

    @property
    def listed(self) -> bool:
        """Whether every repository and every directory that is not empty has a total."""
        return self._records.get(COUNTED.key()) is not None

    def repositories(self, prefix: str = "") -> Iterator[tuple[str, Total]]:
        """Those whose names start with `prefix`, in order."""
        return self._each(TOTAL, prefix)

    def directories(self) -> Iterator[tuple[str, Total]]:
        return self._each(STORED)

    def _each(self, kind: RecordKind, prefix: str = "") -> Iterator[tuple[str, Total]]:
        # A name may be the whole prefix, and a scan leaves out what its prefix is.
        start = len(kind.prefix())
        for key, value in self._records.scan(kind.prefix() + prefix[:-1]):
            if (name := key[start:]).startswith(prefix):
                yield name, Total.parse(value) or Total()

    def stored(self) -> int | None:
        """Bytes of all blobs; None while they are being counted."""
        found = [total.counted for _, total in self.directories()] if self.listed else [None]
        return None if None in found else sum(each.size for each in found if each is not None)


def _add(numbers: dict[str, int], kind: str, number: int) -> None:
    if left := numbers.get(kind, 0) + number:
        numbers[kind] = left
    else:
        numbers.pop(kind, None)


def _size(kind: RecordKind, value: bytes | None) -> int | None:
    """The bytes that a record counts for; None if there is none."""
    if value is None:
        return None
    if kind is MANIFEST:
        return len(value.partition(b"\n")[2])
    if kind is LINK:
        return _number(value.partition(b" ")[0])
    return _number(value.rpartition(b" ")[2]) if kind is BLOB else 0


def _time(value: bytes) -> float:
    """When it was stored or confirmed; 0 if it is damaged, so that it counts as very old."""
    try:
        return float(value.partition(b"\n")[0].rpartition(b" ")[2])
    except ValueError:
        return 0.0


def _number(text: bytes) -> int:
    return int(text) if text.isdigit() else 0


def _target(value: bytes | None) -> bytes | None:
    return None if value is None else value.partition(b" ")[0]


def last_use(value: bytes) -> float:
    """When something was last used, by its record; 0 if that is damaged."""
    with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return msgspec.json.decode(value, type=tuple[int, float, float])[1]
    return 0.0
