"""What access control keeps in records: the keys by which tokens are signed, and API keys.

    signing <id>        a key by which tokens are signed
    apikey <name>       an API key, of which only a hash is kept
    keyused <name>      when an API key was last used

All processes of a server share the records, and all servers of a fleet if they are in a database.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
import structlog

from storage.concurrency import SingleFlight, run_in_thread
from storage.errors import StorageFailed
from storage.keys import API_KEY, KEY_USED, SIGNING
from storage.records import Batch, Records

log = structlog.get_logger()
T = TypeVar("T")

RECENT = 1.0  # seconds until records in a database are read again: so long another server takes to learn
AGAIN = 10.0  # seconds until it is tried again after a failure: each attempt may take seconds
STALE = 300.0  # seconds for which what was read counts while the records cannot be read


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

    `clock` counts seconds.  Used by one event loop.
    """

    def __init__(self, records: Records, clock: Callable[[], float] = time.monotonic) -> None:
        self._records = records
        self._clock = clock
        self._flights = SingleFlight()
        self._state: AccessState | None = None
        self._version: object = None
        self._read_at = 0.0  # when they were read
        self._tried_at = 0.0  # when they were read, or could not be

    def current(self) -> AccessState | None:
        """What the records hold; None if that cannot be told without waiting: see read()."""
        if self._records.remote:
            return self._state if self._clock() - self._tried_at < RECENT else None
        version = self._records.version()
        if self._state is None or version is None or version != self._version:
            with suppress(StorageFailed):
                self._take(self._load(), version)
                return self._state
            return self._former()
        return self._state

    @property
    def latest(self) -> AccessState:
        """What current() or read() gave last: for who has just called one of them."""
        return self._state or AccessState()

    async def read(self) -> AccessState:
        """What the records hold.  Raises StorageFailed if they have not been readable for minutes."""
        if (found := self.current()) is not None:
            return found
        await self._flights.join("", self._reread)
        assert self._state is not None
        return self._state

    async def _reread(self) -> None:
        try:
            self._take(await run_in_thread(self._load), None)
        except StorageFailed:
            if self._former() is None:
                raise
            self._tried_at = self._clock() + AGAIN - RECENT

    def _former(self) -> AccessState | None:
        """What was read, while the records cannot be read: an outage must not log everybody out."""
        return self._state if self._clock() - self._read_at < STALE else None

    def _take(self, state: AccessState, version: object) -> None:
        self._state, self._version = state, version
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

        state = await self.read()
        found = next(iter(state.signing.values()), None)
        if found is not None and now - found.made < rotation:
            return found
        return await self.change(renew)

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
        await self._flights.close()
