"""Access: the API keys, and by what else clients can log in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from aiohttp import web

from proxy.admin.operations import Operations
from proxy.config.access import AccessConfig
from proxy.config.quantities import format_duration
from proxy.ui.answers import Answer, tried
from proxy.ui.rendering import Renderer


class LoginMeans(NamedTuple):
    """Something by which clients log in: its name in the configuration, what it is, and what it demands."""

    key: str
    what: str
    terms: str


class AccessScreen:
    """Who is let in, and by what."""

    def __init__(self, config: AccessConfig, operations: Operations, renderer: Renderer) -> None:
        self._config = config
        self._operations = operations
        self._renderer = renderer

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/access", self._show)]

    async def _show(self, request: web.Request) -> web.Response:
        answer = await tried(self._operations.keys()) if self._config.api_keys else Answer(None)
        return self._renderer.page(
            request,
            "access.html",
            "Access",
            keys=answer.found,
            fault=answer.fault,
            logins=list(logins(self._config)),
            rules=self._config.rules,
        )


def logins(config: AccessConfig) -> Iterator[LoginMeans]:
    """What the configuration accepts."""
    if config.htpasswd is not None:
        yield LoginMeans("htpasswd", f"users and passwords of {config.htpasswd}", "")
    for name, issuer in config.oidc.items():
        terms = [f"for {' or '.join(issuer.audience)}", *map(str, issuer.required_claims)]
        yield LoginMeans(f"oidc.{name}", f"tokens of {issuer.issuer}", "; ".join(terms))
    if (service := config.token) is not None:
        yield LoginMeans("token", f"tokens of {service.realm}", f"for {service.service}, by {service.issuer}")
    if (endpoint := config.token_endpoint) is not None:
        lifetime = format_duration(endpoint.lifetime)
        yield LoginMeans("token_endpoint", "tokens of this server's /token", f"valid for {lifetime}")
