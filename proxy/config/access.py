"""`access:` of the configuration."""

from __future__ import annotations

import re
from typing import Annotated, Literal, TypeAlias

import msgspec

from proxy.config.fields import File, Section, Text, Timeout
from proxy.config.hosts import Network, parse_network, parse_realm
from proxy.config.values import Who, parse_quotable, parse_where, parse_who

Action: TypeAlias = Literal["pull", "push", "delete"]
ACTIONS: tuple[Action, ...] = ("pull", "push", "delete")


class AccessRule(Section, frozen=True):
    """One of `who`, from one of `sources`, `may` do this with repositories that match one of `where`."""

    who: tuple[Annotated[Who, parse_who], ...]
    may: tuple[Action, ...]
    sources: tuple[Annotated[Network, parse_network], ...] = msgspec.field(default=(), name="from")
    where: tuple[Annotated[re.Pattern[str], parse_where], ...] = ()

    def __post_init__(self) -> None:
        for key in ("who", "may"):
            if not getattr(self, key):
                raise ValueError(f"{key} names none, so the rule grants nothing: remove it")


class TokenService(Section, frozen=True):
    """A server whose tokens are taken: it is at `realm`, and signs for `service` with one of `keys`."""

    realm: Annotated[str, parse_realm]
    service: Annotated[str, parse_quotable]
    issuer: Text
    keys: tuple[File, ...]

    def __post_init__(self) -> None:
        if not self.keys:
            raise ValueError(
                "keys names none: give the file with the token server's public key or certificate"
            )


class AccessConfig(Section, frozen=True):
    """Who may do what; with `rules` None the built-in ones hold.  `remember` is for visibility: caller."""

    htpasswd: File | None = None
    realm: Annotated[str, parse_quotable] = "entrepot"
    groups: dict[str, tuple[Text, ...]] = msgspec.field(default_factory=dict)
    token: TokenService | None = None
    trusted_proxies: tuple[Annotated[Network, parse_network], ...] = ()
    rules: tuple[AccessRule, ...] | None = None
    ping: Literal["auto", "challenge", "open"] = "auto"
    remember: Timeout = 300.0
