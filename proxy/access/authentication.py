"""Authentication: verifies the credentials of a request, and slows down password guessing.

The Authorization header takes precedence over a client certificate: it belongs to the request, and is meant
for this server.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from aiohttp import web

from proxy.access.client_address import ClientAddresses, parse
from proxy.access.credentials import BadCredential, CredentialVerifier
from proxy.access.rules import IPAddress, Principal
from proxy.access.throttle import LoginThrottle
from proxy.upstream.credentials import Credential
from storage.errors import Unauthorized

if TYPE_CHECKING:  # they need libraries that not every configuration needs
    from proxy.access.bearer import TokenVerifier
    from proxy.access.htpasswd import Htpasswd

_DATED = "asof+"  # what a user begins with who is no name but a date
_ANONYMOUS = ("Basic Og==", "basic Og==")  # an empty user with an empty password


@dataclass(frozen=True)
class Authenticator:
    """Authenticates the clients of requests.

    With neither passwords nor tokens no client is challenged, and the Authorization header is ignored.

    verifiers: those of credentials besides passwords and the tokens of the token server
    service: the realm and the service of the token server
    groups: the groups of each user
    """

    passwords: Htpasswd | None = None
    tokens: TokenVerifier | None = None
    verifiers: Sequence[CredentialVerifier] = ()
    service: tuple[str, str] = ("", "")
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

    def challenges(self, scope: str = "", error: str = "") -> tuple[str, ...]:
        """The values of WWW-Authenticate: one at most.

        Of two challenges, docker would have to meet both, and podman takes the first.
        """
        if self.tokens is not None:
            realm, service = self.service
            parameters = {"realm": realm, "service": service, "scope": scope, "error": error}
            return ("Bearer " + ",".join(f'{name}="{value}"' for name, value in parameters.items() if value),)
        return (self.basic,) if self.passwords is not None or self.verifiers else ()

    async def identify(self, request: web.BaseRequest, scope: str = "") -> Principal:
        """Return who sent the request.

        Raises Unauthorized, with a challenge for `scope`, if its credentials are wrong; and Throttled.
        """
        address = self.addresses.of(request.remote, request.headers)
        header = authorization(request) if self.accepts_credentials else ""
        scheme, _, value = header.partition(" ")
        scheme = scheme.lower()
        if not scheme:
            principal = _certified(request)
            groups = principal.groups | self.groups.get(principal.user, frozenset())
            local = self.addresses.is_local(request)
            return replace(principal, groups=groups, address=address, local=local)
        if (found := self._recognizing(request)) is not None:
            return replace(await self._verified(*found, scope), address=address)
        if scheme == "basic" and self.passwords is not None:
            user = await self._by_password(request, self.passwords, scope)
            return Principal(user, "password", self.groups.get(user, frozenset()), address=address)
        if scheme == "bearer" and self.tokens is not None:
            return replace(self._by_token(self.tokens, value.strip(), scope), address=address)
        raise self.unauthorized(f"{scheme[:20]!r} credentials are not accepted", scope)

    def renewal(self, request: web.BaseRequest) -> Callable[[], bool]:
        """Whether identify() still returns what it has just returned for this request, without waiting."""
        header = authorization(request) if self.accepts_credentials else ""
        scheme, _, value = header.partition(" ")
        if scheme and (found := self._recognizing(request)) is not None:
            verifier, user, secret = found
            return partial(verifier.remembers, user, secret)
        if scheme.lower() == "basic" and self.passwords is not None:
            login = credential(request)
            return partial(self.passwords.remembers, login.username, login.password) if login else never
        if scheme.lower() == "bearer" and self.tokens is not None:
            return partial(self.tokens.remembers, value.strip())
        return never if scheme else lambda: True  # anonymous: the address and the headers decide

    def _recognizing(self, request: web.BaseRequest) -> tuple[CredentialVerifier, str, str] | None:
        """The verifier of the credential of a request, its user and the credential itself."""
        if not self.verifiers:
            return None
        scheme, _, value = authorization(request).partition(" ")
        login = Credential("", value.strip()) if scheme.lower() == "bearer" else credential(request)
        if login is None:
            return None
        found = next((each for each in self.verifiers if each.recognizes(login.password)), None)
        return None if found is None else (found, login.username, login.password)

    async def _verified(self, verifier: CredentialVerifier, user: str, secret: str, scope: str) -> Principal:
        try:
            return await verifier.verify(user, secret)
        except BadCredential as error:
            raise self.unauthorized(
                f"{verifier.what} is not accepted: {error}", scope, "invalid_token"
            ) from None

    async def _by_password(self, request: web.BaseRequest, passwords: Htpasswd, scope: str) -> str:
        login = credential(request)
        if login is None:
            raise self.unauthorized(
                "the Authorization header is not Basic with user:password in base64", scope
            )
        user, password = login.username, login.password
        if not passwords.remembers(user, password) and not await self.throttle.attempt(
            self.source_address(request), user, lambda: passwords.verify(user, password)
        ):
            raise self.unauthorized("the user name or the password is wrong", scope)
        return user

    def _by_token(self, tokens: TokenVerifier, token: str, scope: str) -> Principal:
        from proxy.access.bearer import BadToken

        try:
            return tokens.verify(token)
        except BadToken as error:
            raise self.unauthorized(f"the token is not accepted: {error}", scope, "invalid_token") from None

    def unauthorized(self, message: str, scope: str, error: str = "") -> Unauthorized:
        return Unauthorized(message, challenges=self.challenges(scope, error))

    def source_address(self, request: web.BaseRequest) -> IPAddress | None:
        """The address that failed logins are counted for: the client's; if unknown, the connection's."""
        return self.addresses.of(request.remote, request.headers) or parse(request.remote or "")


def authorization(request: web.BaseRequest) -> str:
    """The Authorization header.

    "" without one, with podman's empty user and empty password, or with a user that is no name but a date.
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


def never() -> bool:
    return False


def _certified(request: web.BaseRequest) -> Principal:
    """The owner of the certificate that the listener has verified: its CN is the user, its OUs are groups."""
    shown = request.get_extra_info("peercert") or {}
    names = [pair for part in shown.get("subject", ()) for pair in part]
    user = next((value for name, value in names if name == "commonName"), "")
    units = frozenset(value for name, value in names if name == "organizationalUnitName")
    return Principal(user, "certificate", units) if user else Principal()
