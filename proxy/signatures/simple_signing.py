"""The payload that cosign signs in its classic form, "simple signing".

cosign, specs/SIGNATURE_SPEC.md; containers/image, docs/containers-signature.5.md.
"""

from __future__ import annotations

from proxy.signatures.errors import SignatureRefused
from proxy.signatures.strict_json import decode_object, text_member
from storage.oci import Digest

SIGNATURE = "dev.cosignproject.cosign/signature"
# Of keyless signatures: the certificate, and the entry of the transparency log.
CERTIFICATE = "dev.sigstore.cosign/certificate"
LOG_ENTRY = "dev.sigstore.cosign/bundle"
TYPE = "cosign container image signature"
_WHAT = "the payload of the signature"


def check_payload(payload: bytes, digest: Digest) -> None:
    """Raises SignatureRefused unless the payload names `digest`.

    The name of the repository in it is not compared: a mirror has another one.
    """
    found = decode_object(payload, _WHAT)
    kind = text_member(found, "critical", "type", what=_WHAT)
    if kind != TYPE:
        raise SignatureRefused(f"{_WHAT} is of the type {kind[:100]!r}, which is no signature of an image")
    signed = text_member(found, "critical", "image", "docker-manifest-digest", what=_WHAT)
    if signed != digest:
        raise SignatureRefused(f"the signature is of another digest, {signed[:150]}")
