"""The errors of signatures."""

from __future__ import annotations


class SignatureRefused(Exception):
    """A signature, or an attestation, does not prove what is asked of it.

    The text says why, in one line of printable characters, whatever of the signature it shows.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(printable(reason))


def printable(text: str, limit: int = 500) -> str:
    """`text` in one line, with a question mark for each character that terminals might obey."""
    return "".join(each if each.isprintable() else "?" for each in " ".join(text.split()))[:limit]


class SignerInvalid(ValueError):
    """The key, the certificates or the trusted root of a signer cannot be used.  The text names the file."""
