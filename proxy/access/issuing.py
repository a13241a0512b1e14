"""Tokens that this server issues in exchange for credentials, and verifies.

An access token is for some actions on some repositories, for some minutes.  A refresh token stands for the
credential itself, so that a client need not keep that.  Both are JWTs, signed with HMAC-SHA-256: nobody but
the servers that share the records verifies them.

A token states how its client was identified.  Its credential is looked at again with each request: so a
token is worth nothing once its user is removed or has another password, or its API key is revoked, and the
rules decide as they are then.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import msgspec
from joserfc.errors import JoseError
from joserfc.jwk import OctKey
from joserfc.jws import deserialize_compact, extract_compact, serialize_compact

from proxy.access.credentials import KEY, BadCredential
from proxy.access.records import AccessRecords, SigningKey
from proxy.access.rules import Grant, Principal

Use: TypeAlias = Literal["access", "refresh"]
Renew: TypeAlias = Callable[[Principal], Principal | None]

LEEWAY = 60.0  # seconds between the clocks of two servers
ROTATION = 30 * 86400.0  # seconds after which another key signs
REMEMBERED = 10_000  # tokens
ALGORITHM = "HS256"
SHORT_LIVED = ("", "certificate")  # schemes whose principals cannot be looked at again
# What the header of every token begins with, and no other one's: {"typ":"entrepot
START = "eyJ0eXAiOiJlbnRyZXBv"


class _Resource(msgspec.Struct, frozen=True):
    """A member of the claim `access`: Distribution, "Token Authentication Implementation"."""

    type: str
    name: str
    actions: tuple[str, ...]


class _IssuedClaims(msgspec.Struct, frozen=True, omit_defaults=True):
    """The claims of a token (RFC 7519), and what its client was identified by: see Principal."""

    use: Use
    iss: str
    aud: str
    exp: float
    iat: float
    jti: str
    sub: str = ""
    access: tuple[_Resource, ...] = ()
    scheme: str = ""
    groups: tuple[str, ...] = ()
    claims: dict[str, Any] = msgspec.field(default_factory=dict)
    proof: str = ""
    until: float | None = None


@dataclass(frozen=True, slots=True)
class IssuedToken:
    """A token, for how many seconds it is valid, and since when: seconds since the epoch."""

    token: str
    lifetime: int
    issued: float


@dataclass(frozen=True, slots=True)
class _VerifiedToken:
    """A token whose signature was verified, by the key of that id, and who it was issued to."""

    key: str
    claims: _IssuedClaims
    principal: Principal


class TokenIssuer:
    """Issues tokens for `service`, and verifies them: a CredentialVerifier.

    lifetime, refresh: for how many seconds access tokens and refresh tokens are valid; None for none
    renewals: how the principals of each scheme are looked at again; anonymous clients, and those with a
        certificate, stay as they are, and those of other schemes are no longer accepted
    """

    scheme = "issued"
    what = "the token"

    def __init__(
        self,
        records: AccessRecords,
        service: str,
        lifetime: float,
        refresh: float | None,
        renewals: Mapping[str, Renew],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.service = service
        self._records = records
        self._lifetimes: Mapping[Use, float] = {"access": lifetime, "refresh": refresh or 0.0}
        self._renewals = renewals
        self._clock = clock
        self._known: OrderedDict[bytes, _VerifiedToken] = OrderedDict()

    # Issuing

    async def issue(self, principal: Principal, use: Use, grants: Sequence[Grant] = ()) -> IssuedToken:
        """Issue a token that is valid no longer than the credential.  Raises StorageFailed."""
        now = self._clock()
        keep = ROTATION + LEEWAY + max(self._lifetimes.values())
        key = await self._records.signing_key(now, ROTATION, keep)
        lifetime = max(1, int(min(self._lifetimes[use], principal.until - now)))
        claims = _IssuedClaims(
            use=use,
            iss=self.service,
            aud=self.service,
            sub=principal.user,
            exp=now + lifetime,
            iat=now,
            jti=secrets.token_hex(8),
            access=tuple(_access(each) for each in grants),
            scheme=principal.scheme,
            # Who is looked at again is found in its groups as they are then; many fit into no header.
            groups=() if principal.scheme in self._renewals else tuple(sorted(principal.groups)),
            claims=dict(principal.claims),
            proof=principal.proof,
            until=None if principal.until == float("inf") else principal.until,
        )
        header = {"typ": "entrepot", "alg": ALGORITHM, "kid": key.id}
        token = serialize_compact(header, msgspec.json.encode(claims), _oct(key), [ALGORITHM])
        return IssuedToken(token, lifetime, now)

    def renews(self, principal: Principal) -> bool:
        """Whether there are refresh tokens for it: if its credential is looked at again with each request."""
        return bool(self._lifetimes["refresh"]) and principal.scheme in self._renewals

    # Verifying

    def recognizes(self, secret: str) -> bool:
        return secret.startswith(START)

    async def verify(self, user: str, secret: str) -> Principal:
        """Raises BadCredential, and StorageFailed if the records cannot be read."""
        if user:
            raise BadCredential("it is a bearer token, and no password")
        return await self._bearer(secret, "access")

    async def refreshed(self, secret: str) -> Principal:
        """Who a refresh token belongs to.  Raises BadCredential, StorageFailed."""
        return replace(await self._bearer(secret, "refresh"), within=None)

    def remembers(self, user: str, secret: str) -> bool:
        known, state = self._known.get(_mark(secret)), self._records.current()
        return (
            not user
            and known is not None
            and state is not None
            and known.key in state.signing
            and (known.claims.aud, known.claims.use) == (self.service, "access")
            and self._clock() < known.claims.exp
            and self._renewed(known.principal) is not None
        )

    def renew(self, principal: Principal) -> Principal | None:
        return None  # no token is issued in exchange for a token

    async def _bearer(self, token: str, use: Use) -> Principal:
        """Who a token was issued to, as it is now.  Raises BadCredential, StorageFailed."""
        state = await self._records.read(keys=False)
        mark = _mark(token)
        known = self._known.get(mark)
        if known is None or known.key not in state.signing:
            try:
                known = _verified(token, state.signing)
            except BadCredential:
                self._records.check_whole()  # another server may have made a key, and signed by it
                raise
            self._known[mark] = known
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        claims, now = known.claims, self._clock()
        if claims.aud != self.service or claims.use != use:
            raise BadCredential(f"it is no {use} token for the service {self.service}")
        if claims.iat > now + LEEWAY:
            raise BadCredential("it is not valid yet")
        if claims.exp <= now:
            self._known.pop(mark, None)
            raise BadCredential("it has expired")
        if of_key := known.principal.scheme == KEY:
            await self._records.read()  # of an outage, the keys that sign tokens bridge more than API keys do
        if (current := self._renewed(known.principal)) is None:
            if of_key:
                self._records.check_whole()
            raise BadCredential("what it was issued for, a user or an API key, is no longer accepted")
        return replace(current, within=known.principal.within, until=min(current.until, claims.exp))

    def _renewed(self, principal: Principal) -> Principal | None:
        if (renew := self._renewals.get(principal.scheme)) is not None:
            return renew(principal)
        return principal if principal.scheme in SHORT_LIVED else None


def _verified(token: str, keys: Mapping[str, SigningKey]) -> _VerifiedToken:
    """What a token holds that one of the keys has signed.  Raises BadCredential."""
    try:
        kid = extract_compact(token.encode("ascii")).headers().get("kid")
        if isinstance(kid, str) and (key := keys.get(kid)) is not None:
            payload = deserialize_compact(token, _oct(key), [ALGORITHM]).payload
            claims = msgspec.json.decode(payload, type=_IssuedClaims)
            return _VerifiedToken(kid, claims, _principal(claims))
    except (JoseError, ValueError, TypeError, RecursionError):
        pass
    raise BadCredential("this server has not signed it, or no longer has the key")


def _oct(key: SigningKey) -> OctKey:
    return OctKey.import_key(key.secret)


def _mark(token: str) -> bytes:
    """What a token is remembered by."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _access(grant: Grant) -> _Resource:
    kind, colon, name = grant.name.partition(":")
    if colon and kind == "registry":
        return _Resource(kind, name, tuple(sorted(grant.actions)))
    return _Resource("repository", grant.name, tuple(sorted(grant.actions)))


def _grant(access: _Resource) -> Grant:
    name = access.name if access.type == "repository" else f"{access.type}:{access.name}"
    return Grant(name, frozenset(access.actions))


def _principal(claims: _IssuedClaims) -> Principal:
    return Principal(
        user=claims.sub,
        scheme=claims.scheme,
        groups=frozenset(claims.groups),
        claims=claims.claims,
        until=float("inf") if claims.until is None else claims.until,
        proof=claims.proof,
        within=tuple(map(_grant, claims.access)),
    )
