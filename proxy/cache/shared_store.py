"""The store that the caches of several servers share: its records in a database, its blobs in a bucket."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from storage.concurrency import run_in_thread
from storage.content import BlobContent
from storage.errors import BlobUnknown, StorageFailed, Unavailable
from storage.oci import Digest
from storage.patient import PatientStore
from storage.records import Records

T = TypeVar("T")

PATIENCE = 3.0  # seconds for the first bytes of an object
REST = 5.0  # seconds for which a bucket that has failed is not asked


class BucketRest:
    """Whether a bucket rests after a failure.  `ticks` are seconds of a clock that nobody sets."""

    def __init__(self, ticks: Callable[[], float]) -> None:
        self._ticks = ticks
        self._until = -float("inf")

    def __bool__(self) -> bool:
        return self._ticks() < self._until

    def begin(self) -> None:
        self._until = self._ticks() + REST


class SharedStore(PatientStore):
    """A store that a cache can do without: its origin has the same content.

    So nobody waits long for its records: what needs them raises StorageUnavailable.
    """

    def __init__(self, files: BlobContent, records: Records, clock: Callable[[], float] = time.time) -> None:
        super().__init__(files, records, clock)
        self._distrusted: dict[Digest, asyncio.Task[None]] = {}

    async def run(self, work: Callable[..., T], *arguments: object) -> T:
        return await self.ask(work, *arguments)

    def distrust(self, digest: Digest) -> None:
        """What came of a blob was wrong: verify its object, which is removed if it is damaged."""
        if digest not in self._distrusted:
            task = asyncio.get_running_loop().create_task(self._verify(digest))
            self._distrusted[digest] = task
            task.add_done_callback(lambda _: self._distrusted.pop(digest))

    async def _verify(self, digest: Digest) -> None:
        with suppress(BlobUnknown, StorageFailed, Unavailable):
            await run_in_thread(self.files.verify, digest)

    def distrusts(self, digest: Digest) -> bool:
        """Whether the object of a blob is being verified, and not to be read."""
        return digest in self._distrusted

    async def settled(self, digest: Digest) -> None:
        """Wait until the object of a blob is trusted, or removed."""
        if (task := self._distrusted.get(digest)) is not None:
            await asyncio.wait([task])

    async def close(self) -> None:
        await asyncio.gather(*self._distrusted.values(), return_exceptions=True)
        await super().close()
