"""What lies on disk is read again and compared with its digest: slowly, over and over.

A blob whose content is not what its name says, or that cannot be read, is set aside, told of, and handed to
whoever can have it fetched again.  What is in the tree and is no blob is told of and left alone.  A manifest
whose record is not what its key says is removed, and told of.  That a linked blob is not there is no damage
to a cache, which fetches it when it is asked for.

What nobody can fetch again is kept: all that was set aside, and a damaged manifest where it is, since
somebody may save it.  Both are answered as unknown, so that whoever pushes them again heals them.  There a
linked blob that is not there, and a record that cannot be read, are told of as well, at every pass until they
are pushed again or deleted.

What was checked longest ago comes first.  When that was is recorded by fan-out directory, of which there are
256 for an algorithm: a record for each blob would be a write for each blob, and the times of its file are not
ours to change, since its mtime is its last use.

    scrub <algorithm>/<ab>      when the last check that came to its end began; and, where a later one was
                                cut, the name that it had reached
    scrub manifests             when the last check of all manifests began
    scrub records               the same of whether there is what they tell of

Several may run side by side, in one process or many: each looks at the records before it turns to the next
directory, so that they share the work.
"""

from __future__ import annotations

import asyncio
import errno
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import structlog

from storage.concurrency import run_in_thread
from storage.disk.blobs import KIND
from storage.disk.records import Batch
from storage.disk.tree import BlobHasher, directories, read_directory, remove_damaged
from storage.errors import DigestInvalid, ManifestUnknown, RegistryError, StorageFailed
from storage.keys import LINK, MANIFEST, SCRUB, TAG, RecordKind
from storage.oci import Digest
from storage.store import Store

log = structlog.get_logger()

KEPT = 16  # files set aside
NOTED = 30.0  # seconds between two notes of how far it got
TOLD = 100  # of what is foreign, in one run
UNREADABLE = 3  # blobs in a row; then it is the disk that fails, not they
GRAIN = 0.05  # seconds; shorter rests are saved up
CREDIT = 1.0  # seconds that may be made good, where a rest took too long
BATCH = 200  # manifests at a time

_MANIFESTS = "manifests"
_RECORDS = "records"
_COUNTS = ("checked", "bytes", "damaged", "healed", "foreign")

Heal = Callable[[Digest, list[str]], Awaitable[bool]]


@dataclass(slots=True)
class Progress:
    """`checked` are blobs and manifests, `total_bytes` is estimated from what was seen so far.

    What is `damaged` may be missing altogether.  `foreign` paths are none of ours.  `current` is the blob
    that is being read.
    """

    started_at: float
    checked: int = 0
    bytes: int = 0
    total_bytes: int = 0
    damaged: int = 0
    healed: int = 0
    foreign: int = 0
    current: Digest | None = None
    running: bool = True


@dataclass(frozen=True, slots=True)
class ScrubReport:
    """See Progress."""

    checked: int
    bytes: int
    damaged: int
    healed: int
    foreign: int
    seconds: float


