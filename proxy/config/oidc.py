"""Issuers of OpenID Connect whose tokens are logins: `access.oidc` of the configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, TypeAlias
from urllib.parse import urlsplit

import msgspec

from proxy.config.fields import File, Keep, Section, Text
from proxy.config.hosts import is_loopback, parse_proxy
from proxy.config.values import Secret, parse_text

_ISSUER = re.compile(r"https?://[^\s?#@\"\\/]+(?:/[^\s?#\"\\]*)?", re.ASCII)
_CLAIM = re.compile(r"/.+|[^/].*", re.DOTALL)
# Issuers that serve everybody, and the claims that tell whose a token of theirs is.
_PUBLIC = {
    "https://token.actions.githubusercontent.com": (
        "repository_owner_id",
        "repository_owner",
        "repository_id",
        "repository",
        "sub",
    ),
    "https://gitlab.com": ("namespace_id", "namespace_path", "project_id", "project_path", "sub"),
    "https://accounts.google.com": ("sub", "email", "hd"),
}
_BEFORE_OWNER = re.compile(r"repo:|project_path:")  # what `sub` begins with, whoever it is
_WILDCARD = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class ClaimPattern:
    """What a claim must be: one of its values matches one of `globs`.

    `name` is that of the claim, or a JSON Pointer (RFC 6901) into the claims.
    """

    name: str
    globs: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name}={' or '.join(self.globs)}"


def parse_claims(value: object) -> tuple[ClaimPattern, ...]:
    """Claims and a glob, or a list of globs, for each."""
    if not isinstance(value, dict) or not value:
        raise ValueError("expected claims and what they must be, such as {repository_owner: acme}")
    return tuple(ClaimPattern(parse_claim(name), tuple(_globs(name, each))) for name, each in value.items())


def parse_claim(value: object) -> str:
    """The name of a claim, or a JSON Pointer into claims."""
    text = parse_text(value)
    if not _CLAIM.fullmatch(text):
        raise ValueError("expected the name of a claim, or a JSON Pointer such as /kubernetes.io/namespace")
    return text


def _globs(name: str, value: object) -> Iterator[str]:
    given = value if isinstance(value, list) else [value]
    for each in given:
        text = str(each).lower() if isinstance(each, bool) else str(each)
        if not isinstance(each, str | int) or not text:
            raise ValueError(f"{name}: expected a glob, or a list of globs")
        yield text
    if not given:
        raise ValueError(f"{name}: is empty: give a glob")


def parse_audiences(value: object) -> tuple[str, ...]:
    given = value if isinstance(value, list) else [value]
    if not given:
        raise ValueError("is empty: give the audience that tokens for this server have")
    return tuple(parse_text(each) for each in given)


def parse_issuer(value: object) -> str:
    """The URL of an issuer, as tokens have it: it is compared as text."""
    text = parse_text(value)
    if not _ISSUER.fullmatch(text):
        raise ValueError("expected the URL of an issuer, such as https://token.actions.githubusercontent.com")
    return text


Claims: TypeAlias = Annotated[tuple[ClaimPattern, ...], parse_claims]


class OIDCIssuer(Section, frozen=True):
    """An issuer of OpenID Connect, and who its tokens are here.

    required_claims: what a token must have beside issuer and audience
    user_claim: whose value is the name of the user, after the name of the issuer and a colon
    groups_claim: whose values are groups, after the name of the issuer and a colon
    groups: groups, and the claims by which a token is in them
    jwks_url: where its keys are; by default where its discovery document says
    jwks_file: its keys in a file, so that nothing is fetched
    token_file: a token to fetch its keys with
    keep_keys: for how long known keys are good while the issuer cannot be asked
    """

    issuer: Annotated[str, parse_issuer]
    audience: Annotated[tuple[str, ...], parse_audiences]
    required_claims: Claims
    user_claim: Annotated[str, parse_claim] = "sub"
    groups_claim: Annotated[str, parse_claim] | None = None
    groups: dict[Text, Claims] = msgspec.field(default_factory=dict)
    jwks_url: Annotated[str, parse_issuer] | None = None
    jwks_file: File | None = None
    ca_file: File | None = None
    token_file: File | None = None
    proxy: Annotated[Secret, parse_proxy] | None = None
    keep_keys: Keep = 86400.0

    def __post_init__(self) -> None:
        if self.jwks_file is not None:
            for key in ("jwks_url", "ca_file", "token_file", "proxy"):
                if getattr(self, key) is not None:
                    raise ValueError(
                        f"{key} does not go with jwks_file, since nothing is fetched: remove one"
                    )
        elif not is_safe(self.asked):
            raise ValueError(
                f"keys that are fetched from {self.asked} may be anybody's: use https, or jwks_file"
            )

    @property
    def asked(self) -> str:
        """The URL that is asked first for the keys."""
        return self.jwks_url or f"{self.issuer.rstrip('/')}/.well-known/openid-configuration"

    @property
    def telling(self) -> tuple[str, ...]:
        """If the issuer serves everybody, the claims of which one has to tell whose a token is.

        None are needed if one of the required claims tells it.
        """
        claims = _PUBLIC.get(self.issuer.rstrip("/"), ())
        told = any(
            each.name in claims and all(map(_names_owner, each.globs)) for each in self.required_claims
        )
        return () if told else claims


def is_safe(url: str) -> bool:
    """Whether nobody else can answer for the host of the URL: by https, or on this machine."""
    parts = urlsplit(url)
    return parts.scheme == "https" or is_loopback(parts.hostname or "")


def _names_owner(glob: str) -> bool:
    """Whether a glob begins with more than what is the same for everybody."""
    start = _WILDCARD.split(glob)[0]
    return bool(start.removeprefix(found[0]) if (found := _BEFORE_OWNER.match(start)) else start)
