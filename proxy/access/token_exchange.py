"""The exchange of credentials for tokens of this server: who asks, and what the token is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aiohttp import web

from proxy.access.authentication import Authenticator
from proxy.access.credentials import BadCredential
from proxy.access.issuing import IssuedToken, TokenIssuer
from proxy.access.rules import Grant, Principal
from proxy.upstream.credentials import Credential
from storage.errors import Unauthorized


@dataclass(frozen=True)
class TokenExchange:
    """Identifies clients by what they exchange, and issues their tokens.

    A method that identifies raises Unauthorized, Throttled, and what the verifiers of credentials raise that
    cannot verify anything now.
    """

    authenticator: Authenticator
    issuer: TokenIssuer

    @property
    def service(self) -> str:
        return self.issuer.service

    async def by_request(self, request: web.BaseRequest) -> Principal:
        """By the credentials of the request; anonymous without any."""
        return self._checked(await self.authenticator.identify(request))

    async def by_password(self, request: web.BaseRequest, user: str, password: str) -> Principal:
        return self._checked(await self.authenticator.identify_login(request, Credential(user, password)))

    async def by_refresh_token(self, request: web.BaseRequest, token: str) -> Principal:
        """By a refresh token, or by a credential that a client takes for one since it has no user."""
        if not self.issuer.recognizes(token):
            return await self.by_password(request, "", token)
        try:
            return self.authenticator.located(await self.issuer.refreshed(token), request)
        except BadCredential as error:
            raise self._refused(f"the refresh token is not accepted: {error}") from None

    async def access_token(self, principal: Principal, grants: Sequence[Grant]) -> IssuedToken:
        """A token that grants no more than that, and no longer than its credential.  Raises StorageFailed."""
        return await self.issuer.issue(principal, "access", grants)

    async def refresh_token(self, principal: Principal) -> IssuedToken | None:
        """A token that stands for the credential; None if there is none for it.  Raises StorageFailed."""
        return await self.issuer.issue(principal, "refresh") if self.issuer.renews(principal) else None

    def _checked(self, principal: Principal) -> Principal:
        """Raises Unauthorized if it has a token of this server, or of a token server."""
        if principal.within is not None or principal.scheme == "token":
            raise self._refused("a token is not exchanged for another one: log in")
        return principal

    def _refused(self, message: str) -> Unauthorized:
        return Unauthorized(message, challenges=(self.authenticator.basic,))
