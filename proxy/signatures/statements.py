"""Statements about content, in the format of in-toto: attestation/spec/v1/statement.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from proxy.signatures.errors import SignatureRefused
from proxy.signatures.forms import Proof
from proxy.signatures.strict_json import decode_object, text_member
from storage.oci import Digest

PAYLOAD_TYPE = "application/vnd.in-toto+json"
TYPES = ("https://in-toto.io/Statement/v1", "https://in-toto.io/Statement/v0.1")
# The predicate types by which cosign signs an image without saying anything about it.
SIGNATURES = ("https://sigstore.dev/cosign/sign/v1", "https://cosign.sigstore.dev/attestation/v1/sign")
_WHAT = "the statement"


@dataclass(frozen=True, slots=True)
class Statement:
    """A statement about `subjects`, whose digests are written `algorithm:encoded`."""

    subjects: frozenset[str]
    predicate_type: str
    predicate: Any

    @classmethod
    def parse(cls, payload_type: str, payload: bytes) -> Statement:
        """Raises SignatureRefused."""
        if payload_type != PAYLOAD_TYPE:
            raise SignatureRefused(f"the payload is {payload_type[:100]!r}, which is no in-toto statement")
        found = decode_object(payload, _WHAT)
        version = text_member(found, "_type", what=_WHAT)
        if version not in TYPES:
            raise SignatureRefused(f"{_WHAT} is of the unknown type {version[:100]!r}")
        subjects = found.get("subject")
        digests = [
            f"{algorithm}:{encoded}"
            for each in (subjects if isinstance(subjects, list) else [])
            if isinstance(each, dict) and isinstance(each.get("digest"), dict)
            for algorithm, encoded in each["digest"].items()
        ]
        predicate_type = text_member(found, "predicateType", what=_WHAT)
        return cls(frozenset(digests), predicate_type, found.get("predicate"))

    def prove(self, digest: Digest) -> Proof:
        """What it says about `digest`.  Raises SignatureRefused if it is about other content."""
        if digest not in self.subjects:
            named = ", ".join(sorted(self.subjects)[:3]) or "none"
            raise SignatureRefused(f"the signature is of another digest, {named[:300]}")
        if self.predicate_type in SIGNATURES:
            return Proof()
        return Proof(self.predicate_type, self.predicate)
