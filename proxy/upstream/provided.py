"""Credentials that an extension provides."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from proxy.extensions.extension import Extension, ExtensionFailed
from proxy.extensions.protocols import HostLogin
from proxy.upstream.credentials import Credential, Credentials
from storage.concurrency import SingleFlight

RETRY = 5.0  # seconds until an extension that failed is asked again
REMEMBERED = 1000  # hosts and repositories


@dataclass(frozen=True, slots=True)
class _ProvidedLogin:
    """What the extension said, to be used until a time; `error` instead if it failed."""

    until: float
    credential: Credential | None = None
    error: ExtensionFailed | None = None


class ProvidedCredentials(Credentials):
    """The logins that `extension` knows, each kept for as long as it says.

    While it fails, its last answer is used if the upstream has not refused that; else get() raises
    ExtensionFailed.
    """

    def __init__(self, extension: Extension, clock: Callable[[], float] = time.monotonic) -> None:
        self.account = f"extension {extension.name}"
        self._extension = extension
        self._clock = clock
        self._answers: dict[tuple[str, str], _ProvidedLogin] = {}
        self._flights = SingleFlight()

    async def get(self, host: str, repository: str = "") -> Credential | None:
        key = host, repository
        answer = self._answers.get(key)
        if answer is None or self._clock() >= answer.until:
            answer = await self._flights.join(key, lambda: self._ask(key, answer))
            self._answers.pop(key, None)
            self._answers[key] = answer
            if len(self._answers) > REMEMBERED:
                del self._answers[next(iter(self._answers))]
        if answer.error is not None:
            raise answer.error.copy()
        return answer.credential

    async def _ask(self, key: tuple[str, str], before: _ProvidedLogin | None) -> _ProvidedLogin:
        try:
            found = await self._extension.call("get", *key, gives=(HostLogin, type(None)))
        except ExtensionFailed as error:
            until = self._clock() + RETRY
            if before is None or before.error is not None:
                return _ProvidedLogin(until, error=error)
            return _ProvidedLogin(until, before.credential)
        if found is None:
            return _ProvidedLogin(self._clock() + RETRY)
        until = self._clock() + max(found.valid_for, RETRY)
        return _ProvidedLogin(until, Credential(found.username, found.password))

    def forget(self) -> None:
        self._answers.clear()
