"""Who may write the records of a private registry, while and after it is moved to other engines.

    writers     the kind of content that belongs to the records, as JSON

Records without it were never moved, and anybody may write them.  A move writes it in the same transactions in
which it copies: so a writer that was started before sees it, whichever process or machine it is on.

A move pauses writers for the seconds of its last step.  A pause ends by itself at its time, so that a move
that is killed blocks nobody.  The first writer after that time removes the pause; from this a move that was
only slow learns that it has to look again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import msgspec

from storage.errors import StorageFailed, StorageUnavailable
from storage.keys import WRITERS
from storage.records import Batch, Records

T = TypeVar("T")

FILES, OBJECTS = "files", "objects"  # the content that belongs to the records
LEFT = "left"  # the registry is now elsewhere
COMING = "coming"  # it is being moved here
KEY = WRITERS.key()
RETRY_AFTER = 2.0  # seconds, told to clients


class Writers(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the record says.

    content: FILES, OBJECTS, LEFT or COMING
    move: the id of the move that is under way, or was the last
    paused_until: when writers may go on, in seconds since the epoch; 0 if they are not paused
    """

    content: str
    move: str = ""
    paused_until: float = 0.0

    def encode(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def parse(cls, record: bytes | None) -> Writers | None:
        """None if the record is absent or damaged."""
        with suppress(msgspec.MsgspecError, UnicodeDecodeError):
            return msgspec.json.decode(record or b"", type=cls)
        return None

    @classmethod
    def of(cls, records: Records | Batch) -> Writers | None:
        return cls.parse(records.get(KEY))


def check_whole(records: Records, content: str) -> None:
    """Raise StorageUnavailable if the registry, whose content was FILES or OBJECTS, has been moved elsewhere.

    What is not in these records may have been pushed there.
    """
    try:
        found = Writers.of(records)
    except StorageFailed:
        return  # what was found is all that is known
    if found is not None and found.content != content:
        raise _moved(found)


class GuardedRecords:
    """Records that are written only if they belong to `content`, FILES or OBJECTS, and are not paused.

    Otherwise a write raises StorageUnavailable.
    """

    def __init__(self, records: Records, content: str, clock: Callable[[], float] = time.time) -> None:
        self._records = records
        self._content = content
        self._clock = clock
        self.remote, self.version, self.turn = records.remote, records.version, records.turn
        self.get, self.scan, self.keys, self.holds = records.get, records.scan, records.keys, records.holds
        self.first, self.groups, self.linking = records.first, records.groups, records.linking
        self.oldest, self.troubles, self.close = records.oldest, records.troubles, records.close

    def put(self, key: str, value: bytes) -> None:
        self.transaction(lambda batch: batch.put(key, value), shared=True)

    def delete(self, key: str) -> bool:
        """Whether it was there."""
        return self.transaction(lambda batch: batch.delete(key), shared=True)

    def transaction(self, work: Callable[[Batch], T], shared: bool = False) -> T:
        def guarded(batch: Batch) -> T:
            self._check(batch)
            return work(batch)

        return self._records.transaction(guarded, shared)

    def _check(self, batch: Batch) -> None:
        found = Writers.of(batch)
        if found is None or found == Writers(self._content, found.move):
            return
        if found.content != self._content:
            raise _moved(found)
        if self._clock() < found.paused_until:
            cause = "it is being moved, for some seconds"
            raise StorageUnavailable("writers are paused by a move", cause=cause, retry_after=RETRY_AFTER)
        batch.put(KEY, Writers(self._content, found.move).encode())


def _moved(found: Writers) -> StorageUnavailable:
    return StorageUnavailable(
        f"these records are no longer, or not yet, those of the registry ({found.content})",
        cause="it has been moved; a reload of the server, or its end, completes that",
        retry_after=RETRY_AFTER,
    )
