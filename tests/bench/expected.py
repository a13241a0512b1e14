"""What the random writes of writes.py need: records and a bucket that fail, and what is expected."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from obstore.store import LocalStore

from storage.bucket.objects import Bucket, healthy
from storage.disk.records import SQLiteRecords
from storage.errors import StorageUnavailable
from storage.records import Batch
from tests.conftest import Clock

GRACE = 86400.0  # seconds

Key = tuple[str, str, str]  # blob, manifest or tag; the repository; the digest or the name


class Failures:
    """Fails now and then: before something is done, or after it."""

    def __init__(self, random: Random) -> None:
        self.share, self.number = 0.0, 0
        self._random = random

    @contextmanager
    def around(self) -> Iterator[None]:
        self._fail()
        yield
        self._fail()

    def _fail(self) -> None:
        if self._random.random() < self.share:
            self.number += 1
            raise StorageUnavailable("it fails as it was told to")


class FailingRecords(SQLiteRecords):
    def __init__(self, directory: Path, clock: Clock, failures: Failures, remote: bool) -> None:
        super().__init__(directory, clock)
        self.remote = remote
        self._failures = failures

    def put(self, key: str, value: bytes) -> None:
        self.transaction(lambda batch: batch.put(key, value), shared=True)

    def delete(self, key: str) -> bool:
        return self.transaction(lambda batch: batch.delete(key), shared=True)

    def transaction(self, work: Callable[[Batch], Any], shared: bool = False) -> Any:
        with self._failures.around():
            return super().transaction(work, shared)


class FailingBucket(Bucket):
    def __init__(self, directory: Path, failures: Failures) -> None:
        store = LocalStore(directory, mkdir=True)
        super().__init__(store, "a bucket", healthy("a bucket", directory))
        self._failures = failures

    async def put(self, *arguments: Any) -> None:
        with self._failures.around():
            await super().put(*arguments)


class Expected:
    """What may be there, by what was acknowledged."""

    def __init__(self, clock: Clock) -> None:
        self.held: dict[Key, str | None] = {}  # what was read last
        self.images: dict[str, list[str]] = {}  # the blobs that each manifest names
        self.wrong: list[str] = []
        self._clock = clock
        self._used: dict[Key, float] = {}
        self._done: list[tuple[Key, str | None, bool]] = []  # in this round, and whether that is sure
        self._unknown: list[tuple[Key, str]] = []
        self._whole: set[Key] = set()  # manifests all of whose blobs are there

    def may(self, key: Key, value: str | None) -> None:
        """Something was begun; None is a deletion."""
        self._done.append((key, value, False))

    def did(self, key: Key, value: str | None) -> None:
        """It was acknowledged, or seen by one who may rely on it."""
        self._done.append((key, value, True))

    def unknown(self, key: Key, why: str) -> None:
        """A client was told that there is none."""
        self._unknown.append((key, why))

    def keys(self) -> set[Key]:
        return {*self.held, *(key for key, _, _ in self._done), *(key for key, _ in self._unknown)}

    def compare(self, found: dict[Key, str | None], collected: bool, what: str) -> None:
        """At the end of a round."""
        for key, seen in found.items():
            sure = {value for each, value, is_sure in self._done if each == key and is_sure}
            may = {value for each, value, _ in self._done if each == key}
            may |= sure or {self.held.get(key)}
            taken = collected and not self._is_kept(key)
            if taken and not sure:
                may.add(None)
            if seen not in may:
                self.wrong.append(f"{what}: {key} is {seen}, and may be {may}")
            told = [why for each, why in self._unknown if each == key]
            if told and self.held.get(key) and not taken and None not in may:
                self.wrong.append(f"{what}: {key} was unknown to {told}")
        self.held = found
        self._used.update((key, self._clock()) for key, value, is_sure in self._done if is_sure and value)
        self._done, self._unknown = [], []
        self._whole = {
            (kind, repository, digest)
            for (kind, repository, digest), seen in found.items()
            if kind == "manifest"
            and seen
            and all(found.get(("blob", repository, each)) for each in self.images[digest])
        }

    def _is_kept(self, key: Key) -> bool:
        """Whether collection must keep it: it was used lately, or is named by an image that stays."""
        kind, repository, digest = key
        if kind != "blob" or self._clock() <= self._used.get(key, 0.0) + GRACE:
            return True
        gone = {each for each, value, _ in self._done if value is None}
        named = {each for each in self._whole - gone if each[1] == repository}
        return any(digest in self.images[manifest] for _, _, manifest in named)
