"""API keys: credentials with a scope and an end, for programs that are no users.

A key is shown once, when it is made; the records hold its SHA-256.  It is 256 random bits: no list of likely
keys can be tried, so that a slow hash, which passwords need, would protect nothing and cost each request tens
of milliseconds.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
import secrets
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache

import msgspec

from proxy.access.credentials import KEY, BadCredential
from proxy.access.records import PATIENCE, AccessRecords, AccessState, ApiKey
from proxy.access.rules import Grant, Principal
from proxy.access.scopes import CATALOG, REPOSITORY, Scope, parse_scope
from proxy.config.access import ACTIONS
from proxy.config.values import parse_pattern
from proxy.telemetry.exchange import KeyLock
from storage.errors import NameUnknown, StorageFailed
from storage.keys import API_KEY, KEY_USED
from storage.records import Batch

START = "entrepot_key_"
NOTED = 60.0  # seconds between two records of the use of one key
PAUSE = 5.0  # seconds between two records of uses: each has all processes read all keys again
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class KeyExists(Exception):
    """There is an API key of that name."""


class ApiKeys:
    """Makes, lists and revokes API keys, and verifies them: a CredentialVerifier.

    Methods that read or change the records raise StorageFailed.
    """

    scheme = KEY
    what = "the API key"

    def __init__(self, records: AccessRecords, clock: Callable[[], float] = time.time) -> None:
        self._records = records
        self._clock = clock
        self._tried: dict[str, float] = {}  # when the use of each key was last noted by this process
        self._waiting: dict[str, float] = {}  # those that are not recorded yet
        self._pause: asyncio.TimerHandle | None = None
        self._recording: asyncio.Task[None] | None = None
        self._principal = lru_cache(maxsize=1024)(_principal)

    # Verifying

    def recognizes(self, secret: str) -> bool:
        return secret.startswith(START)

    async def verify(self, user: str, secret: str) -> Principal:
        """The principal is `key:` and the name of the key, whatever user the client states."""
        state = await self._records.read()
        key = state.keys.get(_digest(secret))
        if key is None:
            self._records.check_whole()
            raise BadCredential("there is none like it: it was revoked, or is mistyped")
        if not self._lasts(key):
            raise BadCredential("it has expired: entrepot keys create makes another one")
        if not self._is_noted(key, state):
            await self._note(key)
        return self._principal(key)

    def remembers(self, user: str, secret: str) -> bool:
        if self._records.current() is None:
            return False
        state = self._records.latest
        key = state.keys.get(_digest(secret))
        return key is not None and self._lasts(key) and self._is_noted(key, state)

    def renew(self, principal: Principal) -> Principal | None:
        key = self._records.latest.keys.get(principal.proof)
        return self._principal(key) if key is not None and self._lasts(key) else None

    def _lasts(self, key: ApiKey) -> bool:
        return key.expires is None or self._clock() < key.expires

    def _is_noted(self, key: ApiKey, state: AccessState) -> bool:
        """Whether its use was noted lately."""
        last = max(state.used.get(key.name, -math.inf), self._tried.get(key.name, -math.inf))
        return self._clock() - last < NOTED

    async def _note(self, key: ApiKey) -> None:
        """Record the use of a key: now, or after the pause together with those of others."""
        self._tried[key.name] = self._waiting[key.name] = self._clock()
        if self._pause is None:
            self._begin_pause()
            self._recording = asyncio.ensure_future(self._record())
            await asyncio.wait([self._recording], timeout=0 if self._records.silent else PATIENCE)

    def _begin_pause(self) -> None:
        self._pause = asyncio.get_running_loop().call_later(PAUSE, self._end_pause)

    def _end_pause(self) -> None:
        self._pause = None
        if self._waiting:
            self._begin_pause()
            if self._recording is None or self._recording.done():
                self._recording = asyncio.ensure_future(self._record())

    async def _record(self) -> None:
        """Record the uses that wait; nobody is refused if that fails."""
        uses, self._waiting = self._waiting, {}

        def note(batch: Batch) -> None:
            for name, when in uses.items():
                if batch.get(API_KEY.key(name)) is not None:  # it may have been revoked meanwhile
                    batch.put(KEY_USED.key(name), msgspec.json.encode(when))

        if uses:
            with suppress(StorageFailed):
                await self._records.change(note)

    async def close(self) -> None:
        """Record what waits for it."""
        if self._pause is not None:
            self._pause.cancel()
        if self._recording is not None:
            await self._recording
        await self._record()

    # Managing

    async def create(
        self,
        name: str,
        scopes: tuple[str, ...],
        expires: float | None = None,
        lock: tuple[str, ...] | None = None,
    ) -> tuple[ApiKey, str]:
        """Make a key with scopes that key_scope() has read; the second is the key itself.

        Raises ValueError for a name that cannot be one, and KeyExists.
        """
        if not _NAME.fullmatch(name):
            raise ValueError("expected up to 63 letters, digits, dots, dashes and underscores")
        secret = START + secrets.token_urlsafe(32)
        made = ApiKey(name, _digest(secret), scopes, self._clock(), expires, lock)

        def put(batch: Batch) -> None:
            if batch.get(API_KEY.key(name)) is not None:
                raise KeyExists
            batch.put(API_KEY.key(name), msgspec.json.encode(made))

        await self._records.change(put)
        return made, secret

    async def revoke(self, name: str) -> None:
        """Raises NameUnknown if there is no such key."""

        def remove(batch: Batch) -> bool:
            batch.delete(KEY_USED.key(name))
            return batch.delete(API_KEY.key(name))

        if _NAME.fullmatch(name) is None or not await self._records.change(remove):
            raise NameUnknown(f"there is no API key {name[:63]!r}: entrepot keys list shows them")

    async def may_pull(self, repository: str) -> list[str]:
        """The names of the keys that may pull from the repository of that full name."""
        return [
            key.name
            for key, _ in await self.list()
            if self._lasts(key)
            and any(each.allows("pull") and each.covers(repository, "") for each in _grants(key.scopes))
        ]

    async def list(self) -> list[tuple[ApiKey, float | None]]:
        """The keys by name, each with when it was last used."""
        state = await self._records.read()
        found = sorted(state.keys.values(), key=lambda each: each.name)
        return [(each, self._waiting.get(each.name, state.used.get(each.name))) for each in found]


def key_scope(text: str) -> Scope:
    """The scope of a key: `repository:<pattern>:<actions>` or `registry:catalog:*`.

    Raises ValueError with half a sentence.
    """
    found = parse_scope(text)
    if found.type == REPOSITORY:
        parse_pattern(found.name)
        if found.actions <= {*ACTIONS, "*"}:
            return found
        raise ValueError(f"expected the actions {', '.join(ACTIONS)} or *")
    if f"{found.type}:{found.name}" == CATALOG and found.actions == {"*"}:
        return found
    raise ValueError(f"expected repository:namespace/repository:actions, or {CATALOG}:*")


def _grants(scopes: Iterable[str]) -> Iterable[Grant]:
    for text in scopes:
        with suppress(ValueError):  # of another version
            scope = key_scope(text)
            if scope.type == REPOSITORY:
                yield Grant(scope.name, scope.actions, parse_pattern(scope.name))
            else:
                yield Grant(CATALOG, scope.actions)


def _principal(key: ApiKey) -> Principal:
    return Principal(
        user=f"key:{key.name}",  # no user of htpasswd has a colon in its name
        scheme=KEY,
        grants=tuple(_grants(key.scopes)),
        until=math.inf if key.expires is None else key.expires,
        proof=key.digest,
        lock=None if key.lock is None else KeyLock(key.name, key.lock),
    )


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
