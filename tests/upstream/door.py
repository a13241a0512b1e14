"""Who is let in: Basic, or Bearer with tokens of the fake's own."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from multidict import CIMultiDict

from tests.upstream.messages import Answer, Request, failure


@dataclass(frozen=True)
class Basic:
    user: str
    password: str

    @property
    def header(self) -> str:
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


@dataclass(frozen=True)
class Bearer:
    """Tokens from the fake's own endpoint `/token`, which stands on both of its sockets.

    `realm` may name `{url}` or `{cdn_url}`: the same fake, but another origin.  `actions` are those of the
    challenge's scope; "pull,push" puts a comma in quotes.  `also_basic` challenges for Basic as well, before
    Bearer, and then takes the credentials for it too.
    """

    credentials: Basic | None = None
    anonymous: bool = True
    field: Literal["token", "access_token"] = "token"
    expires_in: int | None = 300  # seconds; only told: tokens end by expire_tokens()
    service: str = "registry.fake"
    actions: str = "pull"
    realm: str = "{url}/token"
    also_basic: Literal["same header", "own header"] | None = None

    def __post_init__(self) -> None:
        if not (self.anonymous or self.credentials):
            raise ValueError("Bearer without credentials and anonymous=False lets nobody in")


class Guarded(Protocol):
    auth: Basic | Bearer | None

    @property
    def url(self) -> str: ...

    @property
    def cdn_url(self) -> str: ...


class Door:
    """Challenges and tokens of a registry, as its `auth` is at the moment."""

    def __init__(self, registry: Guarded) -> None:
        self._registry = registry
        self._tokens: dict[str, tuple[str, ...]] = {}  # and their scopes
        self._issued = 0

    def expire_tokens(self) -> None:
        self._tokens.clear()

    def refusal(self, request: Request) -> Answer | None:
        """What is answered to whom may not ask this; None: go on."""
        auth, given = self._registry.auth, request.headers.get("Authorization")
        if auth is None or request.kind in ("token", "cdn"):
            return None
        if request.kind == "upload" and request.headers.get("Host", "") in self._registry.cdn_url:
            # Where an upload was sent to: its location is signed, and what is not asked for is suspicious.
            return None if given is None else failure(400, "UNSUPPORTED", "Authorization is unasked for")
        if isinstance(auth, Basic):
            return None if given == auth.header else self.challenge(request)
        if given is None:
            return self.challenge(request)
        if auth.also_basic and auth.credentials and given == auth.credentials.header:
            return None
        scheme, _, token = given.partition(" ")
        if scheme.lower() != "bearer" or token not in self._tokens:
            return self.challenge(request, "invalid_token")
        granted: dict[str, set[str]] = {}
        for what, _, actions in map(_parted, self._tokens[token]):
            granted.setdefault(what, set()).update(actions.split(","))
        wanted = {f"repository:{request.repository}": _needed(request)} if request.repository else {}
        if request.kind == "catalog":
            wanted = {"registry:catalog": ["*"]}
        if request.query.get("from"):
            wanted[f"repository:{request.query['from']}"] = ["pull"]
        if all(set(actions) <= granted.get(what, set()) for what, actions in wanted.items()):
            return None
        return self.challenge(request, "insufficient_scope")

    def challenge(self, request: Request, error: str | None = None) -> Answer:
        """RFC 9110 §11.6.1, RFC 6750 §3 and the token specification's parameters."""
        auth, challenges = self._registry.auth, ['Basic realm="fake"']
        if isinstance(auth, Bearer):
            realm = auth.realm.format(url=self._registry.url, cdn_url=self._registry.cdn_url)
            bearer = f'Bearer realm="{realm}",service="{auth.service}"'
            if request.repository:
                actions = auth.actions if _needed(request) == ["pull"] else ",".join(_needed(request))
                bearer += f',scope="repository:{request.repository}:{actions}"'
            bearer += f',error="{error}"' if error else ""
            challenges = [*challenges, bearer] if auth.also_basic else [bearer]
            if auth.also_basic == "same header":
                challenges = [", ".join(challenges)]
        answer = failure(401, "UNAUTHORIZED", "authentication required")
        for challenge in challenges:
            answer.headers.add("WWW-Authenticate", challenge)
        return answer

    def issue(self, request: Request) -> Answer:
        """The token specification: GET with `service` and any number of `scope`, credentials as Basic."""
        auth, given = self._registry.auth, request.headers.get("Authorization")
        if not isinstance(auth, Bearer):
            return failure(404, "UNSUPPORTED", "no tokens here")
        known = auth.credentials is not None and given == auth.credentials.header
        if not (known or (given is None and auth.anonymous)):
            refused = {"WWW-Authenticate": 'Basic realm="tokens"'}
            return failure(401, "UNAUTHORIZED", "incorrect user name or password", **refused)
        if request.query.get("service") != auth.service:
            return failure(400, "UNSUPPORTED", f"service is not {auth.service}")
        self._issued += 1
        token = f"token-{self._issued}"
        self._tokens[token] = tuple((request.reference or "").split())
        body: dict[str, Any] = {auth.field: token}
        if auth.expires_in is not None:
            body["expires_in"] = auth.expires_in
        return Answer(200, CIMultiDict({"Content-Type": "application/json"}), json.dumps(body).encode())


def _parted(scope: str) -> tuple[str, str, str]:
    return scope.rpartition(":")


def _needed(request: Request) -> list[str]:
    """The actions that a request needs, as Distribution's access control has it."""
    if request.method in ("GET", "HEAD"):
        return ["pull"]
    return ["delete"] if request.method == "DELETE" else ["pull", "push"]
