"""What access control keeps in records: the keys by which tokens are signed, and API keys.

    signing <id>        a key by which tokens are signed
    apikey <name>       an API key, of which only a hash is kept
    keyused <name>      when an API key was last used

All processes of a server share the records, and all servers of a fleet if they are in a database.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TypeVar

import msgspec
import structlog

from storage.concurrency import run_in_thread
from storage.errors import StorageFailed, StorageUnavailable
from storage.keys import API_KEY, KEY_USED, SIGNING
from storage.records import Batch, Records

log = structlog.get_logger()
T = TypeVar("T")

RECENT = 1.0  # seconds until records in a database are read again: so long another server takes to learn
AGAIN = 10.0  # seconds until it is tried again after a failure: each attempt may take seconds
PATIENCE = 3.0  # seconds for an answer, if what was read before still counts
STALE = 300.0  # seconds for which API keys that were read count while the records cannot be read


class SigningKey(msgspec.Struct, frozen=True):
    """A key by which tokens are signed.  `made` is in seconds since the epoch."""

    id: str
    secret: bytes
    made: float


class ApiKey(msgspec.Struct, frozen=True):
    """An API key.  Times are in seconds since the epoch.

    digest: the SHA-256 of the key, in hexadecimal digits
    scopes: what it may do, with full names or patterns of them
    lock: the lines of a lock file, which are all that it may pull; None without one
    """

    name: str
    digest: str
    scopes: tuple[str, ...]
    made: float
    expires: float | None = None
    lock: tuple[str, ...] | None = None


@dataclass(frozen=True)
class AccessState:
    """What the records hold.

    signing: the keys by which tokens are signed, by their ids, the newest first
    keys: the API keys, by their digests
    used: when each was last used, by its name
    """

    signing: dict[str, SigningKey] = field(default_factory=dict)
    keys: dict[str, ApiKey] = field(default_factory=dict)
    used: dict[str, float] = field(default_factory=dict)


class AccessRecords:
    """Reads the records when they have changed, and changes them.

    `clock` counts seconds.  While the records cannot be read, what was read before counts, so that an outage
    logs nobody out: API keys for STALE seconds, and the keys that sign tokens for at least `keep` seconds, in
    which nothing can be revoked, except by a server that still reaches the database.  Used by one event loop.
    """

    def __init__(
        self, records: Records, clock: Callable[[], float] = time.monotonic, keep: float = STALE
    ) -> None:
        self._records = records
        self._clock = clock
        self._keep = max(keep, STALE)
        self._reading: asyncio.Task[None] | None = None
        self._silent = False  # whether the attempt to read them takes too long
        self._failed = False  # whether the last one failed
        self._state: AccessState | None = None
        self._version: object = None
        self._read_at = 0.0  # when they were read
        self._tried_at = 0.0  # when they were read, or could not be

    def current(self) -> AccessState | None:
        """What the records hold; None if that cannot be told without waiting: see read()."""
        if self._records.remote:
            recent = self._clock() - self._tried_at < RECENT and self._counts(self._keep)
            return self._state if recent else None
        version = self._records.version()
        if self._state is None or version is None or version != self._version:
            self._failed = True
            with suppress(StorageFailed):
                self._take(self._load(), version)
                return self._state
            return self._state if self._counts(STALE) else None
        return self._state

    @property
    def silent(self) -> bool:
        """Whether they are in a database that does not answer now."""
        return self._silent

    def check_whole(self) -> None:
        """Raise StorageUnavailable if read() or current() gave what was read before: there may be more."""
        if self._silent or self._failed:
            cause = "its records cannot be read now"
            raise StorageUnavailable("the records of access cannot be read", cause=cause, retry_after=AGAIN)

    @property
    def latest(self) -> AccessState:
        """What current() or read() gave last: for who has just called one of them.

        Without the API keys if these count no longer.
        """
        state = self._state or AccessState()
        return state if not self._records.remote or self._counts(STALE) else replace(state, keys={})

    async def read(self, keys: bool = True) -> AccessState:
        """What the records hold, for a look at its API keys or, without `keys`, at the others alone.

        Raises StorageFailed if they cannot be read, and what was read before counts no longer.
        """
        counts = self._counts(STALE if keys else self._keep)
        if (found := self.current()) is not None and (counts or not self._records.remote):
            return found
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._reread())
            self._reading.add_done_callback(self._has_read)
        reading = self._reading
        done, _ = await asyncio.wait([reading], timeout=0 if self._silent else PATIENCE)
        self._silent = not done
        if done and not counts:
            reading.result()
        if self._state is None or not (done or counts):
            cause = "its database does not answer"
            raise StorageUnavailable("the database does not answer", cause=cause, retry_after=AGAIN)
        return self._state

    async def _reread(self) -> None:
        try:
            self._take(await run_in_thread(self._load), None)
        except StorageFailed:
            self._failed = True
            self._tried_at = self._clock() + AGAIN - RECENT
            raise

    def _has_read(self, reading: asyncio.Task[None]) -> None:
        self._reading = None
        if not reading.cancelled() and reading.exception() is None:  # the database has logged what failed
            self._silent = False

    def _counts(self, seconds: float) -> bool:
        """Whether what was read counts, which does so for some seconds while the records cannot be read."""
        return self._state is not None and self._clock() - self._read_at < seconds

    def _take(self, state: AccessState, version: object) -> None:
        self._state, self._version, self._failed = state, version, False
        self._read_at = self._tried_at = self._clock()

    def _load(self) -> AccessState:
        keys = [each for _, each in self._all(API_KEY.prefix(), ApiKey)]
        used = {KEY_USED.parse(key)[0]: value for key, value in self._all(KEY_USED.prefix(), float)}
        signing = sorted(self._signing(), key=lambda each: each.made, reverse=True)
        return AccessState({each.id: each for each in signing}, {each.digest: each for each in keys}, used)

    def _all(self, prefix: str, kind: type[T]) -> list[tuple[str, T]]:
        """The keys and values of records; those that cannot be read are left out."""
        found = []
        for key, value in self._records.scan(prefix):
            try:
                found.append((key, msgspec.json.decode(value, type=kind)))
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                log.error("access.damaged", key=key)
        return found

    async def signing_key(self, now: float, rotation: float, keep: float) -> SigningKey:
        """The newest key; a new one if that is older than `rotation` seconds, or there is none.

        Keys older than `keep` seconds are deleted then: no token that they signed is valid any more.  Raises
        StorageFailed.
        """

        def newest() -> SigningKey | None:
            found = max(self._signing(), key=lambda each: each.made, default=None)
            return found if found is not None and now - found.made < rotation else None

        def renew(batch: Batch) -> SigningKey:
            if (found := newest()) is not None:  # another process, or another server, has made it meanwhile
                return found
            for each in self._signing():
                if now - each.made > keep:
                    batch.delete(SIGNING.key(each.id))
            made = SigningKey(secrets.token_hex(8), secrets.token_bytes(32), now)
            batch.put(SIGNING.key(made.id), msgspec.json.encode(made))
            return made

        state = await self.read(keys=False)
        found = next(iter(state.signing.values()), None)
        if found is not None and now - found.made < rotation:
            return found
        try:
            return await self.change(renew)
        except StorageFailed:
            if found is None or now - found.made > keep:
                raise
            return found  # until the records can be written again

    async def forget_signing_keys(self) -> int:
        """Delete the keys by which tokens are signed, so that no token is valid any more; returns how many.

        Raises StorageFailed.
        """
        return await self.change(
            lambda batch: sum([batch.delete(SIGNING.key(each.id)) for each in self._signing()])
        )

    def _signing(self) -> list[SigningKey]:
        return [each for _, each in self._all(SIGNING.prefix(), SigningKey)]

    async def change(self, work: Callable[[Batch], T]) -> T:
        """Change the records in a transaction.  Raises StorageFailed, and what `work` raises."""
        made: T = await run_in_thread(self._records.transaction, work)
        self._version, self._tried_at = None, -math.inf
        return made

    async def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
