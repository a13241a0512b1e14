"""The holder of a key as a signer: what cosign and others sign with a key of their own."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from proxy.signatures.dsse import open_envelope
from proxy.signatures.errors import SignatureRefused
from proxy.signatures.forms import FoundSignature, Proof
from proxy.signatures.keys import VerificationKey
from proxy.signatures.simple_signing import SIGNATURE, check_payload
from proxy.signatures.statements import Statement
from proxy.signatures.strict_json import decode_base64, decode_object
from storage.oci import Descriptor


class KeySigner:
    """The holder of `key`.  Entries of logs and timestamps are not looked at: the key suffices."""

    def __init__(self, key: VerificationKey) -> None:
        self._key = key

    def verify(self, signature: FoundSignature, target: Descriptor, now: datetime) -> Proof:
        if signature.form == "simple signing":
            if (encoded := signature.annotations.get(SIGNATURE)) is None:
                raise SignatureRefused(f"its layer has no annotation {SIGNATURE}")
            self._key.verify(decode_base64(encoded, "the signature"), signature.content)
            check_payload(signature.content, target.digest)
            return Proof()
        if signature.form == "Notary Project":
            raise SignatureRefused("it is signed by a certificate for Notary Project, not by a key")
        found = decode_object(signature.content, f"the {signature.form}")
        envelope = self._enveloped(found) if signature.form == "bundle" else found
        return Statement.parse(*open_envelope(envelope, self._key)).prove(target.digest)

    def _enveloped(self, bundle: dict[str, Any]) -> Any:
        """The envelope in a bundle that is signed by a key: protobuf-specs, sigstore_bundle.proto."""
        material = bundle.get("verificationMaterial")
        named = material.get("publicKey") if isinstance(material, dict) else None
        if not isinstance(named, dict):
            raise SignatureRefused("it is signed by the certificate of an identity, not by a key")
        if (hint := named.get("hint")) not in (None, "", self._key.hint):
            raise SignatureRefused(f"the signature is by another key, {str(hint)[:100]}")
        if "dsseEnvelope" not in bundle:
            raise SignatureRefused("the bundle has no envelope: cosign signs images with one")
        return bundle["dsseEnvelope"]
