"""What an extension is to the server: one protocol for each kind.

A package offers an extension by an entry point, whose value is a class or another callable that makes it:

    [project.entry-points."entrepot.event_sinks"]
    json_lines = "entrepot_json_lines:JSONLines"

Of that, the server uses

    protocol    the VERSION of these protocols that it was written for, an attribute
    Settings    if it has any: a dataclass or a msgspec.Struct of its own keys, an attribute
    itself      called with a Settings, or with nothing; raises ValueError about wrong settings

and of what it makes, the methods of the protocol, and `async def close(self)` if there is one.  To make an
extension opens no connection: `entrepot check` makes one too.

All code of an extension runs in a thread of its own, with an event loop of its own, in each process that uses
it.  So it may keep objects of asyncio, needs no locks, and delays nothing but itself.  A call that takes
longer than its `timeout`, that raises anything at all or returns what it should not, has failed.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

__all__ = [
    "VERSION",
    "ClientRequest",
    "ConditionResult",
    "CredentialProvider",
    "EventSink",
    "HostLogin",
    "JudgedManifest",
    "ObjectStorage",
    "OfferedBlob",
    "OfferedManifest",
    "OfferedObject",
    "PolicyCondition",
    "RequestMiddleware",
    "RequestRefusal",
    "ResponseHeaders",
    "UpstreamSource",
]

VERSION = 1  # of all protocols here: a change that breaks extensions makes another one


_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")  # RFC 9110, section 5.6.2
_TYPE = re.compile(r"[A-Za-z0-9][\w!#$&^.+-]{0,126}/[A-Za-z0-9][\w!#$&^.+-]{0,126}", re.ASCII)  # RFC 6838
_VALUE = re.compile(r"[!-~](?:[ !-~]*[!-~])?")
# Headers that frame a response, or whose meaning is the server's.
_OURS = re.compile(
    r"(?:content-|docker-|oci-|access-control-).*|accept-ranges|age|allow|cache-(?:control|status)|connection|date|etag"
    r"|keep-alive|link|location|retry-after|server|set-cookie|trailer|transfer-encoding|upgrade|vary|warning"
    r"|www-authenticate|x-content-type-options|x-request-id",
    re.IGNORECASE,
)


def _check(value: object, kind: type | tuple[type, ...], what: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{what} is {type(value).__name__}")


def _check_span(value: float | None, what: str) -> None:
    """A number of seconds: neither negative nor NaN, which is no number."""
    _check(value, (int, float), what)
    if value is None or not value >= 0:
        raise ValueError(f"{what} is {value}")


# Credential providers: entrepot.credential_providers


@dataclass(frozen=True, slots=True)
class HostLogin:
    """A user name and a password for an upstream, which may be used for `valid_for` seconds."""

    username: str
    password: str = field(repr=False)
    valid_for: float = 300.0

    def __post_init__(self) -> None:
        _check(self.username, str, "username")
        _check(self.password, str, "password")
        _check_span(self.valid_for, "valid_for")


class CredentialProvider(Protocol):
    """Knows the logins of upstreams.  It runs in workers and in the housekeeping process."""

    @abstractmethod
    async def get(self, host: str, repository: str) -> HostLogin | None:
        """The login for a host, with its port if it has one; None to ask without one.

        `repository` is what it is needed for, empty if it is for none or any.
        """
        ...


# Upstreams: entrepot.upstreams


@dataclass(frozen=True, slots=True)
class OfferedManifest:
    """A manifest or an index, with its media type."""

    media_type: str
    content: bytes = field(repr=False)

    def __post_init__(self) -> None:
        _check(self.media_type, str, "media_type")
        _check(self.content, bytes, "content")
        if not _TYPE.fullmatch(self.media_type):
            raise ValueError(f"{self.media_type[:50]!r} is not a media type")


@dataclass(frozen=True, slots=True)
class OfferedBlob:
    """The `size` of a whole blob in bytes, and its bytes from the wanted one on."""

    size: int
    chunks: AsyncIterator[bytes] = field(repr=False)

    def __post_init__(self) -> None:
        _check(self.size, int, "size")
        _check(self.chunks, AsyncIterator, "chunks")
        if self.size < 0:
            raise ValueError("size is negative")


class UpstreamSource(Protocol):
    """Has the content that a cache is filled with.  It runs in workers and in the housekeeping process.

    Repositories are named without the namespace.  None says that it has no such thing.
    """

    @abstractmethod
    async def manifest(self, repository: str, reference: str) -> OfferedManifest | None:
        """The manifest of a tag or a digest; `reference` has a colon if it is a digest."""
        ...

    @abstractmethod
    async def blob(self, repository: str, digest: str, start: int) -> OfferedBlob | None:
        """The blob, with its bytes from `start` on.  Each chunk is a call, and not all need be read."""
        ...

    @abstractmethod
    async def tags(self, repository: str) -> list[str] | None:
        """All tags of a repository, in any order."""
        ...


# Storage: entrepot.storage


@dataclass(frozen=True, slots=True)
class OfferedObject:
    """The `size` of a whole object in bytes, and those of its bytes that are wanted."""

    size: int
    chunks: AsyncIterator[bytes] = field(repr=False)

    def __post_init__(self) -> None:
        _check(self.size, int, "size")
        _check(self.chunks, AsyncIterator, "chunks")


class ObjectStorage(Protocol):
    """Keeps objects by their keys, in place of a bucket.  It runs in workers and in the housekeeping process.

    A key is a path of ASCII letters, digits, dots, hyphens and slashes.  No object is ever changed, and none
    is put twice.  What is kept must outlive the process, and be seen by all that use the same storage.
    """

    @abstractmethod
    async def put(self, key: str, source: Path, size: int) -> None:
        """Make an object of a file of `size` bytes: whole or not at all, and safe on return.

        It may take a second more for each MiB.
        """
        ...

    @abstractmethod
    async def get(self, key: str, start: int, stop: int | None) -> OfferedObject | None:
        """The object with its bytes [start, stop), or to the end; None if there is none."""
        ...

    @abstractmethod
    async def size(self, key: str) -> int | None:
        """The size of the object in bytes; None if there is none."""
        ...

    @abstractmethod
    async def delete(self, key: str) -> None:
        """Delete the object, if there is one."""
        ...


# Policy conditions: entrepot.policy_conditions


@dataclass(frozen=True, slots=True)
class JudgedManifest:
    """A manifest, or an index of manifests, that a rule of the policy allows if it meets its conditions.

    repository: its full name, with the namespace
    content: the bytes that `digest` is of
    fetch: fetches what it names, by kind and digest: see manifest() and blob()
    """

    repository: str
    digest: str
    media_type: str
    content: bytes = field(repr=False)
    fetch: Callable[[str, str], Awaitable[bytes]] = field(repr=False)

    async def manifest(self, digest: str) -> bytes:
        """The bytes of another manifest of the repository.  Let through what it raises."""
        return await self.fetch("manifest", digest)

    async def blob(self, digest: str) -> bytes:
        """The bytes of a blob of the repository, at most 4 MiB.  Let through what it raises."""
        return await self.fetch("blob", digest)


@dataclass(frozen=True, slots=True)
class ConditionResult:
    """Whether a manifest meets a condition.

    reason: half a sentence that follows "it", such as `has the label team` or `has no label team`; clients
        and operators read it
    valid_for: seconds for which this is known to be so; infinity if it depends on the content alone
    """

    met: bool
    reason: str
    valid_for: float = math.inf

    def __post_init__(self) -> None:
        _check(self.met, bool, "met")
        _check(self.reason, str, "reason")
        _check_span(self.valid_for, "valid_for")


class PolicyCondition(Protocol):
    """Says whether content meets a condition.  It runs in workers and in the housekeeping process."""

    @abstractmethod
    async def judge(self, manifest: JudgedManifest) -> ConditionResult:
        """Is called for each digest once, and again when its result is no longer valid or was not met.

        A failure means that nothing is known: where the rule enforces, the content is not served.
        """
        ...


# Event sinks: entrepot.event_sinks


class EventSink(Protocol):
    """Takes events.  It runs in the housekeeping process."""

    @abstractmethod
    async def send(self, event: Mapping[str, Any]) -> None:
        """Take a CloudEvent (docs/events.md) as JSON has it.

        Events come one after the other, from a queue on disk.  One whose call failed comes again, and so may
        one that was taken, if the server was killed: it then has the same `id`.
        """
        ...


# Request middleware: entrepot.middleware


@dataclass(frozen=True, slots=True)
class ClientRequest:
    """The head of a request to the distribution API.

    path: as it came, percent-encoded, without the query
    headers: by their names in lower case; several of one name are joined by commas
    client: the address of the connection
    """

    method: str
    path: str
    query: str
    headers: Mapping[str, str] = field(repr=False)
    client: str


@dataclass(frozen=True, slots=True)
class RequestRefusal:
    """Answer 403 with this message; with `retry_after`, in seconds, 429."""

    message: str
    retry_after: float | None = None

    def __post_init__(self) -> None:
        _check(self.message, str, "message")
        if self.retry_after is not None:
            _check_span(self.retry_after, "retry_after")
            _check(int(self.retry_after), int, "retry_after")  # raises OverflowError for infinity


@dataclass(frozen=True, slots=True)
class ResponseHeaders:
    """Headers to add to the response; none that the server itself sends.  Raises ValueError."""

    headers: Mapping[str, str]

    def __post_init__(self) -> None:
        for name, value in self.headers.items():
            if not _NAME.fullmatch(name) or _OURS.fullmatch(name):
                raise ValueError(f"{name[:50]!r} is not the name of a header that can be added")
            if not _VALUE.fullmatch(value):
                raise ValueError(f"the value of {name} is not printable ASCII")


class RequestMiddleware(Protocol):
    """Sees requests before they are served.  It runs in workers."""

    @abstractmethod
    async def handle(self, request: ClientRequest) -> RequestRefusal | ResponseHeaders | None:
        """Refuse a request, add headers to its response, or let it pass; before access is checked.

        A failure refuses the request, with 503.
        """
        ...
