"""The authorities and logs in a trusted root file, for what the `sigstore` library does not verify.

sigstore/protobuf-specs, sigstore_trustroot.proto; RFC 6962 for the log of certificates.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key
from cryptography.x509.certificate_transparency import SignedCertificateTimestamp

from proxy.signatures.errors import SignatureRefused, SignerInvalid
from proxy.signatures.keys import VerificationKey

if TYPE_CHECKING:
    from sigstore_models.common.v1 import TimeRange
    from sigstore_models.trustroot.v1 import CertificateAuthority, TransparencyLogInstance

_EPOCH = datetime.fromtimestamp(0, UTC)
_PRECERTIFICATE = 1  # RFC 6962, section 3.1: LogEntryType


@dataclass(frozen=True, slots=True)
class _Period:
    """When an authority or a log is trusted; both ends are inclusive."""

    start: datetime | None
    end: datetime | None

    @classmethod
    def of(cls, span: TimeRange | None) -> _Period:
        return cls(None, None) if span is None else cls(span.start, span.end)

    def holds(self, at: datetime) -> bool:
        return (self.start is None or self.start <= at) and (self.end is None or at <= self.end)


@dataclass(frozen=True, slots=True)
class _TrustedLog:
    key: VerificationKey
    period: _Period


@dataclass(frozen=True, slots=True)
class _Authority:
    """The root certificate of an authority, and those between it and the certificates of signers."""

    root: x509.Certificate
    between: Sequence[x509.Certificate]
    period: _Period


class TrustMaterial:
    """What a trusted root file vouches for.  Raises SignerInvalid if it cannot be used."""

    def __init__(self, path: Path) -> None:
        from sigstore_models.trustroot.v1 import TrustedRoot  # part of sigstore

        try:
            found = TrustedRoot.from_json(path.read_bytes())
            self._authorities = [_authority(each) for each in found.certificate_authorities]
            self._logs = _logs(found.tlogs, path)
            self._certificate_logs = _logs(found.ctlogs, path)
        except OSError as error:
            raise SignerInvalid(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, UnsupportedAlgorithm) as error:
            raise SignerInvalid(f"{path} is no trusted root that can be used: {error}") from None

    def check_entry(self, log_id: bytes, signature: bytes, entry: bytes, at: datetime) -> None:
        """Raises SignatureRefused unless a transparency log, trusted at that time, has signed the entry."""
        log = self._logs.get(log_id)
        if log is None or not log.period.holds(at):
            named = f"of the log {log_id.hex()[:16]}"
            raise SignatureRefused(
                f"its entry is {named}, which the trusted root does not have for that time"
            )
        try:
            log.key.verify(signature, entry)
        except SignatureRefused:
            raise SignatureRefused("its entry was changed: the transparency log did not sign it") from None

    def check_certificate(self, certificate: x509.Certificate, at: datetime) -> None:
        """Raises SignatureRefused unless an authority had issued it, and logged it, and it was valid then.

        May raise one of certificates.UNREADABLE.
        """
        issuer = self._issuer(certificate, at)
        if self._certificate_logs and not any(
            self._holds(each, certificate, issuer) for each in _timestamps(certificate)
        ):
            raise SignatureRefused("its certificate is not in a log of certificates that is trusted")

    def _issuer(self, certificate: x509.Certificate, at: datetime) -> x509.Certificate:
        from cryptography.x509.verification import VerificationError

        if not certificate.not_valid_before_utc <= at <= certificate.not_valid_after_utc:
            raise SignatureRefused(
                f"its certificate was not valid at {at:%Y-%m-%d %H:%M:%S} UTC, when the log took its entry"
            )
        for each in self._authorities:
            if each.period.holds(at):
                try:
                    return _chain(certificate, each, at)[1]
                except VerificationError:
                    continue
        raise SignatureRefused("its certificate is not issued by an authority of the trusted root")

    def _holds(
        self, sct: SignedCertificateTimestamp, certificate: x509.Certificate, issuer: x509.Certificate
    ) -> bool:
        """Whether a trusted log promised to take the certificate."""
        log = self._certificate_logs.get(sct.log_id)
        at = sct.timestamp.replace(tzinfo=UTC)
        if log is None or not log.period.holds(at) or not isinstance(sct.signature_hash_algorithm, SHA256):
            return False
        try:
            log.key.verify(sct.signature, _promised(sct, at, certificate, issuer))
        except SignatureRefused:
            return False
        return True


def _authority(found: CertificateAuthority) -> _Authority:
    *between, root = [
        x509.load_der_x509_certificate(each.raw_bytes) for each in found.cert_chain.certificates
    ]
    return _Authority(root, between, _Period.of(found.valid_for))


def _logs(found: Iterable[TransparencyLogInstance], path: Path) -> Mapping[bytes, _TrustedLog]:
    """By their ids, which are the hashes of their keys.  Those with keys of another kind are left out."""
    logs = {}
    for each in found:
        with suppress(ValueError, UnsupportedAlgorithm):
            key = load_der_public_key(each.public_key.raw_bytes or b"")
            pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
            read = VerificationKey(pem, f"the log {each.base_url} of {path}")
            logs[base64.b64decode(read.hint)] = _TrustedLog(read, _Period.of(each.public_key.valid_for))
    return logs


def _chain(certificate: x509.Certificate, authority: _Authority, at: datetime) -> list[x509.Certificate]:
    """Raises VerificationError of the library."""
    from cryptography.x509.verification import Criticality, ExtensionPolicy, PolicyBuilder, Store

    # The certificates are made for the signing of code, where the library expects clients of TLS.
    usage = (x509.ExtendedKeyUsage, Criticality.NON_CRITICAL, None)
    verifier = (
        PolicyBuilder()
        .store(Store([authority.root]))
        .time(at)
        .extension_policies(
            ca_policy=ExtensionPolicy.webpki_defaults_ca().may_be_present(*usage),
            ee_policy=ExtensionPolicy.webpki_defaults_ee().may_be_present(*usage),
        )
        .build_client_verifier()
    )
    return verifier.verify(certificate, list(authority.between)).chain


def _timestamps(certificate: x509.Certificate) -> list[SignedCertificateTimestamp]:
    try:
        kind = x509.PrecertificateSignedCertificateTimestamps
        return list(certificate.extensions.get_extension_for_class(kind).value)
    except x509.ExtensionNotFound:
        return []


def _promised(
    sct: SignedCertificateTimestamp, at: datetime, certificate: x509.Certificate, issuer: x509.Certificate
) -> bytes:
    """What a log signs when it promises to take a certificate: RFC 6962, section 3.2."""
    milliseconds = (at - _EPOCH) // timedelta(milliseconds=1)
    key = issuer.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    body = certificate.tbs_precertificate_bytes
    return b"".join(
        (
            b"\0\0",
            milliseconds.to_bytes(8, "big"),
            _PRECERTIFICATE.to_bytes(2, "big"),
            hashlib.sha256(key).digest(),
            len(body).to_bytes(3, "big"),
            body,
            len(sct.extension_bytes).to_bytes(2, "big"),
            sct.extension_bytes,
        )
    )
