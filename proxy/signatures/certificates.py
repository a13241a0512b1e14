"""Chains of certificates for the signing of code.

notaryproject/specifications, signature-specification.md, "Certificate Requirements" and
"Algorithm Selection".
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512, HashAlgorithm
from cryptography.x509.oid import ExtendedKeyUsageOID as Purpose

from proxy.signatures.errors import SignatureRefused, SignerInvalid

LONGEST_CHAIN = 10
_HASHES: dict[int, HashAlgorithm] = {256: SHA256(), 384: SHA384(), 512: SHA512()}
_RSA = {2048: 256, 3072: 384, 4096: 512}  # bits of the key: of the hash
_CURVES = {"secp256r1": 256, "secp384r1": 384, "secp521r1": 512}
_OTHER_PURPOSES = (
    Purpose.SERVER_AUTH,
    Purpose.CLIENT_AUTH,
    Purpose.EMAIL_PROTECTION,
    Purpose.TIME_STAMPING,
    Purpose.OCSP_SIGNING,
)
_OTHER_USES = ("key_cert_sign", "crl_sign", "key_encipherment", "data_encipherment", "key_agreement")
_WEAK = ("md5", "sha1")
# What the library raises for certificates with content that it cannot read; it reads much of it late.
UNREADABLE = (
    ValueError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
# RFC 5280, section 4.2: a certificate with a critical extension that is not processed must be rejected.
_PROCESSED = (x509.BasicConstraints, x509.KeyUsage, x509.ExtendedKeyUsage)


def read_certificates(path: Path) -> list[x509.Certificate]:
    """The certificates of a file in PEM.  Raises SignerInvalid."""
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except OSError as error:
        raise SignerInvalid(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise SignerInvalid(f"{path} holds no certificates in PEM: write those of the CA to it") from None


def parse_chain(chain: Sequence[bytes]) -> list[x509.Certificate]:
    """Certificates in DER, that of the signer first.  Raises SignatureRefused, or one of UNREADABLE."""
    if not 1 <= len(chain) <= LONGEST_CHAIN:
        raise SignatureRefused(f"the signature has no certificate, or more than {LONGEST_CHAIN}")
    return [x509.load_der_x509_certificate(each) for each in chain]


def check_chain(
    chain: Sequence[x509.Certificate], trusted: Sequence[x509.Certificate], now: datetime
) -> None:
    """Raises SignatureRefused unless each is issued by the next, the last by itself, and one is trusted.

    All are valid `now`, and made for what they do.  May raise one of UNREADABLE.
    """
    for number, each in enumerate(chain):
        _check_time(each, now)
        _check_extensions(each)
        _check_issuer(each, chain[min(number + 1, len(chain) - 1)])
        if number == 0:
            _check_leaf(each)
        else:
            _check_authority(each, number - 1)
    if not set(chain) & set(trusted):
        raise SignatureRefused(f"no certificate of the chain is trusted; it ends at {name_of(chain[-1])}")


def _check_time(certificate: x509.Certificate, now: datetime) -> None:
    if now < certificate.not_valid_before_utc:
        begins = f"{certificate.not_valid_before_utc:%Y-%m-%d %H:%M}"
        raise SignatureRefused(f"the certificate of {name_of(certificate)} is not valid before {begins} UTC")
    if now > certificate.not_valid_after_utc:
        ended = f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M}"
        raise SignatureRefused(f"the certificate of {name_of(certificate)} expired at {ended} UTC")


def _check_extensions(certificate: x509.Certificate) -> None:
    for each in certificate.extensions:
        if each.critical and not isinstance(each.value, _PROCESSED):
            unknown = f"a critical extension, {each.oid.dotted_string}, which is not understood"
            raise SignatureRefused(f"the certificate of {name_of(certificate)} has {unknown}")


def _check_issuer(certificate: x509.Certificate, issuer: x509.Certificate) -> None:
    hashed = certificate.signature_hash_algorithm
    if hashed is not None and hashed.name in _WEAK:
        raise SignatureRefused(f"the certificate of {name_of(certificate)} is signed by {hashed.name}")
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        issued = f"the certificate of {name_of(certificate)} is not issued by that of {name_of(issuer)}"
        raise SignatureRefused(issued) from None


def _check_leaf(certificate: x509.Certificate) -> None:
    who = f"the certificate of {name_of(certificate)}"
    if _is_authority(certificate):
        raise SignatureRefused(f"{who} is that of a CA: a signer has one of its own")
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    if not usage.critical or not usage.value.digital_signature:
        raise SignatureRefused(f"{who} is not made for signatures")
    if any(getattr(usage.value, each) for each in _OTHER_USES):
        raise SignatureRefused(f"{who} is made for more than signatures")
    for extension in certificate.extensions:
        if isinstance(extension.value, x509.ExtendedKeyUsage) and set(extension.value) & set(_OTHER_PURPOSES):
            raise SignatureRefused(f"{who} is made for other purposes than the signing of code")


def _check_authority(certificate: x509.Certificate, below: int) -> None:
    who = f"the certificate of {name_of(certificate)}"
    if not _is_authority(certificate):
        raise SignatureRefused(f"{who} is not that of a CA")
    allowed = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length
    if allowed is not None and allowed < below:
        raise SignatureRefused(f"{who} allows only {allowed} CAs below it")
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    if not usage.critical or not usage.value.key_cert_sign:
        raise SignatureRefused(f"{who} is not made to sign certificates")


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def name_of(certificate: x509.Certificate) -> str:
    """The subject, for messages."""
    return certificate.subject.rfc4514_string()[:200]


def algorithm_of(certificate: x509.Certificate) -> str:
    """The algorithm by which the holder signs, as in RFC 7518.  Raises as check_signature() does."""
    key = certificate.public_key()
    if isinstance(key, rsa.RSAPublicKey) and key.key_size in _RSA:
        return f"PS{_RSA[key.key_size]}"
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _CURVES:
        return f"ES{_CURVES[key.curve.name]}"
    raise SignatureRefused(
        f"the key of {name_of(certificate)} is of a kind or size that Notary Project does not allow"
    )


def check_signature(certificate: x509.Certificate, algorithm: str, signature: bytes, message: bytes) -> None:
    """Raises SignatureRefused unless the holder signed `message` by `algorithm`: RFC 7518, section 3.

    May raise one of UNREADABLE.
    """
    if algorithm != (expected := algorithm_of(certificate)):
        raise SignatureRefused(f"the signature is by {algorithm}, not {expected} as its key makes")
    key, hashed = certificate.public_key(), _HASHES[int(algorithm[2:])]
    try:
        if isinstance(key, rsa.RSAPublicKey):
            pss = padding.PSS(padding.MGF1(hashed), hashed.digest_size)
            key.verify(signature, message, pss, hashed)
        elif isinstance(key, ec.EllipticCurvePublicKey):
            half = (key.curve.key_size + 7) // 8
            if len(signature) != 2 * half:
                raise InvalidSignature
            numbers = (int.from_bytes(each, "big") for each in (signature[:half], signature[half:]))
            key.verify(encode_dss_signature(*numbers), message, ec.ECDSA(hashed))
    except InvalidSignature:
        signer = name_of(certificate)
        raise SignatureRefused(f"the content was changed: {signer} did not sign it so") from None
