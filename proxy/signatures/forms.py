"""What signs an image: the forms of signatures, and what one proves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, Protocol, TypeAlias

from storage.oci import Descriptor

SIMPLE_SIGNING = "application/vnd.dev.cosign.simplesigning.v1+json"
BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
BUNDLES = (BUNDLE, "application/vnd.dev.sigstore.bundle+json;version=0.3")
DSSE_ENVELOPE = "application/vnd.dsse.envelope.v1+json"
JWS, COSE = "application/jose+json", "application/cose"
# What the list of referrers says of cosign's classic form, and of signatures of Notary Project.
CLASSIC_ARTIFACT = "application/vnd.dev.cosign.artifact.sig.v1+json"
NOTARY_ARTIFACT = "application/vnd.cncf.notary.signature"

Form: TypeAlias = Literal["simple signing", "bundle", "envelope", "Notary Project"]
FORMS: Mapping[str, Form] = {
    SIMPLE_SIGNING: "simple signing",
    **dict.fromkeys(BUNDLES, "bundle"),
    DSSE_ENVELOPE: "envelope",
    JWS: "Notary Project",
    COSE: "Notary Project",
}


@dataclass(frozen=True, slots=True)
class FoundSignature:
    """A signature or an attestation, not verified yet.

    source: where it was found, for messages
    annotations: those of the layer that it is the content of
    """

    source: str
    media_type: str
    content: bytes
    annotations: Mapping[str, str] = field(default_factory=dict)

    @property
    def form(self) -> Form:
        return FORMS[self.media_type]


@dataclass(frozen=True, slots=True)
class Proof:
    """What a signature proves about an image, when the signer is believed.

    predicate_type: of the statement that is signed; None for a signature, which says nothing more
    until: when the signature expires; None if it does not
    """

    predicate_type: str | None = None
    predicate: Any = None
    until: datetime | None = None


class Signer(Protocol):
    """Whose signatures are believed: the holder of a key, an identity, or the subject of a certificate."""

    def verify(self, signature: FoundSignature, target: Descriptor, now: datetime) -> Proof:
        """What `signature` proves about the manifest `target`.  Raises SignatureRefused.  No I/O."""
        ...
