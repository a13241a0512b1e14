"""One blob from one registry to another; and how long to go on trying what fails."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from storage.errors import DigestInvalid, TooManyRequests, Unavailable
from storage.oci import Descriptor, Digest, Span
from storage.registry import Registry, Upload

T = TypeVar("T")

TRIES = 4  # in a row that come to nothing
FIRST = 1.0  # seconds before the second, doubling
WAITS = 20  # for a registry that limits our requests
LONGEST = 600.0  # seconds that it is waited for at a time
GRACE = 10.0  # seconds for a destination to forget an upload


class ProgressListener(Protocol):
    """Who is told what goes on."""

    def moved(self, digest: Digest, done: int, whole: int) -> None:
        """So many bytes of a blob were transferred."""

    def ended(self, digest: Digest) -> None:
        """Its transfer, one way or the other."""

    def note(self, text: str) -> None:
        """For people."""


class RetryPolicy:
    """How often, and after how long, is tried again what may succeed then: what is Unavailable."""

    def __init__(
        self, listener: ProgressListener, pause: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self._listener = listener
        self._pause = pause

    async def persist(
        self, attempt: Callable[[], Awaitable[T]], progress: Callable[[], int] = lambda: 0
    ) -> T:
        """What it returns; after `progress` the count of tries begins anew.  Raises what the last one did."""
        failures = waits = reached = 0
        while True:
            try:
                return await attempt()
            except Unavailable as error:
                limited = isinstance(error, TooManyRequests)
                if progress() > reached:
                    failures, reached = 0, progress()
                failures, waits = failures + (not limited), waits + limited
                if failures >= TRIES or waits >= WAITS:
                    raise
                seconds = min(LONGEST, error.retry_after or FIRST * 2 ** max(0, failures - 1))
                if limited:
                    self._listener.note(f"{error}: waiting for {seconds:.0f} s")
            await self._pause(seconds)


class BlobCopy:
    """Streams it: of the blob no more is held than a few chunks."""

    def __init__(
        self, source: Registry, repository: str, destination: Registry, target: str, blob: Descriptor
    ) -> None:
        self._source, self._repository = source, repository
        self._destination, self._target = destination, target
        self._blob = blob
        self._upload: Upload | None = None
        self._hash = hashlib.new(blob.digest.algorithm)
        self._reached = 0

    async def run(self, listener: ProgressListener, retries: RetryPolicy) -> int:
        """How many bytes it has.  Raises DigestInvalid where the source's is another one."""
        try:
            return await retries.persist(lambda: self._attempt(listener), lambda: self._reached)
        finally:
            await self._give_up()
            listener.ended(self._blob.digest)

    async def _attempt(self, listener: ProgressListener) -> int:
        """Go on, or begin anew where the destination has failed; what the source fails with costs nothing."""
        digest = self._blob.digest
        if self._upload is None:
            self._hash = hashlib.new(digest.algorithm)
            self._upload = await self._destination.start_upload(
                self._target, self._blob.size, digest.algorithm
            )
        upload = self._upload
        if upload.offset < self._blob.size or upload.offset == 0:
            await self._stream(upload, listener)
        if (found := f"{digest.algorithm}:{self._hash.hexdigest()}") != digest:
            raise DigestInvalid(f"the source sends for {digest} what is {found}")
        try:
            await upload.commit(digest)
        except BaseException:
            await self._give_up()
            raise
        self._upload = None
        return upload.offset

    async def _stream(self, upload: Upload, listener: ProgressListener) -> None:
        digest, start = self._blob.digest, upload.offset
        span = Span(start) if start else None
        blob = await self._source.get_blob(self._repository, digest, span)
        try:
            async for chunk in blob.chunks(start):
                try:
                    await upload.write(chunk)
                except BaseException:
                    await self._give_up()
                    raise
                self._hash.update(chunk)
                self._reached = max(self._reached, upload.offset)
                listener.moved(digest, upload.offset, self._blob.size)
        finally:
            await blob.close()

    async def _give_up(self) -> None:
        upload, self._upload = self._upload, None
        if upload is None:
            return
        # A task of its own: who is cancelled while he gives up would leave the bytes to the destination.
        giving_up = asyncio.create_task(upload.cancel())
        try:
            await asyncio.wait({giving_up}, timeout=GRACE)
        except asyncio.CancelledError:
            await asyncio.wait({giving_up}, timeout=GRACE)
            raise
        finally:
            giving_up.cancel()
            await asyncio.gather(giving_up, return_exceptions=True)
