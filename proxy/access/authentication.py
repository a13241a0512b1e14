"""Authentication: verifies the credentials of a request, and slows down password guessing.

The Authorization header takes precedence over a client certificate: it belongs to the request, and is meant
for this server.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from aiohttp import web

from proxy.access.client_address import ClientAddresses, absolute, parse
from proxy.access.credentials import KEY, BadCredential, CredentialVerifier
from proxy.access.rules import IPAddress, Principal
from proxy.access.throttle import LoginThrottle
from proxy.telemetry.exchange import KeyLock
from proxy.upstream.credentials import Credential
from storage.errors import Unauthorized

if TYPE_CHECKING:  # they need libraries that not every configuration needs
    from proxy.access.bearer import TokenVerifier
    from proxy.access.htpasswd import Htpasswd

LOCKING = (KEY, "issued")  # schemes of credentials that may have a lock
TOKEN_PATH = "/token"  # of this server's own token endpoint
_PREFIX = re.compile(r"(/(?!v2/)[^/]+)/v2/")
_DATED = "asof+"  # what a user begins with who is no name but a date
_UNQUOTABLE = {ord('"'): "%22", ord("\\"): "%5C"}
_SCHEMES = ("basic", "bearer", "digest", "negotiate", "ntlm")  # that are told in messages
NOBODYS_TOKEN = "anonymous"  # given to whoever asks for a token where there is no token endpoint
# An empty user with an empty password; nobody's token; that of ghcr.io, which Homebrew sends to any registry.
_ANONYMOUS = ("Basic Og==", "basic Og==", f"Bearer {NOBODYS_TOKEN}", "Bearer QQ==")


@dataclass(frozen=True)
class Authenticator:
    """Authenticates the clients of requests.

    With neither passwords nor tokens no client is challenged, and the Authorization header is ignored.

    verifiers: those of credentials besides passwords and the tokens of the token server
    service: the realm and the service of the token server
    endpoint: the service and the realm of this server's own token endpoint; None without one, and the realm
        is None if it is that by which the client reaches this server
    groups: the groups of each user
    """

    passwords: Htpasswd | None = None
    tokens: TokenVerifier | None = None
    verifiers: Sequence[CredentialVerifier] = ()
    service: tuple[str, str] = ("", "")
    endpoint: tuple[str, str | None] | None = None
    realm: str = "entrepot"
    groups: Mapping[str, frozenset[str]] = field(default_factory=dict)
    addresses: ClientAddresses = field(default_factory=ClientAddresses)
    throttle: LoginThrottle = field(default_factory=LoginThrottle)

    @property
    def accepts_credentials(self) -> bool:
        return self.passwords is not None or self.tokens is not None or bool(self.verifiers)

    @property
    def basic(self) -> str:
        return f'Basic realm="{self.realm}"'

    @property
    def sends_for_tokens(self) -> bool:
        """Whether clients are challenged for a token."""
        return self.tokens is not None or self.endpoint is not None

    def challenges(self, request: web.BaseRequest, scope: str = "", error: str = "") -> tuple[str, ...]:
        """The values of WWW-Authenticate: one at most.

        Of two challenges, docker would have to meet both, and podman takes the first.
        """
        if self.sends_for_tokens:
            realm, service = self._realm(request)
            parameters = {"realm": realm, "service": service, "scope": scope, "error": error}
            return ("Bearer " + ",".join(f'{name}="{value}"' for name, value in parameters.items() if value),)
        return (self.basic,) if self.passwords is not None or self.verifiers else ()

    def _realm(self, request: web.BaseRequest) -> tuple[str, str]:
        if self.endpoint is None:
            return self.service
        service, realm = self.endpoint
        # Below the path of a mirror, clients ask for tokens by the names that repositories have there.
        prefix = _PREFIX.match(request.rel_url.raw_path)
        path = f"{prefix[1] if prefix else ''}{TOKEN_PATH}"
        return realm or _quotable(absolute(request, path)), service

    async def identify(self, request: web.BaseRequest, scope: str = "") -> Principal:
        """Return who sent the request.

        Raises Unauthorized, with a challenge for `scope`, if its credentials are wrong; Throttled; and what
        verifiers raise that cannot verify anything now.
        """
        header = authorization(request) if self.accepts_credentials else ""
        scheme, _, value = header.partition(" ")
        scheme = scheme.lower()
        if not scheme:
            principal = _certified(request)
            groups = principal.groups | self.groups.get(principal.user, frozenset())
            local = self.addresses.is_local(request)
            return self.located(replace(principal, groups=groups, local=local), request)
        login = _shown(request)
        if scheme == "basic" and login is None:
            raise self.unauthorized(
                request, "the Authorization header is not Basic with user:password in base64", scope
            )
        if login is not None and self._accepts(login, scheme):
            return await self.identify_login(request, login, scope)
        if scheme == "bearer" and self.tokens is not None:
            principal = self._by_token(request, self.tokens, value.strip(), scope)
            return self.located(principal, request)
        # Another word may be the credential itself, without a scheme.
        named = scheme if scheme in _SCHEMES else "such"
        raise self.unauthorized(request, f"{named} credentials are not accepted", scope)

    def _accepts(self, login: Credential, scheme: str) -> bool:
        return (scheme == "basic" and self.passwords is not None) or (
            self._verifier(login.password) is not None
        )

    async def identify_login(self, request: web.BaseRequest, login: Credential, scope: str = "") -> Principal:
        """Return whose login this is, which the request has; without a user it is a bearer token.

        Raises what identify() raises.
        """
        if (verifier := self._verifier(login.password)) is not None:
            principal = await self._verified(request, verifier, login, scope)
        elif self.passwords is not None:
            principal = await self._by_password(request, self.passwords, login, scope)
        else:
            raise self.unauthorized(request, "passwords are not accepted", scope)
        return self.located(principal, request)

    def renewed_user(self, principal: Principal) -> Principal | None:
        """A user as it is now, whom a password has identified before: see CredentialVerifier.renew()."""
        proof = "" if self.passwords is None else self.passwords.proof(principal.user)
        if not proof or proof != principal.proof:
            return None
        groups = self.groups.get(principal.user, frozenset())
        return principal if groups == principal.groups else replace(principal, groups=groups)

    def renewal(self, request: web.BaseRequest) -> Callable[[], bool]:
        """Whether identify() still returns what it has just returned for this request, without waiting."""
        header = authorization(request) if self.accepts_credentials else ""
        scheme, _, value = header.partition(" ")
        login = _shown(request)
        if login is not None and (verifier := self._verifier(login.password)) is not None:
            return partial(verifier.remembers, login.username, login.password)
        if scheme.lower() == "basic" and self.passwords is not None:
            return partial(self.passwords.remembers, login.username, login.password) if login else never
        if scheme.lower() == "bearer" and self.tokens is not None:
            return partial(self.tokens.remembers, value.strip())
        return never if scheme else lambda: True  # anonymous: the address and the headers decide

    def foreign(self, request: web.BaseRequest) -> Credential | None:
        """The login of a request if it may be one at an upstream: no API key and no token of this server."""
        login = credential(request)
        return None if login is None or self._verifier(login.password) is not None else login

    async def lock(self, request: web.BaseRequest) -> KeyLock | None:
        """The lock of an API key that a request has where no credentials are needed; None without one."""
        if not self.verifiers or (login := _shown(request)) is None:
            return None
        verifier = self._verifier(login.password)
        if verifier is None or verifier.scheme not in LOCKING:
            return None
        try:
            return (await verifier.verify(login.username, login.password)).lock
        except BadCredential:
            return None

    def _verifier(self, secret: str) -> CredentialVerifier | None:
        return next((each for each in self.verifiers if each.recognizes(secret)), None)

    async def _verified(
        self, request: web.BaseRequest, verifier: CredentialVerifier, login: Credential, scope: str
    ) -> Principal:
        try:
            return await verifier.verify(login.username, login.password)
        except BadCredential as error:
            message = f"{verifier.what} is not accepted: {error}"
            raise self.unauthorized(request, message, scope, "invalid_token") from None

    async def _by_password(
        self, request: web.BaseRequest, passwords: Htpasswd, login: Credential, scope: str
    ) -> Principal:
        user, password = login.username, login.password
        if not passwords.remembers(user, password) and not await self.throttle.attempt(
            self.source_address(request), user, lambda: passwords.verify(user, password)
        ):
            raise self.unauthorized(request, "the user name or the password is wrong", scope)
        groups = self.groups.get(user, frozenset())
        return Principal(user, "password", groups, proof=passwords.proof(user))

    def _by_token(self, request: web.BaseRequest, tokens: TokenVerifier, token: str, scope: str) -> Principal:
        from proxy.access.bearer import BadToken

        try:
            return tokens.verify(token)
        except BadToken as error:
            message = f"the token is not accepted: {error}"
            raise self.unauthorized(request, message, scope, "invalid_token") from None

    def unauthorized(
        self, request: web.BaseRequest, message: str, scope: str, error: str = ""
    ) -> Unauthorized:
        return Unauthorized(message, challenges=self.challenges(request, scope, error))

    def located(self, principal: Principal, request: web.BaseRequest) -> Principal:
        """The principal, at the address that the request comes from."""
        return replace(principal, address=self.addresses.of(request.remote, request.headers))

    def source_address(self, request: web.BaseRequest) -> IPAddress | None:
        """The address that failed logins are counted for: the client's; if unknown, the connection's."""
        return self.addresses.of(request.remote, request.headers) or parse(request.remote or "")


def authorization(request: web.BaseRequest) -> str:
    """The Authorization header.

    "" without one, with credentials of nobody, as podman and Homebrew send them, or with a user that is no
    name but a date.
    """
    header = request.headers.get("Authorization", "").strip()
    return "" if header in _ANONYMOUS or dated_user(request) else header


def credential(request: web.BaseRequest) -> Credential | None:
    """The user and password of Basic authorization (RFC 7617); None without one."""
    return _basic(authorization(request))


def dated_user(request: web.BaseRequest) -> str:
    """The date of a user `asof+<date>`, who wants tags as they were then; "" for another one or none."""
    header = request.headers.get("Authorization", "").strip()
    found = _basic(header) if header else None
    user = "" if found is None else found.username
    return user.removeprefix(_DATED) if user.startswith(_DATED) else ""


def _basic(header: str) -> Credential | None:
    scheme, _, value = header.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        user, colon, password = base64.b64decode(value.strip(), validate=True).decode().partition(":")
    except ValueError:  # the base class of binascii.Error and UnicodeDecodeError
        return None
    return Credential(user, password) if colon else None


def _shown(request: web.BaseRequest) -> Credential | None:
    """The login of a request; a bearer token is one without a user."""
    scheme, _, value = authorization(request).partition(" ")
    return Credential("", value.strip()) if scheme.lower() == "bearer" else credential(request)


def _quotable(url: str) -> str:
    """The URL as it can be a quoted string in a header, whatever Host a client has sent."""
    return url.translate(_UNQUOTABLE)


def never() -> bool:
    return False


def _certified(request: web.BaseRequest) -> Principal:
    """The owner of the certificate that the listener has verified: its CN is the user, its OUs are groups."""
    shown = request.get_extra_info("peercert") or {}
    names = [pair for part in shown.get("subject", ()) for pair in part]
    user = next((value for name, value in names if name == "commonName"), "")
    units = frozenset(value for name, value in names if name == "organizationalUnitName")
    return Principal(user, "certificate", units) if user else Principal()
