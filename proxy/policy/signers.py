"""The signers that the configuration names."""

from __future__ import annotations

from collections.abc import Mapping

from proxy.config.errors import StartError
from proxy.config.signers import SignerConfig
from proxy.signatures.errors import SignerInvalid
from proxy.signatures.forms import Signer


def signers_of(configured: Mapping[str, SignerConfig]) -> dict[str, Signer]:
    """Read the files of all signers.  Raises StartError, which names the signer and what is wrong with it."""
    found = {}
    for name, each in configured.items():
        try:
            found[name] = _signer(each)
        except SignerInvalid as error:
            raise StartError(f"policy.signers.{name}: {error}") from None
    return found


def _signer(configured: SignerConfig) -> Signer:
    # These import cryptography, which takes a twentieth of the start of a server, and most have no signers.
    from proxy.signatures.certificates import read_certificates
    from proxy.signatures.key_signer import KeySigner
    from proxy.signatures.keyless_signer import IdentityPattern, KeylessSigner
    from proxy.signatures.keys import VerificationKey
    from proxy.signatures.notary_signer import NotarySigner

    if configured.key is not None:
        return KeySigner(VerificationKey.read(configured.key))
    if configured.certificates is not None:
        return NotarySigner(read_certificates(configured.certificates), configured.subject)
    assert configured.trusted_root is not None and configured.issuer and configured.identity
    return KeylessSigner(configured.trusted_root, IdentityPattern(configured.issuer, configured.identity))
