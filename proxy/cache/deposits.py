"""Deposits: blobs that a server has fetched into its own cache, handed over to the store that servers share.

A blob is handed over once it is verified and stored here, by a task that no client waits for.  That it is
still to be is recorded before any repository shows it, so that a server which is killed goes on after its
next start.  A failure is tried again, for as long as the blob is here, and at once when another one is
handed over.  One server at a time uploads a blob; the others find it there.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import structlog

from proxy.cache.shared_store import SharedStore
from storage.bucket.failures import BucketFailed
from storage.concurrency import run_in_thread
from storage.content import files_of
from storage.errors import BlobUnknown, DigestInvalid, StorageFailed, Unavailable
from storage.keys import COPIES, DEPOSIT, LINK
from storage.oci import Digest
from storage.store import Store

if TYPE_CHECKING:  # one machine needs no client of object storage
    from storage.bucket.blobs import BucketBlobs

log = structlog.get_logger()

FIRST, LAST = 1.0, 60.0  # seconds before an attempt is repeated, doubling
AT_ONCE = 4  # attempts


class Deposits:
    """Hands blobs of `store`, each server's own, over to `shared`, whose blobs are `objects`."""

    def __init__(self, store: Store, shared: SharedStore, objects: BucketBlobs) -> None:
        self._store = store
        self._files = files_of(store.files)
        self._shared = shared
        self._objects = objects
        self._tasks: dict[Digest, asyncio.Task[None]] = {}
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._resuming = asyncio.Lock()
        self._ill = False
        self._well = asyncio.Event()  # set when an engine that has failed works again

    async def announce(self, digest: Digest) -> None:
        """Record that the blob is to be handed over."""
        with suppress(StorageFailed):  # it is handed over now, or never: others fetch it themselves
            await self._store.run(self._store.records.put, DEPOSIT.key(digest), b"")

    def begin(self, digest: Digest) -> None:
        """Hand over a blob that is stored and linked."""
        if digest not in self._tasks:
            task = asyncio.get_running_loop().create_task(self._persist(digest))
            self._tasks[digest] = task
            task.add_done_callback(lambda _: self._tasks.pop(digest))

    async def resume(self) -> None:
        """Hand over what was announced, and is not under way here."""
        async with self._resuming:
            for key in await run_in_thread(lambda: list(self._store.records.keys(DEPOSIT.prefix()))):
                digest = Digest(DEPOSIT.parse(key)[0])
                if digest not in self._tasks:
                    with suppress(StorageFailed, Unavailable):
                        await self._deposit(digest)

    async def _persist(self, digest: Digest) -> None:
        wait = FIRST
        while True:
            try:
                async with self._turns:
                    return await self._deposit(digest)
            except (StorageFailed, Unavailable) as error:
                self._ill = self._ill or isinstance(error, StorageFailed | BucketFailed)
                if wait > FIRST:  # else another server may just be storing it
                    log.info("deposit.postponed", digest=digest, error=str(error), seconds=wait)
            with suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._well.wait()
            wait = min(2 * wait, LAST)

    async def _deposit(self, digest: Digest) -> None:
        """Raises StorageFailed, Unavailable."""
        linking = (LINK.parse(key)[0] for key in self._store.records.linking(digest))
        repositories = [each for each in linking if each != COPIES]
        linked = filter(None, (self._store.linked(each, digest) for each in repositories))
        with suppress(BlobUnknown):  # it was evicted, or is damaged: there is nothing to hand over
            blob = self._files.open(digest, next((each.size for each in linked), None))
            try:
                await self._shared.settled(digest)
                await self._objects.adopt(blob.fileno(), digest)
            except DigestInvalid:
                await run_in_thread(self._files.verify, digest)  # which removes it
                raise
            finally:
                await blob.close()
            for each in repositories:
                if not await self._is_linked(each, digest):
                    await self._shared.link(each, digest)
            log.info("deposit.done", digest=digest, bytes=blob.descriptor.size)
            self._recover()
        await self._store.run(self._store.records.delete, DEPOSIT.key(digest))

    def _recover(self) -> None:
        """Let those that wait try again at once, if they wait for an engine that has failed."""
        if self._ill:
            self._ill = False
            self._well.set()
            self._well = asyncio.Event()

    async def _is_linked(self, repository: str, digest: Digest) -> bool:
        return await self._shared.read(self._shared.linked, repository, digest) is not None

    async def ended(self) -> None:
        """Wait until nothing is under way here."""
        while self._tasks:
            await asyncio.wait(self._tasks.values())

    async def close(self) -> None:
        """Stop; what is not handed over is after the next start."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)


@asynccontextmanager
async def handed_over(digest: Digest, deposits: Deposits | None) -> AsyncIterator[None]:
    """Inside, repositories link the blob; then it is handed over, if to anybody."""
    if deposits is None:
        yield
        return
    await deposits.announce(digest)
    yield
    deposits.begin(digest)
