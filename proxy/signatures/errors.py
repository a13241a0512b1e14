"""The errors of signatures."""

from __future__ import annotations


class SignatureRefused(Exception):
    """A signature, or an attestation, does not prove what is asked of it.  The text says why, in one line."""


class SignerInvalid(ValueError):
    """The key, the certificates or the trusted root of a signer cannot be used.  The text names the file."""
