"""An identity as a signer: "keyless" signatures of sigstore, whose certificate names who signed in.

The `sigstore` library verifies bundles, without a network, against a trusted root file: the certificate and
the log that it is in, the entry of the transparency log with its proof of inclusion, the time.  It is
imported only where such a signer is configured.  ClassicKeyless verifies those in cosign's classic form.
"""

from __future__ import annotations

import re
from datetime import datetime
from fnmatch import translate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography import x509

from proxy.signatures.certificates import UNREADABLE
from proxy.signatures.classic_keyless import ClassicKeyless
from proxy.signatures.errors import SignatureRefused, SignerInvalid
from proxy.signatures.forms import FoundSignature, Proof
from proxy.signatures.simple_signing import CERTIFICATE
from proxy.signatures.statements import Statement
from proxy.signatures.strict_json import decode_object
from proxy.signatures.trust_material import TrustMaterial
from storage.oci import Descriptor

if TYPE_CHECKING:
    from sigstore.verify import Verifier

# sigstore/fulcio, docs/oid-info.md: the issuer as a DER string, and, before 2023, as bare text.
ISSUER, FORMER_ISSUER = (x509.ObjectIdentifier(f"1.3.6.1.4.1.57264.1.{last}") for last in (8, 1))
OTHER_NAME = x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.7")


class IdentityPattern:
    """Who may have signed: globs of the issuer that vouched for the identity, and of the identity itself.

    It has the form of a VerificationPolicy of the `sigstore` library.
    """

    def __init__(self, issuer: str, identity: str) -> None:
        self._issuer, self._identity = issuer, identity

    def verify(self, cert: x509.Certificate) -> None:
        """Raises SignatureRefused unless the certificate is that of such an identity."""
        issuer, identities = issuer_of(cert), identities_of(cert)
        if issuer is None or not _matches(issuer, self._issuer):
            raise SignatureRefused(f"the issuer of the identity is {issuer}, not {self._issuer}")
        if not any(_matches(each, self._identity) for each in identities):
            named = ", ".join(identities) or "nobody"
            raise SignatureRefused(f"the identity that signed is {named}, not {self._identity}")


class KeylessSigner:
    """Whoever has an identity of `pattern`, vouched for by the authorities in the file `trusted_root`.

    Raises SignerInvalid if the file cannot be used, or the library is not installed.
    """

    def __init__(self, trusted_root: Path, pattern: IdentityPattern) -> None:
        self._verifier = _verifier(trusted_root)
        self._classic = ClassicKeyless(TrustMaterial(trusted_root), pattern)
        self._pattern = pattern

    def verify(self, signature: FoundSignature, target: Descriptor, now: datetime) -> Proof:
        if signature.form in ("simple signing", "envelope") and CERTIFICATE in signature.annotations:
            return self._classic.verify(signature, target)
        if signature.form != "bundle":
            raise SignatureRefused(
                f"it is a signature of the form {signature.form}, not by the certificate of an identity"
            )
        _check_material(decode_object(signature.content, "the bundle").get("verificationMaterial"))
        payload_type, payload = self._open(signature.content)
        return Statement.parse(payload_type, payload).prove(target.digest)

    def _open(self, content: bytes) -> tuple[str, bytes]:
        from sigstore.errors import Error
        from sigstore.models import Bundle

        try:
            return self._verifier.verify_dsse(Bundle.from_json(content), self._pattern)
        except Error as error:
            raise SignatureRefused(f"the bundle is refused: {error}") from None
        except UNREADABLE as error:
            raise SignatureRefused(f"the bundle cannot be read: {error}") from None


def _check_material(material: Any) -> None:
    """Say plainly what the library would say of its model of bundles.  Raises SignatureRefused."""
    found = material if isinstance(material, dict) else {}
    if "publicKey" in found:
        raise SignatureRefused("it is signed by a key, not by the certificate of an identity")
    if not found.get("tlogEntries"):
        raise SignatureRefused("the bundle has no entry of a transparency log")


def _verifier(trusted_root: Path) -> Verifier:
    try:
        from sigstore.errors import Error
        from sigstore.models import TrustedRoot
        from sigstore.verify import Verifier
    except ImportError:
        raise SignerInvalid(
            "keyless signatures need the library sigstore: install entrepot[policy]"
        ) from None
    try:
        return Verifier(trusted_root=TrustedRoot.from_file(str(trusted_root)))
    except OSError as error:
        raise SignerInvalid(f"{trusted_root} cannot be read: {error.strerror}") from None
    except (Error, ValueError) as error:
        raise SignerInvalid(f"{trusted_root} is no trusted root that can be used: {error}") from None


def issuer_of(certificate: x509.Certificate) -> str | None:
    """The issuer of tokens that vouched for the identity; None if the certificate names none."""
    for oid in (ISSUER, FORMER_ISSUER):
        for extension in certificate.extensions:
            if extension.oid == oid and isinstance(extension.value, x509.UnrecognizedExtension):
                value = extension.value.value
                return (_utf8_string(value) if oid == ISSUER else value).decode("utf-8", "replace")
    return None


def identities_of(certificate: x509.Certificate) -> list[str]:
    """The e-mail addresses, URIs and names of the certificate's subject."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    others = names.get_values_for_type(x509.OtherName)
    return [
        *names.get_values_for_type(x509.RFC822Name),
        *names.get_values_for_type(x509.UniformResourceIdentifier),
        *(
            _utf8_string(each.value).decode("utf-8", "replace")
            for each in others
            if each.type_id == OTHER_NAME
        ),
    ]


def _utf8_string(der: bytes) -> bytes:
    """The content of a UTF8String in DER; nothing if it is none: X.690, sections 8.1.3 and 8.23."""
    if len(der) < 2 or der[0] != 0x0C:
        return b""
    wide = der[1] - 0x80 if der[1] & 0x80 else 0
    size = int.from_bytes(der[2 : 2 + wide], "big") if wide else der[1]
    content = der[2 + wide :]
    return content if len(content) == size else b""


def _matches(text: str, pattern: str) -> bool:
    return re.fullmatch(translate(pattern), text) is not None
