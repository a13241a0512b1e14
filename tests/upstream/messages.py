"""What passes over the wire: a request as it came, an answer before it goes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote

from multidict import CIMultiDict, CIMultiDictProxy, MultiDict

if TYPE_CHECKING:
    from tests.upstream.faults import Interruption

DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
_ROUTE = re.compile(r"/v2/(.+)/(?:(manifests|blobs|referrers)/([^/]+)|tags/list)")
_UPLOAD = re.compile(r"/v2/(.+)/blobs/uploads/([^/]*)")
_STORED = re.compile(r"/stored/(sha256|sha512)/([0-9a-f]+)/data")


@dataclass(frozen=True)
class Request:
    """A request as it arrived.  `target` is path and query, byte for byte.

    `kind` is "base", "catalog", "tags", "manifest", "blob", "upload", "referrers", "token", "cdn" or
    "unknown".  `reference` is the tag or digest (of a token: the scopes, separated by spaces; of an upload:
    its id).  None where there is none.
    """

    method: str
    target: str
    headers: CIMultiDictProxy[str]
    kind: str
    repository: str | None = None
    reference: str | None = None
    body: bytes = b""

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def query(self) -> MultiDict[str]:
        return MultiDict(parse_qsl(self.target.partition("?")[2], keep_blank_values=True))

    @property
    def range(self) -> str | None:
        return self.headers.get("Range")

    def __str__(self) -> str:
        """Such as `GET blob a/b@sha256:0123456789ab bytes=5-`; digests are cut to `digest[:19]`.

        The query is told for kinds other than token and cdn, whose reference says it all or is signed; of an
        upload's that which is not the registry's own.
        """
        words = [self.method, self.kind]
        digest = DIGEST.fullmatch(self.reference or "") is not None
        name = self.repository or ""
        if self.reference:
            joint = ("@" if digest else ":") if name else ""
            name += joint + (self.reference[:19] if digest else self.reference)
        query = self.target.partition("?")[2]
        if self.kind == "upload":
            query = "&".join(
                f"{key}={value[:19] if DIGEST.fullmatch(value) else value}"
                for key, value in self.query.items()
                if key != "_state"
            )
        if query and self.kind not in ("token", "cdn"):
            name += "?" + query
        words += [name] if name else []
        words += [self.path] if self.kind == "unknown" else []
        words += [self.range] if self.range else []
        return " ".join(words)


@dataclass
class Answer:
    """What will be sent, until faults have had their say."""

    status: int
    headers: CIMultiDict[str]
    content: bytes = b""
    offset: int = 0  # of `content` in the whole blob
    counted: bool = False  # in bytes_sent
    chunked: bool = False
    hang_up: bool = False  # after the whole answer
    interruptions: list[Interruption] = field(default_factory=list)


def failure(status: int, code: str, message: str = "as scripted", **headers: str) -> Answer:
    """distribution-spec, "Error Codes"."""
    content = json.dumps({"errors": [{"code": code, "message": message, "detail": None}]}).encode()
    return Answer(status, CIMultiDict({"Content-Type": "application/json"}, **headers), content)


def parse_request(
    method: str, target: str, headers: CIMultiDictProxy[str], cdn: bool, body: bytes = b""
) -> Request:
    """`cdn`: it came to the second socket."""
    request = Request(method, target, headers, "unknown", body=body)
    path = unquote(request.path)
    if found := _UPLOAD.fullmatch(path):
        return replace(request, kind="upload", repository=found[1], reference=found[2] or None)
    if path == "/token":
        return replace(request, kind="token", reference=" ".join(request.query.getall("scope", [])))
    if cdn:
        stored = _STORED.fullmatch(path)
        return replace(request, kind="cdn", reference=":".join(stored.groups()) if stored else None)
    if path in ("/v2", "/v2/"):
        return replace(request, kind="base")
    if path == "/v2/_catalog":
        return replace(request, kind="catalog")
    if found := _ROUTE.fullmatch(path):
        repository, plural, reference = found.groups()
        kind = {"manifests": "manifest", "blobs": "blob", None: "tags"}.get(plural, plural)
        return replace(request, kind=kind, repository=repository, reference=reference)
    return request
