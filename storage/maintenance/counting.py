"""The totals of a store: they are counted once, and compared with what is there by each scrub.

A process may be killed between the change of a file and that of the records.  So a directory of the tree is
compared with the records of its blobs, and in a cache, a link whose blob is gone is removed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import structlog

from storage.disk.blobs import BlobFiles
from storage.disk.tree import StoredBlob, directories, read_directory
from storage.keys import BLOB, COUNTABLE, COUNTED, LINK, STORED, TOTAL, counted_by
from storage.maintenance.blob_order import record_blob
from storage.maintenance.pace import DutyCycle
from storage.oci import Digest
from storage.records import BATCH, LAST, Batch, batches
from storage.store import Store
from storage.totals import Counts, RecordChange, Total, Totals
from storage.values import BlobUse

log = structlog.get_logger()


class Counting:
    """Counts what a store holds.  Methods block, and may raise StorageFailed.

    Several processes may count at once, beside others that write.  `pause` is called with a number of seconds
    to wait.  The generators yield between two steps, and end when all is right.
    """

    def __init__(self, store: Store, pause: Callable[[float], None] = lambda seconds: None) -> None:
        self._store = store
        self._tree = store.files if isinstance(store.files, BlobFiles) else None
        self._records = store.records
        self._totals = Totals(store.records)
        self._pause = DutyCycle(pause).pause
        self._turn = threading.Lock()  # one of a process counts for all

    def run(self, everything: bool = False) -> None:
        """Count what has no total yet; or `everything`, to compare it with what is there."""
        if everything:
            self._run(everything)
        else:
            with self._turn:
                self._run(everything)

    def _run(self, everything: bool) -> None:
        begun = time.monotonic()
        # The indexes are made here, in a new database at once: later it takes seconds, and blocks writers.
        self._records.linking("")
        self._records.oldest(("", b""), 1)
        if not self._totals.listed:
            self._list()
        number = 0
        for key in self._everything() if everything else self._uncounted():
            number += 1
            for _ in self.check(key):
                pass
        if number:
            seconds = round(time.monotonic() - begun, 3)
            log.info("totals.counted", store=self._store.files.root.name, totals=number, seconds=seconds)

    def _list(self) -> None:
        """Give each repository and directory a total.

        Whoever writes to one without a total gives it one, until `counted` says that it was empty before.
        """
        for names in batches(self._without_total()):

            def work(batch: Batch, names: list[str] = names) -> None:
                for key in names:
                    if batch.get(key) is None:
                        batch.put(key, Total().encode())

            self._records.transaction(work)
        self._records.put(COUNTED.key(), b"")

    def _without_total(self) -> Iterator[str]:
        for kind in COUNTABLE.values():
            if kind is BLOB:
                continue
            for name in self._records.groups(kind.prefix()):
                if not self._records.holds(key := TOTAL.key(name)):
                    yield key
        yield from map(STORED.key, self._directories())

    def _directories(self) -> list[str]:
        """The fan-out directories; none if blobs are not files."""
        if self._tree is None:
            return []
        root = self._tree.root / "blobs"
        with self._tree.guard(root):
            return directories(root)[0]

    def _uncounted(self) -> Iterator[str]:
        """The keys of totals, of directories first."""
        for kind, found in ((STORED, self._totals.directories()), (TOTAL, self._totals.repositories())):
            for name, total in found:
                if total.counted is None:
                    yield kind.key(name)

    def _everything(self) -> Iterator[str]:
        """The keys of all totals, also those of directories that should have one."""
        names = self._directories()
        yield from map(STORED.key, names)
        known = set(names)
        yield from (STORED.key(name) for name, _ in self._totals.directories() if name not in known)
        yield from (TOTAL.key(name) for name, _ in self._totals.repositories())

    def check(self, key: str) -> Iterator[bool]:
        """Compare a total with what it counts, and that with the files."""
        if self._tree is not None and key.startswith(STORED.prefix()):
            yield from self._compare_directory(STORED.parse(key)[0], self._tree)
        while True:
            before = self._records.get(key)
            total = Total.parse(before) or Total()
            begun, known = total.recount is not None, total.counted
            rows = self._next(key, total)
            if self._tree is not None and not self._tree.private and self._unlink(rows):
                continue
            found = total.recount = total.recount or Counts()
            for name, value in rows:
                if (change := RecordChange.of(name, None, value)) is not None:
                    found.apply(change)
                total.reached = name
            ended = len(rows) < BATCH
            if ended and not begun and (found.same(known) if known else before is None and not rows):
                return
            wrong = self._end(total, found) if ended else None
            if self._replace(key, before, total) and ended:
                if wrong is not None:
                    _tell(key, wrong, found)
                return
            self._pause()
            yield True

    def _next(self, key: str, total: Total) -> list[tuple[str, bytes]]:
        """The next records to count; fewer than BATCH are the last ones."""
        rows: list[tuple[str, bytes]] = []
        for prefix in counted_by(key):
            if total.reached < prefix + LAST and len(rows) < BATCH:
                after = total.reached.removeprefix(prefix) if total.reached.startswith(prefix) else ""
                rows += islice(self._records.scan(prefix, after), BATCH - len(rows))
        return rows

    def _end(self, total: Total, found: Counts) -> Counts | None:
        """Take the finished count for the total; what was recorded before, if that is wrong."""
        known, wrong = total.counted, None
        if known is not None and not known.same(found):
            wrong = known
            total.changes += 1
        elif known is not None:
            found.oldest = known.oldest  # later, if an expiry has looked closely
        found.used = max(found.used, known.used if known else 0.0)
        total.counted, total.recount, total.reached = found, None, ""
        return wrong

    def _replace(self, key: str, before: bytes | None, total: Total) -> bool:
        """Write the total unless it has changed meanwhile; whether it was written."""

        def work(batch: Batch) -> bool:
            if batch.get(key) != before:
                return False
            if total.counted is not None and total.recount is None and not total.counted.numbers:
                batch.delete(key)
            else:
                batch.put(key, total.encode())
            return True

        return self._records.transaction(work)

    # Files

    def _unlink(self, rows: Iterable[tuple[str, bytes]]) -> bool:
        """Remove links to blobs that are gone; whether there are any."""

        def gone(keys: Iterable[str]) -> list[str]:
            links = (key for key in keys if key.startswith(LINK.prefix()))
            return [key for key in links if not self._store.files.holds(Digest(LINK.parse(key)[1]))]

        def work(batch: Batch) -> None:
            for key in gone(lost):  # in the transaction: whoever links a blob sees its file there
                batch.delete(key)

        if lost := gone(key for key, _ in rows):
            self._records.transaction(work)
        return bool(lost)

    def _compare_directory(self, name: str, tree: BlobFiles) -> Iterator[bool]:
        """Record the blobs that are in a directory, and when they were last used."""
        root = tree.root / "blobs"
        with tree.guard(root):
            found = {str(each.digest): _use(each) for each in read_directory(root, name).blobs}
        (prefix,) = counted_by(STORED.key(name))
        known = {BLOB.parse(key)[0]: BlobUse.parse(use) for key, use in self._records.scan(prefix)}
        wrong = [each for each in found.keys() | known.keys() if found.get(each) != known.get(each)]
        for some in batches(sorted(wrong)):
            self._record(some)
            self._pause()
            yield True

    def _record(self, digests: Iterable[str]) -> None:
        def work(batch: Batch) -> None:
            for each in digests:
                record_blob(self._store, batch, Digest(each))

        self._records.transaction(work)


def _tell(key: str, known: Counts, found: Counts) -> None:
    name = (STORED if key.startswith(STORED.prefix()) else TOTAL).parse(key)[0]
    was, now = (known.numbers, known.bytes), (found.numbers, found.bytes)
    log.warning("totals.corrected", of=name, known=was, found=now)


def _use(found: StoredBlob) -> BlobUse:
    return BlobUse.at(found.used_at, found.size)
