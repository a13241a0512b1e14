"""A client of the admin API, which has the methods of Operations and raises OperationFailed."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import IO, TYPE_CHECKING, Any, TypeVar

import msgspec
from yarl import URL

from proxy.admin.notices import HEADER, of_header
from proxy.admin.operations import Operation
from proxy.admin.sent import SentOperations
from proxy.connections.failures import explain
from proxy.transfer import results

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession

    from proxy.transfer.bundle_export import Selection

T = TypeVar("T")
DATA = b"data: "  # how an event begins: see server_events.py
CONNECT = 5.0  # seconds for a connection to the server; an answer may take any time


class OperationFailed(Exception):
    """An operation, or a command, that failed; the message is a sentence, `code` is for programs.

    `usage` means that the arguments were wrong.
    """

    def __init__(self, message: str, code: str = "UNKNOWN", *, usage: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.status = 2 if usage else 1


class AdminClient(SentOperations):
    """The Operations of a running server, over its admin API.  Every method raises OperationFailed.

    `warn` is called with each warning about another replica of its fleet, once.
    """

    def __init__(
        self,
        session: ClientSession,
        url: URL,
        token: str | None,
        warn: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self._warn = warn
        self._warned: set[str] = set()
        self._session = session
        self._url = url
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}

    async def send(self, operation: Operation, parameters: msgspec.Struct) -> Any:
        """The answer to one operation."""
        if operation.method == "GET":
            return await self._request(operation.result, "GET", operation.path, _query(parameters))
        body = msgspec.json.encode(parameters)
        return await self._request(operation.result, operation.method, operation.path, {}, body)

    async def follow(self, operation: Operation, parameters: msgspec.Struct) -> AsyncIterator[Any]:
        """The results of one operation, until the server ends them."""
        query = _query(parameters)
        async with self._response("GET", operation.path, query, None) as response:
            received = bytearray()
            async for piece in response.content.iter_any():
                *events, rest = (received + piece).split(b"\n\n")
                received = bytearray(rest)
                for each in events:
                    if each.startswith(DATA):
                        yield self._decoded(each.removeprefix(DATA), operation.result)

    async def health(self) -> HealthReport:
        """What /readyz says."""
        from aiohttp import ClientError

        try:
            async with self._session.get(self._url / "readyz", allow_redirects=False) as response:
                content = await response.read()
                if response.status not in (200, 503):
                    raise _error_of(self._url, response.status, content)
                return self._decoded(content, HealthReport)
        except (ClientError, ConnectionError, TimeoutError) as error:
            raise self._unreachable(error) from error

    async def import_(
        self,
        archive: IO[bytes],
        name: str | None,
        pin: bool,
        dry_run: bool,
        platforms: Sequence[str] = (),
    ) -> results.BundleImported:
        """The archive is a tar, plain or compressed by gzip or zstd."""
        query = {"name": name or "", "pin": str(pin).lower(), "dry_run": str(dry_run).lower()}
        query["platforms"] = ",".join(platforms)
        return await self._request(
            results.BundleImported, "POST", "import", query, archive, "application/x-tar"
        )

    async def planned(self, selection: Selection) -> results.Exported:
        """What an export would contain."""
        body = _export_body(selection, dry_run=True)
        return await self._request(results.Exported, "POST", "export", {}, body)

    async def export(self, selection: Selection, write: Callable[[bytes], object]) -> str:
        """Pass the bundle to `write`, a tar in pieces; returns the digest of its entrepot.json.

        The digest differs from that of planned(), since the bundle says when it was made.
        """
        async with self._response("POST", "export", {}, _export_body(selection)) as response:
            async for piece, _ in response.content.iter_chunks():
                await asyncio.to_thread(write, piece)
            return response.headers.get(results.DIGEST, "")

    async def _request(
        self,
        kind: type[T],
        method: str,
        name: str,
        query: Mapping[str, str],
        body: bytes | IO[bytes] | None = None,
        media_type: str = "application/json",
    ) -> T:
        async with self._response(method, name, query, body, media_type) as response:
            content = await response.read()
        return self._decoded(content, kind)

    def _decoded(self, content: bytes | bytearray, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(content, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise OperationFailed(
                f"{self._url} sent an answer that is not of entrepot: {error}", "NOT_UNDERSTOOD"
            ) from error

    @asynccontextmanager
    async def _response(
        self,
        method: str,
        name: str,
        query: Mapping[str, str],
        body: bytes | IO[bytes] | None,
        media_type: str = "application/json",
    ) -> AsyncIterator[ClientResponse]:
        """A successful response.  Raises OperationFailed, also for an error while it is read."""
        from aiohttp import ClientError

        headers = self._headers if body is None else {**self._headers, "Content-Type": media_type}
        url = (self._url / "api/v1" / name).with_query(query)
        try:
            # No redirect is followed: another server must not get the token.
            async with self._session.request(
                method, url, headers=headers, data=body, allow_redirects=False
            ) as response:
                for each in of_header(response.headers.get(HEADER, "[]")):
                    if each not in self._warned:
                        self._warned.add(each)
                        self._warn(each)
                if response.status not in (200, 202):
                    raise _error_of(self._url, response.status, await response.read())
                yield response
        except (ClientError, ConnectionError, TimeoutError) as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> OperationFailed:
        failure = explain(error, self._url, "--ca-file")
        return OperationFailed(f"{self._url}: {failure}", "UNREACHABLE")


def _query(parameters: msgspec.Struct) -> dict[str, str]:
    return {name: str(value) for name, value in msgspec.structs.asdict(parameters).items()}


def _export_body(selection: Selection, dry_run: bool = False) -> bytes:
    since = [each.content.decode() for each in selection.since]
    return msgspec.json.encode({**dataclasses.asdict(selection), "since": since, "dry_run": dry_run})


class HealthReport(msgspec.Struct, omit_defaults=True):
    """The answer of /readyz: ready, degraded or draining, and the reasons."""

    status: str
    store: str = ""
    drill: str = ""
    credentials: str = ""


class _ErrorAnswer(msgspec.Struct):
    """The body of an error response."""

    error: str
    code: str


def _error_of(url: URL, status: int, content: bytes) -> OperationFailed:
    try:
        answer = msgspec.json.decode(content, type=_ErrorAnswer)
    except (msgspec.DecodeError, UnicodeDecodeError):
        answer = _ErrorAnswer(
            f"{url} answers {status}: is that the admin address of entrepot?", "NOT_UNDERSTOOD"
        )
    if status == 401:
        answer.error += f"; give that of {url} by --token or ENTREPOT_ADMIN_TOKEN"
    return OperationFailed(answer.error, answer.code, usage=status == 400)
