"""Readers of what an origin sends: of a blob that grows in the store, or of one that passes it by."""

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
from storage.oci import Descriptor, Span
from storage.registry import Blob, Registry


class Hash(Protocol):
    @property
    def name(self) -> str: ...
    def update(self, data: bytes, /) -> None: ...
    def hexdigest(self) -> str: ...


@dataclass(frozen=True, slots=True)
class BlobSource:
    """Where a blob comes from, and the repository of the store that may show it then.

    `unknown` is told when the origin has no such blob, before anybody could ask it again.
    """

    namespace: str
    origin: Registry
    name: str  # the origin's name of the repository
    unknown: Callable[[BlobUnknown], None] = lambda error: None

    @property
    def repository(self) -> str:
        return f"{self.namespace}/{self.name}"


class Counts(Protocol):
    followers: int


class FollowedBlob(Blob):
    """A reader of a growing blob, who asks the origin for the rest should our disk fail.

    It is one of `followed.followers` until it is closed.
    """

    def __init__(self, blob: FileBlob, source: BlobSource, metrics: Metrics, followed: Counts) -> None:
        self.descriptor = blob.descriptor
        self._blob = blob
        self._source = source
        self._followers = metrics.followers
        self._followers.inc()
        self._followed = followed
        followed.followers += 1

    def fileno(self) -> int:
        return self._blob.fileno()

    async def readable(self, offset: int) -> int:
        return await self._blob.readable(offset)

    async def chunks(self, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        position = start
        digest = self.descriptor.digest
        held: Hash | None = None
        if self.fileno() >= 0:
            try:
                async for chunk in self._blob.chunks(start, stop):
                    position += len(chunk)
                    yield chunk
                return
            except StorageFailed:
                held = await asyncio.to_thread(self._hash, digest.algorithm, position)
            # The room that its file takes is wanted now, not when the slowest client has all of it.
            await self._blob.close()
        elif start == 0:
            held = hashlib.new(digest.algorithm)
        span = Span(position, stop) if position or stop else None
        blob = await self._source.origin.get_blob(self._source.name, digest, span)
        try:
            content = blob.chunks(position, stop)
            if held is not None:
                content = verified(content, self.descriptor, held, position)
            async for chunk in content:
                yield chunk
        finally:
            await blob.close()

    def _hash(self, algorithm: str, stop: int) -> Hash:
        """Raises StorageFailed where what the client has cannot be read again: then none can vouch for it."""
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
    """The origin's blob, past a store that cannot take it."""

    def __init__(self, blob: Blob, source: BlobSource) -> None:
        self.descriptor = blob.descriptor
        self._blob: Blob | None = blob
        self._source = source

    async def chunks(self, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        digest = self.descriptor.digest
        blob, self._blob = self._blob, None
        if blob is None:  # a transfer can be read once, and of several ranges this is a later one
            blob = await self._source.origin.get_blob(self._source.name, digest, Span(start, stop))
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
    chunks: AsyncIterator[bytes], descriptor: Descriptor, held: Hash, position: int
) -> AsyncIterator[bytes]:
    """The chunks, which go on at `position` after what `held` has hashed.

    If they reach the blob's end, their last byte is withheld until the digest is right; else
    DigestInvalid is raised.
    """
    last = b""
    async for chunk in chunks:
        held.update(chunk)
        position += len(chunk)
        yield last + chunk[:-1]
        last = chunk[-1:]
    found = f"{held.name}:{held.hexdigest()}"
    if descriptor.size in (-1, position) and found != descriptor.digest:
        raise DigestInvalid(f"content is {found}, not {descriptor.digest}")
    yield last
