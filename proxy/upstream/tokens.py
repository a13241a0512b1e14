"""The Authorization header for an upstream: tokens issued after a challenge, cached by scope.

Rules:
- No token is requested before the upstream has sent a challenge.
- A realm gets our credentials only if it is on the upstream's own host or registrable domain, or allowed by
  the operator.  Without credentials, any realm may be asked by https: there is nothing to steal.
- There is one request at a time for a scope; all callers that wait share its outcome.
- A realm is remembered while it issues tokens, and forgotten when it fails: the upstream may use another one
  by now, and names it in its next challenge.

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
from yarl import URL  # aiohttp's own: the URL checked here is the one it connects to

from proxy.telemetry.tracing import step
from proxy.upstream.challenges import Challenge, parse_challenges
from proxy.upstream.credentials import Credential, Credentials
from storage.concurrency import SingleFlight
from storage.errors import OriginDenied, OriginFailed, OriginTimeout, TooManyRequests, Unavailable

log = structlog.get_logger()

TOKENS_KEPT = 10_000
LIFETIME = 60.0  # seconds, if the realm does not state it: the specification's default


def realm_allowed(realm: URL, host: str, allowed: Collection[str] = (), *, plain_http: bool = False) -> bool:
    """Whether an upstream at `host` may name `realm` in a challenge.

    Its own host is allowed, on any port, its registrable domain, and each of `allowed`: a host, or host:port
    for that port alone.  Plain http is allowed only with `plain_http`.
    """
    theirs, ours = _host(realm), _host(URL(f"https://{host}"))
    if not _anonymously_allowed(realm, plain_http):
        return False
    if theirs == ours or theirs in allowed or f"{theirs}:{realm.port}" in allowed:
        return True
    domain = _registrable_domain(theirs)
    return domain is not None and domain == _registrable_domain(ours)


def _anonymously_allowed(realm: URL, plain_http: bool) -> bool:
    secure = realm.scheme == "https" or (plain_http and realm.scheme == "http")
    # A user name in the URL would take the place of our credentials.
    return secure and _host(realm) != "" and realm.user is None and realm.password is None


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
class TokenResponse:
    """The response of a token realm; `retry_after` is in seconds, if it is stated."""

    status: int
    content: bytes
    retry_after: float | None = None


class Fetch(Protocol):
    """Sends one request to a token realm."""

    async def __call__(
        self, method: str, url: URL, *, headers: Mapping[str, str], form: Mapping[str, str] | None = None
    ) -> TokenResponse:
        """The response, whatever its status; `form` is sent as application/x-www-form-urlencoded.

        It follows no redirects, and limits time and content.  Raises OriginFailed, OriginTimeout.
        """
        ...


@dataclass(frozen=True)
class _Realm:
    """`trusted`: it may get our credentials."""

    url: URL
    service: str | None
    trusted: bool


@dataclass(frozen=True)
class _Token:
    authorization: str
    until: float


class _JSONToken(msgspec.Struct):
    token: str | None = None
    access_token: str | None = None
    expires_in: float | None = None


class TokenCache:
    """Authorization values for one upstream at `host` (with its port, if it has one), cached by scope.

    `allowed_realms` and `plain_http` are as in realm_allowed().  `on_fetch` is called with the result of each
    token request: "ok", "denied" or "failed".  `on_login` is called with the host of a realm and the status
    of its answer, if credentials were sent.  Who gives `flights` also closes them.
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
        on_login: Callable[[str, int], None] | None = None,
        flights: SingleFlight | None = None,
    ) -> None:
        self._host, self._credentials, self._fetch = host, credentials, fetch
        self._allowed, self._plain_http = frozenset(allowed_realms), plain_http
        self._clock = clock
        self._on_fetch = on_fetch or (lambda result: None)
        self._on_login = on_login or (lambda host, status: None)
        self.logged_in = False  # the values are those of credentials, not anonymous
        self._tokens: dict[str, _Token] = {}  # by scope, oldest first
        self._flights = SingleFlight() if flights is None else flights
        self._realm: _Realm | None = None  # the last one that issued a token
        self._basic = False  # the upstream wants Basic

    async def authorization(self, scope: str) -> str | None:
        """The value for `scope` ("repository:library/alpine:pull"), or None before the first challenge.

        Raises OriginTimeout, TooManyRequests, and OriginDenied if the credentials cannot be read.
        """
        if token := self._fresh(scope):
            return token
        if self._basic:
            return await self._basic_value(scope)
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
            return None  # the next challenge shows whether the realm is still the same

    async def renew(self, scope: str, challenges: Sequence[str], used: str | None) -> str | None:
        """The value to try after a 401 or 403 with these WWW-Authenticate values, or None if there is none.

        `used` is the value that was refused, and is forgotten.  If another caller has renewed it meanwhile,
        the newer value is returned without a request.

        Raises OriginDenied if the realm is not allowed or refuses the credentials, TooManyRequests and
        OriginFailed if it fails, and what `fetch` raises.
        """
        if token := self._fresh(scope):
            if token != used:
                return token
            del self._tokens[scope]
        offered = parse_challenges(challenges)
        bearer = next((each for each in offered if each.scheme == "bearer"), None)
        basic = any(each.scheme == "basic" for each in offered)
        if not offered and used:  # a 403 usually has no challenge: renew the same way as before
            basic = used.startswith("Basic ")
            if not basic and self._realm:
                return await self._token(scope, self._realm, scope)
        if bearer:
            try:
                realm = await self._accept(bearer, scope)
            except OriginDenied:
                if basic and (value := await self._renew_basic(scope, used)):
                    return value
                raise
            return await self._token(scope, realm, _wanted_scope(bearer, scope))
        return await self._renew_basic(scope, used) if basic else None

    async def close(self) -> None:
        await self._flights.close()

    def _fresh(self, scope: str) -> str | None:
        token = self._tokens.get(scope)
        return token.authorization if token and self._clock() < token.until else None

    async def _basic_value(self, scope: str) -> str | None:
        credential = await self._credentials.get(self._host, _repository(scope))
        self.logged_in = credential is not None
        return credential.basic() if credential else None

    async def _renew_basic(self, scope: str, used: str | None) -> str | None:
        value = await self._basic_value(scope)
        if value is not None and value == used:
            self._credentials.forget()
            value = await self._basic_value(scope)
        if value is None or value == used:
            return None
        self._basic = True
        return value

    async def _accept(self, challenge: Challenge, scope: str) -> _Realm:
        """Raises OriginDenied."""
        text = challenge.parameters.get("realm", "")
        try:
            url = URL(text)
            trusted = realm_allowed(url, self._host, self._allowed, plain_http=self._plain_http)
            allowed = trusted or _anonymously_allowed(url, self._plain_http)
        except ValueError:
            allowed = False
        if not allowed:
            raise self._refused(text)
        realm = _Realm(url, challenge.parameters.get("service"), trusted)
        await self._credential(realm, scope)
        return realm

    async def _credential(self, realm: _Realm, scope: str) -> Credential | None:
        """The credential for a realm.  Raises OriginDenied if there is one that the realm must not get."""
        credential = await self._credentials.get(self._host, _repository(scope))
        if credential is not None and not realm.trusted:
            raise self._refused(str(realm.url))
        self.logged_in = credential is not None
        return credential

    def _refused(self, realm: str) -> OriginDenied:
        log.warning("token.realm_refused", host=self._host, realm=realm[:200])
        return OriginDenied(
            f"{self._host} requests tokens from {realm[:200]!r}, which is not an https address on its own"
            " domain: allow the host with token_realms, http with plain_http"
        )

    async def _token(self, scope: str, realm: _Realm, wanted: str) -> str:
        # The realm is in the key, so that a caller with a new challenge does not wait for a former realm.
        key = self._host, scope, realm
        return await self._flights.join(key, lambda: self._traced(scope, realm, wanted))

    async def _traced(self, scope: str, realm: _Realm, wanted: str) -> str:
        described = {"entrepot.token.realm": realm.url.raw_host or "", "entrepot.token.scope": wanted}
        with step("token", attributes=described):
            return await self._issue(scope, realm, wanted)

    async def _issue(self, scope: str, realm: _Realm, wanted: str) -> str:
        credential = await self._credential(realm, scope)
        try:
            token = await self._request_token(realm, wanted, credential)
        except OriginDenied:
            self._credentials.forget()
            again = await self._credential(realm, scope)
            if again == credential:
                raise
            token = await self._request_token(realm, wanted, again)
        self._tokens.pop(scope, None)
        self._tokens[scope] = token
        if len(self._tokens) > TOKENS_KEPT:
            del self._tokens[next(iter(self._tokens))]
        self._realm, self._basic = realm, False
        return token.authorization

    async def _request_token(self, realm: _Realm, wanted: str, credential: Credential | None) -> _Token:
        """One token request, counted."""
        begun = self._clock()  # the lifetime starts later than this
        try:
            response = await self._request(realm, wanted, credential)
            if credential is not None:
                self._on_login(realm.url.host_port_subcomponent or "", response.status)
            token, lifetime = _issued(response, realm.url, credential is None)
        except OriginDenied:
            self._on_fetch("denied")
            raise
        except Exception:
            self._on_fetch("failed")
            raise
        self._on_fetch("ok")
        # A token is not used if it could expire before it arrives.
        margin = min(max(lifetime / 10, 5), lifetime / 2)
        return _Token(f"Bearer {token}", begun + lifetime - margin)

    async def _request(self, realm: _Realm, wanted: str, credential: Credential | None) -> TokenResponse:
        service = {"service": realm.service} if realm.service is not None else {}
        if credential and credential.identity_token:
            form = {"grant_type": "refresh_token", "refresh_token": credential.identity_token}
            form |= {"client_id": "entrepot", "scope": wanted} | service
            return await self._fetch("POST", realm.url, headers={}, form=form)
        headers = {}
        query = [*service.items(), *(("scope", each) for each in wanted.split())]
        if credential and (basic := credential.basic()):
            headers["Authorization"] = basic
            query.append(("account", credential.username))
        return await self._fetch("GET", realm.url.extend_query(query), headers=headers)


