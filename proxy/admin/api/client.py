"""How a command gets at a cache: by the admin API of a running server, or in the directory where none runs.

Both are one seam: reach() gives what has the methods of Operations.  Remote sends them over the network, and
reads the answers into the same structures.

Only where nobody listens at the admin address is the directory taken: a server that answers with an error, or
not in time, is there, and knows more than its directory tells.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import IO, TYPE_CHECKING, Any, TypeVar

import msgspec
from yarl import URL

from proxy.admin import models
from proxy.transfer import results

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession


T = TypeVar("T")
CONNECT = 5.0  # seconds for a connection to the server; how long it works on an answer is its own affair
# Where to connect to who listens everywhere.
EVERYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}


class Failed(Exception):
    """What could not be done, as a sentence; `usage` if it was asked wrongly.  `code` is for programs."""

    def __init__(self, message: str, code: str = "UNKNOWN", *, usage: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.status = 2 if usage else 1


class AdminClient:
    """Operations of the server whose admin listener is at `url`.  Raises Failed."""

    def __init__(self, session: ClientSession, url: URL, token: str | None) -> None:
        self._session = session
        self._url = url
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}

    async def ls(
        self, pattern: str = "*", *, tags: bool = False, limit: int | None = None, last: str = ""
    ) -> models.Listed:
        if not tags:
            return await self._get(models.Listed, "repositories", match=pattern)
        return await self._get(models.Listed, "images", match=pattern, limit=limit, last=last or None)

    async def show(self, reference: str) -> models.Tree:
        return await self._get(models.Tree, "image", ref=reference)

    async def stats(self, period: str = "24h") -> models.Stats:
        return await self._get(models.Stats, "stats", period=period)

    async def fills(self) -> list[models.FillRow]:
        return await self._get(list[models.FillRow], "fills")

    async def purge(self, pattern: str, *, dry_run: bool = False, force: bool = False) -> models.Purged:
        return await self._do(models.Purged, "POST", "purge", pattern=pattern, dry_run=dry_run, force=force)

    async def refresh(self, reference: str, platforms: Sequence[str] = ()) -> models.Refreshed:
        return await self._do(
            models.Refreshed, "POST", "refresh", reference=reference, platforms=list(platforms)
        )

    async def pins(self) -> list[models.PinRow]:
        return await self._get(list[models.PinRow], "pins")

    async def pin(
        self, pattern: str, keep_fresh: float | None = None, platforms: Sequence[str] = ()
    ) -> list[models.PinRow]:
        given = {"keep_fresh": keep_fresh, "platforms": list(platforms)}
        return await self._do(list[models.PinRow], "POST", "pins", pattern=pattern, **given)

    async def unpin(self, pattern: str) -> models.Unpinned:
        return await self._do(models.Unpinned, "DELETE", "pins", pattern=pattern)

    async def evict(self, to: int | None = None, *, dry_run: bool = False) -> models.Evicted:
        return await self._do(models.Evicted, "POST", "evict", to=to, dry_run=dry_run)

    async def scrub(self) -> models.Scrubbing:
        return await self._do(models.Scrubbing, "POST", "scrub")

    async def scrubbing(self) -> models.Scrubbing:
        return await self._get(models.Scrubbing, "scrub")

    async def webhooks(self) -> list[models.WebhookRow]:
        return await self._get(list[models.WebhookRow], "webhooks")

    async def warm(
        self, reference: str, platforms: Sequence[str] = (), referrers: bool = True
    ) -> models.WarmRow:
        given = {"platforms": list(platforms), "referrers": referrers}
        return await self._do(models.WarmRow, "POST", "warm", reference=reference, **given)

    async def ready(
        self, references: Sequence[str], platforms: Sequence[str] = (), referrers: bool = True
    ) -> list[models.ReadyRow]:
        given = {"platforms": list(platforms), "referrers": referrers}
        return await self._do(list[models.ReadyRow], "POST", "ready", references=list(references), **given)

    async def begin_drill(self, seconds: float, namespaces: Sequence[str] = ()) -> models.Drilling:
        return await self._do(models.Drilling, "POST", "drill", seconds=seconds, namespaces=list(namespaces))

    async def drill(self) -> models.Drilling:
        return await self._get(models.Drilling, "drill")

    async def end_drill(self) -> models.Drilling:
        return await self._do(models.Drilling, "DELETE", "drill")

    async def import_(
        self, archive: IO[bytes], name: str | None, pin: bool, dry_run: bool
    ) -> results.BundleImported:
        """The archive is a tar, plain or compressed by gzip."""
        query = {"name": name or "", "pin": str(pin).lower(), "dry_run": str(dry_run).lower()}
        return await self._ask(results.BundleImported, "POST", "import", query, archive, "application/x-tar")

    async def planned(self, wanted: Mapping[str, Any]) -> results.Exported:
        """What an export would come to; `wanted` are the fields of its body."""
        return await self._do(results.Exported, "POST", "export", **wanted, dry_run=True)

    async def export(self, wanted: Mapping[str, Any], write: Callable[[bytes], object]) -> str:
        """A tar, piece by piece.  Returns the digest of its entrepot.json; a planned one has another."""
        async with self._answer("POST", "export", {}, msgspec.json.encode(wanted)) as response:
            async for piece, _ in response.content.iter_chunks():
                await asyncio.to_thread(write, piece)
            return response.headers.get(results.DIGEST, "")

    async def collect(self, *, dry_run: bool = False) -> models.Collected:
        return await self._do(models.Collected, "POST", "collect", dry_run=dry_run)

    async def collected(self) -> models.Collected:
        return await self._get(models.Collected, "collect")

    async def why(self, reference: str) -> models.Why:
        return await self._get(models.Why, "why", ref=reference)

    async def _get(self, kind: type[T], name: str, **query: str | int | None) -> T:
        given = {key: str(value) for key, value in query.items() if value is not None}
        return await self._ask(kind, "GET", name, given)

    async def _do(self, kind: type[T], method: str, name: str, **fields: Any) -> T:
        return await self._ask(kind, method, name, {}, msgspec.json.encode(fields))

    async def _ask(
        self,
        kind: type[T],
        method: str,
        name: str,
        query: Mapping[str, str],
        body: bytes | IO[bytes] | None = None,
        media_type: str = "application/json",
    ) -> T:
        async with self._answer(method, name, query, body, media_type) as response:
            content = await response.read()
        try:
            return msgspec.json.decode(content, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Failed(f"{self._url} answers what entrepot does not: {error}", "NOT_UNDERSTOOD") from error

    @asynccontextmanager
    async def _answer(
        self,
        method: str,
        name: str,
        query: Mapping[str, str],
        body: bytes | IO[bytes] | None,
        media_type: str = "application/json",
    ) -> AsyncIterator[ClientResponse]:
        """One that goes well.  What goes wrong while it is read is Failed, too."""
        from aiohttp import ClientError

        headers = self._headers if body is None else {**self._headers, "Content-Type": media_type}
        url = (self._url / "api/v1" / name).with_query(query)
        try:
            # The token is for nobody else: no redirect is followed.
            async with self._session.request(
                method, url, headers=headers, data=body, allow_redirects=False
            ) as response:
                if response.status not in (200, 202):
                    raise _refusal(self._url, response.status, await response.read())
                yield response
        except (ClientError, ConnectionError, TimeoutError) as error:
            raise Failed(f"{self._url}: {error or 'no answer'}", "UNREACHABLE") from error


class _Error(msgspec.Struct):
    error: str
    code: str


def _refusal(url: URL, status: int, content: bytes) -> Failed:
    try:
        told = msgspec.json.decode(content, type=_Error)
    except (msgspec.DecodeError, UnicodeDecodeError):
        told = _Error(f"{url} answers {status}: is that the admin address of entrepot?", "NOT_UNDERSTOOD")
    if status == 401:
        told.error += f"; give it to {url} by --token or ENTREPOT_ADMIN_TOKEN"
    return Failed(told.error, told.code, usage=status == 400)
