"""The API keys that an operator makes, lists and revokes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog

from proxy.access.scopes import REPOSITORY, Scope
from proxy.admin.key_reports import KeyCreated, KeyRevoked, KeyRow, TokensEnded
from proxy.admin.pullers import pullers
from proxy.config.errors import StartError
from proxy.namespaces.composition import Composition
from proxy.namespaces.references import FieldInvalid
from proxy.policy.locks import Locked, parse_lock
from storage.errors import Unsupported
from storage.names import is_glob

if TYPE_CHECKING:  # imported where they are needed: most servers accept no API keys
    from proxy.access.api_keys import ApiKeys
    from proxy.access.records import AccessRecords, ApiKey

log = structlog.get_logger()


class KeyOperations:
    """Those of the Operations that are about API keys.

    Each raises StorageFailed, and Unsupported if the configuration has no api_keys.
    """

    def __init__(self, parts: Composition) -> None:
        self._parts_of_keys = parts
        self._closing_keys = AsyncExitStack()
        self._opened_keys: ApiKeys | None = None
        self._opened_records: AccessRecords | None = None

    async def keys(self) -> list[KeyRow]:
        return [_row(key, used) for key, used in await self._api_keys().list()]

    async def create_key(
        self,
        name: str,
        scopes: Sequence[str] = (),
        seconds: float | None = None,
        lock: Sequence[str] | None = None,
    ) -> KeyCreated:
        from proxy.access.api_keys import KeyExists

        keys = self._api_keys()
        locked = None if lock is None else _locked(lock)
        if locked is not None and not locked:
            raise FieldInvalid("lock", "it has no image")
        found = [self._key_scope(each) for each in scopes]
        if locked is not None:
            found = _scopes_of(locked, found)
        if not found:
            raise FieldInvalid("scopes", "give at least one, such as repository:team/*:pull")
        if seconds is not None and not seconds > 0:
            raise FieldInvalid("seconds", "must be more than 0")
        expires = None if seconds is None else self._parts_of_keys.clock() + seconds
        written = tuple(f"{each.type}:{each.name}:{','.join(sorted(each.actions))}" for each in found)
        try:
            made, secret = await keys.create(name, written, expires, None if lock is None else tuple(lock))
        except ValueError as error:
            raise FieldInvalid("name", error) from None
        except KeyExists:
            raise FieldInvalid("name", f"there is a key {name}: revoke it, or choose another name") from None
        log.info("key.created", name=name, scopes=written, expires=expires, locked=lock is not None)
        return KeyCreated(key=secret, row=_row(made, None), notes=list(self._open_to_all(locked)))

    async def revoke_key(self, name: str) -> KeyRevoked:
        await self._api_keys().revoke(name)
        log.info("key.revoked", name=name)
        return KeyRevoked(name=name)

    async def end_tokens(self) -> TokensEnded:
        if self._parts_of_keys.config.access.token_endpoint is None:
            raise Unsupported("no tokens are issued here: set access.token_endpoint")
        ended = await self._access_records().forget_signing_keys()
        log.warning("tokens.ended", keys=ended)
        return TokensEnded(keys=ended)

    async def pullers(self, repository: str) -> str | None:
        """Who may pull from a repository: see pullers()."""
        config = self._parts_of_keys.config
        keys = await self._api_keys().may_pull(repository) if config.access.api_keys else []
        return pullers(config, repository, keys)

    async def close_keys(self) -> None:
        await self._closing_keys.aclose()

    def _api_keys(self) -> ApiKeys:
        if self._opened_keys is None:
            if not self._parts_of_keys.config.access.api_keys:
                raise Unsupported("API keys are not accepted here: set access.api_keys: true")
            from proxy.access.api_keys import ApiKeys

            self._opened_keys = ApiKeys(self._access_records(), self._parts_of_keys.clock)
        return self._opened_keys

    def _access_records(self) -> AccessRecords:
        if self._opened_records is None:
            from proxy.access.records import AccessRecords
            from proxy.namespaces.access_records import access_records

            self._opened_records = AccessRecords(access_records(self._parts_of_keys, self._closing_keys))
            self._closing_keys.push_async_callback(self._opened_records.close)
        return self._opened_records

    def _key_scope(self, text: str) -> Scope:
        """A scope with the full name of a repository, or a pattern of full names.  Raises FieldInvalid."""
        from proxy.access.api_keys import key_scope

        try:
            scope = key_scope(text)
        except ValueError as error:
            raise FieldInvalid("scopes", f"{text[:200]}: {error}") from None
        if scope.type != REPOSITORY or scope.name.startswith("re:"):
            return scope
        first, slash, rest = scope.name.partition("/")
        if is_glob(first):
            return scope
        namespace = self._parts_of_keys.namespaces.chosen(ns=first) if slash else None
        if namespace is not None:
            return replace(scope, name=f"{namespace}/{rest}")
        unnamed = self._parts_of_keys.config.unnamed()
        if len(unnamed) != 1:
            stores = " or ".join(unnamed or self._parts_of_keys.config.hosted() or ["namespace"])
            raise FieldInvalid("scopes", f"{text[:200]}: begin the name with its namespace: {stores}/…")
        return replace(scope, name=f"{unnamed[0]}/{scope.name}")

    def _open_to_all(self, locked: Locked | None) -> Sequence[str]:
        """The namespaces of a lock from which everybody may pull all the same."""
        config = self._parts_of_keys.config
        names = sorted({name.partition("/")[0] for name in locked or ()})
        public = [each for each in names if (of := config.namespace(each)) and of.visibility == "public"]
        return [
            f"everybody may pull all of {each}, with the key or without: set its visibility to rules"
            for each in public
            if each not in config.hosted()
        ]


def _locked(lines: Sequence[str]) -> Locked:
    try:
        return parse_lock("\n".join(lines), "lock")
    except StartError as error:
        raise FieldInvalid("lock", error) from None


def _scopes_of(locked: Locked, scopes: Sequence[Scope]) -> list[Scope]:
    """The scopes of a key for a lock file: those that are given, or else those that it needs."""
    for each in scopes:
        if each.type != REPOSITORY or each.actions != {"pull"}:
            raise FieldInvalid("scopes", "a key with a lock file may pull, and nothing else")
    return list(scopes) or [Scope(REPOSITORY, name, frozenset(("pull",))) for name in sorted(locked)]


def _row(key: ApiKey, used: float | None) -> KeyRow:
    return KeyRow(
        name=key.name,
        scopes=list(key.scopes),
        made=key.made,
        expires=key.expires,
        used=used,
        locked=None if key.lock is None else len(key.lock),
    )
