"""Who a request's client is: what it shows of itself is verified, and whoever tries is slowed down.

Authorization counts before a client's certificate: it is said with the request, and to us.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from aiohttp import web

from proxy.access.client_address import ClientAddresses, parse
from proxy.access.rules import IPAddress, Principal
from proxy.access.throttle import LoginThrottle
from proxy.upstream.credentials import Credential
from storage.errors import Unauthorized

if TYPE_CHECKING:  # they need libraries that not every server does
    from proxy.access.bearer import TokenVerifier
    from proxy.access.htpasswd import Htpasswd

_NOBODY = ("Basic Og==", "basic Og==")


@dataclass(frozen=True)
class Authenticator:
    """What is taken for a proof.  `service` is realm and service of the token server.

    `groups` are those of each user.  With neither passwords nor tokens nobody is challenged, and what a
    client shows in Authorization is not looked at.
    """

    passwords: Htpasswd | None = None
    tokens: TokenVerifier | None = None
    service: tuple[str, str] = ("", "")
    realm: str = "entrepot"
    groups: Mapping[str, frozenset[str]] = field(default_factory=dict)
    addresses: ClientAddresses = field(default_factory=ClientAddresses)
    attempts: LoginThrottle = field(default_factory=LoginThrottle)

    @property
    def taken(self) -> bool:
        return self.passwords is not None or self.tokens is not None

    @property
    def basic(self) -> str:
        return f'Basic realm="{self.realm}"'

    def challenges(self, scope: str = "", error: str = "") -> tuple[str, ...]:
        """Values of WWW-Authenticate: one at most.

        Offered both, docker would have to meet both, and podman takes whichever comes first.
        """
        if self.tokens is not None:
            realm, service = self.service
            given = {"realm": realm, "service": service, "scope": scope, "error": error}
            return ("Bearer " + ",".join(f'{name}="{value}"' for name, value in given.items() if value),)
        return (self.basic,) if self.passwords is not None else ()

    async def identify(self, request: web.BaseRequest, scope: str = "") -> Principal:
        """Raises Unauthorized, with a challenge for `scope`, where a proof is wrong; and Throttled."""
        address = self.addresses.of(request.remote, request.headers)
        header = authorization(request) if self.taken else ""
        scheme, _, value = header.partition(" ")
        scheme = scheme.lower()
        if not scheme:
            principal = _certified(request)
            groups = principal.groups | self.groups.get(principal.user, frozenset())
            return replace(principal, groups=groups, address=address)
        if scheme == "basic" and self.passwords is not None:
            user = await self._by_password(request, self.passwords, scope)
            return Principal(user, "password", self.groups.get(user, frozenset()), address=address)
        if scheme == "bearer" and self.tokens is not None:
            return replace(self._by_token(self.tokens, value.strip(), scope), address=address)
        raise self.wrong(f"{scheme[:20]!r} credentials are not taken here", scope)

    async def _by_password(self, request: web.BaseRequest, passwords: Htpasswd, scope: str) -> str:
        given = credential(request)
        if given is None:
            raise self.wrong("Authorization is not Basic with base64 of user:password", scope)
        user, password = given.username, given.password
        if not passwords.remembers(user, password) and not await self.attempts.make(
            self.place(request), user, lambda: passwords.verify(user, password)
        ):
            raise self.wrong("the user name or the password is wrong", scope)
        return user

    def _by_token(self, tokens: TokenVerifier, token: str, scope: str) -> Principal:
        from proxy.access.bearer import BadToken

        try:
            return tokens.verify(token)
        except BadToken as error:
            raise self.wrong(f"the token does not count: {error}", scope, "invalid_token") from None

    def wrong(self, message: str, scope: str, error: str = "") -> Unauthorized:
        return Unauthorized(message, challenges=self.challenges(scope, error))

    def place(self, request: web.BaseRequest) -> IPAddress | None:
        """Where attempts come from: the client, or if that cannot be told, who asks for it."""
        return self.addresses.of(request.remote, request.headers) or parse(request.remote or "")


def authorization(request: web.BaseRequest) -> str:
    """The header, or empty: podman says "nobody" by an empty user with an empty password."""
    header = request.headers.get("Authorization", "").strip()
    return "" if header in _NOBODY else header


def credential(request: web.BaseRequest) -> Credential | None:
    """The user and password of a Basic Authorization (RFC 7617), if there is one."""
    scheme, _, value = authorization(request).partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        user, colon, password = base64.b64decode(value.strip(), validate=True).decode().partition(":")
    except ValueError:  # binascii.Error and UnicodeDecodeError are ones
        return None
    return Credential(user, password) if colon else None


def _certified(request: web.BaseRequest) -> Principal:
    """By the certificate that the listener has verified: its CN is the user, its OU are groups."""
    shown = request.get_extra_info("peercert") or {}
    names = [pair for part in shown.get("subject", ()) for pair in part]
    user = next((value for name, value in names if name == "commonName"), "")
    units = frozenset(value for name, value in names if name == "organizationalUnitName")
    return Principal(user, "certificate", units) if user else Principal()
