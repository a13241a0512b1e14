"""What can befall an answer.  Every fault knows what it does to HEAD and to a part of a blob."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from multidict import CIMultiDict

from tests.upstream.messages import Answer, Request, failure

_UNKNOWN = {"manifest": "MANIFEST_UNKNOWN", "blob": "BLOB_UNKNOWN"}
_CODES = {401: "UNAUTHORIZED", 403: "DENIED", 405: "UNSUPPORTED", 429: "TOOMANYREQUESTS"}


class Fault:
    """Something that befalls the answer to one request."""

    def strike(self, answer: Answer, request: Request) -> Answer:
        raise NotImplementedError


@dataclass(frozen=True)
class Status(Fault):
    """Another status; the body is the specification's error JSON unless given."""

    code: int
    headers: Mapping[str, str] | None = None
    body: bytes | None = None

    def strike(self, answer: Answer, request: Request) -> Answer:
        unknown = _UNKNOWN.get(request.kind, "NAME_UNKNOWN")
        found = failure(self.code, unknown if self.code == 404 else _CODES.get(self.code, "UNKNOWN"))
        found.headers.update(self.headers or {})
        return found if self.body is None else replace(found, content=self.body)


@dataclass(frozen=True)
class RetryAfter(Fault):
    """`seconds` may also be an HTTP date."""

    seconds: int | str
    status: int = 429

    def strike(self, answer: Answer, request: Request) -> Answer:
        return Status(self.status, {"Retry-After": str(self.seconds)}).strike(answer, request)


@dataclass(frozen=True)
class Redirect(Fault):
    to: str
    status: int = 307

    def strike(self, answer: Answer, request: Request) -> Answer:
        return Answer(self.status, CIMultiDict({"Location": self.to}))


@dataclass(frozen=True)
class ExpireToken(Fault):
    """Every token becomes invalid before this request is looked at: 401, error="invalid_token"."""


@dataclass(frozen=True)
class Corrupt(Fault):
    """The byte at position `at` of the whole content is another one, where this answer holds that byte."""

    at: int = 0

    def strike(self, answer: Answer, request: Request) -> Answer:
        content, at = bytearray(answer.content), self.at - answer.offset
        if 0 <= at < len(content):
            content[at] ^= 0xFF
        return replace(answer, content=bytes(content))


@dataclass(frozen=True)
class WrongLength(Fault):
    """Content-Length is `by` more than is sent (or less), then the connection is closed."""

    by: int

    def strike(self, answer: Answer, request: Request) -> Answer:
        answer.headers["Content-Length"] = str(len(answer.content) + self.by)
        return replace(answer, hang_up=True)


@dataclass(frozen=True)
class NoDigest(Fault):
    """Neither Docker-Content-Digest nor ETag."""

    def strike(self, answer: Answer, request: Request) -> Answer:
        answer.headers.popall("Docker-Content-Digest", None)
        answer.headers.popall("ETag", None)
        return answer


@dataclass(frozen=True)
class WrongDigest(Fault):
    """Docker-Content-Digest and ETag name other content."""

    digest: str = "sha256:" + "0" * 64

    def strike(self, answer: Answer, request: Request) -> Answer:
        answer.headers["Docker-Content-Digest"] = self.digest
        answer.headers["ETag"] = f'"{self.digest}"'
        return answer


@dataclass(frozen=True)
class ContentType(Fault):
    text: str

    def strike(self, answer: Answer, request: Request) -> Answer:
        answer.headers["Content-Type"] = self.text
        return answer


@dataclass(frozen=True)
class Gzip(Fault):
    """The body is sent with Content-Encoding: gzip, whatever was asked for."""

    def strike(self, answer: Answer, request: Request) -> Answer:
        answer.headers["Content-Encoding"] = "gzip"
        return replace(answer, content=gzip.compress(answer.content, mtime=0))


class Interruption(Fault):
    """Strikes after that many bytes of this answer's body; None: before the headers.

    An answer without a body (HEAD) is over with its headers, so there every interruption strikes before them.
    """

    after: int | None

    def strike(self, answer: Answer, request: Request) -> Answer:
        return replace(answer, interruptions=[*answer.interruptions, self])

    async def interrupt(self) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Hold(Interruption):
    """Waits for `gate`; `reached` is set when it does."""

    gate: asyncio.Event
    after: int | None = 0
    reached: asyncio.Event = field(default_factory=asyncio.Event, compare=False)

    async def interrupt(self) -> None:
        self.reached.set()
        await self.gate.wait()


@dataclass(frozen=True)
class Truncate(Interruption):
    """Content-Length promised more, the connection is closed as if all was well."""

    after: int | None = 0

    async def interrupt(self) -> None:
        raise HangUp(reset=False)


@dataclass(frozen=True)
class Reset(Interruption):
    """TCP RST, once the bytes before it have left."""

    after: int | None = 0

    async def interrupt(self) -> None:
        raise HangUp(reset=True)


@dataclass(frozen=True)
class Refuse(Interruption):
    """The connection is closed without any answer.

    A client may take that for a kept connection that timed out, and ask again at once (RFC 9110 §9.2.2;
    aiohttp does so once, on a connection used before): `times=2` is what it notices.
    """

    after: int | None = field(default=None, init=False)

    async def interrupt(self) -> None:
        raise HangUp(reset=False)


class HangUp(Exception):
    """Ends the connection, where it is raised."""

    def __init__(self, *, reset: bool) -> None:
        self.reset = reset
