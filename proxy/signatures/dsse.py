"""DSSE envelopes, verified by a key: secure-systems-lab/dsse, protocol.md and envelope.md."""

from __future__ import annotations

from typing import Any

from proxy.signatures.errors import SignatureRefused
from proxy.signatures.keys import VerificationKey
from proxy.signatures.strict_json import decode_base64, text_member

MOST_SIGNATURES = 16  # that are tried
_WHAT = "the envelope"


def pre_authentication_encoding(payload_type: bytes, payload: bytes) -> bytes:
    """What is signed: the type and the payload, each after its length."""
    return b"DSSEv1 %d %s %d %s" % (len(payload_type), payload_type, len(payload), payload)


def open_envelope(envelope: Any, key: VerificationKey) -> tuple[str, bytes]:
    """The type and the bytes of the payload, if one of its signatures is by `key`.

    Raises SignatureRefused.
    """
    payload_type = text_member(envelope, "payloadType", what=_WHAT)
    payload = decode_base64(text_member(envelope, "payload", what=_WHAT), "the payload")
    signatures = envelope.get("signatures")
    if not isinstance(signatures, list) or not 1 <= len(signatures) <= MOST_SIGNATURES:
        raise SignatureRefused(f"{_WHAT} has no signature, or more than {MOST_SIGNATURES}")
    message = pre_authentication_encoding(payload_type.encode(), payload)
    for number, each in enumerate(signatures, 1):
        signature = decode_base64(text_member(each, "sig", what=_WHAT), "the signature")
        try:
            key.verify(signature, message)
        except SignatureRefused:
            if number == len(signatures):
                raise
        else:
            break
    return payload_type, payload
