"""Whose signatures the policy believes, and what attestations it asks for."""

from __future__ import annotations

from proxy.config.fields import File, Section, Text

# What goes with each kind of signer; those of an identity are needed.
_FITTING = {"key": (), "trusted_root": ("issuer", "identity"), "certificates": ("subject",)}


class SignerConfig(Section, frozen=True):
    """A signer: the holder of a `key`, an `identity`, or the subject of one of the `certificates`.

    `issuer` and `identity` are globs.  The certificates are those of authorities; `subject` is a name as in
    RFC 4514, and None is any.
    """

    key: File | None = None
    trusted_root: File | None = None
    issuer: Text | None = None
    identity: Text | None = None
    certificates: File | None = None
    subject: Text | None = None

    def __post_init__(self) -> None:
        kinds = [each for each in _FITTING if getattr(self, each) is not None]
        if len(kinds) != 1:
            raise ValueError("give one of key, trusted_root and certificates")
        for each in ("issuer", "identity", "subject"):
            given = getattr(self, each) is not None
            if given and each not in _FITTING[kinds[0]]:
                raise ValueError(f"{each} does not go with {kinds[0]}: remove one of them")
            if not given and each != "subject" and each in _FITTING[kinds[0]]:
                raise ValueError(f"{each} is missing: without it, whoever can log in anywhere could sign")


class AttestationConfig(Section, frozen=True):
    """An attestation that an image needs: a statement of the predicate type `type` by one of `signed_by`.

    `when` is an expression in CEL that has to be true of it.
    """

    type: Text
    signed_by: tuple[Text, ...]
    when: Text | None = None

    def __post_init__(self) -> None:
        if not self.signed_by:
            raise ValueError("signed_by is empty: name the signers whose statement is believed")
