"""Entries of a transparency log as cosign keeps them beside classic signatures, in an annotation.

cosign, pkg/cosign/bundle/rekor.go; Rekor, openapi.yaml and pkg/types.  The log has signed the entry (the
"signed entry timestamp"), and so promised to keep it; there is no proof of inclusion.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cryptography import x509

from proxy.signatures.errors import SignatureRefused
from proxy.signatures.strict_json import decode_base64, decode_object, text_member

_WHAT = "the log's entry"
_HEX = re.compile(r"[0-9a-f]{64}")
_LATEST = 253402300799  # the last second of the year 9999
# By kind and version of an entry: where it has the hash of what was signed, and the certificate.
_SIGNED: Mapping[str, tuple[str, ...]] = {
    "hashedrekord 0.0.1": ("data", "hash"),
    "dsse 0.0.1": ("envelopeHash",),
    "intoto 0.0.2": ("content", "hash"),
}
_CERTIFICATE: Mapping[str, tuple[str | int, ...]] = {
    "hashedrekord 0.0.1": ("signature", "publicKey", "content"),
    "dsse 0.0.1": ("signatures", 0, "verifier"),
    "intoto 0.0.2": ("content", "envelope", "signatures", 0, "publicKey"),
}
SIGNATURE_ENTRIES = ("hashedrekord 0.0.1",)
ENVELOPE_ENTRIES = ("dsse 0.0.1", "intoto 0.0.2")


@dataclass(frozen=True, slots=True)
class LogEntry:
    """An entry, and the log's signature of it.

    signed: the bytes that the log has signed
    at: when it took the entry
    kind: the kind and the version of the body
    """

    log_id: bytes
    signature: bytes
    signed: bytes
    at: datetime
    kind: str
    body: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> LogEntry:
        """Raises SignatureRefused."""
        found = decode_object(text.encode("utf-8", "surrogateescape"), _WHAT)
        signature = decode_base64(text_member(found, "SignedEntryTimestamp", what=_WHAT), "its signature")
        encoded = text_member(found, "Payload", "body", what=_WHAT)
        log_id = text_member(found, "Payload", "logID", what=_WHAT)
        if not _HEX.fullmatch(log_id):
            raise SignatureRefused(f"{_WHAT} names no log")
        numbers = {name: _number(found["Payload"], name) for name in ("integratedTime", "logIndex")}
        body = decode_object(decode_base64(encoded, "the body of the entry"), _WHAT)
        kind = f"{body.get('kind')} {body.get('apiVersion')}"
        payload = {"body": encoded, "logID": log_id, **numbers}
        # RFC 8785, of texts without anything that is escaped
        canonical = json.dumps(payload, sort_keys=True, separators=(",", ":")).encode()
        at = datetime.fromtimestamp(numbers["integratedTime"], UTC)
        return cls(bytes.fromhex(log_id), signature, canonical, at, kind, body)

    def check_about(self, content: bytes, certificate: x509.Certificate, kinds: tuple[str, ...]) -> None:
        """Raises SignatureRefused unless it is of one of `kinds`, and about `content` and the certificate."""
        if self.kind not in kinds:
            raise SignatureRefused(f"its log entry is of the kind {self.kind[:60]}, not {' or '.join(kinds)}")
        spec = self.body.get("spec")
        hashed = _SIGNED[self.kind]
        algorithm = text_member(spec, *hashed, "algorithm", what=_WHAT)
        value = text_member(spec, *hashed, "value", what=_WHAT)
        if algorithm != "sha256" or value != hashlib.sha256(content).hexdigest():
            raise SignatureRefused("its log entry is about other content")
        encoded = _member(spec, _CERTIFICATE[self.kind])
        if (
            not isinstance(encoded, str)
            or parse_certificate(decode_base64(encoded, "the certificate of the entry")) != certificate
        ):
            raise SignatureRefused("its log entry is about another certificate")

    def check_signature(self, signature: str) -> None:
        """Raises SignatureRefused unless it is about a signature, which is in base64."""
        if text_member(self.body.get("spec"), "signature", "content", what=_WHAT) != signature:
            raise SignatureRefused("its log entry is about another signature")


def parse_certificate(pem: bytes) -> x509.Certificate:
    """The only certificate in PEM.  Raises SignatureRefused."""
    try:
        (found,) = x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise SignatureRefused("it has no certificate that can be read, or several") from None
    return found


def _number(payload: dict[str, Any], name: str) -> int:
    value = payload.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _LATEST:
        raise SignatureRefused(f"{_WHAT} has no {name}")
    return value


def _member(found: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        if isinstance(key, int):
            # cosign, too, takes entries with one signature only.
            found = found[key] if isinstance(found, list) and len(found) == 1 else None
        else:
            found = found.get(key) if isinstance(found, dict) else None
    return found
