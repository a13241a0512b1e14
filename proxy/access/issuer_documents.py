"""The documents of an issuer of tokens, and for how long they are good.

OpenID Connect Discovery 1.0, section 4; RFC 7517; RFC 9111, section 4.2.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any

import msgspec
from joserfc.errors import SecurityWarning
from yarl import URL

from proxy.access.bearer import VerificationKey, parse_keys
from proxy.config.oidc import is_safe

USUAL = 3600.0  # seconds for which a response is fresh that says nothing about it
MOST_KEYS = 200
SMALLEST_RSA = 2048  # bits
warnings.filterwarnings("ignore", "Key size should be", SecurityWarning)  # shorter keys are passed over


class _Metadata(msgspec.Struct):
    issuer: str
    jwks_uri: str


def metadata_url(issuer: str) -> str:
    """OpenID Connect Discovery 1.0, section 4.1."""
    return f"{issuer.rstrip('/')}/.well-known/openid-configuration"


def parse_metadata(content: bytes, issuer: str) -> str:
    """The URL of the keys in a discovery document.  Raises ValueError."""
    try:
        found = msgspec.json.decode(content, type=_Metadata)
    except (ValueError, RecursionError):
        raise ValueError("its discovery document has no issuer or no jwks_uri") from None
    if found.issuer != issuer:
        # Section 4.3.  Otherwise a server could pass off another issuer's document as its own.
        raise ValueError(f"its discovery document is of the issuer {found.issuer[:200]!r}, not {issuer}")
    try:
        safe = is_safe(found.jwks_uri) and URL(found.jwks_uri).is_absolute()
    except ValueError:
        safe = False
    if not safe:
        raise ValueError("its discovery document has a jwks_uri that is not an https URL")
    return found.jwks_uri


def parse_jwks(content: bytes) -> tuple[VerificationKey, ...]:
    """The keys for signatures in a JWKS.  Raises ValueError if there are none.

    Others are passed over: RFC 7517, section 5.
    """
    try:
        members = msgspec.json.decode(content, type=dict[str, Any]).get("keys")
    except (ValueError, RecursionError):
        raise ValueError("it is no JWKS: expected a JSON object with keys") from None
    found: list[VerificationKey] = []
    for each in members[:MOST_KEYS] if isinstance(members, list) else ():
        with suppress(ValueError, RecursionError):
            if _may_verify(each):
                found += parse_keys(msgspec.json.encode(each))
    usable = [each for each in found if each.key_type != "RSA" or _bits(each) >= SMALLEST_RSA]
    if not usable:
        raise ValueError("its JWKS has no key for signatures, of type RSA (2048 bits or more), EC or OKP")
    return tuple(usable)


def _may_verify(key: Any) -> bool:
    operations = key.get("key_ops") if isinstance(key, dict) else None
    return isinstance(key, dict) and (not isinstance(operations, list) or "verify" in operations)


def _bits(key: VerificationKey) -> int:
    return int(getattr(key.public_key, "key_size", 0))


def freshness(headers: Mapping[str, str]) -> float:
    """For how many seconds a response is fresh: RFC 9111, section 4.2.1."""
    age = _seconds(headers.get("Age", "")) or 0.0
    for directive in headers.get("Cache-Control", "").lower().split(","):
        name, _, value = directive.strip().partition("=")
        if name in ("no-store", "no-cache"):
            return 0.0
        if name == "max-age":
            return (_seconds(value.strip('"')) or 0.0) - age
    if "Expires" in headers:
        ends, begins = _time(headers["Expires"]), _time(headers.get("Date", ""))
        return 0.0 if ends is None or begins is None else ends - begins - age
    return USUAL


def clock_ahead(headers: Mapping[str, str], now: float) -> float | None:
    """How many seconds the clock of who sent a response is ahead of ours; None if it did not say."""
    date = _time(headers.get("Date", ""))
    return None if date is None else date + 0.5 - now  # Date has whole seconds


def _time(text: str) -> float | None:
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError):
        return None


def _seconds(text: str) -> float | None:
    return float(text) if text.isascii() and text.isdecimal() and len(text) < 12 else None
