"""Moving what a configuration stores between the disk and the engines that servers share."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import AsyncExitStack, closing
from itertools import islice
from operator import attrgetter
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeAlias, cast

from proxy.config.quantities import format_size
from proxy.config.schema import Config
from proxy.namespaces.access_records import access_records_on_disk
from proxy.namespaces.engines import shared_caches
from proxy.namespaces.private import DATABASE, engine, is_shared
from proxy.transfer.results import MovedPart
from storage.concurrency import run_in_thread
from storage.content import BlobContent
from storage.disk.blobs import BlobFiles
from storage.disk.health import DiskHealth
from storage.disk.locks import ProcessLock
from storage.disk.records import SQLiteRecords
from storage.disk.troubles import Troubles
from storage.keys import API_KEY, KEY_USED, PIN, SIGNING, RecordKind
from storage.migration.cache_copy import CacheCopy
from storage.migration.move import EngineMove, MoveReport, NotMovable
from storage.oci import Digest
from storage.records import Records
from storage.store import Store
from storage.writers import FILES, KEY, LEFT, Writers

__all__ = ["EngineMoves", "Job", "NotMovable", "moved_part"]

if TYPE_CHECKING:  # one machine needs no client of object storage
    from storage.bucket.blobs import BucketBlobs

PINS, ACCESS = (PIN,), (SIGNING, API_KEY, KEY_USED)  # records of a server, not of a registry

Job: TypeAlias = EngineMove | CacheCopy

REGISTRY, CACHES = "private registry", "caches"
PROBE = 16 << 20  # bytes, by which it is found out how long the rest takes


def moved_part(name: str, report: MoveReport) -> MovedPart:
    return MovedPart(
        name=name, blobs=report.blobs, bytes=report.bytes, records=report.records, paused=report.paused
    )


def _prefixes(kinds: Iterable[RecordKind]) -> list[str]:
    return [each.prefix() for each in kinds]


def _add(kinds: Iterable[RecordKind], source: Records, target: Records) -> None:
    """Copy the records of these kinds that are not in the target."""
    for prefix in _prefixes(kinds):
        for key, value in source.scan(prefix):
            if target.get(key) is None:
                target.put(key, value)


def _replace(kinds: Iterable[RecordKind], source: Records, target: Records) -> None:
    """Have the target have the same: what was revoked must not come back."""
    for prefix in _prefixes(kinds):
        found = dict(source.scan(prefix))
        for key in [each for each in target.keys(prefix) if each not in found]:
            target.delete(key)
        for key, value in found.items():
            target.put(key, value)


class EngineMoves:
    """What is to be moved to `shared` engines, or else to the disk.  One process enters the context at once.

    Methods raise RegistryError, StartError and NotMovable.
    """

    def __init__(self, config: Config, shared: bool) -> None:
        self._config = config
        self._shared = shared
        self._stack = AsyncExitStack()
        self._cache: Store | None = None
        self._private: Records | None = None  # of the private registry, in a database
        self._common: Records | None = None  # of the caches of several servers

    async def __aenter__(self) -> EngineMoves:
        if not self._config.disk.path.is_dir():
            raise NotMovable(f"{self._config.disk.path} does not exist: run it on the machine of the server")
        lock = ProcessLock(self._config.disk.path / "move.lock")
        self._stack.callback(lock.close)
        if not lock.take(fcntl.LOCK_EX):
            await self._stack.aclose()
            raise NotMovable("another entrepot migrate is running on this directory")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def jobs(self, caches: bool) -> Iterator[tuple[str, Job | None]]:
        """What is to be done, each with its name; None for what is where it is to be."""
        config = self._config
        if config.shared.records is None and config.shared.bucket is None:
            raise NotMovable("`shared` of the configuration names neither a bucket nor records")
        self._cache = self._opened_cache()
        if caches and config.shared.caches is not None:
            common, _ = shared_caches(config, self._cache, time.time, Troubles())
            self._stack.push_async_callback(common.close)
            self._common = common.records
            yield CACHES, CacheCopy(self._cache, common) if self._shared else CacheCopy(common, self._cache)
        if config.hosted():
            yield REGISTRY, self._registry()

    def _opened_cache(self) -> Store:
        root = self._config.disk.path / "cache"
        disk = DiskHealth(root, time.time, Troubles())
        store = Store(BlobFiles(root, time.time, disk), SQLiteRecords(root / "records", time.time, disk))
        self._stack.push_async_callback(store.close)
        return store

    def _registry(self) -> EngineMove | None:
        config = self._config
        there = is_shared(config)
        disk = engine(config, shared=False)
        self._stack.callback(disk.records.close)
        if there == self._shared and Writers.of(disk.records) is None:
            return None
        if not there:
            self._forget_database()
        shared = engine(config, shared=True)
        self._stack.callback(shared.records.close)
        if shared.records.remote:
            self._private = shared.records
        else:  # one database, opened once
            shared = shared._replace(records=disk.records)
        if shared.kind == disk.kind:
            shared = shared._replace(content=disk.content)
        return EngineMove(disk, shared) if self._shared else EngineMove(shared, disk)

    async def settle(self) -> None:
        """What follows when all is moved."""
        await run_in_thread(self._settle)

    def _settle(self) -> None:
        remote = self._private or self._common
        if remote is not None:
            assert self._cache is not None
            with closing(access_records_on_disk(self._config)) as access:
                if not self._shared:
                    _add(PINS, remote, self._cache.records)
                    _replace(ACCESS, remote, access)
                    access.put(KEY, Writers(FILES).encode())
                else:
                    # Nobody makes a key there that would be lost.  What caches have in common counts already.
                    if self._private is not None:
                        access.transaction(lambda batch: batch.put(KEY, Writers(LEFT).encode()))
                    _add(PINS, self._cache.records, remote)
                    used = self._common is not None and any(map(self._common.first, _prefixes(ACCESS)))
                    if self._private is not None:
                        _replace(ACCESS, self._common if used and self._common else access, self._private)
                    elif not used:
                        _add(ACCESS, access, remote)
        if not self._shared:
            self._forget_database()

    def _forget_database(self) -> None:
        """A server that uses a database has written which; another one must not find that."""
        (self._config.disk.path / "private" / DATABASE).unlink(missing_ok=True)

    # How much, and how long

    async def check_room(self, job: Job) -> None:
        """Raises NotMovable if the disk has no room for what is to come."""
        if self._shared:
            return
        needed, room = (await job.survey()).whole_bytes, job.target.room()
        if isinstance(job, CacheCopy) and self._config.disk.cache_limit is not None:
            room = min(room, self._config.disk.cache_limit)
        room = max(0, room)  # less than nothing of a disk that is full
        if needed > room:
            less = ", or leave the caches out (--no-caches)" if isinstance(job, CacheCopy) else ""
            raise NotMovable(
                f"{format_size(needed)} are to be copied, and the disk has room for {format_size(room)}: make"
                f" room{less}"
            )

    async def expected(self, name: str, job: Job) -> MovedPart:
        """What the job would do."""
        found = await job.survey()
        seconds = None
        if found.whole_bytes:
            speed = await (
                self._upload_speed(job.target) if self._shared else self._download_speed(job.source)
            )
            seconds = None if speed is None else found.whole_bytes / speed
        return MovedPart(
            name=name,
            blobs=found.whole,
            bytes=found.whole_bytes,
            records=found.records,
            expected=seconds,
        )

    async def _upload_speed(self, target: BlobContent) -> float:
        """Bytes per second into the bucket, by an object that is deleted again."""
        bucket, key = cast("BucketBlobs", target).bucket, f"probe-{os.urandom(8).hex()}"
        with tempfile.TemporaryFile(dir=target.root) as file:
            file.write(content := os.urandom(PROBE))
            file.flush()
            digest, begun = Digest.of(content), time.monotonic()
            await bucket.put(key, Path(f"/proc/self/fd/{file.fileno()}"), PROBE, digest)
            seconds = time.monotonic() - begun
        await run_in_thread(bucket.delete, key)
        return PROBE / seconds

    async def _download_speed(self, source: BlobContent) -> float | None:
        """Bytes per second out of the bucket, by a blob that is there."""

        for portion in await run_in_thread(lambda: list(islice(source.portions(), 1))):
            begun, read = time.monotonic(), 0
            blob = source.open(max(portion, key=attrgetter("size")).digest)
            async for chunk in blob.chunks(0, PROBE):
                read += len(chunk)
            return read / (time.monotonic() - begun)
        return None
