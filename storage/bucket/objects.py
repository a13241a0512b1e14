"""The objects of a bucket: put, get, look at, delete.

Every failure but that of a missing object is an Unavailable, and is reported to the BucketHealth.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import obstore
import structlog
from obstore.exceptions import AlreadyExistsError, BaseError

from storage.bucket.failures import BucketFailed, explain, is_of_bucket
from storage.bucket.memory import return_large_pieces
from storage.bucket.pending import Pending
from storage.bucket.settings import ObjectStore
from storage.bucket.signed_requests import BucketRefused, SignedRequests
from storage.concurrency import run_in_thread, uninterrupted
from storage.disk.health import translated
from storage.disk.troubles import Trouble, Troubles
from storage.errors import DigestInvalid, OriginTimeout, RegistryError, StorageFailed
from storage.oci import Descriptor, Digest
from storage.registry import Blob

log = structlog.get_logger()

KIND = "bucket"  # the kind of these failures among the troubles of a server
PATIENCE = 30.0  # seconds for the first bytes of an object, by default
CHUNK = 1 << 20  # bytes read at a time
PART = 5 << 20  # bytes of a part of an upload, at least; S3 takes no smaller ones
PARTS = 10_000  # in an upload, at most
AT_ONCE = 3  # parts of an upload in memory
UPLOADS = 4  # at once in a process; others wait for one to end
WHOLE = 5 << 30  # bytes that one request puts, at most; S3 takes no more
LEAST = 256 << 10  # bytes that are read by a signed URL: for fewer, signing it costs more than it saves
VALID = timedelta(minutes=5)  # of such a URL, which is used at once


class ObjectUnknown(Exception):
    """The bucket has no such object."""


class Opened(NamedTuple):
    """An object whose bytes come: its size, what was asked for, and when it was made.

    The time is that of the bucket's clock, in whole seconds since the epoch.  `stream` has the bytes once, in
    chunks of the given size or more, but the last.
    """

    size: int
    stream: Callable[[int], AsyncIterator[bytes]]
    made_at: float

    @property
    def chunks(self) -> AsyncIterator[bytes]:
        return self.stream(CHUNK)


@dataclass(frozen=True, slots=True)
class Signing:
    """Which objects clients may fetch from the bucket themselves, by signed URLs.

    store: the bucket at the endpoint that clients reach
    above: objects of more bytes
    seconds: how long a URL is valid
    """

    store: ObjectStore
    above: int
    seconds: float


class SignedReader(Protocol):
    """What reads objects by signed URLs, past the client of the bucket."""

    @property
    def quick(self) -> bool:
        """Whether the keys are known that sign URLs: to find them may take a request."""

    @property
    def resting(self) -> bool:
        """Whether it is not to be asked now."""

    async def open(self, url: str, descriptor: Descriptor, start: int, stop: int) -> Blob | None:
        """The bytes [start, stop) of an object, which can be read once; None if they do not come so.

        Raises OriginTimeout without an answer.
        """


class BucketHealth:
    """Whether a bucket works, as all processes of a server know it.

    `root` is the directory of the store whose blobs are in the bucket.
    """

    def __init__(self, name: str, root: Path, clock: Callable[[], float], troubles: Troubles) -> None:
        self._name = name
        self._root = str(root)
        self._clock = clock
        self._troubles = troubles

    def failed(self, error: BaseException, action: str = "", key: str = "") -> BucketFailed:
        """Report that an attempt to `put`, `get`, `look at` or `delete` an object has failed.

        Returns the error to raise from it.
        """
        made = self.error(error, action, key)
        failure = made.failure
        trouble = Trouble(KIND, 0, self._root, self._name, failure.cause, 0, self._clock())
        if self._troubles.add(trouble):
            log.error(
                "bucket.failed",
                bucket=self._name,
                cause=failure.cause,
                detail=failure.detail,
                advice=failure.advice,
                raw=failure.raw,
                action="what needs it is answered 503",
            )
        return made

    def error(self, error: BaseException, action: str = "", key: str = "") -> BucketFailed:
        """The error to raise from a failure, which is not reported."""
        return BucketFailed(self._name, explain(error, action, key))

    def worked(self) -> None:
        """Report a success."""
        if self._troubles:
            for trouble in self._troubles.remove(self._is_ours):
                log.info("bucket.recovered", bucket=self._name, cause=trouble.cause)

    def ill(self) -> bool:
        """Whether the last request failed."""
        return any(map(self._is_ours, self._troubles))

    def _is_ours(self, trouble: Trouble) -> bool:
        return (trouble.kind, trouble.root, trouble.path) == (KIND, self._root, self._name)


class Bucket:
    """The objects of a bucket.  Methods raise Unavailable; those that are not asynchronous block.

    `store` is one of obstore's, `name` what errors call the bucket.  `patience` is the number of seconds to
    wait for the first bytes of an object, None for PATIENCE.  `reader` reads those of large ones, if it can.
    `requests` are those that the client of `store` does not make.
    """

    def __init__(
        self,
        store: ObjectStore,
        name: str,
        health: BucketHealth,
        storage_class: str = "",
        patience: float | None = None,
        signing: Signing | None = None,
        reader: SignedReader | None = None,
        requests: SignedRequests | None = None,
    ) -> None:
        return_large_pieces()
        self.name = name
        self.health = health
        self._store = store
        self._patience = patience
        self._signing = signing
        self._reader = reader
        self._requests = requests
        self._attributes = {"Storage-Class": storage_class} if storage_class else None
        self._uploads = asyncio.Semaphore(UPLOADS)
        self._threads = ThreadPoolExecutor(UPLOADS, "put")
        self._pending = Pending()

    def end(self) -> None:
        """End what is awaited of the bucket, for good; a put leaves what it has sent.  Thread-safe."""
        self._pending.end()
        if self._requests is not None:
            self._requests.end()

    @contextmanager
    def _asking(self, action: str, key: str, text: bool = True) -> Iterator[None]:
        """Report what comes of a request; `text` is whether an error has a text."""
        try:
            yield
        except FileNotFoundError as error:
            if action == "put" or is_of_bucket(error):  # what an object is put into is missing
                raise self.health.failed(error, action, key) from None
            if text:
                self.health.worked()
            raise ObjectUnknown(f"{self.name} has no {key}") from None
        except RegistryError:
            raise  # it is not the bucket that is at fault
        except Exception as error:  # obstore's are of several kinds, and a panic of its library is another
            if not text and explain(error).right:
                raise ObjectUnknown(f"{self.name} does not show {key}") from None
            raise self.health.failed(error, action, key) from None
        self.health.worked()

    async def put(self, key: str, source: Path, size: int, digest: Digest | None = None) -> None:
        """Make an object of a file of `size` bytes, with this digest; it appears whole or not at all.

        At most AT_ONCE parts of it are in memory.  A failure aborts it.  A cancellation waits for its end:
        obstore would leave the parts that are under way.  Raises StorageFailed if the file has not this size,
        and DigestInvalid if the service has refused it and it has not this digest.
        """
        check_size(source, size)
        part = max(PART, -(-size // PARTS))
        options: Any = {"chunk_size": part, "max_concurrency": AT_ONCE, "attributes": self._attributes}
        async with self._uploads:
            with self._asking("put", key):
                if not await self._put_signed(key, source, size, digest):
                    put = partial(obstore.put_async, self._store, key, source, **options)
                    await uninterrupted(self._pending.answer(put))

    async def _put_signed(self, key: str, source: Path, size: int, digest: Digest | None) -> bool:
        """Put an object by our own request, where that is better.  Raises TimeoutError, DigestInvalid."""
        requests = self._requests
        if requests is None or not requests.puts or size > WHOLE:
            return False
        if digest is None or digest.algorithm != "sha256":
            return False
        try:
            work = requests.put, key, source, size, digest.encoded
            await run_in_thread(*work, threads=self._threads)
        except TimeoutError:
            raise
        except OSError:  # obstore tries again, and reports what is wrong
            return False
        except BucketRefused:  # so it does, unless it is the file that is wrong: the service would not notice
            if (found := await run_in_thread(_digest_of, source)) != digest:
                raise DigestInvalid(f"content is {found}, not {digest}") from None
            return False
        return True

    def abort(self, key: str) -> None:
        """Abort what has been begun to be put in parts and has not ended, where that can be asked for."""
        if self._requests is None:
            return
        with self._asking("abort", key):
            try:
                self._requests.abort(key)
            except BucketRefused as error:
                if error.passing:
                    raise
                found = explain(error, "abort", key)
                log.warning("bucket.parts_left", bucket=self.name, detail=found.detail, advice=found.advice)

    async def get(self, key: str, start: int = 0, stop: int | None = None, action: str = "get") -> Opened:
        """Ask for the bytes [start, stop), of which there is at least one; None is the end, for all of them.

        Raises ObjectUnknown.  Reading the chunks may raise what a connection does: see broken().
        """
        with self._asking(action, key):
            async with asyncio.timeout(self._patience or PATIENCE):
                asked: Any = None if stop is None else {"range": (start, stop)}
                found = await self._pending.answer(
                    partial(obstore.get_async, self._store, key, options=asked)
                )
        meta = found.meta

        def stream(size: int) -> AsyncIterator[bytes]:
            return aiter(found.stream(min_chunk_size=size))

        return Opened(meta["size"], stream, meta["last_modified"].timestamp())

    async def read_signed(self, key: str, descriptor: Descriptor, start: int, stop: int) -> Blob | None:
        """The bytes [start, stop) of a blob's object by a signed URL; None if get() is to be asked."""
        reader = self._reader
        if reader is None or reader.resting or stop - start < LEAST:
            return None
        sign = partial(obstore.sign, self._store, "GET", key, VALID)
        try:
            url = sign() if reader.quick else await run_in_thread(sign)
        except Exception:  # obstore's are of several kinds; get() reports what is wrong
            return None
        try:
            async with asyncio.timeout(self._patience or PATIENCE):
                found = await reader.open(url, descriptor, start, stop)
        except (TimeoutError, OriginTimeout):
            raise self.health.failed(TimeoutError(), "get", key) from None
        if found is not None:
            self.health.worked()
        return found

    def broken(self, error: Exception, key: str) -> BucketFailed:
        """Report that the chunks of an object ended with `error`; returns the error to raise from it."""
        return self.health.failed(error, "get", key)

    async def size(self, key: str) -> int | None:
        """The size of an object in bytes; None if there is none."""
        try:
            with self._asking("look at", key, text=False):
                async with asyncio.timeout(self._patience or PATIENCE):
                    found = await self._pending.answer(partial(obstore.head_async, self._store, key))
                    return int(found["size"])
        except ObjectUnknown:
            pass
        try:
            # The answer to a HEAD has no text, which alone tells whether the bucket itself is missing, or
            # the keys are wrong.
            return (await self.get(key, action="look at")).size
        except ObjectUnknown:
            return None

    async def locate(self, key: str, size: int) -> str | None:
        """A signed URL of an object of `size` bytes; None if it is too small, or cannot be signed."""
        signing = self._signing
        if signing is None or size <= signing.above:
            return None
        valid = timedelta(seconds=signing.seconds)
        try:
            # For GET: of Azure, HEAD too; others are not sent there.  Google may have to be asked for it.
            return await run_in_thread(obstore.sign, signing.store, "GET", key, valid)
        except Exception as error:  # obstore's are of several kinds
            log.warning("redirect.failed", bucket=self.name, error=explain(error).detail)
            return None

    def chunks(self, key: str) -> Iterator[bytes]:
        """All bytes of an object.  Raises ObjectUnknown."""
        with self._asking("get", key):
            found = self._pending.result(lambda: obstore.get(self._store, key))
            chunks = iter(found.stream(min_chunk_size=CHUNK))
            while (chunk := self._pending.result(lambda: next(chunks, None))) is not None:
                yield chunk

    def read(self, key: str) -> bytes:
        """A small object.  Raises ObjectUnknown."""
        return b"".join(map(bytes, self.chunks(key)))

    def create(self, key: str, content: bytes) -> None:
        """Make a small object, unless there is one, as far as the service can tell."""
        with self._asking("put", key), suppress(AlreadyExistsError):
            try:
                self._pending.result(partial(obstore.put, self._store, key, content, mode="create"))
            except BaseError as error:
                if "NotImplemented" not in str(error):
                    raise
                self._pending.result(partial(obstore.put, self._store, key, content))

    def delete(self, key: str) -> None:
        """Delete an object, if there is one."""
        try:
            with self._asking("delete", key):
                self._pending.result(partial(obstore.delete, self._store, key))
        except ObjectUnknown:  # Azure says so, S3 does not
            pass

    def probe(self) -> None:
        """Ask for something, to see whether it works."""
        try:
            with self._asking("get", "probe"):
                self._pending.result(partial(obstore.get, self._store, "probe"))
        except ObjectUnknown:
            pass


def check_size(path: Path, size: int) -> None:
    """Raise StorageFailed for a file of another size.

    Otherwise the service would wait for the rest, or get an object without it.
    """
    with translated(path):
        found = path.stat().st_size
    if found != size:
        raise StorageFailed(f"{path} has {found} of {size} bytes", cause="a file is damaged")


def _digest_of(path: Path) -> Digest:
    with translated(path), path.open("rb") as file:
        return Digest.of_hash(hashlib.file_digest(file, "sha256"))


def healthy(name: str, root: Path) -> BucketHealth:
    """The health of a bucket that only this process knows."""
    return BucketHealth(name, root, time.time, Troubles())
