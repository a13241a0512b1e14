"""What a server remembers of the records in a database, for pulls while that cannot be read.

    remembered <key>      when the record was read or written, and its value; without one if it was deleted
    confirmed             when all of them were last compared with the database

They are in the records of the caches, on the disk of each server.  Only what pulls read is remembered, and
of the same kinds what pushes write: the tags, manifests, links and objects of images.  What is confirmed
counts for `keep` seconds: no answer is older than that, whatever another server has changed since.
"""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import NamedTuple, TypeVar

from storage.errors import StorageFailed, StorageUnavailable
from storage.keys import CONFIRMED, LINK, MANIFEST, OBJECT, REMEMBERED, TAG
from storage.records import Batch, Records, SharedRecords, batches

T = TypeVar("T")

PULLED = tuple(kind.prefix() for kind in (TAG, MANIFEST, LINK, OBJECT))
USED = 7 * 86400.0  # seconds without a use after which a record is forgotten
RENEWED = 86400.0  # seconds after which a use is recorded again
LOOKED = 60.0  # seconds for which a process does not look again whether it has remembered a record
MOST, SPACE = 50_000, 128 << 20  # records that are remembered, and bytes of them
SEEN = 10_000  # records of which a process knows that it has remembered them


class NotRemembered(StorageUnavailable):
    """Nothing is known of a record that cannot be read now."""


class _Former(NamedTuple):
    """A record as it was at a time, in seconds since the epoch; None if there was none.

    `written` is whether this server has made it so then, as far as that is not yet stored.
    """

    at: float
    value: bytes | None
    written: bool = False

    def encode(self) -> bytes:
        return b"%f" % self.at if self.value is None else b"%f\n%b" % (self.at, self.value)

    @classmethod
    def parse(cls, record: bytes | None) -> _Former | None:
        """None if the record is absent or damaged."""
        at, found, value = (record or b"").partition(b"\n")
        try:
            return cls(float(at), value if found else None)
        except ValueError:
            return None


class RecordMemory:
    """What is remembered, in the records `here`.  Thread-safe.  Methods but note() raise StorageFailed.

    `clock` returns seconds since the epoch.
    """

    def __init__(self, here: Records, keep: float, clock: Callable[[], float] = time.time) -> None:
        self._here = here
        self._keep = keep
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: dict[str, tuple[int, float]] = {}  # the hash of a value, and when it was noted
        self._waiting: dict[str, _Former] = {}

    def now(self) -> float:
        return self._clock()

    @property
    def waits(self) -> bool:
        """Whether there is something for write()."""
        return bool(self._waiting)

    def note(self, key: str, value: bytes | None, at: float, written: bool = False) -> None:
        """Remember, with the next write(), that a record was so.

        A read of it had begun `at` this time, or it was `written` before.
        """
        if not key.startswith(PULLED):
            return
        mark = hash(value)
        with self._lock:
            known, since = self._seen.get(key, (None, -math.inf))
            same = known == mark and not written  # since then, another process may have changed it
            if at < since <= self._clock() or (same and 0 <= at - since < LOOKED):
                return  # a later read or write was quicker, or has noted the same
            if len(self._seen) >= SEEN:
                self._seen.clear()
            self._seen[key] = mark, at
            self._waiting[key] = _Former(at, value, written)

    def write(self) -> None:
        """Store what was noted."""
        with self._lock:
            noted, self._waiting = self._waiting, {}
        if any(self._news(self._here, key, each) for key, each in noted.items()):
            self._here.transaction(lambda batch: self._write(batch, noted), shared=True)

    def _write(self, batch: Batch, noted: Mapping[str, _Former]) -> None:
        for key, each in noted.items():
            if self._news(batch, key, each):
                batch.put(REMEMBERED.key(key), each.encode())

    def _news(self, records: Records | Batch, key: str, noted: _Former) -> bool:
        """Whether it says more than what is stored; a later read or write may have been quicker.

        What is stored for a time that is yet to come was stored before the clock was set back.
        """
        former = _Former.parse(records.get(REMEMBERED.key(key)))
        if former is None:  # who writes down a slow read, which had begun before a deletion, has to find that
            return noted.value is not None or noted.written
        if noted.at < former.at <= self._clock():
            return False
        changed = noted.written or noted.value != former.value
        return changed or not 0 <= noted.at - former.at < RENEWED

    def recall(self, key: str) -> bytes:
        """The record as it was.  Raises NotRemembered."""
        with self._lock:
            found = self._waiting.get(key)
        times = []
        if found is None or not self._news(self._here, key, found):
            found = _Former.parse(self._here.get(REMEMBERED.key(key)))
            confirmed = _Former.parse(self._here.get(CONFIRMED.key()))  # which is so of what is stored
            times = [] if confirmed is None else [confirmed.at]
        if found is not None and found.value is not None and any(map(self._counts, [found.at, *times])):
            return found.value
        raise NotRemembered(f"the database cannot be read, and nothing recent is known here of {key}")

    def _counts(self, at: float) -> bool:
        """Whether it is not too long ago.  A time that is yet to come may be any."""
        return 0 <= self._clock() - at <= self._keep

    def clear(self) -> None:
        """Forget all: it is of other records."""
        with self._lock:
            self._waiting.clear()
            self._seen.clear()
        for some in batches(self._here.keys(REMEMBERED.prefix())):
            self._here.transaction(partial(_delete, some), shared=True)

    def confirm(self, there: SharedRecords) -> None:
        """Compare all with the records, and forget what was not used for long, or is too much."""
        begun = self._clock()
        sizes: list[tuple[float, int, str]] = []
        for some in batches(self._here.scan(REMEMBERED.prefix())):
            known = {REMEMBERED.parse(key)[0]: _Former.parse(value) for key, value in some}
            marks = there.marks(known)
            for key, each in known.items():
                if each is not None and each.value is not None and key in marks:
                    sizes.append((each.at, len(each.value), key))
                    if each.at > begun or marks[key] != hashlib.sha256(each.value).digest():
                        self._note_changed(key, there)
                elif each is None or each.value is not None or not 0 <= begun - each.at <= LOOKED:
                    self._forget(key, begun)
        self.write()
        self._forget_surplus(sizes, begun)
        self._here.put(CONFIRMED.key(), _Former(begun, None).encode())

    def _note_changed(self, key: str, there: SharedRecords) -> None:
        at = self._clock()
        value = there.get(key)
        with self._lock:
            self._waiting[key] = _Former(at, value)

    def _forget_surplus(self, sizes: list[tuple[float, int, str]], now: float) -> None:
        """Forget the least recently used records beyond the limits, and those that were not used for long."""
        room = SPACE
        for number, (at, size, key) in enumerate(sorted(sizes, reverse=True)):
            room -= size
            if number >= MOST or room < 0 or now - at > USED:
                self._forget(key, now)

    def _forget(self, key: str, until: float) -> None:
        """Forget a record, unless it was noted after `until`."""

        def work(batch: Batch) -> None:
            found = _Former.parse(batch.get(REMEMBERED.key(key)))
            if found is None or not until < found.at <= self._clock():
                batch.delete(REMEMBERED.key(key))

        self._here.transaction(work, shared=True)
        with self._lock:
            self._seen.pop(key, None)


