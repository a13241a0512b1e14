"""Copying what a cache has stored into another store of caches, while both are used.

Nothing is removed: whatever is missing in a cache is fetched from its upstream.  What only one of the two has
is in both then; of a tag that both have, the one that its upstream confirmed later counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial

from storage.concurrency import for_each, run_in_thread
from storage.disk.tree import StoredBlob
from storage.errors import BlobUnknown, DigestInvalid
from storage.keys import COPIES, LINK, MANIFEST, REFERRER, TAG
from storage.migration.engine_copy import EngineCopy
from storage.migration.move import AT_ONCE, MoveReport
from storage.oci import Digest
from storage.records import Batch, batches
from storage.store import Store
from storage.values import Pointer


class CacheCopy:
    """Copies from `source` to `target`.  Methods raise StorageFailed and Unavailable."""

    def __init__(self, source: Store, target: Store) -> None:
        self._source = source
        self._target = target
        self.source, self.target = source.files, target.files
        self._copy = EngineCopy(source.files, target.files)
        self.report = MoveReport()

    async def survey(self) -> MoveReport:
        """What is still to be copied, without changing anything."""
        return await run_in_thread(self._survey)

    def _survey(self) -> MoveReport:
        report = MoveReport()
        for each in self._linked():
            if not self._target.holds(each.digest):
                report.whole, report.whole_bytes = report.whole + 1, report.whole_bytes + each.size
        report.records = sum(len(found) for found in self._missing())
        return report

    async def run(self) -> MoveReport:
        found = await self.survey()
        self.report.whole, self.report.whole_bytes = found.whole, found.whole_bytes
        await for_each(self._copy_blob, await run_in_thread(lambda: list(self._linked())), AT_ONCE)
        await run_in_thread(self._copy_records)
        return self.report

    def _linked(self) -> Iterator[StoredBlob]:
        """The blobs that a repository shows."""
        for portion in self._source.files.portions():
            for each in portion:
                if self._repositories(each.digest):
                    yield each

    def _repositories(self, digest: Digest) -> list[str]:
        linking = (LINK.parse(key)[0] for key in self._source.records.linking(digest))
        return [each for each in linking if each != COPIES]

    async def _copy_blob(self, blob: StoredBlob) -> None:
        with suppress(BlobUnknown, DigestInvalid):  # evicted meanwhile, or damaged
            if not await self._target.read(self._target.holds, blob.digest):
                await self._copy.copy(blob)
                self.report.blobs += 1
                self.report.bytes += blob.size
            for repository in await self._source.run(self._repositories, blob.digest):
                if await self._target.read(self._target.linked, repository, blob.digest) is None:
                    await self._target.link(repository, blob.digest)

    def _copy_records(self) -> None:
        for found in self._missing():
            self._target.records.transaction(partial(_add, found), shared=True)
            self.report.records += len(found)

    def _missing(self) -> Iterator[list[tuple[str, bytes]]]:
        """The manifests, then the tags, that are not in the target."""
        for kind in (MANIFEST, REFERRER, TAG):
            known = self._target.records
            each = ((key, value) for key, value in self._source.records.scan(kind.prefix()))
            yield from batches(record for record in each if _is_news(known.get(record[0]), *record))


def _is_news(known: bytes | None, key: str, value: bytes) -> bool:
    if known is None or not key.startswith(TAG.prefix()):
        return known is None
    ours, theirs = Pointer.parse(value), Pointer.parse(known)
    return ours is not None and (theirs is None or ours.validated_at > theirs.validated_at)


def _add(found: list[tuple[str, bytes]], batch: Batch) -> None:
    for key, value in found:
        if _is_news(batch.get(key), key, value):
            batch.put(key, value)
