"""A client of the admin API, which has the methods of Operations and raises OperationFailed."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import IO, TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import msgspec
from yarl import URL

from proxy.admin.operations import OPERATIONS, Operation, Operations
from proxy.connections.failures import explain
from proxy.transfer import results

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession

    from proxy.transfer.bundle_export import Selection

P = ParamSpec("P")
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


def _sent(
    method: Callable[Concatenate[Operations, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[AdminClient, P], Coroutine[Any, Any, T]]:
    """A method of Operations as a method of the client."""
    operation = OPERATIONS[method.__name__]

    async def send(client: AdminClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        found: T = await client.send(operation, operation.parameters(*args, **kwargs))
        return found

    return send


def _streamed(
    method: Callable[Concatenate[Operations, P], AsyncIterator[T]],
) -> Callable[Concatenate[AdminClient, P], AsyncIterator[T]]:
    """A method of Operations that gives one result after the other, as a method of the client."""
    operation = OPERATIONS[method.__name__]

    def follow(client: AdminClient, /, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[T]:
        return client.follow(operation, operation.parameters(*args, **kwargs))

    return follow


class AdminClient:
    """The Operations of a running server, over its admin API.  Every method raises OperationFailed."""

    remote = True

    def __init__(self, session: ClientSession, url: URL, token: str | None) -> None:
        self._session = session
        self._url = url
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}

    repositories = _sent(Operations.repositories)
    images = _sent(Operations.images)
    find = _sent(Operations.find)
    show = _sent(Operations.show)
    history = _sent(Operations.history)
    diff = _sent(Operations.diff)
    stats = _sent(Operations.stats)
    fills = _sent(Operations.fills)
    watch = _streamed(Operations.watch)
    audit = _sent(Operations.audit)
    config = _sent(Operations.config)
    files = _sent(Operations.files)
    upstreams = _sent(Operations.upstreams)
    why = _sent(Operations.why)
    policy = _sent(Operations.policy)
    held = _sent(Operations.held)
    approve = _sent(Operations.approve)
    reject = _sent(Operations.reject)
    overrides = _sent(Operations.overrides)
    override = _sent(Operations.override)
    end_override = _sent(Operations.end_override)
    pulled = _sent(Operations.pulled)
    keys = _sent(Operations.keys)
    create_key = _sent(Operations.create_key)
    revoke_key = _sent(Operations.revoke_key)
    purge = _sent(Operations.purge)
    delete = _sent(Operations.delete)
    tag = _sent(Operations.tag)
    refresh = _sent(Operations.refresh)
    pins = _sent(Operations.pins)
    pin = _sent(Operations.pin)
    unpin = _sent(Operations.unpin)
    evict = _sent(Operations.evict)
    evictable = _sent(Operations.evictable)
    scrub = _sent(Operations.scrub)
    scrubbing = _sent(Operations.scrubbing)
    webhooks = _sent(Operations.webhooks)
    collect = _sent(Operations.collect)
    collected = _sent(Operations.collected)
    warm = _sent(Operations.warm)
    ready = _sent(Operations.ready)
    drill = _sent(Operations.drill)
    begin_drill = _sent(Operations.begin_drill)
    end_drill = _sent(Operations.end_drill)
    reload = _sent(Operations.reload)

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
                if response.status not in (200, 202):
                    raise _error_of(self._url, response.status, await response.read())
                yield response
        except (ClientError, ConnectionError, TimeoutError) as error:
            failure = explain(error, self._url, "--ca-file")
            raise OperationFailed(f"{self._url}: {failure}", "UNREACHABLE") from error


def _query(parameters: msgspec.Struct) -> dict[str, str]:
    return {name: str(value) for name, value in msgspec.structs.asdict(parameters).items()}


def _export_body(selection: Selection, dry_run: bool = False) -> bytes:
    since = [each.content.decode() for each in selection.since]
    return msgspec.json.encode({**dataclasses.asdict(selection), "since": since, "dry_run": dry_run})


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
