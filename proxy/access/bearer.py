"""Verification of tokens that a token server signs: Distribution, "Token Authentication Specification".

- Only the keys of the configuration count; keys in a token (`jwk`, `x5c`, `jku`) are ignored.  Key files are
  read again when they change.
- Only signatures by private keys count.  Unsigned tokens and shared secrets are refused, whatever the key.
- A token must be for this server (`aud`), from its token server (`iss`) and valid now (`exp`, `nbf`, `iat`).
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import structlog
from joserfc.errors import JoseError, SecurityWarning
from joserfc.jwk import ECKey, JWKRegistry, OKPKey, RSAKey
from joserfc.jws import JWSRegistry, deserialize_compact, extract_compact

from proxy.access.rules import Grant, Principal
from proxy.config.watched_file import WatchedFile

log = structlog.get_logger()

# RFC 9864 renames EdDSA; token servers still use the old name, which is as safe as before.
warnings.filterwarnings("ignore", "EdDSA is deprecated", SecurityWarning)

LEEWAY = 60.0  # seconds between our clock and the token server's
LONGEST = 64 << 10  # characters of a token, as of a header of a request
REMEMBERED = 10_000  # tokens
KEPT = ("RSA", "EC", "OKP")
ALGORITHMS = {
    "RSA": ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    "EC": ("ES256", "ES384", "ES512"),
    "OKP": ("EdDSA", "Ed25519", "Ed448"),
}
_PEM = re.compile(rb"-----BEGIN ([A-Z ]+)-----[^-]+-----END \1-----")
VerificationKey: TypeAlias = RSAKey | ECKey | OKPKey


class SignedTokens(JWSRegistry):
    """Reads tokens that private keys sign, of any length that a request can have.

    A header may bring a chain of certificates (`x5c`), and an RSA key may be long.  Unknown headers are
    ignored unless they are critical: RFC 7515, section 4.
    """

    max_header_length = max_payload_length = max_signature_length = LONGEST

    def __init__(self) -> None:
        every = [each for group in ALGORITHMS.values() for each in group]
        super().__init__(algorithms=every, strict_check_header=False)


class BadToken(Exception):
    """A token is not accepted.  The message gives the reason without any part of the token."""


class _Access(msgspec.Struct):
    type: str = ""
    name: str = ""
    actions: list[str] | None = None


class _Claims(msgspec.Struct):
    iss: str
    exp: float
    aud: str | list[str]
    sub: str | None = None
    nbf: float | None = None
    iat: float | None = None


@dataclass(frozen=True, slots=True)
class _Verified:
    principal: Principal
    until: float


class TokenVerifier:
    """Verifies tokens by the keys in some files.  Raises OSError, and ValueError for a file without a key."""

    def __init__(
        self, service: str, issuer: str, keys: Sequence[Path], clock: Callable[[], float] = time.time
    ) -> None:
        self._service = service
        self._issuer = issuer
        self._clock = clock
        self._files = [WatchedFile(each, parse_keys) for each in keys]
        self._registry = SignedTokens()
        self._known: dict[bytes, _Verified] = {}
        self._reasons: dict[Path, str] = {}
        self._last: dict[Path, Sequence[VerificationKey]] = {}
        for each in self._files:
            try:
                self._last[each.path] = each.current()
            except ValueError as error:
                raise ValueError(f"{each.path}: {error}") from None

    def verify(self, token: str) -> Principal:
        """Return who the token belongs to, without an address.  Raises BadToken."""
        keys = self._keys()
        mark = _mark(token)
        known = self._known.get(mark)
        if known is None:
            known = self._verify(token, keys)
            self._known[mark] = known
            if len(self._known) > REMEMBERED:
                del self._known[next(iter(self._known))]
        if self._clock() >= known.until:
            self._known.pop(mark, None)
            raise BadToken("it has expired")
        return known.principal

    def remembers(self, token: str) -> bool:
        """Whether the token was verified, by the keys as they are now, and has not expired."""
        self._keys()
        known = self._known.get(_mark(token))
        return known is not None and self._clock() < known.until

    def _keys(self) -> Sequence[VerificationKey]:
        """The keys in the files as they are now; none of a file that cannot be read."""
        found: list[VerificationKey] = []
        for each in self._files:
            keys: Sequence[VerificationKey] = ()
            reason = ""
            try:
                keys = each.current()
            except OSError as error:
                reason = error.strerror or "it cannot be read"
            except ValueError as error:
                reason = str(error)
            if reason and reason != self._reasons.get(each.path):
                log.error("keys.failed", path=str(each.path), reason=reason)
            self._reasons[each.path] = reason
            if keys is not self._last.get(each.path):
                self._last[each.path] = keys
                self._known.clear()
            found += keys
        return found

    def _verify(self, token: str, keys: Sequence[VerificationKey]) -> _Verified:
        claims, whole = self._claims(self._payload(token, keys))
        now = self._clock()
        if claims.iss != self._issuer:
            raise BadToken(f"its issuer is not {self._issuer}")
        audience = [claims.aud] if isinstance(claims.aud, str) else claims.aud
        if self._service not in audience:
            raise BadToken(f"it is not for the service {self._service}")
        if max(claims.nbf or 0.0, claims.iat or 0.0) > now + LEEWAY:
            raise BadToken("it is not valid yet")
        user = claims.sub or ""
        principal = Principal(user, "token", claims=whole, grants=_grants(whole.get("access")))
        return _Verified(principal, claims.exp + LEEWAY)

    def _payload(self, token: str, keys: Sequence[VerificationKey]) -> bytes:
        """The payload of a token that one of the keys has signed."""
        try:
            header = extract_compact(token.encode("ascii"), registry=self._registry).headers()
            algorithm, kid = header.get("alg"), header.get("kid")
            fit = [key for key in keys if algorithm in ALGORITHMS[key.key_type]]
            # Token servers name keys as they like, so `kid` only decides which of the few keys is tried
            # first.
            fit.sort(key=lambda key: kid not in (key.kid, key.thumbprint()))
            for key in fit:
                try:
                    return deserialize_compact(token, key, ALGORITHMS[key.key_type], self._registry).payload
                except JoseError:
                    continue
        except (JoseError, ValueError, TypeError, UnicodeEncodeError):
            raise BadToken("it is not a signed token") from None
        raise BadToken("no configured key (access.token.keys) has signed it with an accepted algorithm")

    def _claims(self, payload: bytes) -> tuple[_Claims, dict[str, Any]]:
        try:
            whole = msgspec.json.decode(payload, type=dict[str, Any])
            return msgspec.convert(whole, _Claims), whole
        except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError):
            raise BadToken(
                "one of the claims iss, aud and exp is missing, or a claim has the wrong type"
            ) from None


def _mark(token: str) -> bytes:
    """What a token is remembered by."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _grants(access: object) -> tuple[Grant, ...]:
    """The grants of the claim `access` (token specification); unknown entries grant nothing."""
    found = []
    for each in access if isinstance(access, list) else ():
        try:
            entry = msgspec.convert(each, _Access)
        except msgspec.ValidationError:
            continue
        if entry.type in ("repository", "registry"):
            name = entry.name if entry.type == "repository" else f"registry:{entry.name}"
            found.append(Grant(name, frozenset(entry.actions or ())))
    return tuple(found)


