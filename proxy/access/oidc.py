"""Tokens of issuers of OpenID Connect as logins: whose they are, and whether they may be believed.

OpenID Connect Core 1.0, section 3.1.3.7; RFC 8725.  A token must be signed by a private key of its issuer,
for this server (`aud`) and for now (`exp`, `nbf`, `iat`), and have the claims that are required.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import msgspec
import structlog
from joserfc.errors import JoseError
from joserfc.jws import deserialize_compact

from proxy.access.bearer import ALGORITHMS, LEEWAY, LONGEST, REMEMBERED, SignedTokens
from proxy.access.claims import claim_texts, fits
from proxy.access.credentials import BadCredential
from proxy.access.issuer_keys import KeySet, KeySource
from proxy.access.rules import Principal
from proxy.config.oidc import OIDCIssuer
from storage.errors import Unavailable

log = structlog.get_logger()

LONGEST_NAME = 500  # characters of a user or a group
MOST_GROUPS = 500
_START = "eyJ"  # of a JSON object in base64
# RFC 7519, section 5.1; RFC 9068, section 2.1.  Others, such as those of logouts, are no logins.
_TYPES = (None, "jwt", "at+jwt")
_REGISTRY = SignedTokens()


class _Header(msgspec.Struct):
    alg: str
    kid: str | None = None
    typ: str | None = None


class _Issued(msgspec.Struct):
    iss: str | None = None


class _Times(msgspec.Struct):
    exp: float
    aud: str | list[str]
    nbf: float | None = None
    iat: float | None = None


# Made once: to make a decoder takes longer than to decode.
_ISSUED, _HEADER = msgspec.json.Decoder(_Issued), msgspec.json.Decoder(_Header)


@dataclass(frozen=True, slots=True)
class _Accepted:
    principal: Principal
    keys: KeySet
    issuer: str


class TokenRefused(BadCredential):
    """A token is not accepted.  The message is for the client; `detail` is for the log."""

    def __init__(self, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail or message


class OIDCTokens:
    """Verifies the tokens of issuers: a CredentialVerifier.

    issuers: by their names, which the names of their users begin with
    sources: the keys of each
    groups: of users, beside those that the issuers' tokens have
    alone: whether tokens of other issuers are recognized, too, and refused: nothing else accepts such
    """

    scheme = "oidc"
    what = "the token"

    def __init__(
        self,
        issuers: Mapping[str, OIDCIssuer],
        sources: Mapping[str, KeySource],
        clock: Callable[[], float] = time.time,
        groups: Mapping[str, frozenset[str]] = MappingProxyType({}),
        *,
        alone: bool = False,
    ) -> None:
        self._issuers = issuers
        self._sources = sources
        self._clock = clock
        self._groups = groups
        self._alone = alone
        self._known: dict[bytes, _Accepted] = {}

    def recognizes(self, secret: str) -> bool:
        stated = stated_issuer(secret)
        return stated is not None and (
            self._alone or any(stated == each.issuer for each in self._issuers.values())
        )

    async def verify(self, user: str, secret: str) -> Principal:
        """The principal is that of the token, whatever user the client states."""
        mark = _mark(secret)
        if (known := self._known.get(mark)) is not None:
            keys = await self._sources[known.issuer].keys(None)
            if keys is known.keys and self._clock() < known.principal.until:
                return known.principal
            self._known.pop(mark, None)
        found = await self._accepting(secret)
        self._known[mark] = found
        if len(self._known) > REMEMBERED:
            del self._known[next(iter(self._known))]
        return found.principal

    def remembers(self, user: str, secret: str) -> bool:
        known = self._known.get(_mark(secret))
        return (
            known is not None
            and self._sources[known.issuer].current() is known.keys
            and self._clock() < known.principal.until
        )

    def renew(self, principal: Principal) -> Principal | None:
        """None too if its issuer is known to have withdrawn the key that signed the token."""
        name, _, key = principal.proof.partition(" ")
        if (config := self._issuers.get(name)) is None:
            return None
        keys = self._sources[name].current()
        if keys is not None and key in keys.withdrawn:
            return None
        try:
            return self._principal(name, config, dict(principal.claims), key)
        except TokenRefused:
            return None

    async def _accepting(self, token: str) -> _Accepted:
        """What the first of the issuers says that accepts the token.

        While one of them cannot be asked, it is not known that none does.
        """
        refusal = TokenRefused("it is of no issuer that is accepted here (access.oidc)")
        unavailable: Unavailable | None = None
        reasons = {}
        for name in self._named(token):
            try:
                return await self._verify(name, token)
            except TokenRefused as error:
                refusal, reasons[name] = error, error.detail
            except Unavailable as error:
                unavailable, reasons[name] = error, str(error)
        for name, reason in reasons.items():
            log.info("token.refused", issuer=name, reason=reason)
        raise unavailable or refusal

    def _named(self, token: str) -> list[str]:
        """The issuers that the token may be of; several clusters may call themselves by the same URL."""
        stated = stated_issuer(token)
        return [name for name, each in self._issuers.items() if each.issuer == stated]

    async def _verify(self, name: str, token: str) -> _Accepted:
        header = _header(token)
        keys = await self._sources[name].keys(header.kid)
        claims, key = _signed(token, header, keys)
        return _Accepted(self._principal(name, self._issuers[name], claims, key), keys, name)

    def _principal(self, name: str, config: OIDCIssuer, claims: dict[str, Any], key: str) -> Principal:
        """Who the claims are of, if they are accepted.  Raises TokenRefused."""
        until = self._check(config, claims)
        user = next(iter(claim_texts(claims, config.user_claim)), "")
        if not user or not user.isprintable() or len(user) > LONGEST_NAME:
            raise TokenRefused(f"its claim {config.user_claim} is missing, or is no name")
        user = f"{name}:{user}"
        groups = self._groups.get(user, frozenset()) | _groups(name, config, claims)
        return Principal(user, self.scheme, groups, claims, until=until, proof=f"{name} {key}")

    def _check(self, config: OIDCIssuer, whole: Mapping[str, Any]) -> float:
        """Return when the token expires.  Raises TokenRefused."""
        try:
            claims = msgspec.convert(whole, _Times)
        except msgspec.ValidationError:
            raise TokenRefused(
                "one of the claims exp and aud is missing, or a claim has the wrong type"
            ) from None
        now = self._clock()
        audience = [claims.aud] if isinstance(claims.aud, str) else claims.aud
        if not set(audience) & set(config.audience):
            wanted = " or ".join(config.audience)
            named = ", ".join(map(repr, audience))[:300]
            raise TokenRefused(
                f"its audience (aud) is not {wanted}", f"its audience is {named}, not {wanted}"
            )
        if now >= claims.exp + LEEWAY:
            ago = f"{now - claims.exp:.0f} s ago by the clock of this server"
            raise TokenRefused("it has expired", f"it expired {ago}")
        if (begin := max(claims.nbf or 0.0, claims.iat or 0.0)) > now + LEEWAY:
            ahead = f"for another {begin - now:.0f} s by the clock of this server"
            raise TokenRefused("it is not valid yet", f"it is not valid {ahead}")
        for pattern in config.required_claims:
            if not fits(whole, pattern):
                found = ", ".join(map(repr, claim_texts(whole, pattern.name)))[:300] or "missing"
                raise TokenRefused(
                    f"its claim {pattern.name} is not what this server requires",
                    f"its claim {pattern.name} is {found}, not {' or '.join(pattern.globs)}",
                )
        return claims.exp + LEEWAY


def stated_issuer(token: str) -> str | None:
    """The issuer that a token claims to be of; None if it is no token.  Nothing is verified."""
    if not token.startswith(_START) or token.count(".") != 2 or len(token) > LONGEST:
        return None
    try:
        return _ISSUED.decode(_part(token, 1)).iss
    except (ValueError, RecursionError):
        return None


def _part(token: str, number: int) -> bytes:
    part = token.split(".")[number]
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))


def _header(token: str) -> _Header:
    try:
        header = _HEADER.decode(_part(token, 0))
    except (ValueError, RecursionError):
        raise TokenRefused("it is not a signed token") from None
    if not any(header.alg in each for each in ALGORITHMS.values()):
        # Nobody but the issuer must be able to sign: RFC 8725, sections 3.1 and 3.2.
        detail = f"its algorithm is {header.alg[:50]!r}, which is no signature by a private key"
        raise TokenRefused("its algorithm (alg) is not accepted", detail)
    kind = header.typ and header.typ.lower().removeprefix("application/")
    if kind not in _TYPES:
        raise TokenRefused("its type (typ) is not that of a login", f"its type is {header.typ!r}"[:200])
    return header


def _signed(token: str, header: _Header, keys: KeySet) -> tuple[dict[str, Any], str]:
    """The claims of a token that one of the keys has signed, and the thumbprint of that key (RFC 7638)."""
    fit = keys.fit(header.kid, header.alg)
    for key in fit:
        try:
            payload = deserialize_compact(token, key, [header.alg], _REGISTRY).payload
            return msgspec.json.decode(payload, type=dict[str, Any]), key.thumbprint()
        except JoseError:
            continue
        except (ValueError, TypeError, RecursionError):
            raise TokenRefused("its claims cannot be read") from None
    if not fit:
        named = f"{header.alg} key {header.kid[:100]!r}" if header.kid is not None else f"{header.alg} key"
        raise TokenRefused(
            "its issuer has no such key", f"its issuer has no {named}; it has {keys.names()[:10]}"
        )
    raise TokenRefused(
        "its signature is wrong", "its signature is not by the key of the issuer that it names"
    )


def _groups(name: str, config: OIDCIssuer, claims: dict[str, Any]) -> set[str]:
    found = {
        group for group, patterns in config.groups.items() if all(fits(claims, each) for each in patterns)
    }
    if config.groups_claim is not None:
        listed = claim_texts(claims, config.groups_claim)[:MOST_GROUPS]
        found |= {f"{name}:{each}" for each in listed if each and len(each) <= LONGEST_NAME}
    return found


def _mark(token: str) -> bytes:
    """What a token is remembered by."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
