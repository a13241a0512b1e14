"""The keys of an issuer of tokens: where they are, and for how long they are good.

- Nothing is fetched before a token of the issuer comes, and one fetch serves all who wait for it.
- A token with an unknown `kid` has the keys fetched again, as keys are rotated; but not more often than each
  UNKNOWN seconds, since anybody can write such a token.
- Keys that are no longer fresh are fetched again.  While that fails, the known ones are good for `keep`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import structlog
from yarl import URL

from proxy.access.bearer import ALGORITHMS, VerificationKey
from proxy.access.issuer_documents import clock_ahead, freshness, metadata_url, parse_jwks, parse_metadata
from proxy.config.watched_file import WatchedFile
from proxy.upstream.connect import Connect
from proxy.upstream.transport import Transport
from storage.concurrency import SingleFlight
from storage.errors import OriginFailed, RegistryError, Unavailable
from storage.shared import SharedState

log = structlog.get_logger()

SHORTEST, LONGEST = 60.0, 86400.0  # seconds that a response is fresh, at least and at most
UNKNOWN = 10.0  # seconds between two fetches for keys that are not known
RETRY = 10.0  # seconds after a failed fetch
PATIENCE = 1.0  # seconds that a token waits for keys to be fetched again which are good meanwhile
LARGEST = 1 << 20  # bytes of a document


@dataclass(frozen=True, eq=False, slots=True)
class KeySet:
    """Keys that an issuer signs with; another object once they have changed.

    withdrawn: the thumbprints (RFC 7638) of keys that it had before, as far as this process knows
    """

    keys: tuple[VerificationKey, ...]
    withdrawn: frozenset[str] = frozenset()

    def followed_by(self, keys: tuple[VerificationKey, ...]) -> KeySet:
        """What the issuer has from now on."""
        present = {each.thumbprint() for each in keys}
        return KeySet(keys, (self.withdrawn | {each.thumbprint() for each in self.keys}) - present)

    def has(self, kid: str | None) -> bool:
        return kid is None or any(each.kid in (kid, None) for each in self.keys)

    def fit(self, kid: str | None, algorithm: str) -> list[VerificationKey]:
        """The keys that may have signed a token with this header: RFC 7515, section 4.1.4."""
        return [
            each
            for each in self.keys
            if algorithm in ALGORITHMS[each.key_type]
            and each.alg in (algorithm, None)
            and (kid is None or each.kid in (kid, None))
        ]

    def names(self) -> list[str]:
        return sorted(each.kid or each.thumbprint() for each in self.keys)


class KeySource(Protocol):
    """Where the keys of an issuer are."""

    async def keys(self, kid: str | None) -> KeySet:
        """The keys, where one named `kid` is expected.  Raises Unavailable."""
        ...

    def current(self) -> KeySet | None:
        """The keys, if nothing has to be fetched first."""
        ...

    async def close(self) -> None: ...


class KeyFile:
    """Keys in a file, a JWKS.  Raises OSError, and ValueError if there are none."""

    def __init__(self, path: Path) -> None:
        self._file = WatchedFile(path, parse_jwks)
        self._read = self._file.current()
        self._last = KeySet(self._read)
        self._reason = ""

    async def keys(self, kid: str | None) -> KeySet:
        return self.current()

    def current(self) -> KeySet:
        """None are left if the file is not usable any more."""
        read: tuple[VerificationKey, ...] = ()
        try:
            read, reason = self._file.current(), ""
        except (OSError, ValueError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        if read is not self._read:
            self._read, self._last = read, self._last.followed_by(read)
        if reason and reason != self._reason:
            log.error("keys.failed", path=str(self._file.path), reason=reason)
        self._reason = reason
        return self._last

    async def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class _Document:
    """The response to a GET of `url`, and until when it is fresh."""

    url: URL
    content: bytes
    etag: str
    until: float


class IssuerKeys:
    """Keys that are fetched from the issuer.

    name: the issuer in messages
    issuer: as its discovery document has it
    jwks_url: where the keys are; None if the discovery document says so
    token_file: what is read for each fetch, as a Bearer token
    keep: seconds for which known keys are good while none can be fetched
    Raises OSError if a file of `connect` cannot be read.  It is made inside a running event loop.
    """

    def __init__(
        self,
        name: str,
        issuer: str,
        jwks_url: str | None,
        connect: Connect,
        *,
        token_file: Path | None = None,
        keep: float = 86400.0,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        shared: SharedState | None = None,
        patience: float = PATIENCE,
    ) -> None:
        self._name, self._issuer, self._jwks_url = name, issuer, jwks_url
        self._token_file, self._keep, self._clock, self._patience = token_file, keep, clock, patience
        first = URL(jwks_url or metadata_url(issuer))
        self._transport = Transport(f"the issuer {name}", connect, first, clock=monotonic, shared=shared)
        self._metadata: _Document | None = None
        self._jwks: _Document | None = None
        self._known = KeySet(())
        self._fetched = self._tried = -float("inf")
        self._failure = ""  # why the last fetch failed
        self._ahead: float | None = None
        self._flights = SingleFlight()

    @property
    def failure(self) -> str:
        """Why the last fetch failed; "" if it did not."""
        return self._failure

    @property
    def ahead(self) -> float | None:
        """How many seconds the issuer's clock was ahead of ours at the last fetch; None if unknown."""
        return self._ahead

    async def keys(self, kid: str | None) -> KeySet:
        now = self._clock()
        may_retry = not self._failure or not 0 <= now - self._tried < RETRY
        if not self._good(now):
            if not may_retry:
                raise self._unavailable()
            await self._fetch()
        elif not self._fresh(now):
            if may_retry:
                with suppress(TimeoutError, Unavailable):
                    async with asyncio.timeout(self._patience):
                        await self._fetch()
        elif not self._known.has(kid) and not 0 <= now - self._tried < UNKNOWN:
            with suppress(Unavailable):
                await self._fetch()
        return self._known

    def current(self) -> KeySet | None:
        now = self._clock()
        return self._known if self._good(now) and self._fresh(now) else None

    def _good(self, now: float) -> bool:
        return 0 <= now - self._fetched < self._keep

    def _fresh(self, now: float) -> bool:
        return self._jwks is not None and now < self._jwks.until

    def _unavailable(self) -> Unavailable:
        left = max(self._tried + RETRY - self._clock(), 1.0)
        return Unavailable(f"the keys of the issuer {self._name} cannot be fetched now", retry_after=left)

    async def _fetch(self) -> None:
        """Fetch the keys, together with all who want them.  Raises Unavailable, after it was logged."""
        await self._flights.join("", self._refresh)

    async def _refresh(self) -> None:
        self._tried = self._clock()
        try:
            document = await self._current_jwks()
            found = parse_jwks(document.content)
        except (RegistryError, ValueError) as error:
            self._metadata = None  # the keys may have moved
            if not self._failure or not str(error).startswith(self._failure):  # or it is what was told before
                self._failure = str(error)
                log.warning("issuer.failed", issuer=self._name, reason=self._failure)
            self._tried = self._clock()
            raise self._unavailable() from None
        if self._failure:
            log.info("issuer.recovered", issuer=self._name)
        self._jwks, self._failure, self._fetched = document, "", self._clock()
        if _content(found) != _content(self._known.keys):
            self._known = self._known.followed_by(found)
            log.info("issuer.keys", issuer=self._name, keys=self._known.names())

    async def _current_jwks(self) -> _Document:
        """Raises RegistryError, and ValueError for a discovery document that says nothing."""
        url = self._jwks_url
        if url is None:
            if self._metadata is None or self._clock() >= self._metadata.until:
                self._metadata = await self._get(URL(metadata_url(self._issuer)), self._metadata)
            url = parse_metadata(self._metadata.content, self._issuer)
        return await self._get(URL(url), self._jwks)

    async def _get(self, url: URL, former: _Document | None) -> _Document:
        headers = {"Accept": "application/json"}
        if self._token_file is not None:
            headers["Authorization"] = f"Bearer {_read(self._token_file)}"
        former = former if former is not None and former.url == url else None
        if former is not None and former.etag:
            headers["If-None-Match"] = former.etag
        response, content = await self._transport.exchange("GET", url, headers, None, LARGEST)
        self._ahead = clock_ahead(response.headers, self._clock())
        until = self._clock() + min(max(freshness(response.headers), SHORTEST), LONGEST)
        if response.status == 304 and former is not None:
            return replace(former, until=until)
        if response.status != 200:
            raise OriginFailed(f"the issuer {self._name} answered {response.status} to GET {url}")
        return _Document(url, content, response.headers.get("ETag", ""), until)

    async def close(self) -> None:
        await self._flights.close()
        await self._transport.close()


def _content(keys: Sequence[VerificationKey]) -> list[tuple[str | None, str | None, str]]:
    return [(each.kid, each.alg, each.thumbprint()) for each in keys]


def _read(path: Path) -> str:
    """The token in a file.  Raises OriginFailed."""
    try:
        text = path.read_text("ascii").strip()
    except OSError as error:
        raise OriginFailed(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        text = ""
    if not text or not text.isprintable() or " " in text:
        raise OriginFailed(f"{path} holds no token")
    return text
