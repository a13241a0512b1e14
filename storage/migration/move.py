"""Moving a private registry between engines, while it is used.

1. It is recorded in both records that a move is under way: nobody may write the target.  Writers of the
   source go on.
2. Blobs and records are copied, again and again until little was missing.
3. Writers of the source are paused.  What they wrote last is copied, and all records are compared.
4. In one transaction the source is left for good, unless the pause has ended meanwhile; then 2 follows again.
5. The target may be written.

A move that is killed is resumed by the next one: what is there is not copied again.  Before step 4 the
source is the registry, and after it the target; nobody writes either between 4 and 5.  If both have the same
records, and only the content is moved, steps 4 and 5 are one.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, cast

from storage.concurrency import for_each, run_in_thread
from storage.content import BlobContent, files_of
from storage.disk.tree import StoredBlob
from storage.errors import BlobUnknown, DigestInvalid
from storage.keys import (
    API_KEY,
    EVERY,
    IDENTITY,
    KEY_USED,
    LEFTOVER,
    LINK,
    MANIFEST,
    OBJECT,
    PIN,
    SIGNING,
    TAG,
    UPLOAD,
    WRITERS,
    RecordKind,
)
from storage.migration.engine_copy import EngineCopy, continue_here
from storage.oci import Digest
from storage.records import Batch, Records, batches
from storage.remembered import RememberedRecords
from storage.writers import COMING, FILES, KEY, LEFT, Writers

if TYPE_CHECKING:  # one machine needs no client of object storage
    from storage.bucket.blobs import BucketBlobs

# Records that say where content is: each engine has its own.
OF_ENGINES: tuple[RecordKind, ...] = (OBJECT, LEFTOVER, UPLOAD, WRITERS, IDENTITY)
# Records of a server, in a database beside those of the registry: they are copied from elsewhere.
OF_SERVERS: tuple[RecordKind, ...] = (PIN, SIGNING, API_KEY, KEY_USED)
AT_ONCE = 4  # blobs
QUICK = 3.0  # seconds of a pass after which the next one is the last
PASSES = 5  # before the writers are paused in any case
PAUSE = 30.0  # seconds, unless it is renewed
_OWN = tuple(each.prefix() for each in (*OF_ENGINES, *OF_SERVERS))


class NotMovable(Exception):
    """The registry cannot be moved there; the message says why."""


class Engine(NamedTuple):
    """What holds a private registry.

    kind: that of the content, FILES or OBJECTS: storage/writers.py
    remembered: the part of the records that remembers some of them, if there is one
    """

    records: Records
    content: BlobContent
    kind: str
    remembered: RememberedRecords | None = None


@dataclass
class MoveReport:
    """What a move has done so far; sizes in bytes.

    whole, whole_bytes: the blobs of the source at the last look
    damaged: why a blob of the source could not be copied
    paused: seconds for which writers waited
    """

    blobs: int = 0
    bytes: int = 0
    whole: int = 0
    whole_bytes: int = 0
    records: int = 0
    passes: int = 0
    paused: float = 0.0
    damaged: dict[Digest, str] = field(default_factory=dict)


def complete(source: Records, target: Records, kind: str) -> None:
    """Take step 5, if only that is missing."""
    ours, theirs = Writers.of(source), Writers.of(target)
    if ours is not None and ours.content == LEFT and theirs == Writers(COMING, ours.move):
        target.put(KEY, Writers(kind, ours.move).encode())


class EngineMove:
    """Moves the registry at `source` to `target`.  Methods raise StorageFailed, Unavailable and NotMovable.

    The records are not guarded (storage/writers.py).  `clock` returns seconds since the epoch.
    """

    def __init__(self, source: Engine, target: Engine, clock: Callable[[], float] = time.time) -> None:
        self._source = source
        self._target = target
        self._clock = clock
        self._in_place = source.records is target.records
        self.engines = source, target
        self.source, self.target = source.content, target.content
        self._copy = EngineCopy(source.content, target.content)
        self._done: set[Digest] = set()
        self._id = ""
        self.report = MoveReport()

    async def survey(self) -> MoveReport:
        """What is still to be copied, without changing anything."""
        report = MoveReport()

        def look() -> None:
            if self._source.kind != self._target.kind:
                for each in self._missing():
                    if not self._copy.has(each):
                        report.whole, report.whole_bytes = report.whole + 1, report.whole_bytes + each.size
            report.records = sum(1 for _ in self._differences())

        await run_in_thread(look)
        return report

    async def run(self) -> MoveReport:
        """Move all.  Damaged blobs end it before the source is left."""
        if await run_in_thread(self._begin):
            while not self.report.damaged:
                await self._approach()
                if self.report.damaged or await self._switch():
                    break
        if not self.report.damaged:
            await run_in_thread(self._end)
        return self.report

    # Steps

    def _begin(self) -> bool:
        """Step 1.  Whether anything is left to be moved."""
        source, target = Writers.of(self._source.records), Writers.of(self._target.records)
        if self._in_place:
            if source is not None and source.content == self._target.kind:
                self._id = source.move
                return False
            self._id = (source and source.move) or secrets.token_hex(8)
            self._source.records.put(KEY, Writers(self._source.kind, self._id).encode())
            return True
        if source is not None and source.content == LEFT:
            if target is None or target.move != source.move:
                raise NotMovable("what was moved from here is not there: it is the registry of another move")
            self._id = source.move
            return False
        if source is not None and source.content != self._source.kind:
            raise NotMovable("it is the target of a move that has not ended, or has other content")
        resumed = source is not None and target == Writers(COMING, source.move)
        if not resumed and not self._is_free(target):
            raise NotMovable("there is a registry already, or the target of another move")
        self._id = source.move if source is not None and resumed else secrets.token_hex(8)
        self._source.records.put(KEY, Writers(self._source.kind, self._id).encode())
        self._target.records.put(KEY, Writers(COMING, self._id).encode())
        return True

    def _is_free(self, target: Writers | None) -> bool:
        """Whether nothing is lost if the target is overwritten."""
        if target is not None and target.content in (LEFT, COMING):
            return target.content == LEFT
        return not any(self._target.records.first(kind.prefix()) for kind in (LINK, MANIFEST, TAG))

    async def _approach(self) -> None:
        """Step 2."""
        for _ in range(PASSES):
            begun = time.monotonic()
            await self._pass()
            if self.report.damaged or time.monotonic() - begun < QUICK:
                return

    async def _switch(self) -> bool:
        """Steps 3 and 4; False if they have to be repeated."""
        begun = self._clock()
        await run_in_thread(self._pause, True)
        renewing = asyncio.create_task(self._renew())
        left = False
        try:
            await self._pass()
            left = not self.report.damaged and await run_in_thread(self._leave)
        finally:
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)
            if not left:
                with suppress(NotMovable):  # the source was left after all, which the next move finds
                    await run_in_thread(self._pause, False)
            self.report.paused += self._clock() - begun
        return left

    def _pause(self, paused: bool) -> None:
        def work(batch: Batch) -> None:
            found = Writers.of(batch)
            if found is None or (found.content, found.move) != (self._source.kind, self._id):
                raise NotMovable("another move has begun")
            until = self._clock() + PAUSE if paused else 0.0
            batch.put(KEY, Writers(self._source.kind, self._id, until).encode())

        self._source.records.transaction(work)  # not shared: so no writer is in the middle of one

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(PAUSE / 3)
            await run_in_thread(self._source.records.transaction, self._prolong)

    def _prolong(self, batch: Batch) -> bool:
        """Prolong the pause, unless it has ended; whether it has not."""
        if (found := Writers.of(batch)) is None or not found.paused_until:
            return False
        batch.put(KEY, Writers(found.content, found.move, self._clock() + PAUSE).encode())
        return True

    def _leave(self) -> bool:
        """Step 4, unless the pause has ended."""
        after = Writers(self._target.kind if self._in_place else LEFT, self._id)

        def work(batch: Batch) -> bool:
            if not self._prolong(batch):
                return False
            batch.put(KEY, after.encode())
            return True

        return self._source.records.transaction(work)

    def _end(self) -> None:
        """Step 5.  Records of objects stay: a server that still uses the bucket finds them."""
        self._target.records.put(KEY, Writers(self._target.kind, self._id).encode())

    # Copying

    async def _pass(self) -> None:
        report = self.report
        report.passes += 1
        if self._source.kind != self._target.kind:
            missing = await run_in_thread(lambda: list(self._missing()))
            report.whole = report.blobs + len(missing)
            report.whole_bytes = report.bytes + sum(each.size for each in missing)
            await for_each(self._copy_blob, missing, AT_ONCE)
            await run_in_thread(self._compare)
        if self._source.kind != FILES and self._target.kind == FILES:
            await run_in_thread(self._copy_uploads)
        if not self._in_place:
            await run_in_thread(self._copy_records)

    def _missing(self) -> Iterator[StoredBlob]:
        """The blobs that are still to be copied."""
        for portion in self._source.content.portions():
            for each in portion:
                if each.digest not in self._done:
                    yield each

    async def _copy_blob(self, blob: StoredBlob) -> None:
        try:
            await self._copy.copy(blob)
        except (BlobUnknown, DigestInvalid) as error:
            if self._source.content.holds(blob.digest):  # else it was collected meanwhile
                self.report.damaged[blob.digest] = str(error)
            return
        self._done.add(blob.digest)
        self.report.blobs += 1
        self.report.bytes += blob.size

    def _compare(self) -> None:
        """Remove what is not in the source: it was collected since, or a former move left it here.

        What is there was used last when the source says so, so that it is not collected before its time.
        """
        for portion in self._target.content.portions():
            for each in portion:
                found = self._source.content.find(each.digest)
                if found is None:
                    self._done.discard(each.digest)
                    self._target.records.transaction(
                        partial(self._target.content.remove_old, each.digest, lambda at: True)
                    )
                elif found.used_at > each.used_at:  # else it costs a transaction, while writers may be paused
                    self._target.content.touch(each.digest, found.used_at)

    def _copy_uploads(self) -> None:
        from storage.bucket.sessions import Session  # only here: see above

        source = cast("BucketBlobs", self._source.content)
        for key, value in self._source.records.scan(UPLOAD.prefix()):
            if (session := Session.parse(value)) is not None:
                continue_here(source, files_of(self._target.content), UPLOAD.parse(key)[0], session)

    def _copy_records(self) -> None:
        for changes in batches(self._differences()):
            self._target.records.transaction(partial(_change, changes))
            self.report.records += len(changes)

    def _differences(self) -> Iterator[tuple[str, bytes | None]]:
        """The records that differ in the target, with their value in the source; None if it has none."""
        if self._in_place:
            return
        sources, targets = self._records_of(self._source.records), self._records_of(self._target.records)
        ours, theirs = next(sources, None), next(targets, None)
        while ours is not None or theirs is not None:
            if theirs is None or (ours is not None and ours[0] < theirs[0]):
                assert ours is not None
                yield ours
                ours = next(sources, None)
            elif ours is None or theirs[0] < ours[0]:
                yield theirs[0], None
                theirs = next(targets, None)
            else:
                if ours != theirs:
                    yield ours
                ours, theirs = next(sources, None), next(targets, None)

    def _records_of(self, records: Records) -> Iterator[tuple[str, bytes]]:
        return (each for each in records.scan(EVERY) if not f"{each[0]} ".startswith(_OWN))


def _change(changes: list[tuple[str, bytes | None]], batch: Batch) -> None:
    for key, value in changes:
        if value is None:
            batch.delete(key)
        else:
            batch.put(key, value)
