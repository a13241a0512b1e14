"""The envelopes of Notary Project signatures, JWS and COSE, taken apart.

notaryproject/specifications, signature-envelope-jws.md and signature-envelope-cose.md.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from proxy.signatures.errors import SignatureRefused, SignerInvalid
from proxy.signatures.forms import JWS
from proxy.signatures.strict_json import decode_base64, decode_base64url, decode_object, text_member

_SIGN1, _SIGNATURE1 = 18, "Signature1"  # RFC 9052, sections 2 and 4.4
_ALGORITHM, _CRITICAL, _CONTENT_TYPE, _CHAIN = 1, 2, 3, 33  # RFC 9052, section 3.1; RFC 9360, section 2
_COSE_ALGORITHMS = {
    "-37": "PS256",
    "-38": "PS384",
    "-39": "PS512",
    "-7": "ES256",
    "-35": "ES384",
    "-36": "ES512",
}
_DEEPEST = 8
_WHAT = "the envelope"


@dataclass(frozen=True, slots=True)
class NotaryEnvelope:
    """A signature: `message` is what is signed by the first of `chain`, certificates in DER.

    protected: the headers that are signed, by their names
    critical: the names of those that must be understood
    """

    algorithm: str
    message: bytes
    signature: bytes
    chain: list[bytes]
    content_type: str
    protected: Mapping[str, Any]
    critical: frozenset[str]
    payload: bytes

    def time(self, name: str) -> datetime | None:
        """The time in a protected header; None without one.  Raises SignatureRefused."""
        value = self.protected.get(name)
        try:
            found = datetime.fromisoformat(value) if isinstance(value, str) else value
            if found is None:
                return None
            if isinstance(found, datetime) and found.tzinfo is not None:
                return found.astimezone(UTC)
        except (ValueError, OverflowError):
            pass
        raise SignatureRefused(f"its header {name} is no time")


def read_envelope(media_type: str, content: bytes) -> NotaryEnvelope:
    """Take it apart; nothing is verified.  Raises SignatureRefused."""
    return _jws(content) if media_type == JWS else _cose(content)


def _jws(content: bytes) -> NotaryEnvelope:
    """RFC 7515, section 7.2.2: flattened JSON."""
    found = decode_object(content, _WHAT)
    encoded, payload = (text_member(found, each, what=_WHAT) for each in ("protected", "payload"))
    protected = decode_object(decode_base64url(encoded, "the protected header"), "the protected header")
    chain = found["header"].get("x5c") if isinstance(found.get("header"), dict) else None
    if not isinstance(chain, list) or not all(isinstance(each, str) for each in chain):
        raise SignatureRefused(f"{_WHAT} has no certificates")
    return NotaryEnvelope(
        text_member(protected, "alg", what=_WHAT),
        f"{encoded}.{payload}".encode(),
        decode_base64url(text_member(found, "signature", what=_WHAT), "the signature"),
        [decode_base64(each, "a certificate") for each in chain],
        text_member(protected, "cty", what=_WHAT),
        {name: value for name, value in protected.items() if name not in ("alg", "crit", "cty")},
        _names(protected.get("crit")),
        decode_base64url(payload, "the payload"),
    )


def _cose(content: bytes) -> NotaryEnvelope:
    """RFC 9052, section 4.2: COSE_Sign1_Tagged.  Raises SignerInvalid without the library `cbor2`."""
    try:
        import cbor2
    except ImportError:
        raise SignerInvalid("signatures in COSE need the library cbor2: install entrepot[policy]") from None
    found = _cbor(content)
    parts = found.value if isinstance(found, cbor2.CBORTag) and found.tag == _SIGN1 else None
    if not isinstance(parts, (list, tuple)) or len(parts) != 4:
        raise SignatureRefused(f"{_WHAT} is no COSE_Sign1")
    encoded, unprotected, payload, signature = parts
    protected = _cbor(encoded) if isinstance(encoded, bytes) else None
    if not isinstance(protected, Mapping) or not isinstance(unprotected, Mapping):
        raise SignatureRefused(f"{_WHAT} has no headers")
    chain = unprotected.get(_CHAIN)
    chain = [chain] if isinstance(chain, bytes) else chain
    content_type = protected.get(_CONTENT_TYPE)
    if not isinstance(chain, (list, tuple)) or not all(isinstance(each, bytes) for each in chain):
        raise SignatureRefused(f"{_WHAT} has no certificates")
    if (
        not isinstance(payload, bytes)
        or not isinstance(signature, bytes)
        or not isinstance(content_type, str)
    ):
        raise SignatureRefused(f"{_WHAT} has no payload, no type of it, or no signature")
    return NotaryEnvelope(
        _COSE_ALGORITHMS.get(str(protected.get(_ALGORITHM)), "an unknown algorithm"),
        cbor2.dumps([_SIGNATURE1, encoded, b"", payload]),
        signature,
        list(chain),
        content_type,
        {
            str(name): value
            for name, value in protected.items()
            if name not in (_ALGORITHM, _CRITICAL, _CONTENT_TYPE)
        },
        _names(protected.get(_CRITICAL)),
        payload,
    )


def _cbor(content: bytes) -> Any:
    import cbor2

    stream = io.BytesIO(content)
    try:
        found = cbor2.CBORDecoder(
            stream, max_depth=_DEEPEST, allow_duplicate_keys=False, read_size=1
        ).decode()
    except (cbor2.CBORError, ValueError, TypeError, OverflowError) as error:
        raise SignatureRefused(f"{_WHAT} is not CBOR that all readers read alike: {error}") from None
    if stream.read(1):
        raise SignatureRefused(f"bytes follow {_WHAT}")
    return found


def _names(critical: Any) -> frozenset[str]:
    if not isinstance(critical, (list, tuple)) or not all(isinstance(each, str) for each in critical):
        raise SignatureRefused(f"{_WHAT} does not name its critical headers")
    return frozenset(critical)
