"""One request to an upstream, and what its response says of the credentials that it carried."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import aiohttp
from yarl import URL

from proxy.upstream.body import StreamedBody
from proxy.upstream.transport import READING


@dataclass(frozen=True, slots=True)
class UpstreamRequest:
    """One request to an upstream.

    kind: the label of its metric
    granted: the statuses that mean success
    also: scopes that the token must include, besides what the method needs in `repository`
    """

    method: str
    url: URL
    kind: str
    repository: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | StreamedBody | None = None
    also: str = ""
    granted: Collection[int] = (200, 206)

    def scope(self, pushed_to: bool) -> str:
        """The scope of its token: token specification, "Requesting a Token", with Distribution's actions."""
        actions = "pull" if self.method in READING and not pushed_to else "pull,push"
        # An upload is cancelled with the token that it was started with; Distribution then demands another.
        if self.method == "DELETE" and self.kind != "upload":
            actions = "delete"
        ours = f"repository:{self.repository}:{actions}" if self.repository else ""
        return " ".join(filter(None, (ours, self.also)))

    @property
    def repeatable(self) -> bool:
        """Whether it can be sent again: a streamed body can be read only once."""
        return not isinstance(self.body, StreamedBody)


class PeerLink(Protocol):
    """What requests to another replica carry, and its responses must."""

    def headers(self) -> Mapping[str, str]: ...

    def check(self, headers: Mapping[str, str]) -> None:
        """Raises OriginFailed if a response with these headers does not say what this upstream would."""


def authorization_of(response: aiohttp.ClientResponse) -> str | None:
    """The Authorization of the last request that led to a response."""
    return response.request_info.headers.get("Authorization")


def accepted(status: int, authorization: str | None) -> bool:
    """Whether a refusal means that the credentials are right.

    A token server has accepted them if there is a token.  A 403 says that they do not suffice (RFC 9110,
    section 15.5.4).
    """
    return authorization is not None and (status == 403 or authorization.startswith("Bearer "))
