"""Fills: at most one transfer per digest, however many clients ask, and following it while it grows.

There is no privileged leader.  A fill is a task of its own that pushes the origin's bytes into the
store; every client, the first included, follows the growing file.  One that goes away hurts nobody and
wastes nothing.  Fills are shared by all caches over one store, whichever origin the bytes come from.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from proxy.flights import Flights
from proxy.telemetry import Metrics, current
from storage.errors import (
    BlobUnknown,
    DigestInvalid,
    OriginFailed,
    RegistryError,
    StorageFailed,
    Unavailable,
)
from storage.files import CHUNK, FileBlob, FileUpload
from storage.oci import Descriptor, Digest, Span
from storage.registry import Blob, Registry
from storage.store import Store

log = structlog.get_logger()

RETRIES = 4  # in a row without a byte between them
BACKOFF = 0.2  # seconds before the second one in a row, doubling; after progress there is no wait
FAR_AHEAD = 16 << 20  # bytes; a reader so far before the frontier asks the origin itself


class Hash(Protocol):
    @property
    def name(self) -> str: ...
    def update(self, data: bytes, /) -> None: ...
    def hexdigest(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Source:
    """Where a blob comes from, and the repository of the store that may show it then."""

    namespace: str
    origin: Registry
    name: str  # the origin's name of the repository

    @property
    def repository(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(slots=True)
class Fill:
    """`started` yields None if there was nothing to transfer: the store has the blob."""

    digest: Digest
    started: asyncio.Future[tuple[FileUpload, Descriptor] | None]
    repositories: set[str] = field(default_factory=set)
    task: asyncio.Task[None] | None = None
    received: bool = False  # nothing more is wanted of the origin


class Fills:
    def __init__(self, store: Store, metrics: Metrics, backoff: float = BACKOFF) -> None:
        self._store = store
        self._metrics = metrics
        self._backoff = backoff
        self._fills: dict[Digest, Fill] = {}
        self._permissions = Flights()

    async def join(self, source: Source, digest: Digest, span: Span | None = None) -> Blob:
        """The blob while it comes in; `span` as in Registry.get_blob.

        Raises what the origin answers if it does not serve it, StorageFailed if it cannot be stored.
        """
        fill = self._fills.get(digest)
        if fill is None:
            fill = self._start(source, digest)
        elif source.repository not in fill.repositories:
            await self._permit(fill, source)
        # shield: a client that goes away must not cancel what others wait for.
        started = await asyncio.shield(fill.started)
        if started is None:
            return await self._store.get_blob(source.repository, digest)
        upload, descriptor = started
        current().came("hit" if upload.complete else "miss")
        if span is not None and span.start - upload.offset > FAR_AHEAD:
            return await source.origin.get_blob(source.name, digest, span)
        try:
            blob = upload.follow(descriptor)
        except BlobUnknown:  # it has just ended
            return await self._store.get_blob(source.repository, digest)
        if descriptor.size == 0:
            # There is no last byte to withhold: withhold all.
            try:
                await blob.readable(0)
            except BaseException:
                await blob.close()
                raise
        return Followed(blob, source, self._metrics)

    def descriptor(self, repository: str, digest: Digest) -> Descriptor | None:
        """What is known of a blob that `repository` is getting just now."""
        fill = self._fills.get(digest)
        if fill is None or repository not in fill.repositories:
            return None
        if not fill.started.done() or fill.started.exception() is not None:
            return None
        started = fill.started.result()
        return started[1] if started else None

    def _start(self, source: Source, digest: Digest) -> Fill:
        fill = Fill(digest, asyncio.get_running_loop().create_future(), {source.repository})
        self._fills[digest] = fill
        fill.task = asyncio.create_task(self._run(fill, source))
        return fill

    async def _permit(self, fill: Fill, source: Source) -> None:
        # Another repository's transfer brings the bytes; whether this one may show them its origin says.
        key = (source.repository, fill.digest)
        await self._permissions.join(key, lambda: source.origin.resolve_blob(source.name, fill.digest))
        fill.repositories.add(source.repository)
        if self._fills.get(fill.digest) is not fill and self._store.holds(fill.digest):
            await self._store.link(source.repository, fill.digest)  # it ended while we asked

    async def _run(self, fill: Fill, source: Source) -> None:
        begun = time.monotonic()
        self._metrics.filling.inc()
        result, size = "failed", 0
        upload: FileUpload | None = None
        try:
            if self._store.holds(fill.digest):
                # HEAD is the permission; the bytes came for another repository.
                await source.origin.resolve_blob(source.name, fill.digest)
            else:
                upload = await self._store.resume_fill(fill.digest)
                await self._transfer(fill, source, upload)
                fill.received = True
                size = (await upload.commit(fill.digest)).size
            for repository in list(fill.repositories):
                await self._store.link(repository, fill.digest)
            result = "committed" if upload else "linked"
            if not fill.started.done():
                fill.started.set_result(None)
            log.info(
                f"fill.{result}",
                namespace=source.namespace,
                repository=source.repository,
                digest=fill.digest,
                bytes=size,
                seconds=round(time.monotonic() - begun, 3),
            )
        except (Exception, asyncio.CancelledError) as error:
            await self._fail(fill, source, upload, error)
            if isinstance(error, asyncio.CancelledError):
                raise
        finally:
            del self._fills[fill.digest]
            self._metrics.filling.dec()
            self._metrics.fills.labels(source.namespace, result).inc()

    async def _transfer(self, fill: Fill, source: Source, upload: FileUpload) -> None:
        if upload.offset and upload.matches(fill.digest):
            # A former fill had all of it and was killed before it could say so.
            await source.origin.resolve_blob(source.name, fill.digest)
            return
        failures = 0
        while True:
            before = upload.offset
            try:
                await self._receive(fill, source, upload)
                return
            except Unavailable as error:
                failures = 0 if upload.offset > before else failures + 1
                if not fill.started.done() or failures > RETRIES:
                    raise
                log.warning(
                    "fill.interrupted",
                    namespace=source.namespace,
                    repository=source.repository,
                    digest=fill.digest,
                    offset=upload.offset,
                    error=str(error),
                )
            if failures:
                await asyncio.sleep(self._backoff * 2 ** (failures - 1))

    async def _receive(self, fill: Fill, source: Source, upload: FileUpload) -> None:
        span = Span(upload.offset) if upload.offset else None
        blob = await source.origin.get_blob(source.name, fill.digest, span)
        try:
            if not fill.started.done():
                fill.started.set_result((upload, blob.descriptor))
            size = blob.descriptor.size
            async for chunk in blob.chunks(upload.offset):
                if 0 <= size < upload.offset + len(chunk):
                    raise OriginFailed(f"{source.namespace} sent more than the {size} bytes it announced")
                await upload.write(chunk)
                self._metrics.received.labels(source.namespace).inc(len(chunk))
            if upload.offset < size:
                raise OriginFailed(f"{source.namespace} ended at byte {upload.offset} of {size}")
        finally:
            await blob.close()

    async def _fail(
        self, fill: Fill, source: Source, upload: FileUpload | None, error: BaseException
    ) -> None:
        if upload is not None:
            # On a full disk the bytes are in the way; else the next fill goes on from them.
            if isinstance(error, StorageFailed):
                await upload.cancel(error)
            else:
                await upload.suspend(error)
        if not fill.started.done():
            fill.started.set_exception(
                error if isinstance(error, Exception) else BlobUnknown("shutting down")
            )
            fill.started.exception()  # seen, even if every client has left
            if not isinstance(error, StorageFailed) and isinstance(error, RegistryError):
                return  # each client is answered with it; nothing was begun
        log.error(
            "fill.failed",
            namespace=source.namespace,
            repository=source.repository,
            digest=fill.digest,
            error=str(error) or type(error).__name__,
        )

    async def close(self) -> None:
        """Stop all fills; what they have stays where the next one finds it."""
        tasks = []
        for fill in self._fills.values():
            if fill.task is not None:
                tasks.append(fill.task)
                if not fill.received:  # else it is done in a moment, and need not be asked for again
                    fill.task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._permissions.close()


class Followed(Blob):
    """A reader of a growing blob, who asks the origin for the rest should our disk fail."""

    def __init__(self, blob: FileBlob, source: Source, metrics: Metrics) -> None:
        self.descriptor = blob.descriptor
        self._blob = blob
        self._source = source
        self._followers = metrics.followers
        self._followers.inc()

    def fileno(self) -> int:
        return self._blob.fileno()

    async def readable(self, offset: int) -> int:
        return await self._blob.readable(offset)

    async def chunks(self, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        position = start
        try:
            async for chunk in self._blob.chunks(start, stop):
                position += len(chunk)
                yield chunk
            return
        except StorageFailed:
            digest = self.descriptor.digest
        held = await asyncio.to_thread(self._hash, digest.algorithm, position)
        span = Span(position, stop) if position or stop else None
        blob = await self._source.origin.get_blob(self._source.name, digest, span)
        try:
            async for chunk in verified(blob.chunks(position, stop), self.descriptor, held, position):
                yield chunk
        finally:
            await blob.close()

    def _hash(self, algorithm: str, stop: int) -> Hash:
        found, position = hashlib.new(algorithm), 0
        while position < stop and (chunk := os.pread(self.fileno(), min(CHUNK, stop - position), position)):
            found.update(chunk)
            position += len(chunk)
        return found

    async def close(self) -> None:
        self._followers.dec()
        await self._blob.close()


class Uncached(Blob):
    """The origin's blob, past a store that cannot take it."""

    def __init__(self, blob: Blob) -> None:
        self.descriptor = blob.descriptor
        self._blob = blob

    async def chunks(self, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        content = self._blob.chunks(start, stop)
        if start == 0:
            content = verified(content, self.descriptor, hashlib.new(self.descriptor.digest.algorithm), 0)
        async for chunk in content:
            yield chunk

    async def close(self) -> None:
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