def parse_keys(content: bytes) -> tuple[VerificationKey, ...]:
    """Parse public keys: PEM blocks of keys or certificates, a JWK or a JWKS.  Raises ValueError."""
    found = [_from_jwk(each) for each in _jwks(content)] if content.lstrip()[:1] == b"{" else []
    found += [_from_pem(each[1].decode(), each[0]) for each in _PEM.finditer(content)]
    if not found:
        raise ValueError("it holds no key: expected PEM, a JWK or a JWKS")
    return tuple(found)


def _jwks(content: bytes) -> list[Any]:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None
    keys = document.get("keys", [document])
    if not isinstance(keys, list):
        raise ValueError("its keys is not a list")
    return [each for each in keys if not isinstance(each, dict) or each.get("use", "sig") == "sig"]


def _from_jwk(value: Any) -> VerificationKey:
    if not isinstance(value, dict) or value.get("kty") not in KEPT:
        raise ValueError("it holds a key that is not of type RSA, EC or OKP: shared secrets are not accepted")
    if "d" in value:
        raise ValueError("it holds a private key: give the public key")
    try:
        return _public(JWKRegistry.import_key(value))
    except (JoseError, ValueError, TypeError, KeyError):
        raise ValueError(f"it holds a key of type {value['kty']} that cannot be read") from None


def _from_pem(label: str, block: bytes) -> VerificationKey:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
    from cryptography.x509 import load_pem_x509_certificate

    if "PRIVATE" in label:
        raise ValueError("it holds a private key: give the public key")
    try:
        if label == "CERTIFICATE":
            key = load_pem_x509_certificate(block).public_key()
            block = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        for kind in KEPT:
            try:
                return _public(JWKRegistry.import_key(block, kind))
            except (JoseError, ValueError, TypeError):
                continue
    except (ValueError, TypeError):
        pass
    raise ValueError(f"its {label} cannot be read, or is not a key of RSA, EC or Ed25519")


def _public(key: Any) -> VerificationKey:
    if not isinstance(key, RSAKey | ECKey | OKPKey) or key.is_private:
        raise ValueError("not a public key")
    if isinstance(key, OKPKey) and not key.curve_name.startswith("Ed"):
        raise ValueError("not a key for signatures")
    return key