def _delete(keys: Iterable[str], batch: Batch) -> None:
    for key in keys:
        batch.delete(key)


class _NotedBatch:
    """A transaction whose changes are kept, to be remembered once it is committed."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self.get, self.count, self.tags_at = batch.get, batch.count, batch.tags_at
        self.changes: dict[str, bytes | None] = {}

    def put(self, key: str, value: bytes) -> None:
        self._batch.put(key, value)
        self.changes[key] = value

    def delete(self, key: str) -> bool:
        self.changes[key] = None
        return self._batch.delete(key)


class RememberedRecords:
    """The records `there`, of which `memory` remembers what the work in noting() reads, and what is written.

    In recalling(), get() answers from memory, and raises NotRemembered.
    """

    remote = True

    def __init__(self, there: SharedRecords, memory: RecordMemory) -> None:
        self._there = there
        self.memory = memory
        self._local = threading.local()
        self.version, self.turn, self.oldest = there.version, there.turn, there.oldest
        self.scan, self.keys, self.holds = there.scan, there.keys, there.holds
        self.first, self.groups, self.linking = there.first, there.groups, there.linking
        self.troubles, self.close = there.troubles, there.close

    @property
    def recalls(self) -> bool:
        """Whether this thread is in recalling()."""
        return getattr(self._local, "get", None) == self.memory.recall

    @contextmanager
    def _get_by(self, get: Callable[[str], bytes | None]) -> Iterator[None]:
        self._local.get = get
        try:
            yield
        finally:
            del self._local.get

    def noting(self, work: Callable[..., T], *arguments: object) -> T:
        """The result of `work`; what it reads is remembered."""
        with self._get_by(self._noted):
            return work(*arguments)

    def recalling(self, work: Callable[..., T], *arguments: object) -> T:
        """The result of `work`, which reads what is remembered and nothing else."""
        with self._get_by(self.memory.recall):
            return work(*arguments)

    def _noted(self, key: str) -> bytes | None:
        at = self.memory.now()
        value = self._there.get(key)
        self.memory.note(key, value, at)
        return value

    def get(self, key: str) -> bytes | None:
        get: Callable[[str], bytes | None] = getattr(self._local, "get", self._there.get)
        return get(key)

    def put(self, key: str, value: bytes) -> None:
        self.transaction(lambda batch: batch.put(key, value), shared=True)

    def delete(self, key: str) -> bool:
        return self.transaction(lambda batch: batch.delete(key), shared=True)

    def transaction(self, work: Callable[[Batch], T], shared: bool = False) -> T:
        def noted(batch: Batch) -> tuple[T, Mapping[str, bytes | None]]:
            noting = _NotedBatch(batch)
            return work(noting), noting.changes

        result, changes = self._there.transaction(noted, shared)
        at = self.memory.now()
        for key, value in changes.items():
            self.memory.note(key, value, at, written=True)
        with suppress(StorageFailed):  # of the disk, which reports it: the next comparison finds the change
            self.memory.write()
        return result

    def confirm(self) -> None:
        """Compare what is remembered with the records."""
        self.memory.confirm(self._there)
