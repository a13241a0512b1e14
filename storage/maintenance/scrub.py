"""Verification of all stored content: it is read and compared with its digest, slowly and repeatedly.

Of blobs in a bucket only the records are verified: object storage verifies its objects itself.

A blob whose content does not match its digest, or that cannot be read, is set aside, logged, and fetched
again if that is possible.  What is in the tree but is not a blob is logged and left alone.  A manifest whose
record does not match its key is removed and logged.  A missing blob is no damage to a cache, which fetches it
on the next request.

In a private store, whose content cannot be fetched again, everything that was set aside is kept, and damaged
manifests stay in place, since it may be possible to repair them.  Both are answered as unknown, so that the
next push heals them.  Missing blobs and unreadable records are logged there as well, in every pass until they
are pushed again or deleted.

What was checked longest ago is checked first.  The times are recorded by fan-out directory, of which there
are 256 for an algorithm: a record for each blob would be a write for each, and the mtime is its last use.

    scrub <algorithm>/<ab>      when the last complete check began; and, if a later one was interrupted, the
                                name that it had reached
    scrub manifests             when the last check of all manifests began
    scrub totals                when the last check began of how much each repository has
    scrub records               when the last check began of whether the content of records exists

Several scrubs may run at once, in one or many processes: each reads the records before it begins with a
directory, so that they share the work.
"""

from __future__ import annotations

import asyncio
import errno
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

import structlog

from storage.concurrency import run_in_thread
from storage.content import files_of
from storage.disk.blobs import BlobFiles
from storage.disk.directory import KIND
from storage.disk.tree import BlobHasher, directories, read_directory, remove_damaged
from storage.errors import DigestInvalid, ManifestUnknown, RegistryError, StorageFailed
from storage.keys import LINK, MANIFEST, SCRUB, STORED, TAG, TOTAL, RecordKind
from storage.maintenance.blob_order import record_blob
from storage.maintenance.counting import Counting
from storage.maintenance.pace import Pace
from storage.maintenance.scrub_progress import COUNTED, ScrubProgress, ScrubReport
from storage.oci import Digest
from storage.records import Batch
from storage.store import Store
from storage.totals import Totals

log = structlog.get_logger()

KEPT = 16  # files set aside
SAVE_EVERY = 30.0  # seconds between two records of the progress
LOGGED = 100  # foreign paths in one run
UNREADABLE = 3  # blobs in a row; after that the disk fails, not the blobs
BATCH = 200  # manifests at a time

_MANIFESTS = "manifests"
_RECORDS = "records"
_TOTALS = "totals"

Heal = Callable[[Digest, list[str]], Awaitable[bool]]


