"""Public keys that verify signatures of sigstore: ECDSA, RSA and Ed25519."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512, HashAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from proxy.signatures.errors import SignatureRefused, SignerInvalid

SMALLEST_RSA = 2048  # bits
# cosign hashes by SHA-256 whatever the curve, other signers of sigstore by the size of the curve.
_HASHES: Mapping[str, tuple[HashAlgorithm, ...]] = {
    "secp256r1": (SHA256(),),
    "secp384r1": (SHA384(), SHA256()),
    "secp521r1": (SHA512(), SHA256()),
}


class VerificationKey:
    """A public key in PEM, from the file `name`.  Raises SignerInvalid for what is no key, or too weak."""

    def __init__(self, pem: bytes, name: str) -> None:
        try:
            key = load_pem_public_key(pem)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise SignerInvalid(
                f"{name} holds no public key in PEM: write that of the signer to it"
            ) from None
        self._check = _checker(key, name)
        spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        # sigstore's bundles name the key so: protobuf-specs, PublicKeyIdentifier.
        self.hint = base64.b64encode(hashlib.sha256(spki).digest()).decode()

    @classmethod
    def read(cls, path: Path) -> VerificationKey:
        """Read a file.  Raises SignerInvalid."""
        try:
            return cls(path.read_bytes(), str(path))
        except OSError as error:
            raise SignerInvalid(f"{path} cannot be read: {error.strerror}") from None

    def verify(self, signature: bytes, message: bytes) -> None:
        """Raises SignatureRefused unless the key's holder has signed `message`."""
        if not self._check(signature, message):
            raise SignatureRefused("the signature is by another key, or the content was changed")


def _checker(key: object, name: str) -> Callable[[bytes, bytes], bool]:
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _HASHES:
        schemes = [ec.ECDSA(each) for each in _HASHES[key.curve.name]]
        curve = key
        return lambda signature, message: any(
            _holds(lambda each=each: curve.verify(signature, message, each))  # type: ignore[misc]
            for each in schemes
        )
    if isinstance(key, rsa.RSAPublicKey) and key.key_size >= SMALLEST_RSA:
        modulus = key
        return lambda signature, message: _holds(
            lambda: modulus.verify(signature, message, padding.PKCS1v15(), SHA256())
        )
    if isinstance(key, ed25519.Ed25519PublicKey):
        point = key
        return lambda signature, message: _holds(lambda: point.verify(signature, message))
    raise SignerInvalid(
        f"{name} holds a key that cannot be used: give one of ECDSA (P-256, P-384, P-521), "
        f"RSA of {SMALLEST_RSA} bits or more, or Ed25519"
    )


def _holds(check: Callable[[], None]) -> bool:
    try:
        check()
    except InvalidSignature:
        return False
    return True
