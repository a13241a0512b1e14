"""Anonymous tokens for the registries to which an upstream redirects its API.

Gateways of vendors redirect to a registry on another domain, which then demands a token.  The token is one
that anyone can get: our credentials are for the upstream only.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence

from yarl import URL

from proxy.upstream.challenges import parse_challenges
from proxy.upstream.credentials import Credentials
from proxy.upstream.tokens import Fetch, TokenCache
from storage.concurrency import SingleFlight
from storage.errors import TooManyRequests, Unavailable

HOSTS = 20  # registries whose tokens are kept
_API = re.compile(r"/v2/(.+)/(?:manifests|blobs|tags|referrers)/")


class AnonymousTokens:
    """Authorization values for hosts other than the upstream's own.

    `plain_http` and `on_fetch` are those of TokenCache.
    """

    def __init__(
        self,
        fetch: Fetch,
        *,
        plain_http: bool = False,
        clock: Callable[[], float] = time.monotonic,
        on_fetch: Callable[[str], None] | None = None,
    ) -> None:
        self._fetch, self._plain_http = fetch, plain_http
        self._clock, self._on_fetch = clock, on_fetch
        self._hosts: dict[URL, TokenCache] = {}  # by origin; those that sent a challenge, oldest first
        self._flights = SingleFlight()

    async def authorization(self, url: URL) -> str | None:
        """The value for `url`, or None before the first challenge of its host.

        Raises OriginDenied, OriginTimeout, Unavailable.
        """
        tokens = self._hosts.get(url.origin())
        if tokens is None:
            return None
        try:
            return await tokens.authorization(_scope(url))
        except TooManyRequests as error:
            raise _unavailable(error) from None

    async def renew(self, url: URL, challenges: Sequence[str], used: str | None) -> str | None:
        """The value to try after `url` was refused, or None if there is none.  As TokenCache.renew()."""
        # Azure's storage refuses with a Bearer challenge that names no realm.
        named = any(
            each.scheme == "bearer" and each.parameters.get("realm") for each in parse_challenges(challenges)
        )
        if not named and not used:
            return None
        try:
            return await self._tokens(url.origin()).renew(_scope(url), challenges, used)
        except TooManyRequests as error:
            raise _unavailable(error) from None

    def _tokens(self, origin: URL) -> TokenCache:
        if (found := self._hosts.get(origin)) is None:
            found = self._hosts[origin] = TokenCache(
                origin.host_port_subcomponent or "",
                Credentials(),
                self._fetch,
                plain_http=self._plain_http,
                clock=self._clock,
                on_fetch=self._on_fetch,
                flights=self._flights,
            )
            if len(self._hosts) > HOSTS:
                del self._hosts[next(iter(self._hosts))]
        return found

    async def close(self) -> None:
        await self._flights.close()


def _scope(url: URL) -> str:
    """The scope for `url`, whose repository may have another name than at the upstream."""
    found = _API.search(url.path)
    return f"repository:{found[1]}:pull" if found else ""


def _unavailable(error: TooManyRequests) -> Unavailable:
    # The limit is not that of our credentials.
    return Unavailable(str(error), retry_after=error.retry_after)
