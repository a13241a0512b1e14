"""Decides whether a caller may see a repository of a cache, by asking upstream with the caller's credentials.

The question is a HEAD for the requested content.  A yes holds for the caller and the repository for some
minutes.  A 404 is passed on and is not a yes, because some registries refuse that way.  While the upstream
cannot be asked, a yes of the last day is enough.

The caller's credentials are sent to this upstream and its token realms only, like the configured ones, and
are held in memory for recent callers.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from proxy.upstream.client import UpstreamRegistry
from proxy.upstream.credentials import Credential, Credentials, Inline
from storage.concurrency import SingleFlight
from storage.errors import OriginDenied, OriginForbidden, Unavailable
from storage.registry import Registry

log = structlog.get_logger()

STALE_FOR = 86400.0  # seconds for which a yes is enough while the upstream cannot be asked
REMEMBERED = 10_000  # answers
CALLERS = 200  # callers whose credentials and tokens are kept

Probe = Callable[[Registry], Awaitable[object]]


@dataclass(slots=True)
class _Caller:
    upstream: UpstreamRegistry
    busy: int = 0


class Visibility:
    """What callers may see of one namespace.

    upstream: the upstream that is asked
    cut: whether the upstream is cut off now, and must not be asked
    secret: the key of identify(); with the same one, other processes identify credentials alike
    """

    def __init__(
        self,
        namespace: str,
        upstream: UpstreamRegistry,
        remember: float,
        clock: Callable[[], float] = time.time,
        *,
        cut: Callable[[], bool] = lambda: False,
        secret: bytes = b"",
    ) -> None:
        self._namespace = namespace
        self._upstream = upstream
        self._remember = remember
        self._clock = clock
        self._cut = cut
        self._key = secret or secrets.token_bytes(32)
        self._seen: dict[tuple[bytes, str], float] = {}  # the last yes for a caller and a repository
        self._right: dict[bytes, float] = {}  # when the upstream last accepted the credentials of a caller
        self._callers: dict[bytes, _Caller] = {}
        self._flights = SingleFlight()

    def remembers(self, repository: str, credential: Credential | None) -> bool:
        """Whether a yes for the caller, or for anonymous callers, still holds."""
        return any(
            0 <= self._age(who, repository) < self._remember
            for who in {self._who(credential), self._who(None)}
        )

    def identify(self, credential: Credential) -> bytes:
        """A key for the credential, from which it cannot be found out."""
        return self._who(credential)

    def knows(self, credential: Credential) -> bool:
        """Whether the upstream has accepted the credential within the last day, for any repository."""
        accepted = self._right.get(self._who(credential))
        return accepted is not None and 0 <= self._clock() - accepted < STALE_FOR

    async def check(self, repository: str, credential: Credential | None, content: str, probe: Probe) -> None:
        """Return if the caller may see the repository; without a `credential` the caller is anonymous.

        `probe` asks an upstream for `content` of the repository.  Raises OriginDenied if the upstream refuses
        it, Unavailable if that cannot be found out, and any other error of the upstream, such as
        ManifestUnknown.
        """
        if self.remembers(repository, credential):
            return
        who = self._who(credential)
        try:
            if self._cut():
                raise Unavailable(f"{self._namespace} is cut off")
            await self._flights.join((who, repository, content), lambda: self._ask(who, credential, probe))
        except OriginDenied as error:
            self._seen.pop((who, repository), None)
            if isinstance(error, OriginForbidden):
                self._accepted(who)
            raise
        except Unavailable as error:
            if 0 <= self._age(who, repository) < STALE_FOR:
                log.info("access.stale", namespace=self._namespace, repository=repository, error=str(error))
                return
            raise Unavailable(
                f"cannot find out now whether you may see {self._namespace}/{repository}: {error}",
                retry_after=error.retry_after,
            ) from error
        self._accepted(who)
        self._seen.pop((who, repository), None)
        self._seen[who, repository] = self._clock()
        if len(self._seen) > REMEMBERED:
            del self._seen[next(iter(self._seen))]

    def _accepted(self, who: bytes) -> None:
        self._right.pop(who, None)
        self._right[who] = self._clock()
        if len(self._right) > REMEMBERED:
            del self._right[next(iter(self._right))]

    def _age(self, who: bytes, repository: str) -> float:
        since = self._seen.get((who, repository))
        return -1.0 if since is None else self._clock() - since

    def _who(self, credential: Credential | None) -> bytes:
        if credential is None:
            return b""
        pair = f"{credential.username}\0{credential.password}".encode("utf-8", "surrogateescape")
        return hmac.digest(self._key, pair, "sha256")

    async def _ask(self, who: bytes, credential: Credential | None, probe: Probe) -> None:
        caller = self._callers.pop(who, None)
        if caller is None:
            source = Inline(credential.username, credential.password) if credential else Credentials()
            caller = _Caller(self._upstream.as_caller(source))
        self._callers[who] = caller
        caller.busy += 1
        try:
            await probe(caller.upstream)
        finally:
            caller.busy -= 1
            self._forget_idle()

    def _forget_idle(self) -> None:
        """Forget the idle callers whose last request is the longest ago."""
        # There is nothing to close: their connections belong to the upstream.
        idle = [who for who, caller in self._callers.items() if not caller.busy]
        for who in idle[: max(0, len(self._callers) - CALLERS)]:
            del self._callers[who]

    async def close(self) -> None:
        await self._flights.close()
        for caller in self._callers.values():
            await caller.upstream.close()