def _repository(scope: str) -> str:
    """The first one that a scope names: `a/b` in "repository:a/b:pull"; empty if it names none."""
    kind, _, rest = scope.partition(" ")[0].partition(":")
    return rest.rpartition(":")[0] if kind == "repository" else ""


def _wanted_scope(challenge: Challenge, scope: str) -> str:
    """The challenge's scope, in the upstream's own words, and the parts of `scope` that it does not cover."""
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


def _issued(response: TokenResponse, url: URL, anonymous: bool) -> tuple[str, float]:
    """The token and its lifetime in seconds.  Raises OriginDenied, TooManyRequests, OriginFailed."""
    realm = f"the token realm {url.with_query(None)}"
    if response.status in (401, 403):
        reason = "issues no token without credentials" if anonymous else "refuses the configured credentials"
        raise OriginDenied(f"{realm} {reason} (status {response.status})")
    if response.status == 429:
        raise TooManyRequests(f"{realm} limits our requests", retry_after=response.retry_after)
    if response.status != 200:
        raise OriginFailed(f"{realm} answered status {response.status}", retry_after=response.retry_after)
    try:
        # Not strict: some realms write expires_in as a string.
        found = msgspec.json.decode(response.content, type=_JSONToken, strict=False)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise OriginFailed(f"{realm} answered without a token: {error}") from None
    token = found.token or found.access_token or ""
    if not (token.isascii() and token.isprintable() and token):
        raise OriginFailed(f"{realm} answered without a token")
    lifetime = found.expires_in
    return token, lifetime if lifetime and lifetime > 0 else LIFETIME
