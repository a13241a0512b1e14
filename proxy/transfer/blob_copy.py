"""The copy of one blob between registries, and how failures are retried."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from storage.errors import DigestInvalid, TooManyRequests, Unavailable
from storage.oci import Descriptor, Digest, Span
from storage.registry import Registry, Upload

T = TypeVar("T")

TRIES = 4  # attempts in a row without progress
FIRST = 1.0  # seconds before the second attempt, doubling
WAITS = 20  # waits for a registry that limits our requests
LONGEST = 600.0  # seconds of one wait
GRACE = 10.0  # seconds for the cancellation of an upload


class ProgressListener(Protocol):
    """Receives the progress of copies."""

    def moved(self, digest: Digest, done: int, whole: int) -> None:
        """`done` of `whole` bytes of a blob have been transferred."""

    def ended(self, digest: Digest) -> None:
        """The transfer of a blob has ended, successfully or not."""

    def note(self, text: str) -> None:
        """A message for people."""


class RetryPolicy:
    """Repeats what fails with Unavailable, with growing pauses."""

    def __init__(
        self, listener: ProgressListener, pause: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self._listener = listener
        self._pause = pause

    async def persist(
        self, attempt: Callable[[], Awaitable[T]], progress: Callable[[], int] = lambda: 0
    ) -> T:
        """The result of an attempt.  The count of failures restarts when `progress` has grown.

        Raises the error of the last attempt.
        """
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
    """Streams one blob from a source to a destination, with a few chunks in memory."""

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
        """Copy the blob, and return its size.  Raises DigestInvalid if the source sends other content."""
        try:
            return await retries.persist(lambda: self._attempt(listener), lambda: self._reached)
        finally:
            await self._cancel_upload()
            listener.ended(self._blob.digest)

    async def _attempt(self, listener: ProgressListener) -> int:
        """Continue after a failure of the source, or start again after one of the destination."""
        digest = self._blob.digest
        if self._upload is None:
            self._hash = hashlib.new(digest.algorithm)
            self._upload = await self._destination.start_upload(
                self._target, self._blob.size, digest.algorithm
            )
        upload = self._upload
        if upload.offset < self._blob.size or upload.offset == 0:
            await self._stream(upload, listener)
        if (found := Digest.of_hash(self._hash)) != digest:
            raise DigestInvalid(f"the source sends content with digest {found} for {digest}")
        try:
            await upload.commit(digest)
        except BaseException:
            await self._cancel_upload()
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
                    await self._cancel_upload()
                    raise
                self._hash.update(chunk)
                self._reached = max(self._reached, upload.offset)
                listener.moved(digest, upload.offset, self._blob.size)
        finally:
            await blob.close()

    async def _cancel_upload(self) -> None:
        upload, self._upload = self._upload, None
        if upload is None:
            return
        # In a task of its own: a second cancellation must not leave the upload at the destination.
        cancelling = asyncio.create_task(upload.cancel())
        try:
            await asyncio.wait({cancelling}, timeout=GRACE)
        except asyncio.CancelledError:
            await asyncio.wait({cancelling}, timeout=GRACE)
            raise
        finally:
            cancelling.cancel()
            await asyncio.gather(cancelling, return_exceptions=True)
