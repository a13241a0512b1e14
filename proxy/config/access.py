"""The section `access` of the configuration."""

from __future__ import annotations

import re
from typing import Annotated, Literal, TypeAlias

import msgspec

from proxy.config.fields import File, Flag, Section, Text, Timeout
from proxy.config.hosts import Network, parse_network, parse_realm
from proxy.config.oidc import OIDCIssuer
from proxy.config.quantities import parse_every
from proxy.config.values import LABEL, ClientMatcher, parse_client, parse_quotable, parse_where

Action: TypeAlias = Literal["pull", "push", "delete"]
SHORTEST, LONGEST = 60.0, 3600.0  # seconds of an access token
ACTIONS: tuple[Action, ...] = ("pull", "push", "delete")


class AccessRule(Section, frozen=True):
    """A rule that grants the actions in `may` to clients.

    It applies if a client is one of `who`, connects from one of `sources`, and names a repository that
    matches one of `where`.  Empty `sources` and `where` match everything.
    """

    who: tuple[Annotated[ClientMatcher, parse_client], ...]
    may: tuple[Action, ...]
    sources: tuple[Annotated[Network, parse_network], ...] = msgspec.field(default=(), name="from")
    where: tuple[Annotated[re.Pattern[str], parse_where], ...] = ()

    def __post_init__(self) -> None:
        for key in ("who", "may"):
            if not getattr(self, key):
                raise ValueError(f"{key} is empty, so the rule grants nothing: fill it or remove the rule")


class TokenService(Section, frozen=True):
    """A token server that clients are sent to, and whose tokens are accepted.

    It is at the URL `realm`, and signs tokens for `service` with one of `keys`.
    """

    realm: Annotated[str, parse_realm]
    service: Annotated[str, parse_quotable]
    issuer: Text
    keys: tuple[File, ...]

    def __post_init__(self) -> None:
        if not self.keys:
            raise ValueError("keys is empty: give a file with the token server's public key or certificate")


class TokenEndpointConfig(Section, frozen=True):
    """This server's own token endpoint, /token.

    realm: its URL; by default, that by which each client reaches this server
    service: what its tokens are for; servers that share their records have the same
    lifetime: of an access token, and with it the time until a client certificate that was exchanged is asked
        for again
    refresh: of a refresh token, by which docker logs in instead of keeping a password; None for none
    """

    realm: Annotated[str, parse_realm] | None = None
    service: Annotated[str, parse_quotable] = "entrepot"
    lifetime: Timeout = 300.0
    refresh: Annotated[float | None, parse_every] = 30 * 86400.0

    def __post_init__(self) -> None:
        # Clients take a token that is valid for less than a minute for one that is valid for a minute.
        if not SHORTEST <= self.lifetime <= LONGEST:
            raise ValueError("lifetime must be from 1m to 1h")


class AccessConfig(Section, frozen=True):
    """Authentication and authorization of clients.

    `oidc` has the issuers whose tokens are logins, by name, which the names of their users begin with.  With
    `rules` None the built-in rules apply.  `remember` is how long the answers of an upstream are kept
    for `visibility: caller`.
    """

    htpasswd: File | None = None
    realm: Annotated[str, parse_quotable] = "entrepot"
    groups: dict[str, tuple[Text, ...]] = msgspec.field(default_factory=dict)
    token: TokenService | None = None
    oidc: dict[str, OIDCIssuer] = msgspec.field(default_factory=dict)
    token_endpoint: TokenEndpointConfig | None = None
    api_keys: Flag = False
    trusted_proxies: tuple[Annotated[Network, parse_network], ...] = ()
    rules: tuple[AccessRule, ...] | None = None
    ping: Literal["auto", "challenge", "open"] = "auto"
    remember: Timeout = 300.0

    def __post_init__(self) -> None:
        for name in self.oidc:
            if not LABEL.fullmatch(name):
                raise ValueError(
                    f"the name of an issuer is a word such as github or team-ci, not {name!r} (oidc)"
                )

    @property
    def has_users(self) -> bool:
        """Whether clients can log in."""
        return self.htpasswd is not None or self.token is not None or bool(self.oidc) or self.api_keys

    @property
    def sends_for_tokens(self) -> bool:
        """Whether clients are challenged for a token, which everybody gets."""
        return self.token is not None or self.token_endpoint is not None

    def opens(self, namespace: str) -> bool:
        """Whether a rule lets everybody pull all of a namespace from everywhere."""
        return any(
            "pull" in rule.may
            and not rule.sources
            and any(who.kind == "anonymous" for who in rule.who)
            # No repository has this name: only a pattern for all of them matches it.
            and (not rule.where or any(each.fullmatch(f"{namespace}/*") for each in rule.where))
            for rule in self.rules or ()
        )