class Scrub:
    """Verifies the content of a store.

    `rate` is in bytes per second, None for no limit.  The last `kept` files that were set aside are kept; if
    it is None, all of them, and damaged manifests as well.  `clock` returns seconds since the epoch; `ticks`
    and `sleep` control the pace.  `counted` is called with the name of a count of ScrubReport, and with how
    much is added to it.
    """

    def __init__(
        self,
        store: Store,
        rate: float | None,
        clock: Callable[[], float] = time.time,
        *,
        kept: int | None = KEPT,
        counting: Counting | None = None,
        counted: Callable[[str, int], None] = lambda name, number: None,
        ticks: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self.store = store
        self.rate = rate
        self.clock = clock
        self.kept = kept
        self.counting = counting or Counting(store)
        self.counted = counted
        self.ticks = ticks
        self.sleep = sleep
        self.unreadable = 0  # blobs in a row, over runs
        self.progress: ScrubProgress | None = None  # of the last run, which may have ended

    def begin(self) -> None:
        """Report the progress of a new run, which may start later."""
        self.progress = ScrubProgress(self.clock(), self.counted)

    def end(self) -> None:
        """Report the last run as ended, or as cancelled before it started."""
        if self.progress is not None:
            self.progress.running, self.progress.current = False, None

    async def run(
        self, heal: Heal | None = None, *, older_than: float | None = None, paced: bool = True
    ) -> ScrubReport:
        """Check everything, or only what was not checked for `older_than` seconds.

        `heal` fetches a blob again for one of the repositories that link it, and returns whether it did; it
        may raise RegistryError.  Without `paced` there is no limit of the rate.

        A run may be cancelled; the next one continues.  Raises StorageFailed if the disk fails.
        """
        self.progress = progress = ScrubProgress(self.clock(), self.counted)
        begun = self.ticks()
        pace = Pace(self.rate if paced else None, self.ticks, self.sleep)
        try:
            await _ScrubRun(self, pace, heal, progress).run(progress.started_at - (older_than or 0.0))
        finally:
            progress.running, progress.current = False, None
        counts = {name: getattr(progress, name) for name in COUNTED}
        return ScrubReport(**counts, seconds=self.ticks() - begun)


class _ScrubRun:
    """One pass over everything that is due."""

    def __init__(self, scrub: Scrub, pace: Pace, heal: Heal | None, progress: ScrubProgress) -> None:
        self._scrub = scrub
        self._records = scrub.store.records
        self._root = scrub.store.files.root / "blobs"
        self._totals = Totals(scrub.store.records)
        self._pace = pace
        self._heal = heal
        self._progress = progress
        self._aside: set[Digest] = set()  # set aside by this run
        self._due = self._begun = self._seen = 0  # directories that are due; begun; bytes in these

    async def run(self, since: float) -> None:
        """Check what was last checked at `since` or before."""
        if self._noted(_MANIFESTS)[0] <= since:
            await self._check_manifests()
        if isinstance(self._scrub.store.files, BlobFiles):  # a bucket verifies its objects itself
            await self._check_blobs(since)
        if self._scrub.kept is None and self._noted(_RECORDS)[0] <= since:
            await self._check_records()
        if self._noted(_TOTALS)[0] <= since:
            await self._check_totals()

    @property
    def _files(self) -> BlobFiles:
        return files_of(self._scrub.store.files)

    async def _check_blobs(self, since: float) -> None:
        with self._files.guard(self._root):
            names, foreign = await run_in_thread(directories, self._root)
        self._log_foreign(foreign)
        due = [(at, name) for name in names if (at := self._noted(name)[0]) <= since]
        self._due = len(due)
        beginnings = []
        for _, name in sorted(due):
            at, reached = self._noted(name)
            if at > since:  # another run has checked it meanwhile
                self._due -= 1
                continue
            begun = self._scrub.clock()
            await self._check_directory(name, after=reached, note=at)
            await self._count(STORED.key(name))
            await self._save(name, begun)
            if reached:
                beginnings.append((name, reached))
        # What the interrupted run had checked: last, but a run omits nothing.
        self._due += len(beginnings)
        for name, reached in beginnings:
            await self._check_directory(name, until=reached)

    # Totals

    async def _check_totals(self) -> None:
        begun = self._scrub.clock()
        names = self._totals.repositories()
        while batch := await run_in_thread(lambda: list(islice(names, BATCH))):
            for name, _ in batch:
                await self._count(TOTAL.key(name))
        await self._save(_TOTALS, begun)

    async def _count(self, key: str) -> None:
        with suppress(StorageFailed):  # logged by DiskHealth; the next run counts again
            steps = self._scrub.counting.check(key)
            while await run_in_thread(next, steps, False):
                pass

    # State in the records

    def _noted(self, name: str) -> tuple[float, str]:
        """When a part was last checked, 0 for never, and how far a later check got."""
        at, _, reached = (self._records.get(SCRUB.key(name)) or b"").decode("ascii", "replace").partition(" ")
        try:
            checked_at = float(at)
        except ValueError:
            return 0.0, ""
        # Not in the future, in case that the clock was wrong.
        known = math.isfinite(checked_at) and checked_at <= self._scrub.clock()
        return (checked_at, reached) if known else (0.0, "")

    async def _save(self, name: str, at: float, reached: str = "") -> None:
        with suppress(StorageFailed):  # logged by DiskHealth; only the order of checks is lost
            await run_in_thread(self._records.put, SCRUB.key(name), f"{at} {reached}".encode())

    # Blobs

    def _log_foreign(self, foreign: list[Path]) -> None:
        for path in foreign:
            self._progress.count("foreign")
            if self._progress.foreign <= LOGGED:
                log.warning("scrub.foreign", path=str(path))

    async def _check_directory(
        self, name: str, after: str = "", until: str | None = None, note: float | None = None
    ) -> None:
        """With `note`, the time of the last complete check, also record now and then how far it got."""
        with self._files.guard(self._root / name):
            found = await run_in_thread(read_directory, self._root, name, after, until)
        self._log_foreign(found.foreign)
        self._estimate(sum(each.size for each in found.blobs))
        noted_at = self._scrub.ticks()
        for blob in found.blobs:
            await self._check(blob.digest)
            if note is not None and self._scrub.ticks() - noted_at >= SAVE_EVERY:
                await self._save(name, note, blob.digest.encoded)
                noted_at = self._scrub.ticks()

    def _estimate(self, size: int) -> None:
        """Estimate the total: digests are evenly distributed, so all directories contain about as much."""
        self._begun += 1
        self._seen += size
        to_come = self._seen * (self._due - self._begun) // self._begun
        self._progress.total_bytes = self._progress.bytes + size + to_come

    async def _check(self, digest: Digest) -> None:
        self._progress.current = digest
        reading = BlobHasher(self._files.path(digest), digest)
        try:
            while not reading.ended:
                with self._files.guard(reading.path):
                    size = await run_in_thread(reading.step)
                self._progress.count("bytes", size)
                await self._pace.spend(size)
            if reading.gone:
                return
            self._progress.count("checked")
            if not self._is_the_disk(reading) and reading.found != digest:
                await self._damaged(digest, reading)
        finally:
            reading.close()

    def _is_the_disk(self, reading: BlobHasher) -> bool:
        """Whether the disk fails, not only this blob: then every blob would be set aside.

        Digests do not depend on the place on the disk: bad blocks will hardly hit several blobs in a row.
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
                self._progress.count("healed")
                log.info("blob.healed", digest=str(digest), repositories=repositories)

    def _set_aside(self, digest: Digest, reading: BlobHasher) -> list[str]:
        """Set the blob aside; the repositories that link it, none if it was evicted or cannot be moved."""
        path, moved = reading.path, False
        if reading.status is not None:
            with suppress(StorageFailed):  # logged by DiskHealth: a read-only disk, for example
                aside = self._files.set_aside(digest, reading.status)
                if aside is None:
                    return []
                path, moved = aside, True
                self._aside.add(digest)
                self._records.transaction(lambda batch: record_blob(self._scrub.store, batch, digest))
        self._progress.count("damaged")
        repositories: list[str] = []
        with suppress(StorageFailed):  # the next request for it fetches it
            repositories += [LINK.parse(key)[0] for key in self._records.linking(digest)]
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

    # Manifests

    async def _check_manifests(self) -> None:
        begun = self._scrub.clock()
        records = self._records.scan(MANIFEST.prefix())
        while size := await run_in_thread(self._check_some, records):
            await self._pace.spend(size)
        await self._save(_MANIFESTS, begun)

    def _check_some(self, records: Iterator[tuple[str, bytes]]) -> int:
        """Check the next manifests, and return how many bytes were read; 0 at the end."""
        size = 0
        for key, value in islice(records, BATCH):
            size += len(key) + len(value)
            self._progress.count("checked")
            self._progress.count("bytes", len(value))
            repository, digest = MANIFEST.parse(key)
            try:
                self._scrub.store.manifest(repository, Digest.parse(digest))
            except (ManifestUnknown, DigestInvalid):
                self._remove(key, value)
        return size

    async def _check_records(self) -> None:
        """Log what is recorded but missing: in a private store, it is lost."""
        begun, logged = self._scrub.clock(), 0
        for kind in (TAG, MANIFEST, LINK):
            keys = self._records.keys(kind.prefix())
            while batch := await run_in_thread(lambda keys=keys: list(islice(keys, BATCH))):
                for event, key in await run_in_thread(self._lost, kind, batch):
                    self._progress.count("damaged")
                    logged += 1
                    if logged <= LOGGED:
                        repository, reference = kind.parse(key)
                        log.error(event, repository=repository, reference=reference)
                await self._pace.spend(sum(map(len, batch)))
        await self._save(_RECORDS, begun)

    def _lost(self, kind: RecordKind, keys: list[str]) -> list[tuple[str, str]]:
        lost = []
        for key in keys:
            if self._records.get(key) is None:
                # Unless it was deleted since it was listed.
                lost += [(f"{kind.name}.unreadable", key)] * self._records.holds(key)
            elif kind is LINK and self._names_missing_blob(key):
                lost.append(("blob.missing", key))
        return lost

    def _names_missing_blob(self, key: str) -> bool:
        digest = Digest(LINK.parse(key)[1])
        if digest in self._aside or self._scrub.store.holds(digest):
            return False
        # 1. we see the link  2. it is deleted, and then the blob  3. we look for the blob.
        return self._records.get(key) is not None

    def _remove(self, key: str, value: bytes) -> None:
        def work(batch: Batch) -> bool:
            # Only the damaged record itself: it may have been replaced meanwhile.
            return batch.get(key) == value and (self._scrub.kept is None or batch.delete(key))

        with suppress(StorageFailed):  # logged by DiskHealth; the next run finds it again
            if self._records.transaction(work):
                self._progress.count("damaged")
                repository, reference = MANIFEST.parse(key)
                log.error("manifest.damaged", repository=repository, reference=reference, bytes=len(value))
