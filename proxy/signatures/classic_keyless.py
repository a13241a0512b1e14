"""Keyless signatures and attestations in cosign's classic form: cosign, specs/SIGNATURE_SPEC.md.

The certificate of the identity, and the entry of the transparency log, are in annotations of the layer; the
certificates between it and its authority are those of the trusted root.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID

from proxy.signatures.certificates import UNREADABLE
from proxy.signatures.dsse import open_envelope
from proxy.signatures.errors import SignatureRefused, SignerInvalid
from proxy.signatures.forms import FoundSignature, Proof
from proxy.signatures.keys import VerificationKey
from proxy.signatures.log_entries import ENVELOPE_ENTRIES, SIGNATURE_ENTRIES, LogEntry, parse_certificate
from proxy.signatures.simple_signing import CERTIFICATE, LOG_ENTRY, SIGNATURE, check_payload
from proxy.signatures.statements import Statement
from proxy.signatures.strict_json import decode_base64, decode_object
from proxy.signatures.trust_material import TrustMaterial
from storage.oci import Descriptor


class CertificatePolicy(Protocol):
    """Whose certificates are believed."""

    def verify(self, cert: x509.Certificate) -> None:
        """Raises SignatureRefused."""


class ClassicKeyless:
    """Verifies what is signed by a certificate that `policy` accepts, and that `root` vouches for."""

    def __init__(self, root: TrustMaterial, policy: CertificatePolicy) -> None:
        self._root, self._policy = root, policy

    def verify(self, signature: FoundSignature, target: Descriptor) -> Proof:
        """Raises SignatureRefused."""
        try:
            return self._verify(signature, target)
        except UNREADABLE as error:
            raise SignatureRefused(f"its certificate cannot be read: {error}") from None

    def _verify(self, signature: FoundSignature, target: Descriptor) -> Proof:
        annotations = signature.annotations
        if LOG_ENTRY not in annotations:
            raise SignatureRefused(f"it has no entry of a transparency log (annotation {LOG_ENTRY})")
        certificate = parse_certificate(annotations[CERTIFICATE].encode("utf-8", "replace"))
        entry = LogEntry.parse(annotations[LOG_ENTRY])
        self._root.check_entry(entry.log_id, entry.signature, entry.signed, entry.at)
        self._root.check_certificate(certificate, entry.at)
        _check_usage(certificate)
        self._policy.verify(certificate)
        key = _key_of(certificate)
        if signature.form == "envelope":
            entry.check_about(signature.content, certificate, ENVELOPE_ENTRIES)
            envelope = decode_object(signature.content, "the envelope")
            return Statement.parse(*open_envelope(envelope, key)).prove(target.digest)
        encoded = _signature(annotations)
        key.verify(decode_base64(encoded, "the signature"), signature.content)
        entry.check_about(signature.content, certificate, SIGNATURE_ENTRIES)
        entry.check_signature(encoded)
        check_payload(signature.content, target.digest)
        return Proof()


def _signature(annotations: Mapping[str, str]) -> str:
    if (encoded := annotations.get(SIGNATURE)) is None:
        raise SignatureRefused(f"its layer has no annotation {SIGNATURE}")
    return encoded


def _check_usage(certificate: x509.Certificate) -> None:
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    purposes = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    if not usage.digital_signature or ExtendedKeyUsageOID.CODE_SIGNING not in purposes:
        raise SignatureRefused("its certificate is not made for the signing of code")


def _key_of(certificate: x509.Certificate) -> VerificationKey:
    pem = certificate.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    try:
        return VerificationKey(pem, "its certificate")
    except SignerInvalid as error:
        raise SignatureRefused(str(error)) from None
