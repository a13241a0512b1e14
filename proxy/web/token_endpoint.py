"""The token endpoint: exchanges credentials for bearer tokens, limited to what a client asks for and may do.

GET is Distribution's "Token Authentication Specification": the credentials are in the Authorization header.
POST is its "OAuth2 Token Authentication", with a form: RFC 6749, sections 4.3 and 6.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Protocol
from urllib.parse import parse_qs

import msgspec
from aiohttp import web

from proxy.access.authentication import NOBODYS_TOKEN, authorization
from proxy.access.authorization import TOKEN, Authorizer
from proxy.access.rules import Grant, Principal
from proxy.access.scopes import Scope, requested_scopes
from proxy.telemetry.exchange import Exchange
from proxy.telemetry.metrics import Metrics
from proxy.web.responses import HARBOR, JSON, content
from proxy.web.routes import Route
from storage.errors import GrantTypeUnsupported, NameUnknown, PathUnknown, RegistryError, TokenRequestInvalid

if TYPE_CHECKING:  # it needs a library for tokens
    from proxy.access.token_exchange import TokenExchange

LARGEST = 64 << 10  # bytes of a form
FIELDS = 200  # of a form
PATIENCE = 30.0  # seconds until a form has to be here
_ERRORS = {400: "invalid_request", 401: "invalid_grant"}  # RFC 6749, section 5.2
_Handler = Callable[[web.BaseRequest, Route, str, Exchange], Awaitable[web.StreamResponse]]
_Form = Mapping[str, Sequence[str]]


class _Qualify(Protocol):
    """As Namespaces.qualify()."""

    def __call__(self, name: str, *, ns: str | None, host: str | None, prefix: str) -> str: ...


class TokenEndpoint:
    """Handlers of the token endpoint.  Each may raise RegistryError."""

    def __init__(
        self, authorizer: Authorizer, tokens: TokenExchange, qualify: _Qualify, metrics: Metrics
    ) -> None:
        self._authorizer = authorizer
        self._tokens = tokens
        self._qualify = qualify
        self._metrics = metrics

    @property
    def handlers(self) -> dict[str, _Handler]:
        return {"GET": self._get, "POST": self._post}

    async def _get(
        self, request: web.BaseRequest, route: Route, name: str, exchange: Exchange
    ) -> web.StreamResponse:
        query = request.query
        self._check_service(query.get("service"))
        principal = await self._identified(request, exchange, self._tokens.by_request(request))
        offline = query.get("offline_token", "").lower() in ("true", "1")
        scopes = query.getall("scope", [])
        return await self._issued(request, route.prefix, exchange, principal, scopes, offline)

    async def _post(
        self, request: web.BaseRequest, route: Route, name: str, exchange: Exchange
    ) -> web.StreamResponse:
        form = await _form(request)
        self._check_service(_value(form, "service"))
        match _value(form, "grant_type"):
            case "password":
                user, password = _value(form, "username"), _value(form, "password")
                found = self._tokens.by_password(request, user, password)
            case "refresh_token":
                found = self._tokens.by_refresh_token(request, _value(form, "refresh_token"))
            case "":
                raise TokenRequestInvalid("the form has no grant_type: use password or refresh_token")
            case other:
                raise GrantTypeUnsupported(
                    f"grant_type={other[:50]!r} is not supported: use password or refresh_token"
                )
        principal = await self._identified(request, exchange, found)
        offline = _value(form, "access_type") == "offline"
        scopes = form.get("scope", ())
        return await self._issued(request, route.prefix, exchange, principal, scopes, offline)

    async def _identified(
        self, request: web.BaseRequest, exchange: Exchange, found: Awaitable[Principal]
    ) -> Principal:
        try:
            return await found
        except RegistryError as error:
            self._authorizer.refused(request, exchange, TOKEN, error)
            raise

    def _check_service(self, service: str | None) -> None:
        if service and service != self._tokens.service:
            raise TokenRequestInvalid(
                f"service={service[:50]!r} is not this one: tokens are issued for {self._tokens.service!r}"
            )

    async def _issued(
        self,
        request: web.BaseRequest,
        prefix: str,
        exchange: Exchange,
        principal: Principal,
        scopes: Sequence[str],
        offline: bool,
    ) -> web.Response:
        exchange.user = principal.user
        grants = self._grants(request, prefix, principal, requested_scopes(scopes))
        exchange.reference = " ".join(map(_written, grants))
        made = await self._tokens.access_token(principal, grants)
        refresh = await self._tokens.refresh_token(principal) if offline else None
        self._metrics.issued_tokens.labels(principal.scheme or "anonymous").inc()
        # podman and docker would add expires_in to issued_at, and compare that with their own clock.  Harbor
        # does so too, and takes a token without it for one that has ended.
        issued = datetime.fromtimestamp(made.issued, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        body = {
            "token": made.token,
            "access_token": made.token,
            "token_type": "Bearer",
            "expires_in": made.lifetime,
            "scope": exchange.reference,
            **({"issued_at": issued} if exchange.agent == HARBOR else {}),
            **({} if refresh is None else {"refresh_token": refresh.token}),
        }
        return _response(body)

    def _grants(
        self, request: web.BaseRequest, prefix: str, principal: Principal, asked: Sequence[Scope]
    ) -> list[Grant]:
        """What is granted of the scopes.

        Below a prefix, a name is relative to that if the client has made the scope, and full if it is that of
        a challenge.
        """
        qualify = partial(self._qualify, ns=None, host=request.headers.get("Host"))

        def of_prefix(name: str) -> str:
            return qualify(name, prefix=prefix)

        def of_challenge(name: str) -> str:  # which has the full name
            full = qualify(name, prefix="")
            if full.partition("/")[0] != of_prefix(name).partition("/")[0]:
                raise NameUnknown(f"{full} is not in the namespace of {prefix}")
            return full

        grants = self._authorizer.grants(principal, asked, of_prefix)
        if prefix:
            more = self._authorizer.grants(principal, asked, of_challenge)
            grants += [each for each in more if each not in grants]
        return grants


async def nobodys_token(
    request: web.BaseRequest, route: Route, name: str, exchange: Exchange
) -> web.StreamResponse:
    """The answer where there is no token endpoint.  Raises PathUnknown for a client that shows a login.

    mamba, and rattler before py-rattler 0.26, always ask the registry's host for a token, as if it were
    ghcr.io, and end without one.
    """
    if request.method != "GET" or authorization(request):
        raise PathUnknown("this server has no token endpoint (access.token_endpoint)")
    return _response({"token": NOBODYS_TOKEN})


def _response(body: Mapping[str, object]) -> web.Response:
    return content(msgspec.json.encode(body), {"Content-Type": JSON, "Cache-Control": "no-store"})


def oauth_error(error: RegistryError) -> dict[str, str]:
    """What the body of an error says besides, for clients of OAuth."""
    of_status = _ERRORS.get(error.status, "temporarily_unavailable")
    return {
        "error": "unsupported_grant_type" if isinstance(error, GrantTypeUnsupported) else of_status,
        "error_description": error.public,
    }


async def _form(request: web.BaseRequest) -> _Form:
    """The fields of the body.  Raises TokenRequestInvalid."""
    if request.content_type != "application/x-www-form-urlencoded":
        raise TokenRequestInvalid("expected a form: Content-Type: application/x-www-form-urlencoded")
    body = bytearray()
    try:
        async with asyncio.timeout(PATIENCE):
            async for chunk in request.content.iter_any():
                body += chunk
                if len(body) > LARGEST:
                    raise TokenRequestInvalid(f"the form is larger than {LARGEST} bytes")
    except TimeoutError:
        raise TokenRequestInvalid(f"the form was not here within {PATIENCE:.0f} seconds") from None
    try:
        return parse_qs(body.decode(), keep_blank_values=True, max_num_fields=FIELDS)
    except ValueError:
        raise TokenRequestInvalid("the form is not UTF-8, or has too many fields") from None


def _value(form: _Form, name: str) -> str:
    return form.get(name, ("",))[0]


def _written(grant: Grant) -> str:
    kind = "" if grant.name.startswith("registry:") else "repository:"
    return f"{kind}{grant.name}:{','.join(sorted(grant.actions))}"
