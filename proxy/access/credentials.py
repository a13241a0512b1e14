"""What verifies credentials other than passwords and the tokens of a token server.

Each kind of credential, such as API keys or identity tokens, has a verifier.  A client sends one as a bearer
token, or as the password of Basic authorization, where the user may be any: docker and others know no other
way.  Verifiers are asked in turn, and the first that recognizes a credential decides.
"""

from __future__ import annotations

from typing import Protocol

from proxy.access.rules import Principal

KEY = "key"  # the scheme of API keys


class BadCredential(Exception):
    """A credential is not accepted.  The message gives the reason without any part of the credential.

    It follows "the API key is not accepted:" or the like, for instance `it has expired`.
    """


class CredentialVerifier(Protocol):
    """Verifies the credentials of one kind.

    scheme: the `scheme` of the principals that it returns, and of no other verifier's
    what: what a credential is called in errors, such as `the API key`
    """

    @property
    def scheme(self) -> str: ...

    @property
    def what(self) -> str: ...

    def recognizes(self, secret: str) -> bool:
        """Whether the secret has the form of this kind, right or wrong.  It takes microseconds."""

    async def verify(self, user: str, secret: str) -> Principal:
        """Return who the secret belongs to, without an address.  Only called if it is recognized.

        `user` is that of Basic authorization; "" with a bearer token.  Raises BadCredential, and Unavailable
        if it cannot be verified now.
        """

    def remembers(self, user: str, secret: str) -> bool:
        """Whether verify() would return what it returned last, as can be told at once and without effects."""

    def renew(self, principal: Principal) -> Principal | None:
        """The principal, which any process has verified before, as it is now; without waiting.

        None if it is no longer accepted.  A token that this server has issued in exchange for a credential
        is worth no more than that: this is called with each request that has such a token, right after the
        records of access control were read.
        """
