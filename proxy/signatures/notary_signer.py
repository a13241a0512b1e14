"""The subject of a certificate as a signer: signatures of Notary Project, as `notation` makes them.

notaryproject/specifications, signature-specification.md.  Times of RFC 3161 authorities, plugins and
revocation are not looked at: so a certificate must be valid now.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from cryptography import x509

from proxy.signatures.certificates import UNREADABLE, check_chain, check_signature, name_of, parse_chain
from proxy.signatures.errors import SignatureRefused, SignerInvalid
from proxy.signatures.forms import FoundSignature, Proof
from proxy.signatures.notary_envelopes import NotaryEnvelope, read_envelope
from proxy.signatures.strict_json import decode_object
from storage.oci import Descriptor

PAYLOAD_TYPE = "application/vnd.cncf.notary.payload.v1+json"
SCHEME, SIGNED_AT, EXPIRES_AT = (
    f"io.cncf.notary.{each}" for each in ("signingScheme", "signingTime", "expiry")
)
X509 = "notary.x509"


class NotarySigner:
    """Whoever has a certificate under one of `trusted`, whose subject has all attributes of `subject`.

    `subject` is a name as in RFC 4514, `O=acme,C=FR`; None is any.  Raises SignerInvalid.
    """

    def __init__(self, trusted: Sequence[x509.Certificate], subject: str | None = None) -> None:
        self._trusted = trusted
        self._text = subject
        try:
            self._subject = set(x509.Name.from_rfc4514_string(subject)) if subject else set()
        except ValueError:
            raise SignerInvalid(f"{subject!r} is no subject: write it as O=acme,C=FR") from None

    def verify(self, signature: FoundSignature, target: Descriptor, now: datetime) -> Proof:
        if signature.form != "Notary Project":
            raise SignatureRefused(f"it is a signature of the form {signature.form}, not of Notary Project")
        envelope = read_envelope(signature.media_type, signature.content)
        try:
            return self._verify(envelope, parse_chain(envelope.chain), target, now)
        except UNREADABLE as error:
            raise SignatureRefused(f"a certificate of the signature cannot be read: {error}") from None

    def _verify(
        self,
        envelope: NotaryEnvelope,
        chain: Sequence[x509.Certificate],
        target: Descriptor,
        now: datetime,
    ) -> Proof:
        check_signature(chain[0], envelope.algorithm, envelope.signature, envelope.message)
        expires = _check_headers(envelope, now)
        check_chain(chain, self._trusted, now)
        if not self._subject <= set(chain[0].subject):
            raise SignatureRefused(f"the signer is {name_of(chain[0])}, not {self._text}")
        _check_target(envelope.payload, target)
        until = [each.not_valid_after_utc for each in chain] + [expires] * (expires is not None)
        return Proof(until=min(each for each in until if each is not None))


def _check_headers(envelope: NotaryEnvelope, now: datetime) -> datetime | None:
    """When it expires; None if it does not.  Raises SignatureRefused."""
    if envelope.content_type != PAYLOAD_TYPE:
        raise SignatureRefused(f"its payload is {envelope.content_type[:100]!r}, not {PAYLOAD_TYPE}")
    if (scheme := envelope.protected.get(SCHEME)) != X509:
        raise SignatureRefused(f"its signing scheme is {str(scheme)[:100]!r}, not {X509}")
    signed, expires = envelope.time(SIGNED_AT), envelope.time(EXPIRES_AT)
    required = {SCHEME} | ({EXPIRES_AT} if expires is not None else set())
    if missing := required - envelope.critical:
        raise SignatureRefused(f"its header {min(missing)} is not marked as critical")
    if unknown := envelope.critical - {SCHEME, EXPIRES_AT}:
        raise SignatureRefused(f"its critical header {min(unknown)[:100]!r} is not understood")
    if signed is None:
        raise SignatureRefused(f"its header {SIGNED_AT} is missing")
    if expires is not None and expires <= signed:
        raise SignatureRefused("it expires before it was made")
    if expires is not None and now >= expires:
        raise SignatureRefused(f"the signature expired at {expires:%Y-%m-%d %H:%M} UTC")
    return expires


def _check_target(payload: bytes, target: Descriptor) -> None:
    found = decode_object(payload, "the payload").get("targetArtifact")
    named = found if isinstance(found, dict) else {}
    if named.get("digest") != target.digest:
        raise SignatureRefused(f"the signature is of another digest, {str(named.get('digest'))[:150]}")
    if (named.get("mediaType"), named.get("size")) != (target.media_type, target.size):
        raise SignatureRefused("the signature names another media type or size than the manifest has")
