"""A bucket that is an extension of the kind `storage`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterator
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from proxy.extensions.extension import Extension, ExtensionFailed
from proxy.extensions.protocols import OfferedObject
from storage.bucket.objects import UPLOADS, Bucket, BucketHealth, ObjectUnknown, Opened, check_size
from storage.concurrency import uninterrupted
from storage.oci import Digest

_NOTHING = type(None)
SLOWEST = 1 << 20  # bytes a second: how long an object may take to be put


class ExtensionBucket(Bucket):
    """The objects that an extension keeps, with `prefix` before their keys.  It gives clients no URLs.

    A failure of the extension is one of the bucket.
    """

    def __init__(self, extension: Extension, prefix: str, health: BucketHealth) -> None:
        super().__init__(None, f"extension://{extension.name}", health)
        self._extension = extension
        self._prefix = f"{prefix}/" if prefix else ""
        self._turns = asyncio.Semaphore(UPLOADS)

    async def put(self, key: str, source: Path, size: int, digest: Digest | None = None) -> None:
        check_size(source, size)
        given = self._prefix + key, source, size
        async with self._turns:
            work = self._extension.call("put", *given, gives=_NOTHING, more=size / SLOWEST)
            await uninterrupted(self._asked(work))

    async def get(self, key: str, start: int = 0, stop: int | None = None, action: str = "get") -> Opened:
        given = self._prefix + key, start, stop
        found = await self._asked(self._extension.call("get", *given, gives=(OfferedObject, _NOTHING)))
        if found is None:
            raise ObjectUnknown(f"{self.name} has no {key}")
        return Opened(found.size, lambda least: self._following(found.chunks), 0.0)

    async def _following(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The chunks.  Raises ExtensionFailed."""
        try:
            while True:
                found = await self._extension.attend(lambda: _next(chunks), (bytes, _NOTHING))
                if found is None:
                    return
                yield found
        finally:
            if (close := getattr(chunks, "aclose", None)) is not None:
                self._extension.release(close)

    async def size(self, key: str) -> int | None:
        work = self._extension.call("size", self._prefix + key, gives=(int, _NOTHING))
        found: int | None = await self._asked(work)
        return found

    async def locate(self, key: str, size: int) -> str | None:
        return None

    def chunks(self, key: str) -> Iterator[bytes]:
        found = self._asked_blocking("get", self._prefix + key, 0, None, gives=(OfferedObject, _NOTHING))
        if found is None:
            raise ObjectUnknown(f"{self.name} has no {key}")
        while True:
            try:
                chunk = self._extension.call_blocking(lambda: _next(found.chunks), (bytes, _NOTHING))
            except ExtensionFailed as error:
                raise self.health.failed(error) from None
            if chunk is None:
                return
            yield chunk

    def create(self, key: str, content: bytes) -> None:
        with NamedTemporaryFile() as file:  # the last one of two that do so at the same time counts
            file.write(content)
            file.flush()
            self._asked_blocking("put", self._prefix + key, Path(file.name), len(content), gives=_NOTHING)

    def delete(self, key: str) -> None:
        self._asked_blocking("delete", self._prefix + key, gives=_NOTHING)

    def probe(self) -> None:
        self._asked_blocking("size", f"{self._prefix}probe", gives=(int, _NOTHING))

    async def _asked(self, work: Awaitable[Any]) -> Any:
        """Report what comes of a call.  Raises Unavailable."""
        try:
            found = await work
        except ExtensionFailed as error:
            raise self.health.failed(error) from None
        self.health.worked()
        return found

    def _asked_blocking(self, method: str, *arguments: Any, gives: Any) -> Any:
        try:
            found = self._extension.call_blocking(self._extension.bound(method, *arguments), gives)
        except ExtensionFailed as error:
            raise self.health.failed(error) from None
        self.health.worked()
        return found


async def _next(chunks: AsyncIterator[bytes]) -> bytes | None:
    """The next chunk; None at the end."""
    return await anext(chunks, None)