class Scrub:
    """`rate` is in bytes a second, None is as fast as it goes.  `clock` tells seconds since the epoch.

    Of what was set aside the last `kept` files stay.  None: all, and damaged manifests where they are, since
    what cannot be fetched again may be worth saving.  `ticks` and `sleep` pace it.
    """

    def __init__(
        self,
        store: Store,
        rate: float | None,
        clock: Callable[[], float] = time.time,
        *,
        kept: int | None = KEPT,
        ticks: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self.store = store
        self.rate = rate
        self.clock = clock
        self.kept = kept
        self.ticks = ticks
        self.sleep = sleep
        self.unreadable = 0  # blobs in a row, over runs
        self.progress: Progress | None = None  # of the run that began last; it may have ended

    async def run(
        self, heal: Heal | None = None, *, older_than: float | None = None, paced: bool = True
    ) -> ScrubReport:
        """Check all that is there; or only what was not checked for `older_than` seconds.

        `heal` is to have a blob fetched again, for one of the repositories that show it, and tells whether it
        was.  It may raise a RegistryError.  Without `paced` it goes as fast as it can.

        May be cancelled; the next run goes on where it was.  Raises StorageFailed where the disk fails.
        """
        self.progress = progress = Progress(self.clock())
        begun = self.ticks()
        pace = Pace(self.rate if paced else None, self.ticks, self.sleep)
        try:
            await _ScrubRun(self, pace, heal, progress).run(progress.started_at - (older_than or 0.0))
        finally:
            progress.running, progress.current = False, None
        counts = {name: getattr(progress, name) for name in _COUNTS}
        return ScrubReport(**counts, seconds=self.ticks() - begun)


class Pace:
    """Rests so that on the average `rate` bytes are spent a second; not at all where there is none."""

    def __init__(
        self, rate: float | None, ticks: Callable[[], float], sleep: Callable[[float], Awaitable[object]]
    ) -> None:
        self._rate = rate
        self._ticks = ticks
        self._sleep = sleep
        self._debt = 0.0  # seconds
        self._at = ticks()

    async def spend(self, size: int) -> None:
        if not self._rate:
            return
        now = self._ticks()
        self._debt = max(self._debt - (now - self._at), -CREDIT) + size / self._rate
        self._at = now
        if self._debt >= GRAIN:
            await self._sleep(self._debt)


class _ScrubRun:
    """One pass over all that is due."""

    def __init__(self, scrub: Scrub, pace: Pace, heal: Heal | None, progress: Progress) -> None:
        self._scrub = scrub
        self._files = scrub.store.files
        self._records = scrub.store.records
        self._root = self._files.root / "blobs"
        self._pace = pace
        self._heal = heal
        self._progress = progress
        self._aside: set[Digest] = set()  # by this run
        self._parts = self._looked_at = self._seen = 0  # of directories; of them; bytes in those

    async def run(self, since: float) -> None:
        """Check what was checked at `since` last, or before."""
        if self._noted(_MANIFESTS)[0] <= since:
            await self._check_manifests()
        with self._files.guard(self._root):
            names, foreign = await run_in_thread(directories, self._root)
        self._tell(foreign)
        due = [(at, name) for name in names if (at := self._noted(name)[0]) <= since]
        self._parts = len(due)
        beginnings = []
        for _, name in sorted(due):
            at, reached = self._noted(name)
            if at > since:  # somebody else's run was here meanwhile
                self._parts -= 1
                continue
            begun = self._scrub.clock()
            await self._check_directory(name, after=reached, note=at)
            await self._note(name, begun)
            if reached:
                beginnings.append((name, reached))
        # What the run that was cut had checked by then: last, but a run leaves nothing out.
        self._parts += len(beginnings)
        for name, reached in beginnings:
            await self._check_directory(name, until=reached)
        if self._scrub.kept is None and self._noted(_RECORDS)[0] <= since:
            await self._check_records()

    # Progress, on disk

    def _noted(self, name: str) -> tuple[float, str]:
        """When it was last checked, 0 for never, and how far a later check got."""
        at, _, reached = (self._records.get(SCRUB.key(name)) or b"").decode("ascii", "replace").partition(" ")
        try:
            checked_at = float(at)
        except ValueError:
            return 0.0, ""
        # Not in a future that some clock once believed in.
        known = math.isfinite(checked_at) and checked_at <= self._scrub.clock()
        return (checked_at, reached) if known else (0.0, "")

    async def _note(self, name: str, at: float, reached: str = "") -> None:
        with suppress(StorageFailed):  # told of by the disk; what is lost is but the order
            await run_in_thread(self._records.put, SCRUB.key(name), f"{at} {reached}".encode())

    # Blobs

    def _tell(self, foreign: list[Path]) -> None:
        for path in foreign:
            self._progress.foreign += 1
            if self._progress.foreign <= TOLD:
                log.warning("scrub.foreign", path=str(path))

    async def _check_directory(
        self, name: str, after: str = "", until: str | None = None, note: float | None = None
    ) -> None:
        """`note`: how far it got, now and then, beside this time of the last check."""
        with self._files.guard(self._root / name):
            found = await run_in_thread(read_directory, self._root, name, after, until)
        self._tell(found.foreign)
        self._estimate(sum(each.size for each in found.blobs))
        noted_at = self._scrub.ticks()
        for blob in found.blobs:
            await self._check(blob.digest)
            if note is not None and self._scrub.ticks() - noted_at >= NOTED:
                await self._note(name, note, blob.digest.encoded)
                noted_at = self._scrub.ticks()

    def _estimate(self, size: int) -> None:
        """Digests are spread evenly, so that directories hold about as much, each."""
        self._looked_at += 1
        self._seen += size
        to_come = self._seen * (self._parts - self._looked_at) // self._looked_at
        self._progress.total_bytes = self._progress.bytes + size + to_come

    async def _check(self, digest: Digest) -> None:
        self._progress.current = digest
        reading = BlobHasher(self._files.path(digest), digest)
        try:
            while not reading.ended:
                with self._files.guard(reading.path):
                    size = await run_in_thread(reading.step)
                self._progress.bytes += size
                await self._pace.spend(size)
            if reading.gone:
                return
            self._progress.checked += 1
            if not self._is_the_disk(reading) and reading.found != digest:
                await self._damaged(digest, reading)
        finally:
            reading.close()

    def _is_the_disk(self, reading: BlobHasher) -> bool:
        """Whether it is more than this blob that cannot be read: then all that is there would be set aside.

        Digests say nothing of where on a disk a blob lies: its bad places will hardly hit several in a row.
        """
        if reading.error is None:
            self._scrub.unreadable = 0
            return False
        self._scrub.unreadable += 1
        if self._scrub.unreadable < UNREADABLE:
            return False
        self._files.disk.failed(KIND, reading.path, OSError(errno.EIO, reading.error))
        return True

    async def _damaged(self, digest: Digest, reading: BlobHasher) -> None:
        repositories = await run_in_thread(self._set_aside, digest, reading)
        if not repositories or self._heal is None:
            return
        with suppress(RegistryError):
            if await self._heal(digest, repositories):
                self._progress.healed += 1
                log.info("blob.healed", digest=str(digest), repositories=repositories)

    def _set_aside(self, digest: Digest, reading: BlobHasher) -> list[str]:
        """The repositories that show it; none where it was evicted meanwhile, or cannot be moved."""
        path, moved = reading.path, False
        if reading.status is not None:
            with suppress(StorageFailed):  # a read-only disk, say; it has told of it
                aside = self._files.set_aside(digest, reading.status)
                if aside is None:
                    return []
                path, moved = aside, True
                self._aside.add(digest)
        self._progress.damaged += 1
        # One look at all links: slow, but only where there is damage.
        repositories: list[str] = []
        with suppress(StorageFailed):  # whoever asks for it next has it fetched
            repositories += self._showing(digest)
        log.error(
            "blob.damaged",
            digest=str(digest),
            found=reading.found,
            bytes=reading.size,
            path=str(path),
            repositories=repositories,
            action="set aside" if moved else "left in its place",
        )
        if moved and self._scrub.kept is not None:
            remove_damaged(path, self._scrub.kept)
        return repositories if moved else []

    def _showing(self, digest: Digest) -> Iterator[str]:
        for key, _ in self._records.scan(LINK.prefix()):
            repository, linked = LINK.parse(key)
            if linked == digest:
                yield repository

    # Manifests

    async def _check_manifests(self) -> None:
        begun = self._scrub.clock()
        records = self._records.scan(MANIFEST.prefix())
        while size := await run_in_thread(self._check_some, records):
            await self._pace.spend(size)
        await self._note(_MANIFESTS, begun)

    def _check_some(self, records: Iterator[tuple[str, bytes]]) -> int:
        """How many bytes were read; 0 at the end."""
        size = 0
        for key, value in islice(records, BATCH):
            size += len(key) + len(value)
            self._progress.checked += 1
            self._progress.bytes += len(value)
            repository, digest = MANIFEST.parse(key)
            try:
                self._scrub.store.manifest(repository, Digest.parse(digest))
            except (ManifestUnknown, DigestInvalid):
                self._remove(key, value)
        return size

    async def _check_records(self) -> None:
        """Tell of what is recorded and cannot be had: where nothing is fetched again, that is a loss."""
        begun, told = self._scrub.clock(), 0
        for kind in (TAG, MANIFEST, LINK):
            keys = self._records.keys(kind.prefix())
            while batch := await run_in_thread(lambda keys=keys: list(islice(keys, BATCH))):
                for event, key in await run_in_thread(self._lost, kind, batch):
                    self._progress.damaged += 1
                    told += 1
                    if told <= TOLD:
                        repository, reference = kind.parse(key)
                        log.error(event, repository=repository, reference=reference)
                await self._pace.spend(sum(map(len, batch)))
        await self._note(_RECORDS, begun)

    def _lost(self, kind: RecordKind, keys: list[str]) -> list[tuple[str, str]]:
        lost = []
        for key in keys:
            if self._records.get(key) is None:
                # Of those that were removed since they were listed there is nothing to say.
                lost += [(f"{kind.name}.unreadable", key)] * self._records.holds(key)
            elif kind is LINK and self._missing(key):
                lost.append(("blob.missing", key))
        return lost

    def _missing(self, key: str) -> bool:
        digest = Digest(LINK.parse(key)[1])
        if digest in self._aside or self._files.holds(digest):
            return False
        # 1. we see the link  2. it is removed, and then the blob  3. we look for that.
        return self._records.get(key) is not None

    def _remove(self, key: str, value: bytes) -> None:
        def work(batch: Batch) -> bool:
            # Only the very record that is damaged: it may have been put again meanwhile.
            return batch.get(key) == value and (self._scrub.kept is None or batch.delete(key))

        with suppress(StorageFailed):  # told of by the disk; the next run finds it again
            if self._records.transaction(work):
                self._progress.damaged += 1
                repository, reference = MANIFEST.parse(key)
                log.error("manifest.damaged", repository=repository, reference=reference, bytes=len(value))
