"""Readers of blobs that an origin sends: through the store while a fill is under way, or past the store."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol

from proxy.telemetry.metrics import Metrics
from storage.disk.uploads import CHUNK, FileBlob
from storage.errors import BlobUnknown, DigestInvalid, StorageFailed
from storage.oci import Descriptor, Digest, Hash, Span
from storage.registry import Blob, Registry

LOOK = 1.0  # seconds after which a reader that still waits says so again


@dataclass(frozen=True, slots=True)
class BlobSource:
    """The origin of a blob, and the repository of the store to which it is linked: `linked`, or its own.

    `unknown` is called when the origin has no such blob, before another request can be sent, and `wrong` when
    what it sent is another one.  `client` is a word for who asks, or empty.
    """

    namespace: str
    origin: Registry
    name: str  # of the repository, at the origin
    unknown: Callable[[BlobUnknown], None] = lambda error: None
    client: str = ""
    wrong: Callable[[], None] = lambda: None
    linked: str = ""

    @property
    def full_name(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def repository(self) -> str:
        return self.linked or self.full_name


class Followed(Protocol):
    """A transfer that counts its readers, and learns what they wait for."""

    followers: int

    def want(self, source: BlobSource, offset: int, stop: int | None) -> None:
        """A reader waits for [offset, stop); it says so now and then."""


class FollowedBlob(Blob):
    """A reader of a blob on its way from an origin, one of several.

    If the disk fails, the rest is read from the origin.  `followed.followers` counts it until it is closed.
    """

    def __init__(self, blob: FileBlob, source: BlobSource, metrics: Metrics, followed: Followed) -> None:
        self.descriptor = blob.descriptor
        self._blob = blob
        self._source = source
        self._followers = metrics.followers
        self._followers.inc()
        self._followed = followed
        followed.followers += 1

    def fileno(self) -> int:
        return self._blob.fileno()

    async def readable(self, offset: int, stop: int | None = None) -> int:
        while True:
            self._followed.want(self._source, offset, stop)
            try:
                async with asyncio.timeout(LOOK):
                    return await self._blob.readable(offset)
            except TimeoutError:
                pass

    async def _end_of_next(self, position: int, stop: int | None) -> int:
        """Wait for bytes past `position`; where to read up to, `position` at the end."""
        if position == stop:
            return position
        end = await self.readable(position, stop)
        return end if stop is None else min(end, stop)

    async def chunks(self, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        position = start
        digest = self.descriptor.digest
        hashed: Hash | None = None
        if self.fileno() >= 0:
            try:
                while (end := await self._end_of_next(position, stop)) > position:
                    async for chunk in self._blob.chunks(position, end):
                        position += len(chunk)
                        yield chunk
                return
            except StorageFailed:
                # What went before may have been sent from the file to the same client.
                if start == 0 or self._blob.has_beginning(position):
                    hashed = await asyncio.to_thread(self._hash, digest.algorithm, position)
            # The space of its file is needed now, not when the slowest client has read it.
            await self._blob.close()
        elif start == 0:
            hashed = hashlib.new(digest.algorithm)
        span = Span(position, stop) if position or stop else None
        blob = await self._source.origin.get_blob(self._source.name, digest, span)
        try:
            content = blob.chunks(position, stop)
            if hashed is not None:
                content = verified(content, self.descriptor, hashed, position)
            async for chunk in content:
                yield chunk
        finally:
            await blob.close()

    def _hash(self, algorithm: str, stop: int) -> Hash:
        """Hash again the bytes that were sent.  Raises StorageFailed if they cannot be read any more."""
        found, position = hashlib.new(algorithm), 0
        while position < stop:
            try:
                chunk = os.pread(self.fileno(), min(CHUNK, stop - position), position)
            except OSError as error:
                raise StorageFailed(f"{self.descriptor.digest}: {error.strerror or error}") from error
            if not chunk:
                raise StorageFailed(f"{self.descriptor.digest}: its file was truncated")
            found.update(chunk)
            position += len(chunk)
        return found

    async def close(self) -> None:
        self._followers.dec()
        self._followed.followers -= 1
        await self._blob.close()


class UncachedBlob(Blob):
    """A blob read from the origin without storing it; `blob` is open for `span`, None for all of it."""

    def __init__(
        self, descriptor: Descriptor, source: BlobSource, blob: Blob | None = None, span: Span | None = None
    ) -> None:
        self.descriptor = descriptor
        self._source = source
        self._blob = blob
        self._span = span or Span(0)

    async def chunks(self, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        digest = self.descriptor.digest
        blob, self._blob = self._blob, None
        last = self._span.stop
        if blob is not None and (start < self._span.start or (last and (stop is None or stop > last))):
            await blob.close()
            blob = None
        if blob is None:  # a transfer can be read once, and this may not be the first of several ranges
            span = Span(start, stop) if start or stop else None
            blob = await self._source.origin.get_blob(self._source.name, digest, span)
        try:
            content = blob.chunks(start, stop)
            if start == 0:
                content = verified(content, self.descriptor, hashlib.new(digest.algorithm), 0)
            async for chunk in content:
                yield chunk
        finally:
            await blob.close()

    async def close(self) -> None:
        if self._blob is not None:
            await self._blob.close()


async def verified(
    chunks: AsyncIterator[bytes], descriptor: Descriptor, hashed: Hash, position: int
) -> AsyncIterator[bytes]:
    """The chunks from `position` on, verified; `hashed` is the hash of the bytes before.

    If they reach the end of the blob, the last byte is withheld until the digest is verified.  Raises
    DigestInvalid if it does not match.
    """
    last = b""
    async for chunk in chunks:
        hashed.update(chunk)
        position += len(chunk)
        yield last + chunk[:-1]
        last = chunk[-1:]
    found = Digest.of_hash(hashed)
    if descriptor.size in (-1, position) and found != descriptor.digest:
        raise DigestInvalid(f"content is {found}, not {descriptor.digest}")
    yield last
