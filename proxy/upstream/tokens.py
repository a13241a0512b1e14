"""What to put into Authorization for an upstream: challenge -> token, cached per scope.

Rules:
- Nothing is asked before the upstream has challenged us.
- A realm is asked, and so gets to see our credentials, only on the upstream's own host or registrable
  domain, or where the operator allows it; one that is not is not asked anonymously either.
- One request at a time for a scope, whose outcome all share who wait.
- A realm is remembered while it issues tokens, and forgotten when it fails: the upstream may have
  another one by now, and its next challenge tells.

Distribution, "Token Authentication Specification" and "OAuth2 Token Authentication".
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
import structlog
from publicsuffixlist import PublicSuffixList
from yarl import URL  # aiohttp's own: what is checked here is what it will connect to

from proxy.upstream.challenges import Challenge, parse_challenges
from proxy.upstream.credentials import Credential, Credentials
from storage.concurrency import SingleFlight
from storage.errors import OriginDenied, OriginFailed, OriginTimeout, TooManyRequests, Unavailable

log = structlog.get_logger()

TOKENS_KEPT = 10_000
LIFETIME = 60.0  # seconds, where the realm does not tell: the specification's default


def realm_allowed(realm: URL, host: str, allowed: Collection[str] = (), *, plain_http: bool = False) -> bool:
    """Whether an upstream at `host` may send us to `realm`.

    It may to its own host, on any port, to its registrable domain, and to those `allowed`: each a host, or
    host:port for that port alone.  By plain http only with `plain_http`.
    """
    secure = realm.scheme == "https" or (plain_http and realm.scheme == "http")
    theirs, ours = _host(realm), _host(URL(f"https://{host}"))
    # A user name in the URL would take the place of our credentials.
    if not secure or not theirs or realm.user is not None or realm.password is not None:
        return False
    if theirs == ours or theirs in allowed or f"{theirs}:{realm.port}" in allowed:
        return True
    domain = _registrable_domain(theirs)
    return domain is not None and domain == _registrable_domain(ours)


def _host(url: URL) -> str:
    return (url.host_subcomponent or "").rstrip(".")


def _registrable_domain(host: str) -> str | None:
    """None for an IP address, for a name of one label, and for a public suffix such as github.io."""
    if host.startswith("[") or host.rpartition(".")[2].isdecimal():
        return None
    domain: str | None = _public_suffixes().privatesuffix(host)
    return domain


@functools.cache
def _public_suffixes() -> PublicSuffixList:
    return PublicSuffixList()  # 40 ms: not at import


@dataclass(frozen=True)
class Answer:
    """What a realm answered; `retry_after` in seconds, where it told."""

    status: int
    content: bytes
    retry_after: float | None = None


class Fetch(Protocol):
    async def __call__(
        self, method: str, url: URL, *, headers: Mapping[str, str], form: Mapping[str, str] | None = None
    ) -> Answer:
        """One request, whatever its status; `form` is sent as application/x-www-form-urlencoded.

        It follows no redirect, and bounds time and content.  Raises OriginFailed, OriginTimeout.
        """
        ...


@dataclass(frozen=True)
class _Realm:
    url: URL
    service: str | None


@dataclass(frozen=True)
class _Token:
    authorization: str
    until: float


class _JSONToken(msgspec.Struct):
    token: str | None = None
    access_token: str | None = None
    expires_in: float | None = None


class TokenCache:
    """Authorization values for one upstream at `host` (with its port, if it has one).

    `allowed_realms` and `plain_http` as in realm_allowed().  `on_fetch` is told of each token request:
    "ok", "denied" or "failed".  The owner of `credentials` stays the caller.
    """

    def __init__(
        self,
        host: str,
        credentials: Credentials,
        fetch: Fetch,
        *,
        allowed_realms: Collection[str] = (),
        plain_http: bool = False,
        clock: Callable[[], float] = time.monotonic,
        on_fetch: Callable[[str], None] | None = None,
    ) -> None:
        self._host, self._credentials, self._fetch = host, credentials, fetch
        self._allowed, self._plain_http = frozenset(allowed_realms), plain_http
        self._clock = clock
        self._on_fetch = on_fetch or (lambda result: None)
        self._tokens: dict[str, _Token] = {}  # by scope, oldest first
        self._flights = SingleFlight()
        self._realm: _Realm | None = None  # the last one that issued a token
        self._basic = False  # the upstream wants Basic

    async def authorization(self, scope: str) -> str | None:
        """The value for `scope` ("repository:library/alpine:pull") as far as it is known unchallenged.

        None: ask without, and see.  Raises OriginTimeout, TooManyRequests; OriginDenied where the
        credentials cannot be read.
        """
        if token := self._fresh(scope):
            return token
        if self._basic:
            return await self._basic_value()
        if (realm := self._realm) is None:
            return None
        try:
            return await self._token(scope, realm, scope)
        except TooManyRequests:
            raise
        except (OriginDenied, Unavailable) as error:
            if self._realm is realm:
                self._realm = None
            if isinstance(error, OriginTimeout):
                raise
            return None  # the challenge will tell whether the realm is still the same

    async def renew(self, scope: str, challenges: Sequence[str], used: str | None) -> str | None:
        """What to try after a 401 or 403 with these WWW-Authenticate values; None: the refusal stands.

        `used` is the value that was refused, and is forgotten.  If another has renewed it meanwhile, that
        newer value is the answer, without a request.

        Raises OriginDenied when the realm is not allowed or refuses us, TooManyRequests and OriginFailed
        when it fails, and what `fetch` raises.
        """
        if token := self._fresh(scope):
            if token != used:
                return token
            del self._tokens[scope]
        offered = parse_challenges(challenges)
        bearer = next((each for each in offered if each.scheme == "bearer"), None)
        basic = any(each.scheme == "basic" for each in offered)
        if not offered and used:  # a 403 has no challenge as a rule: renew as before
            basic = used.startswith("Basic ")
            if not basic and self._realm:
                return await self._token(scope, self._realm, scope)
        if bearer:
            try:
                realm = self._accept(bearer)
            except OriginDenied:
                if basic and (value := await self._renew_basic(used)):
                    return value
                raise
            return await self._token(scope, realm, _asked(bearer, scope))
        return await self._renew_basic(used) if basic else None

    async def close(self) -> None:
        await self._flights.close()

    def _fresh(self, scope: str) -> str | None:
        token = self._tokens.get(scope)
        return token.authorization if token and self._clock() < token.until else None

    async def _basic_value(self) -> str | None:
        credential = await self._credentials.get(self._host)
        return credential.basic() if credential else None

    async def _renew_basic(self, used: str | None) -> str | None:
        value = await self._basic_value()
        if value is not None and value == used:
            self._credentials.forget()
            value = await self._basic_value()
        if value is None or value == used:
            return None
        self._basic = True
        return value

    def _accept(self, challenge: Challenge) -> _Realm:
        """Raises OriginDenied."""
        text = challenge.parameters.get("realm", "")
        try:
            url = URL(text)
            allowed = realm_allowed(url, self._host, self._allowed, plain_http=self._plain_http)
        except ValueError:
            allowed = False
        if not allowed:
            log.warning("token.realm_refused", host=self._host, realm=text[:200])
            raise OriginDenied(
                f"{self._host} sends us for a token to {text[:200]!r}, which is not an https address on its"
                " own domain: allow its host with token_realms, http with plain_http"
            )
        return _Realm(url, challenge.parameters.get("service"))

    async def _token(self, scope: str, realm: _Realm, asked: str) -> str:
        # With the realm in the key, nobody with a new challenge waits for a realm of the past.
        return await self._flights.join((scope, realm), lambda: self._issue(scope, realm, asked))

    async def _issue(self, scope: str, realm: _Realm, asked: str) -> str:
        credential = await self._credentials.get(self._host)
        try:
            token = await self._ask(realm, asked, credential)
        except OriginDenied:
            self._credentials.forget()
            again = await self._credentials.get(self._host)
            if again == credential:
                raise
            token = await self._ask(realm, asked, again)
        self._tokens.pop(scope, None)
        self._tokens[scope] = token
        if len(self._tokens) > TOKENS_KEPT:
            del self._tokens[next(iter(self._tokens))]
        self._realm, self._basic = realm, False
        return token.authorization

    async def _ask(self, realm: _Realm, asked: str, credential: Credential | None) -> _Token:
        """One token request, counted."""
        begun = self._clock()  # the lifetime counts from some moment after this one
        try:
            answer = await self._request(realm, asked, credential)
            token, lifetime = _issued(answer, realm.url, credential is None)
        except OriginDenied:
            self._on_fetch("denied")
            raise
        except Exception:
            self._on_fetch("failed")
            raise
        self._on_fetch("ok")
        # A token is no longer used when it could lapse on its way.
        margin = min(max(lifetime / 10, 5), lifetime / 2)
        return _Token(f"Bearer {token}", begun + lifetime - margin)

    async def _request(self, realm: _Realm, asked: str, credential: Credential | None) -> Answer:
        service = {"service": realm.service} if realm.service is not None else {}
        if credential and credential.identity_token:
            form = {"grant_type": "refresh_token", "refresh_token": credential.identity_token}
            form |= {"client_id": "entrepot", "scope": asked} | service
            return await self._fetch("POST", realm.url, headers={}, form=form)
        headers = {}
        query = [*service.items(), *(("scope", each) for each in asked.split())]
        if credential and (basic := credential.basic()):
            headers["Authorization"] = basic
            query.append(("account", credential.username))
        return await self._fetch("GET", realm.url.extend_query(query), headers=headers)


def _asked(challenge: Challenge, scope: str) -> str:
    """The challenge's scope, which may say it the upstream's way, and of ours what that does not cover."""
    theirs = challenge.parameters.get("scope", "").split()
    ours = [each for each in scope.split() if not any(_covers(wide, each) for wide in theirs)]
    theirs = [each for each in theirs if not any(_covers(wide, each) for wide in ours)]
    return " ".join([*theirs, *ours])


def _covers(wide: str, narrow: str) -> bool:
    """Whether type:name:actions of `wide` allows all of `narrow`.  Token specification, "resourcescope"."""
    resource, _, actions = wide.rpartition(":")
    wanted_resource, _, wanted = narrow.rpartition(":")
    return resource == wanted_resource and (
        actions == "*" or set(wanted.split(",")) <= set(actions.split(","))
    )


def _issued(answer: Answer, url: URL, anonymous: bool) -> tuple[str, float]:
    """The token and its lifetime in seconds.  Raises OriginDenied, TooManyRequests, OriginFailed."""
    realm = f"the token realm {url.with_query(None)}"
    if answer.status in (401, 403):
        reason = "gives no token without credentials" if anonymous else "refuses the configured credentials"
        raise OriginDenied(f"{realm} {reason} (status {answer.status})")
    if answer.status == 429:
        raise TooManyRequests(f"{realm} is asked too often", retry_after=answer.retry_after)
    if answer.status != 200:
        raise OriginFailed(f"{realm} answered status {answer.status}", retry_after=answer.retry_after)
    try:
        # Not strict: there are realms that write expires_in as a string.
        found = msgspec.json.decode(answer.content, type=_JSONToken, strict=False)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise OriginFailed(f"{realm} answered no token: {error}") from None
    token = found.token or found.access_token or ""
    if not (token.isascii() and token.isprintable() and token):
        raise OriginFailed(f"{realm} answered no token")
    lifetime = found.expires_in
    return token, lifetime if lifetime and lifetime > 0 else LIFETIME
