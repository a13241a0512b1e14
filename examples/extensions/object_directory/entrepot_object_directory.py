"""Object storage: files in a directory that several servers share, such as a network file system.

Slow calls run in other threads, so that a large object holds up no other.
"""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from proxy.extensions.protocols import ObjectStorage, OfferedObject

CHUNK = 1 << 20


@dataclass
class DirectorySettings:
    """The directory of the objects, which must be there: an empty mount point would hide them."""

    directory: Path


class ObjectDirectory(ObjectStorage):
    protocol = 1
    Settings = DirectorySettings

    def __init__(self, settings: DirectorySettings) -> None:
        if not settings.directory.is_dir():
            raise ValueError(f"directory: {settings.directory} is not a directory")
        self._root = settings.directory

    async def put(self, key: str, source: Path, size: int) -> None:
        await asyncio.to_thread(self._put, self._root / key, source)

    def _put(self, target: Path, source: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        with source.open("rb") as reading, partial.open("wb") as writing:
            shutil.copyfileobj(reading, writing, CHUNK)
            writing.flush()
            os.fsync(writing.fileno())
        partial.rename(target)
        directory = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # else the name may be lost, and not the content
        finally:
            os.close(directory)

    async def get(self, key: str, start: int, stop: int | None) -> OfferedObject | None:
        size = await self.size(key)
        if size is None:
            return None
        return OfferedObject(size, self._read(self._root / key, start, size if stop is None else stop))

    async def _read(self, file: Path, start: int, stop: int) -> AsyncIterator[bytes]:
        with await asyncio.to_thread(file.open, "rb") as opened:
            opened.seek(start)
            while chunk := await asyncio.to_thread(opened.read, min(CHUNK, stop - start)):
                start += len(chunk)
                yield chunk

    async def size(self, key: str) -> int | None:
        try:
            return (await asyncio.to_thread((self._root / key).stat)).st_size
        except FileNotFoundError:
            return None

    async def delete(self, key: str) -> None:
        await asyncio.to_thread((self._root / key).unlink, missing_ok=True)
