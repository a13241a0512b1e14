"""Which verifier a credential is handed to, and what becomes of what it says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from proxy.access.authentication import Authenticator
from proxy.access.credentials import BadCredential
from proxy.access.rules import Principal
from storage.errors import Unauthorized
from tests.upstream import Basic


@dataclass
class Words:
    """A verifier of secrets that begin with a word."""

    scheme: str
    what: str = "the word"

    def recognizes(self, secret: str) -> bool:
        return secret.startswith(self.scheme)

    async def verify(self, user: str, secret: str) -> Principal:
        if secret.endswith("!"):
            raise BadCredential("it ends too loudly")
        return Principal(user or secret, self.scheme)

    def remembers(self, user: str, secret: str) -> bool:
        return secret.endswith("1")

    def renew(self, principal: Principal) -> Principal | None:
        return principal


class Asked:
    """A request, as far as it is looked at."""

    remote = "192.0.2.1"

    def __init__(self, authorization: str = "") -> None:
        self.headers = {"Authorization": authorization} if authorization else {}

    def get_extra_info(self, name: str) -> Any:
        return None


def bearer(secret: str) -> Asked:
    return Asked(f"Bearer {secret}")


def basic(user: str, secret: str) -> Asked:
    return Asked(Basic(user, secret).header)


PROOFS = Authenticator(verifiers=(Words("red"), Words("redder"), Words("blue")))


@pytest.mark.parametrize(
    ("asked", "user", "scheme"),
    [
        (bearer("blue-1"), "blue-1", "blue"),
        (bearer("redder"), "redder", "red"),  # the first that recognizes it
        (basic("ci", "blue-1"), "ci", "blue"),
        (basic("", "blue-1"), "blue-1", "blue"),
    ],
)
async def test_a_credential_is_a_bearer_token_or_a_password(asked: Asked, user: str, scheme: str) -> None:
    principal = await PROOFS.identify(asked)  # type: ignore[arg-type]
    assert (principal.user, principal.scheme, str(principal.address)) == (user, scheme, "192.0.2.1")


@pytest.mark.parametrize("asked", [bearer("red!"), basic("ci", "red!")])
async def test_the_reason_of_a_refusal_is_told(asked: Asked) -> None:
    with pytest.raises(Unauthorized, match="the word is not accepted: it ends too loudly"):
        await PROOFS.identify(asked)  # type: ignore[arg-type]


@pytest.mark.parametrize("asked", [bearer("green"), basic("ci", "green"), Asked("Digest x")])
async def test_what_no_verifier_recognizes_is_refused(asked: Asked) -> None:
    with pytest.raises(Unauthorized, match="credentials are not accepted"):
        await PROOFS.identify(asked)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "still"), [(bearer("red1"), True), (basic("ci", "red1"), True), (bearer("red2"), False)]
)
async def test_a_renewal_asks_the_verifier(asked: Asked, still: bool) -> None:
    assert PROOFS.renewal(asked)() is still  # type: ignore[arg-type]


def test_clients_are_challenged_if_there_are_verifiers_alone() -> None:
    assert PROOFS.accepts_credentials
    asked: Any = Asked()
    assert PROOFS.challenges(asked) == ('Basic realm="entrepot"',)
    assert Authenticator().challenges(asked) == ()
